"""Private keys: the kinds that are made here, how one is made, and how it is written.

The repr of cryptography's key objects does not show the key. That of a PEM does, so an object with one needs its own
(`values.Sensitive`).
"""

from enum import StrEnum
from typing import TypeAlias

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

PrivateKey: TypeAlias = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey
PublicKey: TypeAlias = ec.EllipticCurvePublicKey | rsa.RSAPublicKey
SignatureHash: TypeAlias = hashes.SHA256 | hashes.SHA384 | hashes.SHA512


class KeyType(StrEnum):
    """The kinds of key that a workload or a CA of ours may have, by their names in the configuration."""

    EC_P256 = "ec-p256"
    EC_P384 = "ec-p384"
    RSA_2048 = "rsa-2048"
    RSA_3072 = "rsa-3072"
    RSA_4096 = "rsa-4096"

    @property
    def slow(self) -> bool:
        """Whether making one can take seconds: not on an event loop, then, but in a thread."""
        return self in _RSA_BITS


_SHA256, _SHA384, _SHA512 = hashes.SHA256(), hashes.SHA384(), hashes.SHA512()
_ECDSA = {each.name: ec.ECDSA(each) for each in (_SHA256, _SHA384, _SHA512)}
_CURVES = {KeyType.EC_P256: ec.SECP256R1(), KeyType.EC_P384: ec.SECP384R1()}
_RSA_BITS = {KeyType.RSA_2048: 2048, KeyType.RSA_3072: 3072, KeyType.RSA_4096: 4096}


def generate(key_type: KeyType) -> PrivateKey:
    """Make a new key. Blocks for up to some seconds when the type is `slow`."""
    if bits := _RSA_BITS.get(key_type):
        return rsa.generate_private_key(public_exponent=65537, key_size=bits)
    return ec.generate_private_key(_CURVES[key_type])


def to_pkcs8_pem(key: PrivateKey) -> bytes:
    """The key as unencrypted PKCS#8 in PEM (RFC 5958), the one form that Envoy reads for every kind of key."""
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def public_bytes(public_key: PublicKey) -> bytes:
    """The SubjectPublicKeyInfo in DER (RFC 5280 section 4.1.2.7): equal bytes mean the same key."""
    return public_key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def describe_key(public_key: CertificatePublicKeyTypes) -> str:
    """The kind of a key, for people: `EC secp256r1`, `RSA 2048`, `Ed25519`."""
    match public_key:
        case ec.EllipticCurvePublicKey(curve=curve):
            return f"EC {curve.name}"
        case rsa.RSAPublicKey(key_size=size):
            return f"RSA {size}"
        case _:  # as it may stand in a certificate above a signer, or among the roots
            return type(public_key).__name__.removesuffix("PublicKey")


def signature_hash(key: PrivateKey) -> SignatureHash:
    """The hash to sign with: for EC as strong as the curve (RFC 5480 section 4), for RSA SHA-256."""
    bits = key.curve.key_size if isinstance(key, ec.EllipticCurvePrivateKey) else 256
    return _SHA256 if bits <= 256 else _SHA384 if bits <= 384 else _SHA512


def ecdsa(key: ec.EllipticCurvePrivateKey) -> ec.ECDSA:
    """How the key signs, with that hash. Made before, which takes as long as to parse a certificate."""
    return _ECDSA[signature_hash(key).name]
