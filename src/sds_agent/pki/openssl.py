"""Trust anchors and certificates for Python's own TLS, which is OpenSSL."""

import os
import ssl
from collections.abc import Iterable

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from sds_agent.pki.certificates import describe, read_pem


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
