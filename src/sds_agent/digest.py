"""Digests by the library that the agent has for keys and certificates.

`hashlib` would load OpenSSL a second time, the system's: 4 MB for as long as the agent runs.
"""

from cryptography.hazmat.primitives.hashes import SHA1, SHA256, Hash


def sha256(data: bytes) -> bytes:
    """The digest: 32 bytes."""
    digest = Hash(SHA256())
    digest.update(data)
    return digest.finalize()


def sha1(data: bytes) -> bytes:
    """The digest: 20 bytes. For identifiers that a standard makes of it; it proves nothing."""
    digest = Hash(SHA1())  # noqa: S303 - RFC 5280, section 4.2.1.2
    digest.update(data)
    return digest.finalize()
