"""What RFC 5280 section 6.1 asks of a certificate in a chain: each rule a function that says what is wrong, or None.

A rule returns a clause that names the certificate and the way out, to stand alone or after a colon. An anchor has to
keep every rule but those on its signature and its ExtendedKeyUsage. Section 6.1 leaves that open, and Envoy judges
nothing of an anchor but its validity, its name constraints and whether it may sign. The other rules are for peers that
are no Envoys, and against an anchor that is pinned by mistake and is no CA.

Signatures are judged in `signatures`, policies in `policies`. Revocation is no part of path validation.
"""

from datetime import datetime, timedelta
from typing import TypeAlias

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID
from msgspec import Struct

from sds_agent.pki.certificates import (
    describe,
    describe_name,
    describe_time,
    extended_key_usages,
    extension,
    has_key_in_usual_form,
    is_ca,
    remembered,
    remembered_of_two,
    times_of,
)
from sds_agent.pki.names import is_self_issued, same_name
from sds_agent.pki.strength import IN_CHAINS, USABLE, KeyRule
from sds_agent.pki.validation.signatures import fault_of_pss

Chain: TypeAlias = tuple[x509.Certificate, ...]
"""A leaf, then each CA's certificate after one that it issued."""

_KNOWN_EXTENSIONS = frozenset(
    {
        ExtensionOID.BASIC_CONSTRAINTS,
        ExtensionOID.KEY_USAGE,
        ExtensionOID.EXTENDED_KEY_USAGE,
        ExtensionOID.SUBJECT_ALTERNATIVE_NAME,
        ExtensionOID.NAME_CONSTRAINTS,
        ExtensionOID.CERTIFICATE_POLICIES,
        ExtensionOID.POLICY_MAPPINGS,
        ExtensionOID.POLICY_CONSTRAINTS,
        ExtensionOID.INHIBIT_ANY_POLICY,
    }
)
# Envoy 1.40 refuses the added ones where they are critical, but ignores them in an anchor.
_KNOWN_OF_ANCHORS = _KNOWN_EXTENSIONS | {
    ExtensionOID.SUBJECT_KEY_IDENTIFIER,
    ExtensionOID.AUTHORITY_KEY_IDENTIFIER,
    # where to look for revocation, which is no part of path validation (section 6.3)
    ExtensionOID.CRL_DISTRIBUTION_POINTS,
}
_TLS_USAGES = frozenset({ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH})


class Times(Struct, frozen=True):
    """When the certificates have to be valid: at `now`, but a NotBefore may lie up to `skew` after it."""

    now: datetime
    skew: timedelta


def fault_of_certificate(certificate: x509.Certificate, times: Times, *, is_anchor: bool = False) -> str | None:
    """What is wrong with a certificate wherever it stands."""
    known = _KNOWN_OF_ANCHORS if is_anchor else _KNOWN_EXTENSIONS
    return fault_of_times(certificate, times) or _fault_of_key(certificate) or _fault_of_extensions(certificate, known)


def fault_as_issuer(certificate: x509.Certificate, chain: Chain, times: Times, *, is_anchor: bool) -> str | None:
    """What is wrong with the certificate as the CA above `chain`, whose last certificate it signed."""
    return (
        fault_of_certificate(certificate, times, is_anchor=is_anchor)
        or fault_of_ca(certificate)
        or fault_of_pss(chain[-1], certificate)
        or fault_of_identifiers(certificate, chain[-1])
        or _fault_of_path_length(certificate, chain)
        or (None if is_anchor else _fault_of_usages(certificate, chain[0]))
        or fault_of_names(certificate, chain)
    )


def fault_of_times(certificate: x509.Certificate, times: Times) -> str | None:
    """Section 6.1.3, step a.2.

    Both ends belong to the validity (section 4.1.2.5), in whole seconds. For BoringSSL it ends when its last second
    begins (X509_cmp_time_posix), and so it does here.
    """
    first, last = times_of(certificate)
    if times.now >= last:
        return f"{describe(certificate)} expired on {describe_time(last)}, and it is {describe_time(times.now)}"
    if times.now + times.skew < first:
        return (
            f"{describe(certificate)} is valid only from {describe_time(first)}, and it is {describe_time(times.now)} "
            "by this machine's clock"
        )
    return None


@remembered
def _fault_of_key(certificate: x509.Certificate) -> str | None:
    """Whether Envoy could not use its key, or it is weak."""
    return _fault_by(IN_CHAINS, certificate)


@remembered
def fault_of_use(certificate: x509.Certificate) -> str | None:
    """Whether Envoy could not use its key."""
    return _fault_by(USABLE, certificate)


def _fault_by(rule: KeyRule, certificate: x509.Certificate) -> str | None:
    if fault := rule.fault(certificate.public_key()):
        return f"{describe(certificate)} has {fault.found}; it needs {fault.wanted}"
    if has_key_in_usual_form(certificate):
        return None
    return (
        f"{describe(certificate)} has its key in a form that Envoy does not read, such as that of an RSA-PSS key: it "
        "must be issued anew, with a plain RSA or EC key"
    )


def _fault_of_extensions(certificate: x509.Certificate, known: frozenset[x509.ObjectIdentifier]) -> str | None:
    """A certificate with a critical extension that is not processed must be refused (section 4.2)."""
    for oid in _rare(certificate):
        if oid not in known:
            return (
                f"{describe(certificate)} has the critical extension {oid.dotted_string}, which is not "
                "supported: the CA must leave it out or make it non-critical"
            )
    return None


@remembered
def _rare(certificate: x509.Certificate) -> tuple[x509.ObjectIdentifier, ...]:
    """Its critical extensions beside those that are known wherever they stand, in order."""
    critical = [each.oid for each in certificate.extensions if each.critical]
    return tuple([each for each in critical if each not in _KNOWN_EXTENSIONS])


@remembered
def fault_of_ca(certificate: x509.Certificate) -> str | None:
    """Why the certificate may not issue others, wherever it stands (section 6.1.4, steps k and n).

    A self-signed version 1 certificate, which can have no BasicConstraints, is refused as an anchor too. OpenSSL takes
    it; but then any self-signed server certificate that is pinned by mistake could sign SVIDs, and X509-SVID requires
    the flag (section 4.1).
    """
    return fault_of_ca_flag(certificate) or fault_of_key_usage(certificate)


def fault_of_ca_flag(certificate: x509.Certificate) -> str | None:
    """Whether it lacks what makes a certificate a CA's (section 6.1.4, step k)."""
    if is_ca(certificate):
        return None
    return f"{describe(certificate)} is no CA: its BasicConstraints would have to say CA:TRUE"


def fault_of_key_usage(certificate: x509.Certificate) -> str | None:
    """Whether its KeyUsage keeps its key from signing certificates (section 6.1.4, step n)."""
    usage = extension(certificate, x509.KeyUsage)
    if usage is None or usage.key_cert_sign:
        return None
    return f"{describe(certificate)} may not sign certificates: its KeyUsage lacks keyCertSign"


@remembered_of_two
def fault_of_identifiers(certificate: x509.Certificate, below: x509.Certificate) -> str | None:
    """Whether the certificate below names another certificate of the same CA as its issuer.

    For RFC 5280 the identifiers are hints (section 4.2.1.1). For OpenSSL and BoringSSL, and so for Envoy, they are
    binding: a CA whose identifiers differ is not the issuer, though its key made the signature. That happens where a CA
    was renewed and a certificate below it names the old serial number, as easy-rsa and many openssl configurations do.
    Remembered, for a walk to an anchor asks the same several times.
    """
    named = extension(below, x509.AuthorityKeyIdentifier)
    if named is None:
        return None
    if (what := other_identifier(named, certificate)) is None:
        return None
    return (
        f"the AuthorityKeyIdentifier of {describe(below)} asks for another certificate of {describe(certificate)} than "
        f"is there, by {what}: it must be issued anew, or that certificate put there"
    )


def other_identifier(named: x509.AuthorityKeyIdentifier, certificate: x509.Certificate) -> str | None:
    """By what an AuthorityKeyIdentifier names another certificate than this one of an issuer, or None."""
    own = extension(certificate, x509.SubjectKeyIdentifier)
    number, names = named.authority_cert_serial_number, named.authority_cert_issuer or ()
    issuers = [name.value for name in names if isinstance(name, x509.DirectoryName)]
    if own is not None and named.key_identifier is not None and named.key_identifier != own.digest:
        return f"the key identifier {named.key_identifier.hex()}, and this one has {own.digest.hex()}"
    if number is not None and number != certificate.serial_number:
        return f"the serial number {number:x}, and this one has {certificate.serial_number:x}"
    if issuers and not same_name(issuers[0], certificate.issuer):
        return (
            f"one issued by {describe_name(issuers[0])}, and this one was issued by {describe_name(certificate.issuer)}"
        )
    return None


def _fault_of_path_length(certificate: x509.Certificate, chain: Chain) -> str | None:
    """Section 6.1.4, steps l and m: self-issued intermediates do not count, and the leaf does not."""
    constraints = extension(certificate, x509.BasicConstraints)
    allowed = constraints.path_length if constraints else None
    below = sum(not is_self_issued(ca) for ca in chain[1:])
    if allowed is None or below <= allowed:
        return None
    return f"{describe(certificate)} allows at most {allowed} CAs below it (pathLenConstraint), and there are {below}"


def _fault_of_usages(certificate: x509.Certificate, leaf: x509.Certificate) -> str | None:
    """An intermediate's ExtendedKeyUsage limits what is below it.

    RFC 5280 does not ask for that; OpenSSL, Go and BoringSSL do. As tried on Envoy 1.40, the usages must be named
    (anyExtendedKeyUsage does not count, nor does it for OpenSSL), and those of an anchor are ignored.
    """
    if extension(certificate, x509.ExtendedKeyUsage) is None:
        return None
    # a leaf that names neither may be used for both
    wanted = _TLS_USAGES & extended_key_usages(leaf) or _TLS_USAGES
    if wanted <= extended_key_usages(certificate):
        return None
    return (
        f"the ExtendedKeyUsage of {describe(certificate)} does not list serverAuth and clientAuth, which the "
        "certificates below it are used for: it must list both, or be left out"
    )


def fault_of_names(certificate: x509.Certificate, chain: Chain) -> str | None:
    """Section 6.1.3, steps b and c: constraints bind all that is below, but for self-issued intermediates."""
    constraints = extension(certificate, x509.NameConstraints)
    if constraints is None:
        return None
    from sds_agent.pki.validation.constraints import constrained_names, violation  # noqa: PLC0415 - most have none

    if constraints.public_bytes() not in certificate.tbs_certificate_bytes:
        # cryptography reads past these, and only what it has read is written again
        return (
            f"the name constraints of {describe(certificate)} hold a minimum or a maximum, which RFC 5280 section "
            "4.2.1.10 rules out: the CA must be issued anew"
        )
    bound = (chain[0], *(ca for ca in chain[1:] if not is_self_issued(ca)))
    for below in bound:
        if fault := violation(constraints, constrained_names(below)):
            return f"the name constraints of {describe(certificate)} {fault}"
    return None
