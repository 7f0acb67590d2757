"""Writes DER (ITU-T X.690) by hand: certificates and revocation lists that libraries refuse to make, but that exist.

Every function gives encoded bytes, and every part of a certificate can be given as such. What is left out is as it
should be (RFC 5280); nothing is checked, sorted or corrected. No clock is read: all is valid from BEGIN to END.
"""

import base64
import hashlib
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

Key = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey
Hash = hashes.MD5 | hashes.SHA1 | hashes.SHA224 | hashes.SHA256 | hashes.SHA384 | hashes.SHA512 | hashes.SHA3_256

# Tags of strings (X.680 section 8.6)
UTF8, NUMERIC, PRINTABLE, TELETEX, IA5, VISIBLE, UNIVERSAL, BMP = 0x0C, 0x12, 0x13, 0x14, 0x16, 0x1A, 0x1C, 0x1E
NULL = b"\x05\x00"
SHA256 = hashes.SHA256()

# Attributes of names
COMMON_NAME, COUNTRY, ORGANIZATION, EMAIL_ADDRESS = "2.5.4.3", "2.5.4.6", "2.5.4.10", "1.2.840.113549.1.9.1"
# Extensions (RFC 5280 sections 4.2.1 and 5.2)
SUBJECT_KEY_IDENTIFIER = "2.5.29.14"
KEY_USAGE = "2.5.29.15"
ALTERNATIVE_NAMES = "2.5.29.17"
BASIC_CONSTRAINTS = "2.5.29.19"
CRL_NUMBER = "2.5.29.20"
REASON_CODE = "2.5.29.21"
DELTA_CRL = "2.5.29.27"
ISSUING_DISTRIBUTION_POINT = "2.5.29.28"
CERTIFICATE_ISSUER = "2.5.29.29"
NAME_CONSTRAINTS = "2.5.29.30"
POLICIES = "2.5.29.32"
POLICY_MAPPINGS = "2.5.29.33"
AUTHORITY_KEY_IDENTIFIER = "2.5.29.35"
POLICY_CONSTRAINTS = "2.5.29.36"
EXTENDED_KEY_USAGE = "2.5.29.37"
INHIBIT_ANY_POLICY = "2.5.29.54"
# Values in them
ANY_POLICY = "2.5.29.32.0"
ANY_USAGE = "2.5.29.37.0"
SERVER_AUTH, CLIENT_AUTH = "1.3.6.1.5.5.7.3.1", "1.3.6.1.5.5.7.3.2"

# Bits of KeyUsage, as they stand in its first byte
DIGITAL_SIGNATURE, KEY_ENCIPHERMENT, KEY_CERT_SIGN, CRL_SIGN = 0x80, 0x20, 0x04, 0x02

_serial_numbers = itertools.count(1000)


def tlv(tag: int, *parts: bytes) -> bytes:
    """Tag, length and content; the tag is one byte."""
    content = b"".join(parts)
    return bytes([tag]) + _length(len(content)) + content


def _length(length: int) -> bytes:
    if length < 0x80:
        return bytes([length])
    encoded = length.to_bytes((length.bit_length() + 7) // 8)
    return bytes([0x80 | len(encoded)]) + encoded


def sequence(*parts: bytes) -> bytes:
    return tlv(0x30, *parts)


def set_of(*parts: bytes) -> bytes:
    """A SET in the order given, which DER would sort."""
    return tlv(0x31, *parts)


def explicit(number: int, *parts: bytes) -> bytes:
    """`[number]` around whole values, and `[number] IMPLICIT` of a constructed one."""
    return tlv(0xA0 | number, *parts)


def implicit(number: int, content: bytes) -> bytes:
    """`[number] IMPLICIT` of a primitive value."""
    return tlv(0x80 | number, content)


def boolean(*, value: bool) -> bytes:
    return tlv(0x01, b"\xff" if value else b"\x00")


def integer(number: int) -> bytes:
    return tlv(0x02, number.to_bytes(number.bit_length() // 8 + 1, signed=True))


def enumerated(number: int) -> bytes:
    return tlv(0x0A, bytes([number]))


def bits(content: bytes, unused: int = 0) -> bytes:
    return tlv(0x03, bytes([unused]), content)


def octets(content: bytes) -> bytes:
    return tlv(0x04, content)


def oid(dotted: str) -> bytes:
    first, second, *rest = map(int, dotted.split("."))
    return tlv(0x06, *map(_base128, [40 * first + second, *rest]))


def _base128(number: int) -> bytes:
    groups = [number & 0x7F]
    while number := number >> 7:
        groups.append(0x80 | number & 0x7F)
    return bytes(reversed(groups))


def utc_time(text: str) -> bytes:
    """`YYMMDDHHMMSSZ`, or anything else."""
    return tlv(0x17, text.encode())


def generalized_time(text: str) -> bytes:
    """`YYYYMMDDHHMMSSZ`, or anything else."""
    return tlv(0x18, text.encode())


def time(moment: datetime) -> bytes:
    """A time in the form that RFC 5280 section 4.1.2.5 wants of it."""
    text = f"{moment.astimezone(UTC):%Y%m%d%H%M%SZ}"
    return utc_time(text[2:]) if 1950 <= moment.year < 2050 else generalized_time(text)


BEGIN, END = utc_time("200101000000Z"), utc_time("491231235959Z")
"""The validity of what is made, unless another is given."""


def attribute(kind: str, value: str | bytes, tag: int = UTF8) -> bytes:
    """AttributeTypeAndValue; a `str` is encoded as UTF-8, whatever the tag."""
    return sequence(oid(kind), tlv(tag, value.encode() if isinstance(value, str) else value))


def name(*attributes: bytes) -> bytes:
    """A Name in which each attribute stands alone; for others put `set_of` into a `sequence`."""
    return sequence(*map(set_of, attributes))


def common_name(value: str | bytes, tag: int = UTF8) -> bytes:
    """A Name that is a CN alone."""
    return name(attribute(COMMON_NAME, value, tag))


def uri(text: str | bytes) -> bytes:
    return implicit(6, text.encode() if isinstance(text, str) else text)


def dns(text: str) -> bytes:
    return implicit(2, text.encode())


def email(text: str) -> bytes:
    return implicit(1, text.encode())


def ip(content: bytes) -> bytes:
    return implicit(7, content)


def directory(encoded_name: bytes) -> bytes:
    """A GeneralName that is a Name."""
    return explicit(4, encoded_name)


def extension(kind: str, value: bytes, critical: bool | None = None) -> bytes:
    """With None `critical` is left out, as DER wants it of the default; False writes it out."""
    return sequence(oid(kind), b"" if critical is None else boolean(value=critical), octets(value))


def basic_constraints(path_length: int | None = None, *, ca: bool = True, critical: bool | None = True) -> bytes:
    limit = b"" if path_length is None else integer(path_length)
    return extension(BASIC_CONSTRAINTS, sequence(boolean(value=True) if ca else b"", limit), critical)


def key_usage(usages: int, *, critical: bool | None = True) -> bytes:
    """`usages` are the bits of the first byte, joined by `|`."""
    unused = (usages & -usages).bit_length() - 1 if usages else 0
    return extension(KEY_USAGE, bits(bytes([usages]) if usages else b"", unused), critical)


def extended_key_usage(*usages: str, critical: bool | None = None) -> bytes:
    return extension(EXTENDED_KEY_USAGE, sequence(*map(oid, usages)), critical)


def alternative_names(*names: bytes, critical: bool | None = None) -> bytes:
    return extension(ALTERNATIVE_NAMES, sequence(*names), critical)


def name_constraints(
    permitted: Sequence[bytes] = (), excluded: Sequence[bytes] = (), *, critical: bool | None = True
) -> bytes:
    """GeneralNames on either side, each as a subtree without minimum and maximum."""
    sides = enumerate((permitted, excluded))
    value = sequence(*(explicit(number, *map(sequence, side)) for number, side in sides if side))
    return extension(NAME_CONSTRAINTS, value, critical)


def policies(*kinds: str, critical: bool | None = None) -> bytes:
    return extension(POLICIES, sequence(*(sequence(oid(kind)) for kind in kinds)), critical)


def policy_constraints(
    require: int | None = None, inhibit: int | None = None, *, critical: bool | None = True
) -> bytes:
    """`require` is requireExplicitPolicy, `inhibit` inhibitPolicyMapping."""
    sides = enumerate((require, inhibit))
    value = sequence(*(tlv(0x80 | number, integer(side)[2:]) for number, side in sides if side is not None))
    return extension(POLICY_CONSTRAINTS, value, critical)


def policy_mappings(*pairs: tuple[str, str], critical: bool | None = True) -> bytes:
    """Each pair is the issuer's policy, then the subject's."""
    return extension(POLICY_MAPPINGS, sequence(*(sequence(*map(oid, pair)) for pair in pairs)), critical)


def inhibit_any_policy(after: int, *, critical: bool | None = True) -> bytes:
    return extension(INHIBIT_ANY_POLICY, integer(after), critical)


def subject_key_identifier(identifier: bytes, *, critical: bool | None = None) -> bytes:
    return extension(SUBJECT_KEY_IDENTIFIER, octets(identifier), critical)


def authority_key_identifier(
    identifier: bytes | None = None,
    issuers: Sequence[bytes] = (),
    serial: int | None = None,
    *,
    critical: bool | None = None,
) -> bytes:
    """The issuer's key identifier, the names of the issuer's issuer (GeneralNames), and the issuer's serial number."""
    parts = [b"" if identifier is None else implicit(0, identifier)]
    parts += [explicit(1, *issuers)] if issuers else []
    parts += [] if serial is None else [implicit(2, integer(serial)[2:])]
    return extension(AUTHORITY_KEY_IDENTIFIER, sequence(*parts), critical)


def public_key(key: Key) -> bytes:
    """SubjectPublicKeyInfo."""
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def key_identifier(key: Key) -> bytes:
    """A hash of the key. RFC 5280 section 4.2.1.2 leaves it open what is hashed."""
    return hashlib.sha1(public_key(key), usedforsecurity=False).digest()


ECDSA_SHA256 = sequence(oid("1.2.840.10045.4.3.2"))
RSA_SHA256 = sequence(oid("1.2.840.113549.1.1.11"), NULL)
ED25519 = sequence(oid("1.3.101.112"))


def algorithm(key: Key) -> bytes:
    """The AlgorithmIdentifier of a signature by the key, with SHA-256 where a hash is chosen."""
    match key:
        case ec.EllipticCurvePrivateKey():
            return ECDSA_SHA256
        case rsa.RSAPrivateKey():
            return RSA_SHA256
        case ed25519.Ed25519PrivateKey():
            return ED25519


def sign(key: Key, content: bytes, digest: Hash = SHA256) -> bytes:
    """The signature's bytes; RSA as PKCS #1 v1.5."""
    match key:
        case ec.EllipticCurvePrivateKey():
            return key.sign(content, ec.ECDSA(digest))
        case rsa.RSAPrivateKey():
            return key.sign(content, padding.PKCS1v15(), digest)
        case ed25519.Ed25519PrivateKey():
            return key.sign(content)


def signed(
    key: Key, content: bytes, outer: bytes | None = None, *, digest: Hash = SHA256, signature: bytes | None = None
) -> bytes:
    """SIGNED{content}: what a certificate and a revocation list are."""
    return sequence(content, outer or algorithm(key), signature or bits(sign(key, content, digest)))


@dataclass(frozen=True)
class Entity:
    """A name (encoded) and a key: what a certificate is about, and what signs one."""

    name: bytes
    key: Key = field(repr=False)

    @property
    def identifier(self) -> bytes:
        return key_identifier(self.key)


def entity(text: str, key: Key | None = None) -> Entity:
    """An entity with that CN, and a P-256 key unless another is given."""
    return Entity(common_name(text), key or ec.generate_private_key(ec.SECP256R1()))


def ca_extensions(own: Entity, issuer: Entity, *more: bytes, path_length: int | None = None) -> tuple[bytes, ...]:
    """What a CA's certificate has, and `more`."""
    return (
        basic_constraints(path_length),
        key_usage(KEY_CERT_SIGN | CRL_SIGN),
        subject_key_identifier(own.identifier),
        authority_key_identifier(issuer.identifier),
        *more,
    )


def leaf_extensions(own: Entity, issuer: Entity, spiffe_id: str, *more: bytes) -> tuple[bytes, ...]:
    """What a workload's certificate has, and `more`."""
    return (
        basic_constraints(ca=False),
        key_usage(DIGITAL_SIGNATURE),
        extended_key_usage(SERVER_AUTH, CLIENT_AUTH),
        alternative_names(uri(spiffe_id)),
        subject_key_identifier(own.identifier),
        authority_key_identifier(issuer.identifier),
        *more,
    )


def certificate(
    subject: Entity,
    issuer: Entity | None = None,
    *,
    extensions: Iterable[bytes] | None = None,
    version: bytes | None = None,
    serial: bytes | None = None,
    inner: bytes | None = None,
    outer: bytes | None = None,
    issuer_name: bytes | None = None,
    not_before: bytes = BEGIN,
    not_after: bytes = END,
    spki: bytes | None = None,
    unique_identifiers: bytes = b"",
    digest: Hash = SHA256,
    signature: bytes | None = None,
) -> bytes:
    """A Certificate (RFC 5280 section 4.1): a CA's, and self-signed without `issuer`, unless `extensions` are given.

    `version` is the whole field, `inner` and `outer` are the two AlgorithmIdentifiers, `issuer_name` stands in place of
    the issuer's own name, `signature` is a BIT STRING. `version=b""` makes version 1, as empty `extensions` do not.
    """
    issuer = issuer or subject
    extensions = ca_extensions(subject, issuer) if extensions is None else tuple(extensions)
    tbs = sequence(
        explicit(0, integer(2)) if version is None else version,
        integer(next(_serial_numbers)) if serial is None else serial,
        inner or outer or algorithm(issuer.key),
        issuer.name if issuer_name is None else issuer_name,
        sequence(not_before, not_after),
        subject.name,
        public_key(subject.key) if spki is None else spki,
        unique_identifiers,
        explicit(3, sequence(*extensions)) if extensions else b"",
    )
    return signed(issuer.key, tbs, outer, digest=digest, signature=signature)


def revoked(serial: int, *extensions: bytes, when: bytes = BEGIN) -> bytes:
    """One entry of a revocation list."""
    return sequence(integer(serial), when, sequence(*extensions) if extensions else b"")


def revocation_list(
    issuer: Entity,
    entries: Sequence[bytes] = (),
    extensions: Sequence[bytes] = (),
    *,
    version: bytes | None = None,
    inner: bytes | None = None,
    outer: bytes | None = None,
    this_update: bytes = BEGIN,
    next_update: bytes = END,
) -> bytes:
    """A CertificateList (RFC 5280 section 5.1). `version=b""` makes version 1; `next_update=b""` leaves it out."""
    tbs = sequence(
        integer(1) if version is None else version,
        inner or outer or algorithm(issuer.key),
        issuer.name,
        this_update,
        next_update,
        sequence(*entries) if entries else b"",
        explicit(0, sequence(*extensions)) if extensions else b"",
    )
    return signed(issuer.key, tbs, outer)


def pem(der: bytes, label: str = "CERTIFICATE") -> bytes:
    """The DER as one PEM block (RFC 7468)."""
    text = base64.encodebytes(der).decode().replace("\n", "")
    lines = [text[n : n + 64] for n in range(0, len(text), 64)]
    return "\n".join([f"-----BEGIN {label}-----", *lines, f"-----END {label}-----", ""]).encode()


def loaded(der: bytes) -> x509.Certificate:
    """As cryptography reads it; what it cannot read stays bytes."""
    return x509.load_der_x509_certificate(der)


def key_pem(key: Key) -> bytes:
    """The private key in PKCS #8."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
