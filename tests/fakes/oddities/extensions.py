"""Extensions: known and unknown, critical or not, damaged, and what they say of usage and other names."""

from collections.abc import Iterator

from fakes import der
from fakes.der import extension, oid, sequence
from fakes.judge import Case
from fakes.oddities.places import Make, in_each_place, instead, parts, plus

UNKNOWN = "1.2.3.4.5"
SIGNS = der.KEY_CERT_SIGN | der.CRL_SIGN
_POINT = sequence(der.explicit(0, der.explicit(0, der.uri("http://crl.example/"))))
_RELATIVE = sequence(der.explicit(0, der.explicit(1, der.attribute(der.COMMON_NAME, "crl"))))
_ACCESS = sequence(oid("1.3.6.1.5.5.7.48.1"), der.uri("http://ocsp.example/"))
# Extensions that no rule of section 6.1 speaks of
OTHERS: dict[str, tuple[str, bytes]] = {
    "CRLDistributionPoints": ("2.5.29.31", sequence(_POINT)),
    "CRLDistributionPoints, relative": ("2.5.29.31", sequence(_RELATIVE)),
    "FreshestCRL": ("2.5.29.46", sequence(_POINT)),
    "AuthorityInfoAccess": ("1.3.6.1.5.5.7.1.1", sequence(_ACCESS)),
    "IssuerAlternativeName": ("2.5.29.18", sequence(der.dns("ca.example"))),
    "must-staple": ("1.3.6.1.5.5.7.1.24", sequence(der.integer(5))),
    "must-staple, and for several certificates": ("1.3.6.1.5.5.7.1.24", sequence(der.integer(5), der.integer(17))),
    "an unknown TLS feature": ("1.3.6.1.5.5.7.1.24", sequence(der.integer(99))),
    "must-staple and an unknown TLS feature": ("1.3.6.1.5.5.7.1.24", sequence(der.integer(5), der.integer(99))),
    "precertificate poison": ("1.3.6.1.4.1.11129.2.4.3", der.NULL),
    "Netscape certificate type": ("2.16.840.1.113730.1.1", der.bits(b"\xc0", 6)),
    "Netscape comment": ("2.16.840.1.113730.1.13", der.tlv(der.IA5, b"made by")),
    "Microsoft template": ("1.3.6.1.4.1.311.20.2", der.tlv(der.BMP, "SubCA".encode("utf-16-be"))),
    "OCSP no check": ("1.3.6.1.5.5.7.48.1.5", der.NULL),
    "SubjectDirectoryAttributes": ("2.5.29.9", sequence()),
    "PrivateKeyUsagePeriod": ("2.5.29.16", sequence(der.implicit(0, b"20200101000000Z"))),
}
KINDS = {
    "BasicConstraints": der.BASIC_CONSTRAINTS,
    "KeyUsage": der.KEY_USAGE,
    "SubjectKeyIdentifier": der.SUBJECT_KEY_IDENTIFIER,
    "AuthorityKeyIdentifier": der.AUTHORITY_KEY_IDENTIFIER,
    "ExtendedKeyUsage": der.EXTENDED_KEY_USAGE,
    "SubjectAlternativeName": der.ALTERNATIVE_NAMES,
    "NameConstraints": der.NAME_CONSTRAINTS,
    "CertificatePolicies": der.POLICIES,
    "PolicyMappings": der.POLICY_MAPPINGS,
    "PolicyConstraints": der.POLICY_CONSTRAINTS,
    "InhibitAnyPolicy": der.INHIBIT_ANY_POLICY,
    "CRLDistributionPoints": "2.5.29.31",
}
PURPOSES: dict[str, tuple[str, ...]] = {
    "server, client": (der.SERVER_AUTH, der.CLIENT_AUTH),
    "server": (der.SERVER_AUTH,),
    "client": (der.CLIENT_AUTH,),
    "any": (der.ANY_USAGE,),
    "any, server, client": (der.ANY_USAGE, der.SERVER_AUTH, der.CLIENT_AUTH),
    "code signing": ("1.3.6.1.5.5.7.3.3",),
    "step-up": ("2.16.840.1.113730.4.1", der.CLIENT_AUTH),
    "none": (),
}
_OTHER_NAME = der.explicit(0, oid("1.2.3.4"), der.explicit(0, der.tlv(der.UTF8, b"x")))
ALTERNATIVES: dict[str, tuple[bytes, ...]] = {
    "a DNS name": (der.dns("ca.example"),),
    "a DNS name with _": (der.dns("a_b.example"),),
    "an e-mail address": (der.email("a@demo.example"),),
    "an IPv4 address": (der.ip(bytes([127, 0, 0, 1])),),
    "an IP address of 5 bytes": (der.ip(bytes(5)),),
    "a directory name": (der.directory(der.common_name("x")),),
    "a directory name in a BMPString": (der.directory(der.common_name(b"\0x", der.BMP)),),
    "an otherName": (_OTHER_NAME,),
    "an x400Address": (der.explicit(3),),
    "an ediPartyName": (der.explicit(5, der.explicit(1, der.tlv(der.UTF8, b"x"))),),
    "a registeredID": (der.tlv(0x88, oid("1.2.3.4")[2:]),),
    "an unknown form": (der.implicit(9, b"x"),),
    "Latin-1 in a DNS name": (der.implicit(2, b"caf\xe9"),),
    "Latin-1 in a URI": (der.uri(b"spiffe://caf\xe9/"),),
    "none": (),
    "a trust domain": (der.uri("spiffe://demo.example"),),
    "a SPIFFE ID": (der.uri("spiffe://demo.example/ca"),),
    "two SPIFFE IDs": (der.uri("spiffe://demo.example/a"), der.uri("spiffe://demo.example/b")),
}


def extensions() -> Iterator[Case]:
    for label, make, spare in (
        ("unknown", plus(extension(UNKNOWN, der.NULL)), False),
        ("unknown, critical", plus(extension(UNKNOWN, der.NULL, critical=True)), False),
        ("unknown, critical FALSE", plus(extension(UNKNOWN, der.NULL, critical=False)), True),
        ("unknown, empty", plus(extension(UNKNOWN, b"")), False),
        ("unknown, twice", plus(extension(UNKNOWN, der.NULL), extension(UNKNOWN, der.NULL)), True),
        ("BasicConstraints twice", plus(der.basic_constraints()), True),
        ("none", _without_any, True),
        ("an empty list", parts(unique_identifiers=der.explicit(3, sequence())), True),
        ("SubjectKeyIdentifier, critical", _critical(der.SUBJECT_KEY_IDENTIFIER, der.octets(b"x")), False),
        ("AuthorityKeyIdentifier, critical", _critical(der.AUTHORITY_KEY_IDENTIFIER, sequence()), False),
    ):
        yield from in_each_place(f"extension: {label}", make, spare=spare)
    for label, (kind, value) in OTHERS.items():
        yield from in_each_place(f"extension: {label}", plus(extension(kind, value)))
        yield from in_each_place(f"extension: {label}, critical", plus(extension(kind, value, critical=True)))
    for label, kind in KINDS.items():
        damaged, trailing = extension(kind, b"\x30\x05"), extension(kind, sequence() + b"\0")
        yield from in_each_place(f"extension: {label}, damaged", instead(kind, damaged), spare=True)
        yield from in_each_place(f"extension: {label}, with a trailing byte", instead(kind, trailing), spare=True)


def _without_any(subject: der.Entity, issuer: der.Entity, _: tuple[bytes, ...]) -> bytes:
    return der.certificate(subject, issuer, extensions=())


def _critical(kind: str, value: bytes) -> Make:
    return instead(kind, extension(kind, value, critical=True))


def usages() -> Iterator[Case]:
    for label, makes in (("BasicConstraints", _basic_constraints()), ("KeyUsage", _key_usages())):
        for what, make in makes:
            yield from in_each_place(f"{label} {what}", make)
    for label, oids in PURPOSES.items():
        for critical in (None, True):
            make = instead(der.EXTENDED_KEY_USAGE, der.extended_key_usage(*oids, critical=critical))
            yield from in_each_place(f"ExtendedKeyUsage {label}{', critical' if critical else ''}", make)
    yield from in_each_place("ExtendedKeyUsage left out", instead(der.EXTENDED_KEY_USAGE))


def _basic_constraints() -> Iterator[tuple[str, Make]]:
    kind, true = der.BASIC_CONSTRAINTS, der.boolean(value=True)
    yield "left out", instead(kind)
    yield "not critical", instead(kind, der.basic_constraints(critical=None))
    yield "CA:FALSE", instead(kind, der.basic_constraints(ca=False))
    yield "CA:TRUE", instead(kind, der.basic_constraints())
    yield "pathLen 300", instead(kind, der.basic_constraints(300))
    for label, content in {
        "CA:FALSE written out": sequence(der.boolean(value=False)),
        "pathLen without CA": sequence(der.integer(0)),
        "pathLen negative": sequence(true, der.integer(-1)),
        "pathLen of 70 bits": sequence(true, der.integer(2**70)),
        "CA:TRUE as BER": sequence(der.tlv(0x01, b"\x01")),
    }.items():
        yield label, instead(kind, extension(kind, content, critical=True))


def _key_usages() -> Iterator[tuple[str, Make]]:
    kind = der.KEY_USAGE
    yield "left out", instead(kind)
    yield "not critical", instead(kind, der.key_usage(SIGNS, critical=None))
    for label, usage in {
        "empty": 0,
        "crlSign": der.CRL_SIGN,
        "digitalSignature": der.DIGITAL_SIGNATURE,
        "digitalSignature and keyCertSign": der.DIGITAL_SIGNATURE | SIGNS,
        "keyEncipherment": der.KEY_ENCIPHERMENT,
        "keyAgreement": 0x08,
    }.items():
        yield label, instead(kind, der.key_usage(usage))
    for label, bits in {
        "of two bytes": der.bits(b"\x86\x80", 7),
        "with a trailing zero byte": der.bits(b"\x86\0"),
        "with a trailing zero bit": der.bits(b"\x86"),
        "with unused bits set": der.bits(b"\x87", 1),
    }.items():
        yield label, instead(kind, extension(kind, bits, critical=True))


def alternative_names() -> Iterator[Case]:
    for label, names in ALTERNATIVES.items():
        make = instead(der.ALTERNATIVE_NAMES, der.alternative_names(*names, critical=True))
        yield from in_each_place(f"alternative name: {label}", make)
