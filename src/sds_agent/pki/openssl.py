"""Trust anchors and certificates for Python's own TLS, which is OpenSSL."""

import os
import ssl
from collections.abc import Iterable

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

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
