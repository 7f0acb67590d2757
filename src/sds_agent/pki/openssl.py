"""Trust anchors for OpenSSL, which is what Python's own TLS is."""

import ssl
from collections.abc import Iterable

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from sds_agent.pki.certificates import describe


def trust(context: ssl.SSLContext, anchors: Iterable[x509.Certificate]) -> tuple[str, ...]:
    """Make these anchors those of the context. Returns a clause for each that OpenSSL does not load.

    Each is loaded by itself: of several at once, one that is not loaded would keep out all that follow it.
    """
    left_out = list[str]()
    for anchor in anchors:
        try:
            context.load_verify_locations(cadata=anchor.public_bytes(Encoding.DER))
        except ssl.SSLError:
            left_out.append(f"OpenSSL does not load {describe(anchor)}")
    return tuple(left_out)
