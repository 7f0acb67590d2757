"""The CA whose certificates a subject gives out: a root and an intermediate, and leaves that are right or wrong."""

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID

from sds_agent.pki.keys import KeyType, generate
from sds_agent.signing.signer import make_intermediate, make_root

LIFETIME = timedelta(hours=1)
BACKDATE = timedelta(minutes=2)

Chain = tuple[x509.Certificate, ...]
Sign = Callable[[x509.CertificateSigningRequest], Chain]


class SuiteCa:
    """Signs what the attribute `issue` says, `good` at first. `csrs` are the requests that came, in order.

    Leaves are valid by the clock that the attribute `now` reads.
    """

    def __init__(self, trust_domain: str = "demo.example") -> None:
        now = datetime.now(UTC)
        self.now: Callable[[], datetime] = lambda: datetime.now(UTC)
        self._root = make_root(generate(KeyType.EC_P256), trust_domain, now, timedelta(days=30))
        self._key = generate(KeyType.EC_P256)
        self._signer = make_intermediate(self._root, self._key, f"{trust_domain} signer", now, timedelta(days=20))
        self.root = self._root.certificate
        self.intermediate = self._signer.certificate
        self.csrs: list[x509.CertificateSigningRequest] = []
        self.issue: Sign = self.good

    def answer(self, csr_pem: bytes) -> Chain:
        """The certificates to answer this request with: a leaf and the intermediate, without the root."""
        csr = x509.load_pem_x509_csr(csr_pem)
        self.csrs.append(csr)
        return self.issue(csr)

    def good(self, csr: x509.CertificateSigningRequest) -> Chain:
        """What was asked for."""
        return self._chain(csr.public_key(), _names(csr))

    def empty(self, _: x509.CertificateSigningRequest) -> Chain:
        """No certificate at all."""
        return ()

    def for_another_key(self, csr: x509.CertificateSigningRequest) -> Chain:
        """A certificate for a key that the agent did not ask for."""
        return self._chain(generate(KeyType.EC_P256).public_key(), _names(csr))

    def without_name(self, csr: x509.CertificateSigningRequest) -> Chain:
        """A certificate without the SAN that was asked for."""
        return self._chain(csr.public_key(), None)

    def of_tomorrow(self, csr: x509.CertificateSigningRequest) -> Chain:
        """A certificate that is not valid yet."""
        return self._chain(csr.public_key(), _names(csr), timedelta(days=1))

    def expired(self, csr: x509.CertificateSigningRequest) -> Chain:
        """A certificate that has ended."""
        return self._chain(csr.public_key(), _names(csr), -timedelta(hours=2))

    def _chain(
        self,
        public_key: CertificatePublicKeyTypes,
        names: x509.SubjectAlternativeName | None,
        shift: timedelta = timedelta(),
    ) -> Chain:
        begin = self.now().replace(microsecond=0) - BACKDATE + shift
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(self.intermediate.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(begin + BACKDATE + LIFETIME)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]),
                critical=False,
            )
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        if names is not None:
            builder = builder.add_extension(names, critical=True)
        return (builder.sign(self._key, hashes.SHA256()), self.intermediate)


def _names(csr: x509.CertificateSigningRequest) -> x509.SubjectAlternativeName:
    return csr.extensions.get_extension_for_class(x509.SubjectAlternativeName).value


def _usage() -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=False,
        crl_sign=False,
        encipher_only=False,
        decipher_only=False,
    )
