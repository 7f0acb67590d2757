"""A request to a CA that speaks HTTP, and its answer, as values."""

from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

from msgspec import Struct

from sds_agent.authority.answers import words
from sds_agent.authority.credentials import Token
from sds_agent.authority.protocol import AuthorityError, CurrentIdentity, ErrorKind
from sds_agent.values import Sensitive

LARGEST_ANSWER = 4 << 20
"""Bytes of an answer's body."""
LONGEST_LINE = 1 << 20
"""Bytes of one line of an answer that comes line by line."""
REQUEST_TIMEOUT = 408
"""A server, or a proxy before it, waited too long for the request: it may be sent again (RFC 9110 section 15.5.9)."""


def is_passing(status: int) -> bool:
    """Whether the server failed by itself, or that wait was too long: the same request may be answered later."""
    return status >= 500 or status == REQUEST_TIMEOUT


class CertificateRefusedError(AuthorityError):
    """The connection failed after our certificate was shown, and before an answer began.

    With TLS 1.3 a server that refuses a client's certificate ends the connection with an alert, an end of file or a
    reset, by chance; so each of them means that. It does so when the client's handshake has ended. One that ends in the
    handshake without an alert is TRANSIENT: behind a balancer that reaches no server each does, and of those that
    refuse a certificate one of TLS 1.2 may.
    """

    def __init__(self, message: str, kind: ErrorKind = ErrorKind.UNAUTHENTICATED) -> None:
        super().__init__(kind, message)


class HttpAnswer(Struct, frozen=True):
    """An answer of whatever status. The names in `headers` are in lower case; `host` is who answered, as HOST:PORT."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    host: str

    def retry_after(self, now: datetime) -> float | None:
        """The delay that the server asks for, in seconds (RFC 9110 section 10.2.3); None where it names none.

        A date counts by the server's own clock where the answer has one (Date), and else by ours, which is `now`.
        """
        value = self.headers.get("retry-after", "").strip()
        if value.isascii() and value.isdecimal():
            return float(value[:13]) or None if len(value) < 13 else None
        until = http_date(value)
        if until is None:
            return None
        delay = (until - (http_date(self.headers.get("date", "")) or now)).total_seconds()
        return delay if delay > 0 else None

    def words(self, *secret: Token) -> str:
        """The body as one short line for a message, without these secrets."""
        return words(self.body, *secret)


class HttpsRequest(Sensitive, frozen=True):
    """What to send. `url` is absolute; with https the roots in `roots` (PEM) vouch for the server, whose certificate is
    for `server_name`, or else for the URL's host. `certificate` is shown to a server that asks for one.
    """

    method: str
    url: str
    roots: bytes | None
    body: bytes = b""
    headers: Mapping[str, str] = {}
    server_name: str | None = None
    certificate: CurrentIdentity | None = None
    unverified: bool = False
    """Verify nothing about the server: only for an answer that is proved otherwise, such as by its own hash."""
    roots_from: tuple[str, str] = ("the roots in ca_file do", "put its CA's root there")
    """For the message where the roots do not vouch for the server: what they are, up to a verb, and what to do."""


def http_date(value: str) -> datetime | None:
    """The time in a header such as Date (RFC 9110 section 5.6.7); None for what is none."""
    with suppress(ValueError, TypeError, OverflowError):
        read = parsedate_to_datetime(value)
        return read if read.tzinfo is not None else read.replace(tzinfo=UTC)
    return None
