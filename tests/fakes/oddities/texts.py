"""Names: their strings, their shape, and two spellings of one name."""

from collections.abc import Iterator

from fakes import der
from fakes.der import Entity, common_name
from fakes.judge import Case
from fakes.oddities.places import CA, ROOT, case, named, parts

STRINGS: dict[str, tuple[int, bytes]] = {
    "UTF8String, é": (der.UTF8, "Café".encode()),
    "UTF8String, U+FFFE": (der.UTF8, "a\ufffe".encode()),
    "UTF8String, U+FFFF": (der.UTF8, "a\uffff".encode()),
    "UTF8String, U+FDD0": (der.UTF8, "a\ufdd0".encode()),
    "UTF8String, U+1FFFE": (der.UTF8, "a\U0001fffe".encode()),
    "UTF8String, emoji": (der.UTF8, "a\U0001f600".encode()),
    "UTF8String, surrogate": (der.UTF8, b"\xed\xa0\x80"),
    "UTF8String, overlong": (der.UTF8, b"\xc0\xaf"),
    "UTF8String, Latin-1": (der.UTF8, b"Caf\xe9"),
    "UTF8String, NUL": (der.UTF8, b"a\0b"),
    "UTF8String, empty": (der.UTF8, b""),
    "UTF8String, newline": (der.UTF8, b"a\nb"),
    "UTF8String, 70 characters": (der.UTF8, b"a" * 70),
    "PrintableString": (der.PRINTABLE, b"Demo"),
    "PrintableString, _": (der.PRINTABLE, b"Demo_1"),
    "PrintableString, @": (der.PRINTABLE, b"me@demo"),
    "PrintableString, *": (der.PRINTABLE, b"*.demo"),
    "PrintableString, Latin-1": (der.PRINTABLE, b"Caf\xe9"),
    "PrintableString, NUL": (der.PRINTABLE, b"a\0b"),
    "T61String": (der.TELETEX, b"Demo"),
    "T61String, Latin-1": (der.TELETEX, b"Caf\xe9"),
    "T61String, UTF-8": (der.TELETEX, "Café".encode()),
    "IA5String": (der.IA5, b"Demo"),
    "IA5String, Latin-1": (der.IA5, b"Caf\xe9"),
    "VisibleString": (der.VISIBLE, b"Demo"),
    "VisibleString, Latin-1": (der.VISIBLE, b"Caf\xe9"),
    "NumericString": (der.NUMERIC, b"12 34"),
    "NumericString, letters": (der.NUMERIC, b"Demo"),
    "BMPString": (der.BMP, "Café".encode("utf-16-be")),
    "BMPString, surrogate pair": (der.BMP, "a\U0001f600".encode("utf-16-be")),
    "BMPString, lone surrogate": (der.BMP, b"\xd8\x00"),
    "BMPString, odd length": (der.BMP, b"\0a\0"),
    "BMPString, U+FFFE": (der.BMP, b"\xff\xfe"),
    "UniversalString": (der.UNIVERSAL, "Café".encode("utf-32-be")),
    "UniversalString, surrogate": (der.UNIVERSAL, b"\0\0\xd8\x00"),
    "UniversalString, beyond Unicode": (der.UNIVERSAL, b"\0\x11\0\0"),
    "UniversalString, odd length": (der.UNIVERSAL, b"\0\0\0a\0"),
    "GeneralString": (0x1B, b"Demo"),
    "GraphicString": (0x19, b"Demo"),
    "VideotexString": (0x15, b"Demo"),
    "OCTET STRING": (0x04, b"Demo"),
    "BIT STRING": (0x03, b"\0Demo"),
    "INTEGER": (0x02, b"\x05"),
    "BOOLEAN": (0x01, b"\xff"),
    "NULL": (0x05, b""),
    "SEQUENCE": (0x30, b""),
    "UTCTime": (0x17, b"200101000000Z"),
    "a constructed UTF8String": (0x2C, der.tlv(der.UTF8, b"Demo")),
    "a context tag": (0x80, b"Demo"),
}
_A, _B = der.attribute(der.ORGANIZATION, "a"), der.attribute(der.COMMON_NAME, "b")
_ADDRESS = "a@demo.example"
NAMES: dict[str, bytes] = {
    "empty": der.sequence(),
    "an empty SET": der.sequence(der.set_of()),
    "a SET in order": der.sequence(der.set_of(_B, _A)),
    "a SET in another order": der.sequence(der.set_of(_A, _B)),
    "a SET with one twice": der.sequence(der.set_of(_A, _A)),
    "the same attribute twice": der.name(_A, _A),
    "an empty CN, then another": der.name(der.attribute(der.COMMON_NAME, ""), _B),
    "a CN, then an empty one": der.name(_B, der.attribute(der.COMMON_NAME, "")),
    "C of three letters": der.name(der.attribute(der.COUNTRY, "DEU", der.PRINTABLE)),
    "C as UTF8String": der.name(der.attribute(der.COUNTRY, "DE")),
    "C empty": der.name(der.attribute(der.COUNTRY, "", der.PRINTABLE)),
    "C in lower case": der.name(der.attribute(der.COUNTRY, "de", der.PRINTABLE)),
    "an e-mail address": der.name(der.attribute(der.EMAIL_ADDRESS, _ADDRESS, der.IA5), _B),
    "an e-mail address as UTF8String": der.name(der.attribute(der.EMAIL_ADDRESS, _ADDRESS), _B),
    "an unknown attribute": der.name(der.attribute("1.2.3.4", "x")),
    "a uniqueIdentifier": der.name(der.attribute("2.5.4.45", b"\0x", 0x03), _B),
    "a domain component": der.name(der.attribute("0.9.2342.19200300.100.1.25", "demo", der.IA5), _B),
    "400 attributes": der.name(*[_A] * 400),
}
# How the issuer spells its name, and how what is below it does.
SPELLINGS: dict[str, tuple[bytes, bytes]] = {
    "PrintableString, UTF8String": (common_name("Demo", der.PRINTABLE), common_name("Demo")),
    "T61String, UTF8String": (common_name("Demo", der.TELETEX), common_name("Demo")),
    "Latin-1 in T61String, UTF8String": (common_name(b"Caf\xe9", der.TELETEX), common_name("Café")),
    "UTF-8 in T61String, UTF8String": (common_name("Café", der.TELETEX), common_name("Café")),
    "BMPString, UTF8String": (common_name("Café".encode("utf-16-be"), der.BMP), common_name("Café")),
    "UniversalString, UTF8String": (common_name("Café".encode("utf-32-be"), der.UNIVERSAL), common_name("Café")),
    "IA5String, UTF8String": (common_name("Demo", der.IA5), common_name("Demo")),
    "VisibleString, UTF8String": (common_name("Demo", der.VISIBLE), common_name("Demo")),
    "NumericString, UTF8String": (common_name("12", der.NUMERIC), common_name("12")),
    "upper case": (common_name("DEMO"), common_name("demo")),
    "upper case É": (common_name("É"), common_name("é")),
    "two spaces": (common_name("Demo  Root"), common_name("Demo Root")),
    "a leading space": (common_name(" Demo"), common_name("Demo")),
    "a trailing space": (common_name("Demo "), common_name("Demo")),
    "a tab": (common_name("Demo\tRoot"), common_name("Demo Root")),
    "a no-break space": (common_name("Demo\u00a0Root"), common_name("Demo Root")),
    "composed and decomposed": (common_name("é"), common_name("e\u0301")),
    "full width": (common_name("\uff24emo"), common_name("Demo")),
    "two RDNs, one RDN": (der.name(_A, _B), der.sequence(der.set_of(_B, _A))),
    "another order": (der.name(_A, _B), der.name(_B, _A)),
}


def strings() -> Iterator[Case]:
    for label, (tag, content) in STRINGS.items():
        yield from named(f"CN as {label}", common_name(content, tag))


def names() -> Iterator[Case]:
    for label, name in NAMES.items():
        yield from named(f"name: {label}", name)


def spellings() -> Iterator[Case]:
    for label, (own, below) in SPELLINGS.items():
        other = parts(issuer_name=below)
        yield case(f"issuer spelled otherwise: {label} / anchor", root=Entity(own, ROOT.key), make_ca=other)
        yield case(f"issuer spelled otherwise: {label} / intermediate", ca=Entity(own, CA.key), make_leaf=other)
