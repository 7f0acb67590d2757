"""Certificate signing requests (PKCS#10, RFC 2986)."""

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import Encoding

from sds_agent.pki.keys import PrivateKey, signature_hash

_BROKEN = frozenset({"md5", "sha1"})
"""Hashes for which forgeries are known. cryptography checks no signature made with them, and calls each one wrong."""


def make_csr(key: PrivateKey, uri: str) -> bytes:
    """A request in PEM for a certificate whose one name is `uri` (ASCII).

    The subject is empty and the SAN therefore critical (RFC 5280 section 4.2.1.6). Nothing else is asked for: a CA sets
    usages and times by its own rules, and some refuse a request that tries to.
    """
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)])
    request = x509.CertificateSigningRequestBuilder(x509.Name([])).add_extension(names, critical=True)
    return request.sign(key, signature_hash(key)).public_bytes(Encoding.PEM)


def fault_of_possession(csr: x509.CertificateSigningRequest) -> str | None:
    """Why the request does not prove that its key was there (RFC 2986 section 3), or None where it does.

    Raises what cryptography raises for a key or a signature that it cannot read.
    """
    try:
        digest = csr.signature_hash_algorithm
    except UnsupportedAlgorithm:
        algorithm = csr.signature_algorithm_oid.dotted_string
        return f"the CSR is signed by the algorithm {algorithm}, which is not supported: sign it with SHA-256"
    if digest is not None and digest.name in _BROKEN:
        return f"the CSR is signed with {digest.name.upper()}, which is broken and proves nothing: sign it with SHA-256"
    if not csr.is_signature_valid:
        return "the CSR does not prove possession of its key: its signature is wrong"
    return None
