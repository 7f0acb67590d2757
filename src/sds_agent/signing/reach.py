"""For which trust domains a CA can issue, where name constraints bind it (RFC 5280 section 4.2.1.10).

The CA proves it: it signs a throwaway leaf, and the walk that judges every certificate has to lead from that leaf to
an anchor. So the answer cannot differ from what the walk says of a real leaf. The constraints say which hosts have to
be tried: between them they divide all hosts into a few kinds, and the walk treats hosts of one kind alike, for a
constraint speaks of one host or of all below one.

The signature is the small part of the price. For one trust domain, as at each start and each change of the files, it
takes 0.2 ms of processor time of 2 with a P-256 key, and 2.5 of 4 with RSA-4096. Only `ca check` asks for every scope:
2 to 4 ms without constraints, 40 with ten, and about a second with the MOST_TRIED that are tried at most.
"""

import itertools
from collections.abc import Iterable
from datetime import datetime, timedelta

from cryptography import x509
from msgspec import Struct

from sds_agent.errors import SdsAgentError
from sds_agent.pki.certificates import describe_name, extension
from sds_agent.pki.keys import KeyType, generate
from sds_agent.pki.validation.path import PathError, find_path
from sds_agent.pki.validation.rules import Chain
from sds_agent.signing.signer import Signer, SignerError

MOST_TRIED = 256
"""Hosts and domains tried at most, each with a signature: a certificate may hold a hundred thousand constraints."""
ANYWHERE = ""
"""The scope of all hosts that no constraint speaks of. The others are as in constraints: `demo.example`, `.example`."""

_LIFE = timedelta(seconds=10)
_PROBE = "sds-agent-probe"
"""A label that no constraint has: alone it lies below no domain, and before a domain it stands for all below that."""


class ReachError(SdsAgentError):
    """Nothing that the CA signs would be trusted; the message gives the reason."""


class Reach(Struct, frozen=True):
    """The scopes of the trust domains for which a CA can issue, and those within them for which it cannot."""

    within: tuple[str, ...]
    without: tuple[str, ...]
    complete: bool
    """Whether every constraint was tried."""

    def __str__(self) -> str:
        # what is excluded is so by a constraint, and under any the trust domain has to be a DNS name (`constraints`)
        anywhere = "any that is a DNS name" if self.without else "any"
        text = ", ".join(_in_words(scope) or anywhere for scope in self.within)
        if self.without:
            text += f"; but not {', '.join(map(_in_words, self.without))}"
        return text if self.complete else f"{text}; only the first {MOST_TRIED} name constraints were tried"


class Prover(Struct, frozen=True):
    """A CA with the certificates that came with it (its own among them), in any order, and whom to trust."""

    signer: Signer
    candidates: Chain
    anchors: Chain
    now: datetime

    def chain(self, trust_domain: str | None = None) -> Chain:
        """What lies between a leaf and an anchor: for that trust domain, or for the first that can be found.

        Raises ReachError with what speaks against the first.
        """
        faults = []
        for host in map(_example, self._scopes()) if trust_domain is None else [trust_domain]:
            try:
                return self._above(host)
            except ReachError as error:
                faults.append(error)
        raise faults[0]

    def reach(self) -> Reach:
        """Everything that it can issue for."""
        scopes = self._scopes()
        good: dict[str | None, bool] = {scope: self._reaches(scope) for scope in scopes}
        around = {scope: _around(scope, scopes) for scope in scopes}
        return Reach(
            within=tuple(each for each in scopes if good[each] and not good.get(around[each])),
            without=tuple(each for each in scopes if not good[each] and good.get(around[each])),
            complete=len(scopes) <= MOST_TRIED,
        )

    def _scopes(self) -> tuple[str, ...]:
        """What the constraints permit, the signer's first, then everything else, then what they exclude."""
        found = [extension(c, x509.NameConstraints) for c in (self.signer.certificate, *self.candidates, *self.anchors)]
        permitted = _hosts(c.permitted_subtrees for c in found if c)
        excluded = _hosts(c.excluded_subtrees for c in found if c)
        scopes = dict.fromkeys([*permitted, ANYWHERE, *excluded])
        return tuple(itertools.islice(scopes, MOST_TRIED + 1))

    def _reaches(self, scope: str) -> bool:
        try:
            self._above(_example(scope))
        except ReachError:
            return False
        return True

    def _above(self, host: str) -> Chain:
        probe = generate(KeyType.EC_P256).public_key()
        try:
            leaf = self.signer.sign_leaf(probe, f"spiffe://{host}/probe", self.now, _LIFE)
            return find_path(leaf, self.candidates, self.anchors, self.now)[1:]
        except (PathError, SignerError) as error:
            raise ReachError(str(error)) from error


def _hosts(subtrees: Iterable[Iterable[x509.GeneralName] | None]) -> Iterable[str]:
    for name in itertools.chain.from_iterable(each or () for each in subtrees):
        if isinstance(name, x509.UniformResourceIdentifier):
            yield name.value.lower()


def _example(scope: str) -> str:
    """A host that stands for all of a scope."""
    return scope if scope and not scope.startswith(".") else f"{_PROBE}{scope}"


def _around(scope: str, scopes: Iterable[str]) -> str | None:
    """The narrowest of the scopes that the scope lies within."""
    wider = [each for each in scopes if each.startswith(".") and scope.endswith(each) and scope != each]
    return max(wider, key=len, default=None if scope == ANYWHERE else ANYWHERE)


def _in_words(scope: str) -> str:
    if scope.startswith("."):
        return f"any below {describe_name(scope[1:])}"
    return describe_name(scope) if scope else ""
