"""A certificate chain and its key from the texts of two files, or of one: checked to belong together.

The leaf is the first certificate that has the key. In the chain it comes first, as TLS wants it (RFC 8446 section
4.4.2), and self-signed certificates behind it are left out: a peer has its own roots.
"""

from cryptography import x509

from sds_agent.errors import Problem, SdsAgentError
from sds_agent.pki.certificates import CertificateError, describe, has_key, is_self_signed, read_bundle, unique
from sds_agent.pki.forms import without_certificate
from sds_agent.pki.keyfile import KeyFileError, read_private_key
from sds_agent.pki.keys import PrivateKey
from sds_agent.values import Sensitive

CERTIFICATE, KEY = "certificate", "key"
"""The places of a problem."""


class PairError(SdsAgentError):
    """The texts hold no certificate with its key. The place of `problem` is CERTIFICATE or KEY; it holds no secret."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


class Pair(Sensitive, frozen=True):
    """A chain, the leaf first, and the leaf's key. `left_out` says of each certificate that cannot be used why."""

    chain: tuple[x509.Certificate, ...]
    key: PrivateKey
    left_out: tuple[str, ...] = ()

    @property
    def leaf(self) -> x509.Certificate:
        """The certificate of the key."""
        return self.chain[0]


def read_pair_of(chain_text: bytes, key_text: bytes, passphrase: bytes | None = None) -> Pair:
    """The chain and the key in these texts (PEM), which may be one and the same. Raises PairError."""
    try:
        key = read_private_key(key_text, passphrase)
    except KeyFileError as error:
        raise PairError(error.problem.within(KEY)) from error
    try:
        read = read_bundle(chain_text)
    except CertificateError as error:
        problem = Problem((CERTIFICATE,), f"cannot be read: {error}", "write the right certificates there")
        raise PairError(problem) from error
    if not read.certificates:
        raise PairError(without_certificate(chain_text, "the certificate and its intermediates").within(CERTIFICATE))
    leaf = next((each for each in read.certificates if has_key(each, key.public_key())), None)
    if leaf is None:
        raise PairError(_foreign(read.certificates, read.left_out))
    others = (each for each in unique(read.certificates) if each != leaf and not is_self_signed(each))
    return Pair((leaf, *others), key, read.left_out)


def _foreign(certificates: tuple[x509.Certificate, ...], left_out: tuple[str, ...]) -> Problem:
    found = f"is for {describe(certificates[0])}, and no certificate in it has the key"
    besides = f" (left out: {'; '.join(left_out)})" if left_out else ""
    return Problem((CERTIFICATE,), f"{found}{besides}", "write the certificate and the key of one request")
