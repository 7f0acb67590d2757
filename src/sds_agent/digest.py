"""Digests by the library that the agent has for keys and certificates.

`hashlib` would load OpenSSL a second time, the system's: 4 MB for as long as the agent runs.
"""

from cryptography.hazmat.primitives.hashes import SHA1, SHA256, Hash

_SHA1, _SHA256 = SHA1(), SHA256()  # noqa: S303 - RFC 5280, section 4.2.1.2


def sha256(data: bytes) -> bytes:
    """The digest: 32 bytes."""
    return Hash.hash(_SHA256, data)


def sha1(data: bytes) -> bytes:
    """The digest: 20 bytes. For identifiers that a standard makes of it; it proves nothing."""
    return Hash.hash(_SHA1, data)
