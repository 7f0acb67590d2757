"""Makes test certificates: CAs and leaves in every shape, also the wrong ones, which no CA of ours would issue.

All are valid around NOW. Each property of a certificate is a keyword; what is left out is as it should be.
"""

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey | ed448.Ed448PrivateKey
Digest = hashes.SHA224 | hashes.SHA256 | hashes.SHA384 | hashes.SHA512 | hashes.SHA3_256
Extension = tuple[x509.ExtensionType, bool]
"""An extension's value, and whether it is critical."""

NOW = datetime(2026, 3, 14, 15, 9, 26, tzinfo=UTC)
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
URI = "spiffe://demo.example/ns/default/sa/web"
SERVER_AND_CLIENT = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)
UNKNOWN = x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4.5"), b"\x05\x00")
NO_NAME = x509.Name([])
SHA256 = hashes.SHA256()
_EDDSA = (ed25519.Ed25519PrivateKey, ed448.Ed448PrivateKey)
_serial_numbers = itertools.count(1000)


@dataclass(frozen=True)
class Ca:
    """What issues other certificates, whether it may or not."""

    certificate: x509.Certificate
    key: Key = field(repr=False)


def new_key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


def common_name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def uris(*, permitted: Sequence[str] = (), excluded: Sequence[str] = ()) -> x509.NameConstraints:
    """Name constraints of the URI form."""
    form = x509.UniformResourceIdentifier
    return x509.NameConstraints([form(p) for p in permitted] or None, [form(e) for e in excluded] or None)


def key_usage(*, cert_sign: bool, crl_sign: bool | None = None) -> x509.KeyUsage:
    """The KeyUsage of a CA or of a leaf; `crl_sign` is as `cert_sign` unless given."""
    return x509.KeyUsage(
        digital_signature=not cert_sign,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=cert_sign,
        crl_sign=cert_sign if crl_sign is None else crl_sign,
        encipher_only=False,
        decipher_only=False,
    )


CA_USAGE = key_usage(cert_sign=True)
LEAF_USAGE = key_usage(cert_sign=False)


def make_ca(
    name: str,
    issuer: Ca | None = None,
    *,
    key: Key | None = None,
    subject: x509.Name | None = None,
    is_ca: bool | None = True,
    is_ca_critical: bool = True,
    path_length: int | None = None,
    usage: x509.KeyUsage | None = CA_USAGE,
    usages: Sequence[x509.ObjectIdentifier] = (),
    constraints: x509.NameConstraints | None = None,
    names: Sequence[x509.GeneralName] = (),
    extra: Iterable[Extension] = (),
    not_before: datetime = NOW - DAY,
    not_after: datetime = NOW + DAY,
    digest: Digest = SHA256,
    identified: bool = True,
) -> Ca:
    """A CA under `issuer`, self-signed without one. `is_ca=None` leaves BasicConstraints out."""
    key = key or new_key()
    subject = common_name(name) if subject is None else subject
    extensions: list[Extension] = [*extra]
    if is_ca is not None:
        extensions.append((x509.BasicConstraints(is_ca, path_length), is_ca_critical))
    if usage is not None:
        extensions.append((usage, True))
    if usages:
        extensions.append((x509.ExtendedKeyUsage(usages), False))
    if constraints is not None:
        extensions.append((constraints, True))
    if names:
        extensions.append((x509.SubjectAlternativeName(names), False))
    issuer_name, issuer_key = (issuer.certificate.subject, issuer.key) if issuer else (subject, key)
    if identified:
        extensions += _key_identifiers(key, issuer_key)
    return Ca(_sign(issuer_name, issuer_key, subject, key, not_before, not_after, extensions, digest), key)


def make_leaf(
    issuer: Ca,
    uri: str | None = URI,
    *,
    key: Key | None = None,
    subject: x509.Name = NO_NAME,
    is_ca: bool = False,
    usage: x509.KeyUsage = LEAF_USAGE,
    usages: Sequence[x509.ObjectIdentifier] = SERVER_AND_CLIENT,
    names: Sequence[x509.GeneralName] = (),
    extra: Iterable[Extension] = (),
    not_before: datetime = NOW - HOUR,
    not_after: datetime = NOW + HOUR,
    digest: Digest = SHA256,
) -> x509.Certificate:
    """A workload's certificate, for `uri` and then `names`."""
    key = key or new_key()
    extensions: list[Extension] = [*extra, (x509.BasicConstraints(is_ca, None), True), (usage, True)]
    if usages:
        extensions.append((x509.ExtendedKeyUsage(usages), False))
    if uri is not None or names:
        own = [] if uri is None else [x509.UniformResourceIdentifier(uri)]
        extensions.append((x509.SubjectAlternativeName([*own, *names]), not subject.rdns))
    extensions += _key_identifiers(key, issuer.key)
    return _sign(issuer.certificate.subject, issuer.key, subject, key, not_before, not_after, extensions, digest)


def make_crl(
    issuer: Ca,
    *revoked: x509.Certificate | int,
    key: Key | None = None,
    last_update: datetime = NOW - HOUR,
    next_update: datetime = NOW + DAY,
    extra: Iterable[Extension] = (),
    entry_extra: Iterable[Extension] = (),
    digest: Digest = SHA256,
) -> x509.CertificateRevocationList:
    """A revocation list of `issuer`: certificates, or serial numbers. With `key` another key has signed it. The list
    has the extensions `extra`, and each entry has `entry_extra`.
    """
    builder = x509.CertificateRevocationListBuilder(issuer.certificate.subject, last_update, next_update)
    for each in revoked:
        number = each if isinstance(each, int) else each.serial_number
        entry = x509.RevokedCertificateBuilder(number, last_update)
        for value, critical in entry_extra:
            entry = entry.add_extension(value, critical)
        builder = builder.add_revoked_certificate(entry.build())
    for value, critical in extra:
        builder = builder.add_extension(value, critical)
    signing = key or issuer.key
    return builder.sign(signing, None if isinstance(signing, _EDDSA) else digest)


def _key_identifiers(key: Key, issuer_key: Key) -> list[Extension]:
    return [
        (x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False),
        (x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), False),
    ]


def _sign(
    issuer: x509.Name,
    issuer_key: Key,
    subject: x509.Name,
    key: Key,
    not_before: datetime,
    not_after: datetime,
    extensions: Iterable[Extension],
    digest: Digest,
) -> x509.Certificate:
    builder = x509.CertificateBuilder(issuer, subject, key.public_key(), next(_serial_numbers))
    builder = builder.not_valid_before(not_before).not_valid_after(not_after)
    for value, critical in extensions:
        builder = builder.add_extension(value, critical)
    # EdDSA has its hash built in
    return builder.sign(issuer_key, None if isinstance(issuer_key, _EDDSA) else digest)
