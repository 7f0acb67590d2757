"""A JWK provisioner's private key, as step writes it: a JWK (RFC 7517), or one inside an encrypted JWE (RFC 7516).

The libraries for JWE refuse a file of step's by default, as it derives its key in 600,000 rounds, so the one form of
JWE that step writes is decrypted here with cryptography's primitives: PBES2-HS256+A128KW (RFC 7518 section 4.8) with
AES-GCM (section 5.3), compact, or in JSON with one recipient.
"""

import hashlib
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Mapping
from typing import Any

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.pbkdf2 import PBKDF2HMAC
from cryptography.hazmat.primitives.keywrap import InvalidUnwrap, aes_key_unwrap
from msgspec import Struct

from sds_agent.errors import Problem, SdsAgentError
from sds_agent.text import quoted
from sds_agent.values import Sensitive

MOST_ROUNDS = 10_000_000
"""Rounds of PBKDF2, some seconds: a damaged file must not occupy a thread for longer."""
_ALGORITHM = "PBES2-HS256+A128KW"
_KEY_SIZES = {"A128GCM": 16, "A192GCM": 24, "A256GCM": 32}
_SIGNATURES = frozenset({"ES256", "ES384", "ES512", "RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "EdDSA"})
_WRITE_ANOTHER = "write the provisioner's private key into it, as `step crypto jwk create` does"
_COPY = "copy the file anew"

SigningKey = ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey


class StepCaKeyError(SdsAgentError):
    """What should be a provisioner's key cannot be used. `problem` says why, and never holds key material.

    `password` says whether the fault is the password's, which is missing or wrong.
    """

    def __init__(self, found: str, fix: str, *, password: bool = False) -> None:
        self.problem = Problem((), found, fix)
        self.password = password
        super().__init__(str(self.problem))


class StepCaJwk(Sensitive, frozen=True):
    """A private key, the algorithm of its signatures, and the `kid` by which step-ca finds the provisioner."""

    key: SigningKey
    algorithm: str
    kid: str


class _Jwe(Struct, frozen=True):
    """RFC 7516 section 7.2.2. `protected` is the header as it stands in the text."""

    protected: str
    encrypted_key: str
    iv: str
    ciphertext: str
    tag: str


class _JweHeader(Struct, frozen=True):
    alg: str
    enc: str
    p2s: str = ""
    p2c: int = 0
    crit: object = None
    zip: object = None


def read_jwk(data: bytes, password: bytes | None = None) -> StepCaJwk:
    """The key in a file. Blocks while it is decrypted: a tenth of a second is usual. Raises StepCaKeyError."""
    parsed = _parsed(data)
    if not isinstance(parsed, _Jwe):
        return _jwk(parsed)
    if not password:
        raise StepCaKeyError(
            "is encrypted and there is no password", "name the password's file in password_file", password=True
        )
    inside = _members(_decrypted(parsed, password))
    if inside is None:
        raise StepCaKeyError("holds no JWK inside its JWE", _WRITE_ANOTHER)
    return _jwk(inside)


def _parsed(data: bytes) -> _Jwe | Mapping[str, Any]:
    text = data.strip()
    if text.count(b".") == 4 and text.isascii() and not text.startswith(b"{"):
        return _Jwe(*text.decode().split("."))
    members = _members(text)
    if members is None:
        raise StepCaKeyError("is neither a JWK nor a JWE" if text else "is empty", _WRITE_ANOTHER)
    if "ciphertext" not in members:
        return members
    try:
        return msgspec.convert(members, _Jwe)
    except msgspec.ValidationError as error:
        raise StepCaKeyError("is no JWE with one recipient", _WRITE_ANOTHER) from error


def _members(data: bytes) -> dict[str, Any] | None:
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.MsgspecError, RecursionError, ValueError):
        return None


def _decrypted(jwe: _Jwe, password: bytes) -> bytes:
    header = _header(jwe)
    salt = _ALGORITHM.encode() + b"\0" + _bytes(header.p2s)
    derived = PBKDF2HMAC(SHA256(), 16, salt, header.p2c).derive(password)
    try:
        key = aes_key_unwrap(derived, _bytes(jwe.encrypted_key))
    except (InvalidUnwrap, ValueError):
        raise StepCaKeyError(
            "cannot be decrypted", "the password is wrong, or the file is damaged", password=True
        ) from None
    if len(key) != _KEY_SIZES[header.enc]:
        raise StepCaKeyError("is damaged: its key has another size than its header says", _COPY)
    try:
        return AESGCM(key).decrypt(_bytes(jwe.iv), _bytes(jwe.ciphertext) + _bytes(jwe.tag), jwe.protected.encode())
    except (InvalidTag, ValueError):
        raise StepCaKeyError("is damaged: its content does not match its tag", _COPY) from None


def _header(jwe: _Jwe) -> _JweHeader:
    try:
        header = msgspec.json.decode(_bytes(jwe.protected), type=_JweHeader)
    except (msgspec.MsgspecError, ValueError) as error:
        raise StepCaKeyError("has no header that a JWE needs", _COPY) from error
    if header.alg != _ALGORITHM or header.enc not in _KEY_SIZES or header.crit is not None or header.zip is not None:
        way = f"{quoted(header.alg)} and {quoted(header.enc)}"
        raise StepCaKeyError(f"is encrypted by {way}", f"encrypt it as step does, by {_ALGORITHM} and A256GCM")
    if not 0 < header.p2c <= MOST_ROUNDS:
        fix = f"at most {MOST_ROUNDS} are used: encrypt it again"
        raise StepCaKeyError(f"asks for {header.p2c} rounds of PBKDF2", fix)
    return header


def _jwk(members: Mapping[str, Any]) -> StepCaJwk:
    if members.get("kty") == "oct":
        raise StepCaKeyError("is a shared secret (kty oct)", "a provisioner needs a pair of keys: make an EC one")
    if "kty" in members and "d" not in members:
        raise StepCaKeyError("is a public key", "write the private key that belongs to it")
    key, algorithm = _key(members)
    kid = members.get("kid")
    return StepCaJwk(key, algorithm, kid if isinstance(kid, str) and kid else thumbprint(members))


def _key(members: Mapping[str, Any]) -> tuple[SigningKey, str]:
    import jwt  # noqa: PLC0415 - measured: 45 ms, for the first token

    try:
        read = jwt.PyJWK(dict(members))
    except (jwt.PyJWTError, ValueError, TypeError, KeyError):
        # not chained: the library's errors may quote what it was given
        raise StepCaKeyError("is no JWK that can sign", _WRITE_ANOTHER) from None
    if not isinstance(read.key, SigningKey) or read.algorithm_name not in _SIGNATURES:
        found = f"signs by {quoted(read.algorithm_name)}, which step-ca does not verify"
        raise StepCaKeyError(found, _WRITE_ANOTHER)
    return read.key, read.algorithm_name


def thumbprint(members: Mapping[str, Any]) -> str:
    """RFC 7638; step-ca's own choice for a key without a name."""
    needed = {"EC": ("crv", "kty", "x", "y"), "RSA": ("e", "kty", "n"), "OKP": ("crv", "kty", "x")}
    chosen = {name: members[name] for name in needed[members["kty"]]}
    return urlsafe_b64encode(hashlib.sha256(msgspec.json.encode(chosen)).digest()).decode().rstrip("=")


def _bytes(text: str) -> bytes:
    try:
        return urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except ValueError as error:  # binascii.Error is one
        raise StepCaKeyError("is damaged: a part of it is not base64", _COPY) from error
