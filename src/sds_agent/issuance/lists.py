"""Which revocation lists Envoys may be given: pure decisions, with the time as an argument.

An Envoy that has any list asks for one of every CA that issued a peer's certificate, and refuses the peer where that
list is missing, has ended, or is of a kind that it does not use. So a list alone does more harm than none. All lists
go out together or none does: every CA that is known to issue below a trust anchor in the bundle has to have a list
that Envoys use, and every anchor such a CA.

Envoys have to check the leaf alone (`only_verify_leaf_cert_crl`), as most CAs publish no list of their root. What
makes BoringSSL refuse all certificates below a CA is left out here: lists by another key, by a CA without cRLSign or
another certificate of it than is in use, with critical extensions other than the two it knows, delta, indirect and
partial lists, and lists for a distribution point that the certificates do not name (crypto/x509/x509_vfy.cc, x_crl.cc);
and so is what it does not load.
"""

import base64
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import ExtensionOID, SignatureAlgorithmOID
from msgspec import Struct

from sds_agent.issuance.validity import vouches
from sds_agent.pki.certificates import describe, describe_name, describe_time, extension, unique
from sds_agent.pki.der import elements
from sds_agent.pki.names import same_name
from sds_agent.pki.validation.choice import CaIdentity, ca_identity, seems_issued
from sds_agent.pki.validation.revocation import RevocationList, extension_of, is_signed_by, read_crls
from sds_agent.pki.validation.rules import Chain, other_identifier
from sds_agent.pki.validation.signatures import fault_of_signature, in_other_pss

LARGEST_LISTS = 4 << 20
"""Bytes of all lists that go out, in PEM: some 70,000 revoked certificates. All Envoys load them at each change."""
MOST_LISTS = 100
TAKEN_OUT = timedelta(seconds=30)
"""How long before its nextUpdate a list is no longer given out, or a tenth of its life if that is less."""
WARNED = 1 / 8
"""The part of its life that is left when a list that was not replaced is warned of."""
_CRITICAL = frozenset({ExtensionOID.ISSUING_DISTRIBUTION_POINT, ExtensionOID.AUTHORITY_KEY_IDENTIFIER})
_INTEGER = 0x02
_DIGESTS = frozenset({"sha256", "sha384", "sha512"})


class PublishedList(Struct, frozen=True):
    """A list as a CA publishes it, in PEM. `fault` says why no Envoy could use it, whatever else is known.

    With `points` it counts only for certificates that name one of these distribution points.
    """

    crl: RevocationList
    pem: bytes
    fault: str = ""
    points: frozenset[x509.GeneralName] = frozenset()

    @property
    def name(self) -> str:
        """The list for messages."""
        return f"the revocation list of {describe_name(self.crl.issuer)}"

    @property
    def taken_out_at(self) -> datetime | None:
        """When it is no longer given out; None for a list that does not end."""
        end = self.crl.next_update_utc
        return None if end is None else end - min((end - self.crl.last_update_utc) / 10, TAKEN_OUT)

    @property
    def warned_at(self) -> datetime | None:
        """When it should have been replaced."""
        end = self.crl.next_update_utc
        return None if end is None else end - (end - self.crl.last_update_utc) * WARNED

    def fault_at(self, now: datetime) -> str:
        """Why no Envoy could use it at `now`; empty if they can."""
        if self.fault:
            return self.fault
        if self.crl.last_update_utc > now:
            return f"is valid only from {describe_time(self.crl.last_update_utc)}; set the clock of the CA or this one"
        if self.taken_out_at is not None and now >= self.taken_out_at:
            end = self.crl.next_update_utc or now
            return f"ends on {describe_time(end)} and was not replaced; have the CA publish another one"
        return ""


class KnownCas(Struct, frozen=True):
    """The anchors that are served, a chain in use of each kind (a leaf, then its intermediates), CAs whose leaves may
    still be in use (`former`), and what authorities say of their CAs (`advertised`).
    """

    anchors: Chain
    chains: tuple[Chain, ...] = ()
    former: Chain = ()
    advertised: Chain = ()

    @property
    def all(self) -> Chain:
        """Every CA's certificate."""
        above = (ca for chain in self.chains for ca in chain[1:])
        return unique((*above, *self.advertised, *self.former, *self.anchors))


class Choice(Struct, frozen=True):
    """What Envoys are given: the lists by CA, or none of them where `off` says why, a clause each.

    `left_out` says what is wrong with single lists. `usable` is each CA's best list, which counts as an earlier one in
    the next choice. That may be another one from `check_at` on.
    """

    lists: Mapping[CaIdentity, PublishedList]
    usable: tuple[PublishedList, ...] = ()
    off: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    check_at: datetime | None = None

    @property
    def pem(self) -> bytes:
        """The lists in an order that depends on nothing else."""
        return b"".join(sorted(each.pem for each in self.lists.values()))


def read_lists(answers: Iterable[bytes]) -> tuple[PublishedList, ...]:
    """The lists in PEM texts or single DERs. Takes a second for 100,000 entries. Raises RevocationListError."""
    return tuple(published(crl) for answer in answers for crl in read_crls(_as_pem(answer)))


def published(crl: RevocationList) -> PublishedList:
    """The list with what is wrong with it by itself."""
    scope = extension_of(crl, x509.IssuingDistributionPoint)
    points = frozenset(scope.full_name or ()) if scope is not None else frozenset[x509.GeneralName]()
    return PublishedList(crl, crl.public_bytes(Encoding.PEM), next(_faults(crl), ""), points)


def _as_pem(answer: bytes) -> bytes:
    if b"-----BEGIN" in answer:
        return answer
    body = base64.encodebytes(answer)
    return b"-----BEGIN X509 CRL-----\n" + body + b"-----END X509 CRL-----\n" if body else b""


def _faults(crl: RevocationList) -> Iterator[str]:
    if crl.signature_algorithm_oid != SignatureAlgorithmOID.ED25519 and _digest(crl) not in _DIGESTS:
        yield "is signed with a digest that Envoys may refuse; have the CA sign it with SHA-256"
    try:
        extensions = list(crl.extensions)
        entries = [each for entry in crl for each in entry.extensions]
    except (ValueError, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        yield f"has extensions that cannot be read ({describe_name(error)}); have the CA write it anew"
        return
    if (extensions or entries) and _is_version_1(crl):
        yield "is of version 1 and has extensions, so Envoys do not load it; have the CA write it in version 2"
    if extension_of(crl, x509.DeltaCRLIndicator) is not None:
        yield "is a delta list, which Envoys do not use; publish the complete one"
    for each in extensions:
        if each.critical and each.oid not in _CRITICAL:
            yield f"has the critical extension {each.oid.dotted_string}, for which Envoys refuse every certificate"
    if any(each.critical for each in entries):
        yield "has an entry with a critical extension, for which Envoys refuse every certificate"
    yield from _faults_of_scope(extension_of(crl, x509.IssuingDistributionPoint))


def _is_version_1(crl: RevocationList) -> bool:
    """A later one is written at its beginning (RFC 5280 section 5.1.2.1)."""
    ((_, content),) = elements(crl.tbs_certlist_bytes)
    return content[0] != _INTEGER


def _digest(crl: RevocationList) -> str:
    try:
        digest = crl.signature_hash_algorithm
    except UnsupportedAlgorithm:
        return ""
    return "" if digest is None else digest.name


def _faults_of_scope(scope: x509.IssuingDistributionPoint | None) -> Iterator[str]:
    if scope is None:
        return
    if scope.only_contains_attribute_certs:
        yield "is for attribute certificates alone, so it revokes no other; publish the complete list"
    kinds = {
        "is indirect": scope.indirect_crl,
        "is for CA certificates alone": scope.only_contains_ca_certs,
        "is for some reasons alone": scope.only_some_reasons is not None,
        "names its distribution point relative to its issuer": scope.relative_name is not None,
    }
    for kind, found in kinds.items():
        if found:
            yield f"{kind}, and Envoys then refuse every certificate of its CA; publish the complete list"


def choose(latest: Iterable[PublishedList], earlier: Iterable[PublishedList], known: KnownCas, now: datetime) -> Choice:
    """What to give out of the lists that the CAs publish now (`latest`) and those that they did (`earlier`).

    Of each CA that is the one with the newest thisUpdate that can be used, so that no older one ever follows a newer.
    """
    choosing = _Choosing(known, now)
    for each in latest:
        choosing.take(each, is_latest=True)
    for each in earlier:
        choosing.take(each, is_latest=False)
    return choosing.choice()


class _Choosing:
    """One pass over the lists and the CAs."""

    def __init__(self, known: KnownCas, now: datetime) -> None:
        self._known = known
        self._now = now
        self._all = known.all
        self._anchors = [a for a in known.anchors if a.not_valid_before_utc <= now < a.not_valid_after_utc]
        self._issued = [
            (chain[0], issuer)
            for chain in known.chains
            if any(vouches(anchor, chain, _in_force(chain, now)) for anchor in self._anchors)
            if (issuer := _issuer_of(chain[0], (*chain[1:], *known.anchors))) is not None
        ]
        self._best: dict[CaIdentity, PublishedList] = {}
        self._cas: dict[CaIdentity, list[x509.Certificate]] = {}
        self._seen: list[PublishedList] = []
        self._left_out: list[str] = []
        self._off: list[str] = []
        for ca in self._all:
            self._cas.setdefault(ca_identity(ca), []).append(ca)
        issuing = [*(issuer for _, issuer in self._issued), *filter(self._is_below, known.former)]
        self._issuing = {ca_identity(ca): ca for ca in issuing}

    def take(self, published: PublishedList, *, is_latest: bool) -> None:
        """Judge one list. Those `earlier` come after all of the `latest`, and count where they are newer."""
        signer = next((ca for ca in self._all if is_signed_by(published.crl, ca)), None)
        if signer is None:
            if is_latest:
                self._off.append(self._fault_of_unknown(published))
            return
        identity = ca_identity(signer)
        if is_latest and self._is_below(signer):
            self._issuing.setdefault(identity, signer)  # a CA that publishes a list has issued certificates, or will
        self._seen.append(published)
        if fault := published.fault_at(self._now) or self._fault_beside(published, identity, is_latest=is_latest):
            if is_latest:
                self._left_out.append(f"{published.name} {fault}")
            return
        best = self._best.get(identity)
        if best is None or published.crl.last_update_utc > best.crl.last_update_utc:
            self._best[identity] = published

    def choice(self) -> Choice:
        """What goes out."""
        off = [*self._off, *self._lacks(), *self._namesakes()]
        pem = sum(len(each.pem) for each in self._best.values())
        if pem > LARGEST_LISTS or len(self._best) > MOST_LISTS:
            off.append(
                f"the {len(self._best)} revocation lists have {pem} bytes, and {MOST_LISTS} with {LARGEST_LISTS} go "
                "out; let the CAs drop entries of expired certificates"
            )
        best = tuple(self._best.values())
        return Choice({} if off else self._best, best, tuple(off), tuple(self._left_out), self._check_at())

    def _check_at(self) -> datetime | None:
        moments = (m for each in self._seen for m in (each.crl.last_update_utc, each.warned_at, each.taken_out_at))
        return min((moment for moment in moments if moment is not None and moment > self._now), default=None)

    def _is_below(self, ca: x509.Certificate) -> bool:
        """Whether the CA is an anchor or below one."""
        return any(self._reaches(ca, anchor) for anchor in self._anchors)

    def _reaches(self, ca: x509.Certificate, anchor: x509.Certificate) -> bool:
        return ca_identity(ca) == ca_identity(anchor) or vouches(anchor, (ca, *self._all), self._now)

    def _fault_beside(self, published: PublishedList, identity: CaIdentity, *, is_latest: bool) -> str:
        """What is wrong with the list beside its CA's certificates and those that the CA issued."""
        leaves = [leaf for leaf, issuer in self._issued if ca_identity(issuer) == identity]
        if fault := _fault_of_signer(published.crl, self._in_chains(identity, leaves)):
            return fault
        if not published.points:
            return ""
        if all(_names_point(leaf, published.points) for leaf in leaves) and (leaves or not is_latest):
            return ""  # an earlier one was chosen while there were leaves to tell by
        points = ", ".join(sorted(describe_name(point.value) for point in published.points))
        return (
            f"is for certificates with the distribution point {points} alone, and "
            + ("no certificate of its CA is known" if not leaves else f"{describe(leaves[0])} does not name it")
            + "; have the CA write that CRL distribution point into every certificate"
        )

    def _in_chains(self, identity: CaIdentity, leaves: Sequence[x509.Certificate]) -> Sequence[x509.Certificate]:
        """The certificates of the CA that Envoys may find above its leaves: to one that a peer sends they prefer an
        anchor, as where a root was certified by an older one.
        """
        anchors = [anchor for anchor in self._anchors if ca_identity(anchor) == identity]
        fitting = [[anchor for anchor in anchors if seems_issued(leaf, anchor)] for leaf in leaves] or [anchors]
        if all(fitting):
            return unique(anchor for each in fitting for anchor in each)
        return [ca for ca in self._cas[identity] if self._now < ca.not_valid_after_utc]

    def _fault_of_unknown(self, published: PublishedList) -> str:
        namesakes = [ca for ca in self._all if same_name(ca.subject, published.crl.issuer)]
        if namesakes and published.fault:  # for which it may not have been verified
            return f"{published.name} {published.fault}"
        if namesakes:
            return f"{published.name} is signed by another key than that CA's; have the CA publish it anew"
        return (
            f"{published.name} is by a CA whose certificate is not known here, and which may have issued for others; "
            "no list goes out until that CA has issued for this agent"
        )

    def _lacks(self) -> Iterator[str]:
        for identity, ca in self._issuing.items():
            if identity not in self._best:
                yield (
                    f"there is no usable revocation list of {describe(ca)}, which issues certificates; have that CA "
                    "publish one, and set revocation_lists for its authority"
                )
        for anchor in self._anchors:
            if not any(self._reaches(ca, anchor) for ca in self._issuing.values()):
                yield (
                    f"below the trust anchor {describe(anchor)} no CA with a revocation list is known; set "
                    "revocation_lists for the authority that advertises it, or have it advertised no more"
                )

    def _namesakes(self) -> Iterator[str]:
        """CAs of one name and several keys: the list says by its key identifier whose it is, or Envoys confuse them."""
        names = [name for name, _ in self._best]
        for (name, _), published in self._best.items():
            identifier = extension_of(published.crl, x509.AuthorityKeyIdentifier)
            if names.count(name) > 1 and (identifier is None or identifier.key_identifier is None):
                yield f"{published.name} has no key identifier, and several CAs have that name; have the CA add it"


def _fault_of_signer(crl: RevocationList, cas: Sequence[x509.Certificate]) -> str:
    """Whether Envoys would not find the list's signer in a peer's chain, or not take it for one, or not check the
    signature.
    """
    usages = [extension(ca, x509.KeyUsage) for ca in cas]
    if any(usage is not None and not usage.crl_sign for usage in usages):
        return "is by a CA without cRLSign in its keyUsage; have that CA's certificate issued with it"
    if cas and in_other_pss(crl, crl.tbs_certlist_bytes, cas[0]):
        return (
            "is signed by RSA-PSS in a form that Envoys do not take; have the CA sign it with a salt as long as "
            "the hash, or by PKCS #1"
        )
    if (named := extension_of(crl, x509.AuthorityKeyIdentifier)) is None:
        return ""
    if what := next(filter(None, (other_identifier(named, ca) for ca in cas)), None):
        return (
            f"asks by its AuthorityKeyIdentifier for another certificate of its CA than is in use, by {what}; "
            "have the CA write it anew, with the key identifier alone"
        )
    return ""


def _in_force(chain: Chain, now: datetime) -> datetime:
    """Now, or when the chain begins to be valid: it may be served from then on."""
    return max(now, *(each.not_valid_before_utc for each in chain))


def _issuer_of(leaf: x509.Certificate, cas: Sequence[x509.Certificate]) -> x509.Certificate | None:
    issuers = (ca for ca in cas if same_name(ca.subject, leaf.issuer))
    return next((ca for ca in issuers if fault_of_signature(leaf, ca) is None), None)


def kind_of(chain: Chain) -> object:
    """What of a chain (a leaf, then its intermediates) counts in a choice: chains of one kind change nothing in it."""
    leaf = chain[0]
    points, identifier = extension(leaf, x509.CRLDistributionPoints), extension(leaf, x509.AuthorityKeyIdentifier)
    return chain[1:], leaf.issuer, points, identifier


def issuer_of(chain: Chain, anchors: Chain) -> x509.Certificate | None:
    """The CA that issued the leaf that `chain` begins with; None where it is neither in the chain nor an anchor."""
    return _issuer_of(chain[0], (*chain[1:], *anchors))


def _names_point(leaf: x509.Certificate, points: frozenset[x509.GeneralName]) -> bool:
    distribution = extension(leaf, x509.CRLDistributionPoints)
    return distribution is not None and any(
        not points.isdisjoint(point.full_name or ()) and point.reasons is None and point.crl_issuer is None
        for point in distribution
    )
