"""Validity, version, serial number, algorithms, keys, and the encoding of the whole."""

from collections.abc import Callable, Iterator
from functools import cache
from itertools import count
from math import gcd, lcm

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from fakes import der
from fakes.der import Entity, bits, generalized_time, oid, sequence, utc_time
from fakes.judge import Case
from fakes.oddities.places import CA, ENDED, LATER, LEAF, ROOT, SPARE, Make, case, in_each_place, parts, usual

VALIDITIES: dict[str, tuple[bytes, bytes]] = {
    "GeneralizedTime before 2050": (generalized_time("20200101000000Z"), der.END),
    "UTCTime of 1999": (utc_time("990101000000Z"), der.END),
    "year 1950": (utc_time("500101000000Z"), der.END),
    "year 1900": (generalized_time("19000101000000Z"), der.END),
    "year 0000": (generalized_time("00000101000000Z"), der.END),
    "until 2060": (der.BEGIN, generalized_time("20600101000000Z")),
    "until 9999": (der.BEGIN, generalized_time("99991231235959Z")),
    "UTCTime without seconds": (utc_time("2001010000Z"), der.END),
    "UTCTime with an offset": (utc_time("200101000000+0000"), der.END),
    "UTCTime without Z": (utc_time("200101000000"), der.END),
    "GeneralizedTime with a fraction": (generalized_time("20200101000000.5Z"), der.END),
    "GeneralizedTime with an offset": (generalized_time("20200101000000+0100"), der.END),
    "a 30th of February": (utc_time("200230000000Z"), der.END),
    "hour 24": (utc_time("200101240000Z"), der.END),
    "second 60": (utc_time("200101000060Z"), der.END),
    "end before begin": (utc_time("490101000000Z"), utc_time("200101000000Z")),
    "expired": (der.BEGIN, ENDED),
    "not yet valid": (utc_time("480101000000Z"), der.END),
}
SERIAL_NUMBERS: dict[str, bytes] = {
    "0": der.integer(0),
    "negative": der.integer(-5),
    "of 20 bytes": der.integer(2**158),
    "of 21 bytes": der.integer(2**166),
    "of 1000 bytes": der.integer(2**7998),
    "with a leading zero byte": der.tlv(0x02, b"\0\x05"),
    "without content": der.tlv(0x02),
}
_ON_P256 = sequence(oid("1.2.840.10045.2.1"), oid("1.2.840.10045.3.1.7"))
_ECDSA, _PKCS1 = "1.2.840.10045.4", "1.2.840.113549.1.1"
_SHA1, _MD5 = hashes.SHA1(), hashes.MD5()  # noqa: S303 - that they are refused is the question
EC_SIGNATURES: dict[str, tuple[der.Hash, bytes]] = {
    "ECDSA with SHA-1": (_SHA1, sequence(oid(f"{_ECDSA}.1"))),
    "ECDSA with SHA-224": (hashes.SHA224(), sequence(oid(f"{_ECDSA}.3.1"))),
    "ECDSA with SHA-384": (hashes.SHA384(), sequence(oid(f"{_ECDSA}.3.3"))),
    "ECDSA with SHA-512": (hashes.SHA512(), sequence(oid(f"{_ECDSA}.3.4"))),
    "ECDSA with NULL": (der.SHA256, sequence(oid(f"{_ECDSA}.3.2"), der.NULL)),
    "ECDSA with SHA3-256": (hashes.SHA3_256(), sequence(oid("2.16.840.1.101.3.4.3.10"))),
}
RSA_SIGNATURES: dict[str, tuple[der.Hash, bytes]] = {
    "RSA with SHA-1": (_SHA1, sequence(oid(f"{_PKCS1}.5"), der.NULL)),
    "RSA with SHA-224": (hashes.SHA224(), sequence(oid(f"{_PKCS1}.14"), der.NULL)),
    "RSA with SHA-384": (hashes.SHA384(), sequence(oid(f"{_PKCS1}.12"), der.NULL)),
    "RSA with SHA-512": (hashes.SHA512(), sequence(oid(f"{_PKCS1}.13"), der.NULL)),
    "RSA without NULL": (der.SHA256, sequence(oid(f"{_PKCS1}.11"))),
    "RSA with MD5": (_MD5, sequence(oid(f"{_PKCS1}.4"), der.NULL)),
}


def times() -> Iterator[Case]:
    for label, (begin, end) in VALIDITIES.items():
        yield from in_each_place(f"times: {label}", parts(not_before=begin, not_after=end), spare=True)


def versions() -> Iterator[Case]:
    identifier = der.implicit(1, b"\0\x01")
    one, two, three, four = (der.explicit(0, der.integer(number)) for number in range(4))
    for label, make in {
        "1": _bare(b""),
        "1 with extensions": parts(version=b""),
        "1 written out": _bare(one),
        "1 with a unique identifier": _bare(b"", identifier),
        "2": _bare(two),
        "2 with extensions": parts(version=two),
        "2 with a unique identifier": _bare(two, identifier),
        "3 with a unique identifier": parts(unique_identifiers=identifier),
        "3 without extensions": _bare(three),
        "4": parts(version=four),
        "-1": parts(version=der.explicit(0, der.integer(-1))),
    }.items():
        yield from in_each_place(f"version {label}", make, spare=True)


def _bare(version: bytes, identifiers: bytes = b"") -> Make:
    """Without extensions."""
    return lambda subject, issuer, _: der.certificate(
        subject, issuer, extensions=(), version=version, unique_identifiers=identifiers
    )


def serial_numbers() -> Iterator[Case]:
    for label, serial in SERIAL_NUMBERS.items():
        yield from in_each_place(f"serial number {label}", parts(serial=serial), spare=True)


@cache
def rsa_key(size: int, exponent: int = 65537) -> rsa.RSAPrivateKey:
    return rsa.generate_private_key(exponent, size)


def algorithms() -> Iterator[Case]:
    for label, (digest, outer) in EC_SIGNATURES.items():
        yield from in_each_place(f"signed by {label}", parts(digest=digest, outer=outer), spare=True)
    yield from in_each_place("inner algorithm another", parts(inner=der.RSA_SHA256), spare=True)
    yield from in_each_place("inner algorithm with NULL", parts(inner=EC_SIGNATURES["ECDSA with NULL"][1]), spare=True)
    upper, lower = Entity(ROOT.name, rsa_key(2048)), Entity(CA.name, rsa_key(2048))
    for label, (digest, outer) in RSA_SIGNATURES.items():
        make = parts(digest=digest, outer=outer)
        yield case(f"signed by {label} / anchor", root=upper, make_root=make)
        yield case(f"signed by {label} / intermediate", root=upper, make_ca=make)
        yield case(f"signed by {label} / leaf", ca=lower, make_leaf=make)


def keys() -> Iterator[Case]:
    for label, key in _private_keys():
        yield case(f"key {label} / anchor", root=Entity(ROOT.name, key))
        yield case(f"key {label} / intermediate", ca=Entity(CA.name, key))
        if label.startswith(("RSA", "P-3", "P-5")):  # the agent makes the leaf's itself, and of no other kind
            yield case(f"key {label} / leaf", leaf=Entity(LEAF.name, key))
        yield case(f"key {label} / spare", beside=[der.certificate(Entity(SPARE.name, key))])
    for label, key, spki in _written_otherwise():
        form, own = parts(spki=spki), Entity(ROOT.name, key)
        yield case(f"key {label} / anchor", root=own, make_root=form)
        yield case(f"key {label} / intermediate", ca=Entity(CA.name, key), make_ca=form)
        yield case(f"key {label} / leaf", leaf=Entity(LEAF.name, key), make_leaf=form)
        yield case(f"key {label} / spare", beside=[der.certificate(Entity(SPARE.name, key), spki=spki)])
        yield case(f"key {label} / namesake", root=own, beside=[der.certificate(own, spki=spki, not_after=LATER)])
    # the usual keys in other forms, which are not those that have signed: what can be seen is whether they are loaded
    for label, spki in _public_keys():
        yield from (
            case(f"public key {label} / anchor", make_root=parts(spki=spki)),
            case(f"public key {label} / intermediate", make_ca=parts(spki=spki)),
            case(f"public key {label} / spare", beside=[der.certificate(SPARE, spki=spki)]),
        )


def _private_keys() -> Iterator[tuple[str, der.Key]]:
    for size in (1024, 2047, 2048, 3072):
        yield f"RSA {size}", rsa_key(size)
    yield "RSA 2048, exponent 3", rsa_key(2048, 3)
    yield "RSA 2048, exponent of 33 bits", _with_exponent(2**32 + 15)
    yield "RSA 2048, exponent of 34 bits", _with_exponent(2**33 + 17)
    for label, curve in {
        "P-192": ec.SECP192R1(),
        "P-224": ec.SECP224R1(),
        "P-384": ec.SECP384R1(),
        "P-521": ec.SECP521R1(),
        "secp256k1": ec.SECP256K1(),
        "Brainpool": ec.BrainpoolP256R1(),
    }.items():
        yield label, ec.generate_private_key(curve)
    yield "Ed25519", ed25519.Ed25519PrivateKey.generate()


def _with_exponent(least: int) -> rsa.RSAPrivateKey:
    """With that public exponent, or the next that the modulus can have; cryptography makes keys with two others."""
    numbers = rsa_key(2048).private_numbers()
    p, q = numbers.p, numbers.q
    order = lcm(p - 1, q - 1)
    exponent = next(each for each in count(least, 2) if gcd(each, order) == 1)
    d = pow(exponent, -1, order)
    crt = rsa.rsa_crt_dmp1(d, p), rsa.rsa_crt_dmq1(d, q), rsa.rsa_crt_iqmp(p, q)
    return rsa.RSAPrivateNumbers(p, q, d, *crt, rsa.RSAPublicNumbers(exponent, p * q)).private_key()


def _written_otherwise() -> Iterator[tuple[str, der.Key, bytes]]:
    """A key and its SubjectPublicKeyInfo in a form that is read as that key."""
    on_p256, point = _ON_P256, der.public_key(ROOT.key)[-65:]
    parity, x = point[-1] % 2, point[1:33]
    key = rsa_key(2048)
    modulus = key.public_key().public_numbers().n
    yield "as a compressed point", ROOT.key, sequence(on_p256, bits(bytes([2 + parity]) + x))
    yield "as a hybrid point", ROOT.key, sequence(on_p256, bits(bytes([6 + parity]) + point[1:]))
    yield "RSA without NULL", key, sequence(sequence(oid(f"{_PKCS1}.1")), bits(_rsa(modulus)))
    yield "RSA for PSS", key, sequence(sequence(oid(f"{_PKCS1}.10")), bits(_rsa(modulus)))


def _public_keys() -> Iterator[tuple[str, bytes]]:
    on_p256 = _ON_P256
    rsa_kind = sequence(oid(f"{_PKCS1}.1"), der.NULL)
    point = der.public_key(ROOT.key)[-65:]
    modulus = rsa_key(2048).public_key().public_numbers().n
    for label, kind, content in (
        ("that is the point at infinity", on_p256, b"\0"),
        ("not on its curve", on_p256, point[:-1] + bytes([point[-1] ^ 1])),
        ("on an unknown curve", sequence(oid("1.2.840.10045.2.1"), oid("1.2.3.4")), point),
        ("without a curve", sequence(oid("1.2.840.10045.2.1")), point),
        ("RSA with an even modulus", rsa_kind, _rsa(2**2047)),
        ("RSA with exponent 1", rsa_kind, _rsa(modulus, 1)),
        ("RSA of 16384 bits", rsa_kind, _rsa(2**16383 + 1)),
        ("Ed448", sequence(oid("1.3.101.113")), bytes(57)),
        ("X25519", sequence(oid("1.3.101.110")), bytes(32)),
        ("GOST", sequence(oid("1.2.643.7.1.1.1.1"), sequence(oid("1.2.643.2.2.35.1"))), der.octets(b"\x11" * 64)),
        ("ML-DSA-65", sequence(oid("2.16.840.1.101.3.4.3.18")), bytes(1952)),
        ("of an unknown kind", sequence(oid("1.2.3.4")), b"x"),
    ):
        yield label, sequence(kind, bits(content))
    yield "with unused bits", sequence(on_p256, bits(point, 1))


def _rsa(modulus: int, exponent: int = 65537) -> bytes:
    return sequence(der.integer(modulus), der.integer(exponent))


def encodings() -> Iterator[Case]:
    for label, make in {
        "trailing bytes": _changed(lambda made: made + b"\0\0"),
        "a length with a leading zero": _changed(lambda made: made[:1] + b"\x83\0" + made[2:]),
        "an indefinite length": _changed(lambda made: b"\x30\x80" + made[4:] + b"\0\0"),
        "cut off": _changed(lambda made: made[:-5]),
        "a signature with unused bits": parts(signature=bits(bytes(70), 3)),
        "a signature of zeros": parts(signature=bits(bytes(70))),
    }.items():
        yield from in_each_place(f"encoding: {label}", make, spare=True)


def _changed(change: Callable[[bytes], bytes]) -> Make:
    return lambda subject, issuer, extensions: change(usual(subject, issuer, extensions))
