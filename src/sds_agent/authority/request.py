"""What the CAs that sign in process read from a request."""

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm

from sds_agent.authority.protocol import AuthorityError, ErrorKind
from sds_agent.pki.csr import fault_of_possession
from sds_agent.pki.keys import PublicKey


def proven_key(csr_pem: bytes) -> PublicKey:
    """The key of a CSR (PEM) that was signed with it. Raises AuthorityError (invalid)."""
    try:
        csr = x509.load_pem_x509_csr(csr_pem)
        key = csr.public_key()
        fault = fault_of_possession(csr)
    except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature) as error:
        raise AuthorityError(ErrorKind.INVALID, "the CSR cannot be read") from error
    if fault:
        raise AuthorityError(ErrorKind.INVALID, fault)
    if not isinstance(key, PublicKey):
        raise AuthorityError(ErrorKind.INVALID, "the CSR is for a key that is neither an EC nor an RSA key")
    return key
