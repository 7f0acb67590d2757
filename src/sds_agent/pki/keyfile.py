"""Reading a private key in every PEM form that other tools write.

Accepted are PKCS#8 (RFC 5958), also encrypted, PKCS#1 and SEC1 (RFC 5915): `openssl genrsa -traditional` and cfssl
write PKCS#1, `openssl ecparam` writes SEC1 behind a block of parameters. Text around the block, CRLF and a byte order
mark are skipped.
"""

import base64
import binascii
from typing import TypeAlias

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from sds_agent.errors import Problem, SdsAgentError
from sds_agent.pki.forms import other_form
from sds_agent.pki.keys import PrivateKey
from sds_agent.pki.pem import blocks, labels
from sds_agent.pki.strength import IN_FILES

LONGEST_PASSPHRASE = 1023
"""Bytes; the most that OpenSSL takes."""

_KEYS = frozenset({b"PRIVATE KEY", b"ENCRYPTED PRIVATE KEY", b"RSA PRIVATE KEY", b"EC PRIVATE KEY"})

# A key that cryptography has read shows neither, so they are searched for before: the DER of the object identifiers
# id-RSASSA-PSS (RFC 4055 section 1.2), and prime-field (RFC 3279 section 2.3.5), which only explicit parameters have.
RSA_PSS = bytes.fromhex("06092a864886f70d01010a")
EXPLICIT_CURVE = bytes.fromhex("06072a8648ce3d0101")

PSS_REFUSED = Problem(
    (),
    "is an RSA-PSS key, which Envoy and most others do not take",
    "make a plain one with `openssl genpkey -algorithm RSA`",
)
EXPLICIT_REFUSED = Problem(
    (),
    "has its curve spelled out as explicit parameters, which others refuse",
    "name the curve instead, with `openssl ec -in KEY -param_enc named_curve`",
)
_GIVE_PRIVATE = "give the private key that belongs to it"
_OTHER_KINDS = {
    b"OPENSSH PRIVATE KEY": ("is in OpenSSH's own form", "convert it with `ssh-keygen -p -m PKCS8 -f KEY`"),
    b"DSA PRIVATE KEY": (
        "is a DSA key, which no TLS library takes for a certificate any more",
        "make an EC or RSA key",
    ),
    b"PUBLIC KEY": ("is a public key", _GIVE_PRIVATE),
    b"RSA PUBLIC KEY": ("is a public key", _GIVE_PRIVATE),
    b"CERTIFICATE": ("is a certificate", _GIVE_PRIVATE),
    b"TRUSTED CERTIFICATE": ("is a certificate of OpenSSL's own kind", _GIVE_PRIVATE),
    b"CERTIFICATE REQUEST": ("is a certificate request", "give the private key that it was made with"),
}

_KeyBlock: TypeAlias = tuple[bytes, bytes]
"""A block's label and the whole block."""


class KeyFileError(SdsAgentError):
    """What should be a private key cannot be used. `problem` says why, and never holds key material."""

    exit_code = 2

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


class PassphraseError(KeyFileError):
    """The key is encrypted, and there is no passphrase or it is not the right one."""


def _refused(found: str, fix: str, kind: type[KeyFileError] = KeyFileError) -> KeyFileError:
    return kind(Problem((), found, fix))


def read_private_key(data: bytes, passphrase: bytes | None = None) -> PrivateKey:
    """The one EC or RSA private key in `data`.

    `passphrase` is used where the key is encrypted and not needed otherwise. Raises KeyFileError for anything that
    cannot serve as a CA's key, among them RSA-PSS keys, curves given as explicit parameters and RSA under 2048 bits.
    """
    label, block = _only_key(data)
    encrypted = _is_encrypted(label, block)
    if encrypted and not passphrase:
        fix = "name the file that holds it: passphrase_file or password_file, or --passphrase-file of a command"
        raise _refused("is encrypted and there is no passphrase", fix, PassphraseError)
    if not encrypted:
        _refuse_odd_encodings(_der(block))
    return _fit(_load(block, passphrase if encrypted else None))


def is_encrypted(data: bytes) -> bool:
    """Whether the key in `data` needs a passphrase. Raises KeyFileError when there is no key in it."""
    return _is_encrypted(*_only_key(data))


def _is_encrypted(label: bytes, block: bytes) -> bool:
    """PKCS#8 says it in the label, the older forms in a header (RFC 1421 section 4.6.1.1)."""
    return label == b"ENCRYPTED PRIVATE KEY" or b"\nProc-Type: 4,ENCRYPTED\n" in block


def _only_key(data: bytes) -> _KeyBlock:
    text = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    keys = list(blocks(text, _KEYS))
    if len(keys) > 1:
        raise _refused(f"holds {len(keys)} private keys", "keep only the one that belongs to the certificate")
    if not keys:
        raise KeyFileError(_no_key(data, list(labels(text))))
    if not keys[0].has_end:
        raise _refused("has no END line, so the key is cut off", "write the whole of it")
    return keys[0].label, keys[0].text + b"\n"


def _no_key(data: bytes, labels: list[bytes]) -> Problem:
    for label in labels:
        if label in _OTHER_KINDS:
            return Problem((), *_OTHER_KINDS[label])
    if form := other_form(data, "pkey"):
        return form
    if not data.strip():
        return Problem((), "is empty", "write the private key into it, in PEM")
    return Problem((), "holds no private key in PEM", "write one that begins with -----BEGIN PRIVATE KEY-----")


def _der(block: bytes) -> bytes:
    body = b"".join(block.split(b"\n")[1:-2])
    try:
        return base64.b64decode(b"".join(body.split()), validate=True)
    except binascii.Error as error:
        raise _refused("is damaged: what stands between BEGIN and END is not base64", "copy it anew") from error


def _refuse_odd_encodings(der: bytes) -> None:
    if RSA_PSS in der:
        raise KeyFileError(PSS_REFUSED)
    if EXPLICIT_CURVE in der:
        raise KeyFileError(EXPLICIT_REFUSED)


def _load(block: bytes, passphrase: bytes | None) -> object:
    try:
        return load_pem_private_key(block, passphrase)
    except UnsupportedAlgorithm as error:
        raise _refused(
            "is of a kind, or encrypted in a way, that is not supported",
            "convert it with `openssl pkcs8 -topk8 -v2 aes-256-cbc -in KEY`",
        ) from error
    except (ValueError, TypeError) as error:
        if passphrase is not None:
            raise _refused(
                "cannot be decrypted",
                "the passphrase is wrong, or the key is damaged or encrypted in an old way "
                "(`openssl pkcs8 -topk8 -v2 aes-256-cbc -in KEY` writes a new one)",
                PassphraseError,
            ) from error
        raise _refused("is not a well-formed private key", "write it anew") from error


def _fit(key: object) -> PrivateKey:
    if fault := IN_FILES.fault(key):
        raise _refused(f"is {fault.found}", f"make {fault.wanted}")
    assert isinstance(key, PrivateKey), "the rule takes no other kind"  # noqa: S101 - for the type checker
    return key
