"""Roots in odd encodings, by how they read: those that Envoy does not load, those that only Envoy reads, and good ones.

What Envoy makes of each was tried; `e2e/test_envoy_loads.py` asks it again.
"""

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from fakes import der
from fakes.der import BMP, COMMON_NAME, NULL, TELETEX, UNIVERSAL, UTF8, Entity
from fakes.hierarchy import make_ca

BIT_STRING, UTC_TIME, X500_UNIQUE_IDENTIFIER = 0x03, 0x17, "2.5.4.45"
KEY = der.entity("any").key
PLAIN = Entity(der.common_name("Plain Root"), KEY)
UNKNOWN_ALGORITHM = "1.2.3.4"


def named(value: bytes | str, tag: int = UTF8, kind: str = COMMON_NAME) -> bytes:
    return der.certificate(Entity(der.name(der.attribute(kind, value, tag)), KEY))


def utf16(text: str) -> bytes:
    return named(text.encode("utf-16-be"), BMP)


def signed_by(*parameters: bytes) -> bytes:
    """Signed by an unknown algorithm, with these parameters."""
    return der.certificate(PLAIN, outer=der.sequence(der.oid(UNKNOWN_ALGORITHM), *parameters))


NOT_LOADED = {
    "version 1 with extensions": der.certificate(PLAIN, version=b""),
    "version 1 with a unique identifier": der.certificate(
        PLAIN, version=b"", extensions=(), unique_identifiers=der.implicit(1, b"\x00a")
    ),
    "surrogate pair in BMPString": utf16("\U0001f600"),
    "U+FFFE in BMPString": utf16("a\ufffe"),
    "U+FDD0 in BMPString": utf16("\ufdd0"),
    "byte order mark in BMPString": utf16("\ufeffa"),
    "U+FFFE in UTF8String": named("\ufffe"),
    "U+FDEF in UTF8String": named("\ufdef"),
    "U+1FFFF in UTF8String": named("\U0001ffff"),
    "U+10FFFE in UTF8String": named("\U0010fffe"),
    "U+FFFF in UniversalString": named("\uffff".encode("utf-32-be"), UNIVERSAL),
    "byte order mark in UniversalString": named("\ufeffa".encode("utf-32-be"), UNIVERSAL),
    "U+FFFE in the issuer's name alone": der.certificate(
        PLAIN, Entity(der.common_name("\ufffe"), KEY), extensions=der.ca_extensions(PLAIN, PLAIN)
    ),
    "unused bits that are set": named(b"\x04\xff", BIT_STRING, X500_UNIQUE_IDENTIFIER),
    "nine unused bits": named(b"\x09a", BIT_STRING, X500_UNIQUE_IDENTIFIER),
    "unused bits of nothing": named(b"\x03", BIT_STRING, X500_UNIQUE_IDENTIFIER),
    "empty BIT STRING": named(b"", BIT_STRING, X500_UNIQUE_IDENTIFIER),
    "a time that is none": named("yesterday", UTC_TIME),
    "a name of 1.2 MB": named("x" * 1_200_000),
    "parameters: NULL with content": signed_by(der.tlv(0x05, b"a")),
    "parameters: a cut-off OID": signed_by(der.tlv(0x06, b"\x2a\x83")),
    "parameters: an OID in too many bytes": signed_by(der.tlv(0x06, b"\x2a\x80\x03")),
    "parameters: an INTEGER in too many bytes": signed_by(der.tlv(0x02, b"\x00\x01")),
    "parameters: an ENUMERATED in too many bytes": signed_by(der.tlv(0x0A, b"\xff\xff")),
    "parameters: BOOLEAN 1": signed_by(der.tlv(0x01, b"\x01")),
    "parameters: damaged UTF8String": signed_by(der.tlv(UTF8, b"\xff")),
    "parameters: damaged BMPString": signed_by(der.tlv(BMP, b"a")),
    "parameters: damaged BIT STRING": signed_by(der.tlv(BIT_STRING, b"\x09")),
    "parameters: an INTEGER in pieces": signed_by(der.tlv(0x22, der.integer(1))),
}
"""cryptography reads them; Envoy 1.36.4, 1.40.0 or both refuse a bundle for one of them."""

NOT_READ = {
    "_ in PrintableString": named("Old_Root!", der.PRINTABLE),
    "Latin-1 in T61String": named(b"Caf\xe9 Root", TELETEX),
    "Latin-1 in IA5String": named(b"Caf\xe9", der.IA5),
    "GraphicString": named("Root", 0x19),
    "INTEGER in a name": named(b"\x05", 0x02),
    "a SET in another order": der.certificate(
        Entity(der.sequence(der.set_of(der.attribute(der.ORGANIZATION, "a"), der.attribute(COMMON_NAME, "b"))), KEY)
    ),
    "an attribute twice": der.certificate(
        Entity(der.sequence(der.set_of(der.attribute(COMMON_NAME, "a"), der.attribute(COMMON_NAME, "a"))), KEY)
    ),
    "critical FALSE": der.certificate(
        PLAIN, extensions=(der.basic_constraints(), der.extension("2.5.29.14", der.octets(b"a"), critical=False))
    ),
    "an extension twice": der.certificate(PLAIN, extensions=(der.basic_constraints(), der.basic_constraints())),
    "x400Address": der.certificate(PLAIN, extensions=(der.basic_constraints(), der.alternative_names(der.explicit(3)))),
    "damaged policies": der.certificate(PLAIN, extensions=(der.basic_constraints(), der.extension(der.POLICIES, b"z"))),
    "a key of an unknown kind": der.certificate(
        PLAIN, spki=der.sequence(der.sequence(der.oid("1.2.643.7.1.1.1.1")), der.bits(der.octets(b"\x11" * 64)))
    ),
    "a point off the curve": der.certificate(
        PLAIN,
        spki=der.sequence(
            der.sequence(der.oid("1.2.840.10045.2.1"), der.oid("1.2.840.10045.3.1.7")),
            der.bits(b"\x04" + b"\x01" * 64),
        ),
    ),
    "ECDSA with parameters": der.certificate(PLAIN, outer=der.sequence(der.oid("1.2.840.10045.4.3.2"), NULL)),
    "version 2": der.certificate(PLAIN, version=der.explicit(0, der.integer(1)), extensions=()),
    "version 1 written out": der.certificate(PLAIN, version=der.explicit(0, der.integer(0)), extensions=()),
    "a TLS feature that is not known": der.certificate(
        PLAIN, extensions=(der.basic_constraints(), der.extension("1.3.6.1.5.5.7.1.24", der.sequence(der.integer(99))))
    ),
    "an offset in a time": der.certificate(PLAIN, not_before=der.utc_time("200101000000+0000")),
}
"""Envoy loads them; cryptography does not read them."""

LOADED = {
    "as it should be": der.certificate(PLAIN),
    "version 1": der.certificate(PLAIN, version=b"", extensions=()),
    "version 3 with unique identifiers": der.certificate(
        PLAIN, unique_identifiers=der.implicit(1, b"\x04\xf0") + der.implicit(2, b"\x00b")
    ),
    "BMPString": utf16("Wurzel é \uffef"),
    "UTF8String beyond the BMP": named("\U0001f600 \U0010fffd"),
    "byte order mark in UTF8String": named("\ufeffa"),
    "UniversalString": named("a\U0001f600".encode("utf-32-be"), UNIVERSAL),
    "T61String": named("Root", TELETEX),
    "BIT STRING": named(b"\x04\xf0", BIT_STRING, X500_UNIQUE_IDENTIFIER),
    "empty name": der.certificate(Entity(der.name(), KEY)),
    "a name of 900 kB": named("x" * 900_000),
    "serial 0": der.certificate(PLAIN, serial=der.integer(0)),
    "negative serial": der.certificate(PLAIN, serial=der.integer(-7)),
    "serial of 1000 bytes": der.certificate(PLAIN, serial=der.integer(2**7990)),
    "signed by an unknown algorithm": signed_by(),
    "parameters: NULL": signed_by(NULL),
    "parameters: SEQUENCE of anything": signed_by(der.sequence(b"\xff")),
    "parameters: OID": signed_by(der.oid("1.2.643.2.2.35.1")),
    "parameters: INTEGER": signed_by(der.integer(-300)),
    "parameters: a long tag": signed_by(b"\x5f\x81\x01\x01a"),
}


def good() -> x509.Certificate:
    return make_ca("good root").certificate


def together(root: bytes) -> bytes:
    """A good root and this one, as a bundle holds them."""
    return der.pem(good().public_bytes(Encoding.DER)) + der.pem(root)
