"""From a leaf to a trust anchor: the search for a chain that is valid by RFC 5280 section 6.1 (judged in `rules`), and
that every Envoy builds and finds good (judged in `choice`).

cryptography has a verifier, but it is made for the web: it refuses every URI name constraint, by which a CA is bound to
its trust domain, and by default a CA whose BasicConstraints are not critical, as easy-rsa makes them. Hence this one.

The search goes from the leaf upwards. All that section 6.1 asks of a CA depends on that CA and on what lies below it;
so a CA is judged as soon as the search reaches it, and a branch ends at its first fault.
"""

import heapq
import itertools
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from operator import itemgetter

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from msgspec import Struct

from sds_agent.errors import SdsAgentError
from sds_agent.pki.certificates import describe, describe_name, extension, is_self_signed, unique
from sds_agent.pki.names import CanonicalName, is_self_issued, issuer_of, subject_of
from sds_agent.pki.validation.choice import Bundle, current
from sds_agent.pki.validation.policies import fault_of_policies
from sds_agent.pki.validation.rules import Chain, Times, fault_as_issuer, fault_of_certificate
from sds_agent.pki.validation.signatures import fault_of_signature

MOST_INTERMEDIATES = 8
"""No hierarchy in use is deeper; a longer chain is a mistake or an attack."""
MOST_ATTEMPTS = 128
"""Issuers tried in one search, each for one signature: the bound on the time that hundreds of CAs of one name cost."""


class PathError(SdsAgentError):
    """No valid chain leads from the leaf to a trust anchor; the message gives the most telling reason."""


class _CaCertificate(Struct, frozen=True):
    """A certificate that may have issued others, sent or trusted."""

    certificate: x509.Certificate
    is_anchor: bool
    key_identifier: bytes | None


class _StepUp(Struct, frozen=True, order=True):
    """A step that may be tried: `issuer` above `chain`.

    Steps along which all key identifiers agree are tried first: among hundreds of CAs of one name they find the right
    one. The others follow, since not every CA has a key identifier. `number` orders equals; no two steps share one, so
    the fields after it are never compared.
    """

    mismatches: int
    depth: int
    number: int
    chain: Chain
    issuer: _CaCertificate


class _Fault(Struct, frozen=True):
    """Why one branch of the walk ended.

    `proven` means that the signature was right, so the CA at fault is the one that issued; `depth` counts the
    certificates below it.
    """

    proven: bool
    depth: int
    text: str


def find_path(
    leaf: x509.Certificate,
    candidates: Iterable[x509.Certificate],
    anchors: Iterable[x509.Certificate],
    now: datetime,
    *,
    skew: timedelta = timedelta(0),
    bundle: Iterable[x509.Certificate] | None = None,
    envoys: bool = True,
) -> Chain:
    """A valid chain: the leaf, then each intermediate after what it issued, up to but without an anchor.

    `candidates` are what a CA sent, in any order and with anything else among them. `anchors` are the CAs to trust,
    self-signed or not; each ends the chain. `bundle` is what Envoys trust, where that is more than the anchors. Of
    both, only the `current` certificates count, as only those are served. Without `envoys` the chain need not be one
    that every Envoy builds. All certificates come from `certificates.read_bundle`. `now` is an aware datetime; a
    NotBefore may lie up to `skew` after it, and no NotAfter before it.

    Of several chains the one is returned whose key identifiers agree, then the shortest, then the one that is valid
    longest: the same sets give the same chain, in whatever order they come.

    Whether the leaf is what was asked for (its names, usages, CA flag) is `issuance.acceptance`'s question. Raises
    PathError.
    """
    times = Times(now, skew)
    if fault := fault_of_certificate(leaf, times):
        raise PathError(fault)
    trusted = unique(current(anchors, now))
    if not trusted:
        raise PathError("there is no trust anchor that the certificate could be checked against")
    served = Bundle(trusted if bundle is None else unique(current(bundle, now))) if envoys else None
    return _Search(_CaCertificates(unique(candidates), trusted), served, times).from_leaf(leaf)


def has_path(
    leaf: x509.Certificate,
    candidates: Iterable[x509.Certificate],
    anchors: Iterable[x509.Certificate],
    now: datetime,
    *,
    skew: timedelta = timedelta(0),
    envoys: bool = True,
) -> bool:
    """Whether `find_path` finds one."""
    try:
        find_path(leaf, candidates, anchors, now, skew=skew, envoys=envoys)
    except PathError:
        return False
    return True


class _CaCertificates:
    """Anchors and candidates by name, in an order that does not depend on the order they come in."""

    def __init__(self, candidates: Sequence[x509.Certificate], anchors: Sequence[x509.Certificate]) -> None:
        issuers = [_ca_certificate(c, is_anchor=True) for c in anchors]
        issuers += [_ca_certificate(c, is_anchor=False) for c in candidates]
        self._by_name: dict[CanonicalName, list[_CaCertificate]] = {}
        for issuer in issuers:
            self._by_name.setdefault(subject_of(issuer.certificate), []).append(issuer)
        for namesakes in self._by_name.values():
            if len(namesakes) > 1:
                namesakes.sort(key=_preference)

    def of(self, certificate: x509.Certificate) -> list[tuple[bool, _CaCertificate]]:
        """The CAs with its issuer's name; with each, whether another key identifier is asked for. Such come last."""
        named = extension(certificate, x509.AuthorityKeyIdentifier)
        wanted = named.key_identifier if named else None
        namesakes = [(i.key_identifier != wanted, i) for i in self._by_name.get(issuer_of(certificate), [])]
        return sorted(namesakes, key=itemgetter(0))


def _ca_certificate(certificate: x509.Certificate, *, is_anchor: bool) -> _CaCertificate:
    identifier = extension(certificate, x509.SubjectKeyIdentifier)
    return _CaCertificate(certificate, is_anchor, identifier.digest if identifier else None)


def _preference(issuer: _CaCertificate) -> tuple[bool, float, bytes]:
    """Anchors first, then the longest valid; DER decides between equals, so that the choice is always the same."""
    certificate = issuer.certificate
    return not issuer.is_anchor, -certificate.not_valid_after_utc.timestamp(), certificate.public_bytes(Encoding.DER)


class _Search:
    """One search: the steps that may still be tried, and why those that were tried failed."""

    def __init__(self, issuers: _CaCertificates, bundle: Bundle | None, times: Times) -> None:
        self._issuers = issuers
        self._bundle = bundle
        self._times = times
        self._faults_of_choice: dict[Chain, str | None] = {}
        self._steps: list[_StepUp] = []
        self._numbers = itertools.count()
        self._faults: list[_Fault] = []

    def from_leaf(self, leaf: x509.Certificate) -> Chain:
        self._extend((leaf,), mismatches=0)
        for _ in range(MOST_ATTEMPTS):
            if not self._steps:
                raise PathError(max(self._faults, key=lambda fault: (fault.proven, fault.depth)).text)
            step = heapq.heappop(self._steps)
            if fault := self._fault(step):
                self._faults.append(fault)
            elif step.issuer.is_anchor:
                return step.chain
            else:
                self._extend((*step.chain, step.issuer.certificate), step.mismatches)
        raise PathError(
            f"none of the first {MOST_ATTEMPTS} ways up from {describe(leaf)} led to a trust anchor, and no more are "
            "tried: too many of the certificates have the same name"
        )

    def _fault(self, step: _StepUp) -> _Fault | None:
        chain, issuer = step.chain, step.issuer
        if (fault := _fault(chain, issuer, self._times)) or not issuer.is_anchor:
            return fault
        if self._bundle is None or self._bundle.leaves_no_choice(chain, issuer.certificate):
            text = fault_of_policies((*chain, issuer.certificate))
        else:
            text = self._fault_of_choice(self._bundle, chain)
        return _Fault(proven=True, depth=len(chain), text=text) if text else None

    def _fault_of_choice(self, bundle: Bundle, chain: Chain) -> str | None:
        """The same for every anchor above one chain, and so found once."""
        if chain not in self._faults_of_choice:
            self._faults_of_choice[chain] = bundle.fault_of_choice(chain, self._times)
        return self._faults_of_choice[chain]

    def _extend(self, chain: Chain, mismatches: int) -> None:
        """Add every step up from the chain's last certificate. From a self-signed one there is none."""
        last = chain[-1]
        issuers = [] if is_self_issued(last) and is_self_signed(last) else self._issuers.of(last)
        if not issuers:
            self._faults.append(_dead_end(chain))
        for differs, issuer in issuers[:MOST_ATTEMPTS]:
            step = _StepUp(mismatches + differs, len(chain), next(self._numbers), chain, issuer)
            heapq.heappush(self._steps, step)


def _dead_end(chain: Chain) -> _Fault:
    last = chain[-1]
    if is_self_signed(last):
        text = f"{describe(last)} is self-signed and is not one of the trust anchors"
    else:
        text = (
            f"{describe(last)} was issued by {describe_name(last.issuer)}, which is neither among the certificates "
            "that came with it nor a trust anchor"
        )
    return _Fault(proven=False, depth=len(chain), text=text)


def _fault(chain: Chain, issuer: _CaCertificate, times: Times) -> _Fault | None:
    """What is wrong with one step up."""
    certificate, depth = issuer.certificate, len(chain)
    foreign = _fault_of_loop(certificate, chain) or fault_of_signature(chain[-1], certificate)
    if foreign:
        return _Fault(proven=False, depth=depth, text=foreign)
    unfit = _fault_of_length(issuer, depth) or fault_as_issuer(certificate, chain, times, is_anchor=issuer.is_anchor)
    return _Fault(proven=True, depth=depth, text=unfit) if unfit else None


def _fault_of_loop(certificate: x509.Certificate, chain: Chain) -> str | None:
    """One name and one key make one CA, though its certificates may differ (cross-signed, renewed)."""
    for below in chain:
        if subject_of(certificate) == subject_of(below) and certificate.public_key() == below.public_key():
            return f"{describe(chain[-1])} was issued by {describe(certificate)}, which is already below it"
    return None


def _fault_of_length(issuer: _CaCertificate, depth: int) -> str | None:
    if issuer.is_anchor or depth <= MOST_INTERMEDIATES:
        return None
    return f"the chain has more than {MOST_INTERMEDIATES} intermediates"
