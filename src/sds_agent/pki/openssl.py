"""Trust anchors and certificates for Python's own TLS, which is OpenSSL, and what its connections fail of, in words."""

import os
import ssl
from collections.abc import Iterable, Sequence

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from sds_agent.errors import leaves
from sds_agent.pki.certificates import describe, read_pem

_FAULTS_OF_SERVERS = {
    9: "is not valid yet, or this machine's clock is behind; set the clock, or wait for that",
    10: "has expired, or this machine's clock is ahead; renew it, also in the file of roots here if it is there, or "
    "set the clock",
    26: "is not for a server: its extended key usage lacks serverAuth; have one issued with it",
}
"""X509_V_ERR_CERT_NOT_YET_VALID, X509_V_ERR_CERT_HAS_EXPIRED and X509_V_ERR_INVALID_PURPOSE (openssl/x509_vfy.h)."""


def fault_of_server(error: ssl.SSLCertVerificationError, certificate: str) -> str | None:
    """What is wrong with a server's `certificate`, as messages call it, or with that of a CA above it, which other
    roots would cure only where it is an old one of them that has expired.

    It ends with the fix; None for any other error. OpenSSL does not say which of them it is.
    """
    fault = _FAULTS_OF_SERVERS.get(error.verify_code)
    return fault and f"{certificate}, or that of a CA above it, {fault}"


def causes_of(error: BaseException) -> Sequence[BaseException]:
    """The error, then what caused each, the deepest last."""
    found = list[BaseException]()
    below: BaseException | None = error
    while below is not None and below not in found:
        found.append(below)
        below = below.__cause__ or below.__context__
    return found


def words_of(causes: Sequence[BaseException]) -> str:
    """What the deepest cause with words of the system's or OpenSSL's says; no URL and no header.

    Of a host with several addresses, what was wrong with each of them. Without such words, what kind of error it is.
    """
    for each in reversed(causes):
        if found := dict.fromkeys(filter(None, map(_system_words, leaves(each)))):
            return ", ".join(found)
    name = type(causes[0]).__name__
    return _HTTPX.get(name, name)


def _system_words(error: BaseException) -> str:
    if isinstance(error, ssl.SSLError):  # an OSError too, whose number is one of OpenSSL's
        words, _, _ = str(error.strerror).partition(" (_ssl.c")
        return error.reason.replace("_", " ").lower() if error.reason else words
    if isinstance(error, OSError) and error.strerror:
        return os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror
    return ""


_HTTPX = {
    "ConnectError": "no connection",
    "ReadError": "the connection was cut",
    "RemoteProtocolError": "it is no HTTP, or was cut off",
    "InvalidURL": "its address is no URL",
}
"""What errors of httpx mean, by their names: to import it takes long."""


def trust(context: ssl.SSLContext, anchors: Iterable[x509.Certificate]) -> tuple[str, ...]:
    """Give the context these anchors. Returns a clause for each that OpenSSL does not load.

    Each is loaded by itself: of several in one call, the first that OpenSSL refuses would keep out those after it.
    """
    left_out = list[str]()
    for anchor in anchors:
        try:
            context.load_verify_locations(cadata=anchor.public_bytes(Encoding.DER))
        except ssl.SSLError:
            left_out.append(f"OpenSSL does not load {describe(anchor)}")
    return tuple(left_out)


def trust_pem(context: ssl.SSLContext, anchors_pem: bytes) -> tuple[str, ...]:
    """As `trust`, of anchors in PEM. Raises CertificateError."""
    return trust(context, read_pem(anchors_pem))


def load_certificate(context: ssl.SSLContext, pem: bytes) -> None:
    """Give the context a certificate chain and its unencrypted key, both in `pem`. Raises ssl.SSLError.

    Python's ssl reads a certificate only from a path; this file is in memory and in no directory.
    """
    descriptor = os.memfd_create("certificate", os.MFD_CLOEXEC)
    try:
        with os.fdopen(os.dup(descriptor), "wb") as file:
            file.write(pem)
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")
    finally:
        os.close(descriptor)
