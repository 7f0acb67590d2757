"""Certificate signing requests (PKCS#10, RFC 2986)."""

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from sds_agent.pki.keys import PrivateKey, signature_hash


def make_csr(key: PrivateKey, uri: str) -> bytes:
    """A request in PEM for a certificate whose one name is `uri` (ASCII).

    The subject is empty and the SAN therefore critical (RFC 5280 section 4.2.1.6). Nothing else is asked for: a CA sets
    usages and times by its own rules, and some refuse a request that tries to.
    """
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)])
    request = x509.CertificateSigningRequestBuilder(x509.Name([])).add_extension(names, critical=True)
    return request.sign(key, signature_hash(key)).public_bytes(Encoding.PEM)
