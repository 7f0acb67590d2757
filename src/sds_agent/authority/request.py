"""What the CAs that sign in process read from a request."""

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm

from sds_agent.authority.protocol import AuthorityError, ErrorKind
from sds_agent.pki.keys import PublicKey


def proven_key(csr_pem: bytes) -> PublicKey:
    """The key of a CSR (PEM) that was signed with it. Raises AuthorityError (invalid)."""
    try:
        csr = x509.load_pem_x509_csr(csr_pem)
        key = csr.public_key()
        proven = csr.is_signature_valid
    except (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature) as error:
        raise AuthorityError(ErrorKind.INVALID, "the CSR cannot be read") from error
    if not proven or not isinstance(key, PublicKey):
        raise AuthorityError(ErrorKind.INVALID, "the CSR does not prove possession of an EC or RSA key")
    return key
