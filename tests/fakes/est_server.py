"""Stands in for an EST server (RFC 7030), over real TLS, with the refusals that the RFC names.

No registry has an EST server. This one was written from the RFC, and its words are those of globalsign's server 1.0.6.
"""

import base64
import binascii
from collections.abc import Sequence

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from fakes.https_server import HttpsServer, Reply, Request

from sds_agent.conformance import SuiteCa
from sds_agent.pki.certificates import is_self_signed, san_values

USER, PASSWORD = "agent", "wonderful-password"
CHANGED = "Subject and SubjectAltName fields in CSR must be identical to certificate being renewed"
_SIGNED_DATA = bytes.fromhex("06092a864886f70d010702")
_DATA = bytes.fromhex("06092a864886f70d010701")


def tlv(tag: int, *content: bytes) -> bytes:
    """One value in DER."""
    body = b"".join(content)
    size = len(body).to_bytes((len(body).bit_length() + 7) // 8 or 1, "big")
    return bytes([tag]) + (size if len(body) < 0x80 else bytes([0x80 | len(size)]) + size) + body


def certs_only(certificates: Sequence[x509.Certificate]) -> bytes:
    """A PKCS#7 message of these certificates in just this order, as OpenSSL writes it: no SET of DER's."""
    parts = [tlv(0x02, b"\x01"), tlv(0x31), tlv(0x30, _DATA)]
    if certificates:
        parts.append(tlv(0xA0, *(each.public_bytes(Encoding.DER) for each in certificates)))
    return tlv(0x30, _SIGNED_DATA, tlv(0xA0, tlv(0x30, *parts, tlv(0x31))))


def pkcs7(certificates: Sequence[x509.Certificate]) -> Reply:
    """An answer: base64 in lines that end in CRLF."""
    body = base64.encodebytes(certs_only(certificates)).replace(b"\n", b"\r\n")
    return Reply(200, body, {"content-type": "application/pkcs7-mime", "content-transfer-encoding": "base64"})


def refusal(status: int, words: str, **headers: str) -> Reply:
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Reply(status, f"{words}\n".encode(), {"content-type": "text/plain; charset=utf-8", **named})


UNAUTHORIZED = refusal(401, "authorization required", www_authenticate='Basic realm="estserver@localhost"')


class EstServer:
    """Signs with `ca`, for the user USER and for clients with a certificate of `clients` or of the CA's own.

    `label` is the only label there is, if any. `approvals` are answers of 202 before a certificate comes.
    `renewals_need_the_password` is whether it takes no certificate alone; `cacerts` is what it tells.
    """

    def __init__(self, ca: SuiteCa | None = None) -> None:
        self.ca = ca or SuiteCa()
        self.http = HttpsServer(self.answer)
        self.http.trust = (self.ca.root, self.ca.intermediate)
        self.label: str | None = None
        self.approvals = 0
        self.renewals_need_the_password = False
        self.cacerts: list[x509.Certificate] = [self.ca.intermediate, self.ca.root]
        self.replies: dict[str, Reply] = {}

    @property
    def operations(self) -> list[str]:
        """What was asked for, in order, without cacerts."""
        names = [each.path.rpartition("/")[2] for each in self.http.requests]
        return [each for each in names if each != "cacerts"]

    async def answer(self, request: Request) -> Reply | bytes | None:
        prefix = "/.well-known/est/" if self.label is None else f"/.well-known/est/{self.label}/"
        if not request.path.startswith(prefix):
            return refusal(404, "404 page not found")
        operation = request.path.removeprefix(prefix)
        if operation in self.replies:
            return self.replies[operation]
        if operation == "cacerts":
            return pkcs7(self.cacerts)
        if operation not in {"simpleenroll", "simplereenroll"}:
            return refusal(404, "404 page not found")
        return self.enroll(request, renew=operation == "simplereenroll")

    def enroll(self, request: Request, *, renew: bool) -> Reply:
        if (refused := self.refusal(request, renew=renew)) is not None:
            return refused
        csr = _csr(request)
        if csr is None:
            return refusal(400, "malformed PKCS10 certificate signing request")
        if renew and request.certificate is not None and self.changed(csr, request.certificate):
            return refusal(403, CHANGED)
        if self.approvals:
            self.approvals -= 1
            return refusal(202, "waiting for an approval", retry_after="3")
        chain = self.ca.answer(csr.public_bytes(Encoding.PEM))
        return pkcs7(chain[:1])  # the leaf alone

    def refusal(self, request: Request, *, renew: bool) -> Reply | None:
        """What keeps the request from being read."""
        if request.headers.get("content-type") != "application/pkcs10":
            return refusal(415, "Content-Type must be application/pkcs10")
        basic = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        known = request.headers.get("authorization") == f"Basic {basic}"
        if not known and (request.certificate is None or (renew and self.renewals_need_the_password)):
            return UNAUTHORIZED
        if renew and request.certificate is None:
            return refusal(403, "client certificate must be provided for /simplereenroll")
        return None

    def changed(self, csr: x509.CertificateSigningRequest, current: x509.Certificate) -> bool:
        asked = csr.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        return (csr.subject, tuple(asked)) != (current.subject, san_values(current))

    @property
    def roots(self) -> tuple[x509.Certificate, ...]:
        return tuple(each for each in self.cacerts if is_self_signed(each))


def _csr(request: Request) -> x509.CertificateSigningRequest | None:
    try:
        return x509.load_der_x509_csr(base64.b64decode(b"".join(request.body.split()), validate=True))
    except (binascii.Error, ValueError):
        return None
