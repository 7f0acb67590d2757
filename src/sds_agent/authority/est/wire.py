"""EST's requests and answers as values (RFC 7030, with RFC 8951's corrections), and what its refusals mean."""

import base64
import binascii
from collections.abc import Mapping

from msgspec import Struct

from sds_agent.authority.answers import status_and
from sds_agent.authority.credentials import Token
from sds_agent.authority.http_message import is_passing
from sds_agent.authority.protocol import AuthorityError, ErrorKind
from sds_agent.pki.certificates import CertificateError, is_self_signed, read_bundle, write_beside, write_pem
from sds_agent.pki.pem import blocks
from sds_agent.pki.pkcs7 import Pkcs7Error, certificates_pem

CACERTS, ENROLL, REENROLL = "cacerts", "simpleenroll", "simplereenroll"
_CSR_LABELS = frozenset({b"CERTIFICATE REQUEST"})


class BasicCredentials(Struct, frozen=True):
    """A user's name and password."""

    username: str
    password: Token

    @property
    def header(self) -> Token:
        """The Authorization header (RFC 7617)."""
        return Token(f"Basic {base64.b64encode(f'{self.username}:{self.password.text}'.encode()).decode('ascii')}")

    @property
    def secrets(self) -> tuple[Token, ...]:
        """What must not be quoted."""
        return self.password, Token(self.header.text.removeprefix("Basic "))


class EstCaCertificates(Struct, frozen=True):
    """The answer to cacerts, in PEM: the roots with what cannot be read, and what is between them and a certificate."""

    roots: bytes
    others: bytes


def path(label: str | None, operation: str) -> str:
    """The path of an operation (RFC 7030 section 3.2.2)."""
    return "/".join(["/.well-known/est", *([] if label is None else [label]), operation])


def enroll_headers(basic: BasicCredentials | None) -> Mapping[str, str]:
    """The headers of a request for a certificate.

    RFC 8951 gives Content-Transfer-Encoding up, and there are servers that insist on it.
    """
    content = {"content-type": "application/pkcs10", "content-transfer-encoding": "base64"}
    return content if basic is None else {**content, "authorization": basic.header.text}


def enroll_body(csr_pem: bytes) -> bytes:
    """The CSR as base64 of its DER, in lines (RFC 7030 section 4.2.1)."""
    (block,) = blocks(csr_pem, _CSR_LABELS)
    return base64.encodebytes(block.der()).replace(b"\n", b"\r\n")


def read_certificates(body: bytes, operation: str) -> bytes:
    """The certificates of an answer, in PEM. Raises AuthorityError INVALID."""
    try:
        found = certificates_pem(base64.b64decode(b"".join(body.split()), validate=True))
    except (binascii.Error, Pkcs7Error) as error:
        reason = str(error) if isinstance(error, Pkcs7Error) else "it is not base64"
        raise _unusable(operation, reason, "check that the server at url speaks EST, and label") from error
    if not found:
        raise _unusable(operation, "it holds no certificate", "read the server's own log")
    return found


def read_cacerts(body: bytes) -> EstCaCertificates:
    """The answer to cacerts. Raises AuthorityError INVALID.

    The self-signed ones are roots; a root's key may be replaced by certificates of the old key for the new one and the
    other way round, which are not (RFC 7030 section 4.1.3).
    """
    try:
        reading = read_bundle(read_certificates(body, CACERTS))
    except CertificateError as error:
        raise _unusable(CACERTS, str(error), "read the server's own log") from error
    found = reading.certificates
    roots = [each for each in found if is_self_signed(each)]
    told = write_beside(roots, reading.unread.values()) if roots else b""
    return EstCaCertificates(told, write_pem(each for each in found if each not in roots))


def refused(status: int, words: str, operation: str, offered: str = "") -> AuthorityError:
    """What an answer means that is no success (RFC 7030 section 4.2.3): its status and words, and the ways to
    authenticate that it offers (WWW-Authenticate).
    """
    said = status_and(words, status)
    if status == 202:
        message = f"the EST server waits for an approval of the request ({said}); approve it there"
        return AuthorityError(ErrorKind.PENDING, message)
    kind, fix = _meaning(status, operation, offered)
    return AuthorityError(kind, f"the EST server refused {operation} ({said}); {fix}")


def after_renewal(refusal: AuthorityError, not_renewed: str) -> AuthorityError:
    """The refusal to enroll, with the reason why the agent did not renew, if it tried."""
    if not not_renewed or refusal.kind is ErrorKind.PENDING:
        return refusal
    reason = not_renewed.rpartition("; ")[0]
    return AuthorityError(refusal.kind, f"{reason}, and {refusal}", retry_after=refusal.retry_after)


def _meaning(status: int, operation: str, offered: str) -> tuple[ErrorKind, str]:
    if status == 401 and offered and "basic" not in offered.lower():
        return ErrorKind.UNAUTHENTICATED, "it offers no Basic authentication: use certificate_file and key_file"
    if status == 403 and operation == REENROLL:
        return ErrorKind.DENIED, "it renews for the same subject and SAN alone, and with a certificate of its own CA"
    if status in _MEANINGS:
        return _MEANINGS[status]
    if is_passing(status):
        return ErrorKind.TRANSIENT, "read the server's own log"
    return ErrorKind.INVALID, "check url, and that the server speaks EST"


_MEANINGS = {
    204: (ErrorKind.INVALID, "it has nothing to answer with: read the server's own log"),
    400: (ErrorKind.INVALID, "check what its policy wants of a request, and the workload's key"),
    401: (ErrorKind.UNAUTHENTICATED, "check username and the password in password_file, or the client certificate"),
    403: (ErrorKind.DENIED, "let its policy give this user or client certificate the workload's SPIFFE ID"),
    404: (ErrorKind.INVALID, "check url and label"),
    415: (ErrorKind.INVALID, "EST's requests are application/pkcs10: check that nothing in between changes them"),
    429: (ErrorKind.THROTTLED, "it is asked less often from now on"),
    501: (ErrorKind.INVALID, "it does not offer this operation"),
}


def _unusable(operation: str, reason: str, fix: str) -> AuthorityError:
    return AuthorityError(ErrorKind.INVALID, f"the EST server's answer to {operation} cannot be used: {reason}; {fix}")
