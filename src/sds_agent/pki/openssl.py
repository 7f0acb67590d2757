"""Trust anchors for Python's own TLS, which is OpenSSL."""

import ssl
from collections.abc import Iterable

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from sds_agent.pki.certificates import describe


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
