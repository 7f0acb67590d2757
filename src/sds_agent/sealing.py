"""State that is readable for the holder of a key alone: AES-256-GCM, with a key and a nonce of its own for each write.

A sealed file is

    "sds-agent sealed 1" and a line feed     the version of this form
    8 bytes     the id of the operator's key, which tells another key from damage
    32 bytes    a salt, random
    the rest    the content, encrypted, and 16 bytes of authentication tag

HKDF-SHA256 (RFC 5869) derives from the operator's key and the salt the 32 bytes of the key and the 12 of the nonce. The
header, the salt and what the file is for are authenticated too (associated data): a file that was exchanged for that of
another identity does not open. An older copy of the same file does.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from sds_agent.errors import ConfigurationError, SdsAgentError
from sds_agent.files import read_at_once
from sds_agent.values import Sensitive

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

LEAST, MOST = 32, 4096
"""Bytes of a key file."""
OVERHEAD = 128
"""Bytes, at most, by which a sealed content is longer than the content."""

_MARK = b"sds-agent sealed "
_HEADER = _MARK + b"1\n"
_ID, _SALT, _KEY, _NONCE = 8, 32, 32, 12


class SealError(SdsAgentError):
    """Sealed content cannot be opened: it is damaged, or was sealed for another file. The message is a clause that
    follows the file's path.
    """


class NewerSealError(SealError):
    """A newer version of the agent has sealed it, in a form that this one does not know."""


class OtherKeyError(SealError):
    """It was sealed with another key. With that one it may be good."""


class Seal(Sensitive, frozen=True):
    """The operator's key, at least 32 bytes that are random, and what it seals."""

    secret: bytes

    def seal(self, content: bytes, purpose: str) -> bytes:
        """The content for a file. Only the same `purpose` opens it, such as the identity that it belongs to."""
        header = _HEADER + self._id()
        salt = os.urandom(_SALT)
        cipher, nonce = self._cipher(salt)
        return header + salt + cipher.encrypt(nonce, content, header + salt + purpose.encode())

    def open(self, sealed: bytes, purpose: str) -> bytes:
        """The content of a file. Raises SealError, and its subclasses."""
        from cryptography.exceptions import InvalidTag  # noqa: PLC0415 - measured with the cipher: 4 ms

        if not sealed.startswith(_HEADER):
            raise NewerSealError("is encrypted in a form that only a newer version of the agent knows")
        begin = len(_HEADER) + _ID
        header, salt, rest = sealed[:begin], sealed[begin : begin + _SALT], sealed[begin + _SALT :]
        if header != _HEADER + self._id():
            raise OtherKeyError("is encrypted with another key than the one that state_encryption names")
        cipher, nonce = self._cipher(salt)
        try:
            return cipher.decrypt(nonce, rest, header + salt + purpose.encode())
        except InvalidTag as error:
            raise SealError("is encrypted with this key, and was damaged or exchanged since") from error

    def _id(self) -> bytes:
        return self._derive(b"", b"sds-agent state: id of the key", _ID)

    def _cipher(self, salt: bytes) -> "tuple[AESGCM, bytes]":
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM  # noqa: PLC0415 - measured: 4 ms

        derived = self._derive(salt, b"sds-agent state: key and nonce", _KEY + _NONCE)
        return AESGCM(derived[:_KEY]), derived[_KEY:]

    def _derive(self, salt: bytes, use: bytes, size: int) -> bytes:
        from cryptography.hazmat.primitives.hashes import SHA256  # noqa: PLC0415 - measured: 4 ms
        from cryptography.hazmat.primitives.kdf.hkdf import HKDF  # noqa: PLC0415 - measured: likewise

        return HKDF(algorithm=SHA256(), length=size, salt=salt, info=use).derive(self.secret)


def is_sealed(content: bytes) -> bool:
    """Whether the content of a file is sealed, with whatever key."""
    return content.startswith(_MARK)


def read_seal(file: Path, setting: str) -> Seal:
    """The key in a file, every byte of it. Raises ConfigurationError, which names the setting."""
    try:
        secret = read_at_once(file, MOST)
    except OSError as error:
        raise ConfigurationError(
            f"{setting}: cannot read {file}: {error.strerror}; put a key there, such as from "
            f"`openssl rand -out {file} {LEAST}`, that the agent's user (uid {os.geteuid()}) can read"
        ) from error
    if not LEAST <= len(secret) <= MOST:
        size = f"more than {MOST}" if len(secret) > MOST else str(len(secret))
        raise ConfigurationError(
            f"{setting}: the key in {file} has {size} bytes; it must have {LEAST} to {MOST}, all random, such as from "
            f"`openssl rand -out {file} {LEAST}`"
        )
    return Seal(secret)
