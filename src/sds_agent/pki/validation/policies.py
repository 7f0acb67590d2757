"""Certificate policies: whether a chain fails for them (RFC 5280 sections 6.1.2 to 6.1.5, as RFC 9618 simplifies them).

Envoy accepts every policy and needs none (section 6.1.1, inputs c to f). So a chain can fail only where a certificate
demands by requireExplicitPolicy that some policy holds all the way down, or where one of the extensions breaks its own
rules. Whether they are critical makes no difference. Only the set of policies that hold so far has to be known;
section 6.1.2 has a tree, since its callers may ask where each came from.
"""

from collections.abc import Iterator

from cryptography import x509
from cryptography.x509.oid import CertificatePoliciesOID, ExtensionOID
from msgspec import Struct

from sds_agent.errors import SdsAgentError
from sds_agent.pki.certificates import describe, extension
from sds_agent.pki.der import elements
from sds_agent.pki.names import is_self_issued

ANY = CertificatePoliciesOID.ANY_POLICY
_SEQUENCE, _OID = 0x30, 0x06

_Policies = frozenset[x509.ObjectIdentifier]
"""What holds so far; ANY stands for every policy that no CA has named yet."""
_Mappings = tuple[tuple[x509.ObjectIdentifier, x509.ObjectIdentifier], ...]
"""Pairs of the issuer's policy and the subject's that it becomes."""


class _MalformedError(SdsAgentError):
    """An extension breaks the rules of RFC 5280 section 4.2.1 that its syntax cannot express."""


class _Counters(Struct):
    """How many more certificates there may be until ... (section 6.1.2, steps d to f); 0 is now."""

    explicit: int
    mapping: int
    any_policy: int
    demanded_by: x509.Certificate | None = None

    def step(self) -> None:
        """One certificate that is not self-issued is done with (section 6.1.4, step h)."""
        self.explicit = max(0, self.explicit - 1)
        self.mapping = max(0, self.mapping - 1)
        self.any_policy = max(0, self.any_policy - 1)

    def lower(self, certificate: x509.Certificate) -> None:
        """Apply the certificate's own constraints (section 6.1.4, steps i and j)."""
        constraints = extension(certificate, x509.PolicyConstraints)
        limit = constraints.require_explicit_policy if constraints else None
        if limit is not None and limit < self.explicit:
            self.explicit, self.demanded_by = limit, certificate
        if constraints and constraints.inhibit_policy_mapping is not None:
            self.mapping = min(self.mapping, constraints.inhibit_policy_mapping)
        if inhibit := extension(certificate, x509.InhibitAnyPolicy):
            self.any_policy = min(self.any_policy, inhibit.skip_certs)


def fault_of_policies(path: tuple[x509.Certificate, ...]) -> str | None:
    """Why `path`, from the leaf up to its anchor, fails for its policies. Those of the anchor do not count."""
    never = len(path) + 1
    counters = _Counters(never, never, never)
    expected: _Policies = frozenset({ANY})
    for certificate in path[-2::-1]:
        is_leaf = certificate is path[0]
        skipped = not is_leaf and is_self_issued(certificate)
        try:
            valid = _valid(certificate, expected, any_allowed=skipped or counters.any_policy > 0)
            if counters.explicit == 0 and not valid:
                return _lacking(certificate, counters.demanded_by)
            if not is_leaf:
                expected = _passed_on(valid, _mappings(certificate), allowed=counters.mapping > 0)
        except _MalformedError as error:
            return f"{describe(certificate)} {error} (RFC 5280 section 4.2.1): it must be issued anew"
        if not skipped:
            counters.step()
        counters.lower(certificate)
        if is_leaf and counters.explicit == 0 and not valid:
            return _lacking(certificate, counters.demanded_by)
    return None


def _lacking(certificate: x509.Certificate, demanding: x509.Certificate | None) -> str:
    demand = describe(demanding) if demanding else "a CA above it"
    return (
        f"{demand} demands a certificate policy that holds down to the leaf (requireExplicitPolicy), and with "
        f"{describe(certificate)} none does: issue it with a policy that all CAs above it name, or that CA without the "
        "demand"
    )


def _valid(certificate: x509.Certificate, expected: _Policies, *, any_allowed: bool) -> _Policies:
    """Which policies hold with the certificate (section 6.1.3, steps d and e)."""
    found = extension(certificate, x509.CertificatePolicies)
    if found is None:
        return frozenset()
    listed = [policy.policy_identifier for policy in found]
    if not listed or len(set(listed)) < len(listed):
        raise _MalformedError("lists a certificate policy twice, or none at all")
    named = frozenset(listed) - {ANY}
    kept = expected if ANY in listed and any_allowed else expected & named
    return kept | named if ANY in expected else kept


def _passed_on(valid: _Policies, mappings: _Mappings, *, allowed: bool) -> _Policies:
    """What the policies that hold are called below the CA (section 6.1.4, steps a and b)."""
    mapped = frozenset(issuer for issuer, _ in mappings)
    renamed = frozenset(subject for issuer, subject in mappings if issuer in valid or ANY in valid)
    return valid - mapped | (renamed if allowed else frozenset())


def _mappings(certificate: x509.Certificate) -> _Mappings:
    """PolicyMappings (section 4.2.1.5), which cryptography does not read."""
    try:
        found = certificate.extensions.get_extension_for_oid(ExtensionOID.POLICY_MAPPINGS).value
    except x509.ExtensionNotFound:
        return ()
    try:
        pairs = tuple(_pairs(found.public_bytes()))
    except (IndexError, ValueError) as error:
        raise _MalformedError("has PolicyMappings that are damaged") from error
    if not pairs or ANY in {policy for pair in pairs for policy in pair}:
        raise _MalformedError("maps no certificate policy, or the one that stands for all")
    return pairs


def _pairs(data: bytes) -> Iterator[tuple[x509.ObjectIdentifier, x509.ObjectIdentifier]]:
    (mappings,) = _of(_SEQUENCE, data)
    for mapping in _of(_SEQUENCE, mappings):
        issuer, subject = (x509.ObjectIdentifier(_dotted(content)) for content in _of(_OID, mapping))
        yield issuer, subject


def _of(tag: int, data: bytes) -> Iterator[bytes]:
    for found, content in elements(data):
        if found != tag:
            raise ValueError("a value is of another type")
        yield content


def _dotted(content: bytes) -> str:
    """The text of an OBJECT IDENTIFIER (X.690 section 8.19)."""
    numbers, number = list[int](), 0
    for byte in content:
        number = number << 7 | byte & 0x7F
        if byte < 0x80:
            numbers.append(number)
            number = 0
    if content[-1] >= 0x80:
        raise ValueError("the object identifier is cut off")
    first = min(numbers[0] // 40, 2)
    return ".".join(map(str, [first, numbers[0] - 40 * first, *numbers[1:]]))
