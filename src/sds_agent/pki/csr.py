"""Certificate signing requests (PKCS#10, RFC 2986)."""

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from sds_agent.errors import SdsAgentError
from sds_agent.pki.keys import PrivateKey, PublicKey, signature_hash
from sds_agent.pki.strength import IN_REQUESTS

_BROKEN = frozenset({"md5", "sha1"})
"""Hashes for which forgeries are known. cryptography calls every signature with them wrong, without checking it."""


class CsrError(SdsAgentError):
    """A request is not to be signed; the message says why, to the one who sent it."""


def make_csr(key: PrivateKey, uri: str) -> bytes:
    """A request in PEM for a certificate whose one name is `uri` (ASCII).

    The subject is empty and the SAN therefore critical (RFC 5280 section 4.2.1.6). Nothing else is asked for: a CA sets
    usages and times by its own rules, and some CAs refuse a request that sets them.
    """
    names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(uri)])
    request = x509.CertificateSigningRequestBuilder(x509.Name([])).add_extension(names, critical=True)
    return request.sign(key, signature_hash(key)).public_bytes(Encoding.PEM)


def proven_key(csr_pem: bytes) -> PublicKey:
    """The key of a request (PEM) that was signed with it (RFC 2986 section 3). Raises CsrError.

    Its subject and extensions are not even parsed. A weak or giant key is refused before its signature costs anything.
    """
    try:
        csr = x509.load_pem_x509_csr(csr_pem)
        key = csr.public_key()
        if unfit := IN_REQUESTS.fault(key):
            raise CsrError(f"the CSR is for {unfit.found}: use {unfit.wanted}")
        assert isinstance(key, PublicKey), "the rule takes no other kind"  # noqa: S101 - for the type checker
        fault = _fault_of_possession(csr, key)
    except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature, x509.InvalidVersion) as error:
        raise CsrError("the CSR cannot be read, or is signed in a way that is not supported") from error
    if fault:
        raise CsrError(fault)
    return key


def _fault_of_possession(csr: x509.CertificateSigningRequest, key: PublicKey) -> str | None:
    """Why the request does not prove that its key was there, or None where it does.

    Raises what cryptography raises for a key or a signature that it cannot read.
    """
    try:
        digest = csr.signature_hash_algorithm
    except UnsupportedAlgorithm:
        algorithm = csr.signature_algorithm_oid.dotted_string
        return f"the CSR is signed by the algorithm {algorithm}, which is not supported: sign it with SHA-256"
    if digest is not None and digest.name in _BROKEN:
        return f"the CSR is signed with {digest.name.upper()}, which is broken and proves nothing: sign it with SHA-256"
    if not _is_signed(csr, key):
        return "the CSR does not prove possession of its key: its signature is wrong"
    return None


def _is_signed(csr: x509.CertificateSigningRequest, key: PublicKey) -> bool:
    """Whether the request's own key signed it. To make a key on a curve ready takes a fifth of a verification, so the
    one that is ready verifies.
    """
    scheme = csr.signature_algorithm_parameters
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(scheme, ec.ECDSA):
        return csr.is_signature_valid
    try:
        key.verify(csr.signature, csr.tbs_certrequest_bytes, scheme)
    except InvalidSignature:
        return False
    return True
