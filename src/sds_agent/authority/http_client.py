"""One HTTP request to a CA: a connection of its own, a bounded answer, and failures in words.

Roots, tokens and certificates are read anew for every attempt, so nothing outlives one request that could remember an
old one. No redirect is followed and no proxy is used: the CA alone may see a token. There is no time limit here, as the
caller enforces its deadline by cancellation.
"""

import os
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, ParamSpec, TypeVar
from urllib.parse import urlsplit

import httpx
from msgspec import Struct

from sds_agent.authority.credentials import Token, read_certificates
from sds_agent.authority.protocol import AuthorityError, CurrentIdentity, ErrorKind
from sds_agent.pki import openssl
from sds_agent.pki.certificates import write_pem
from sds_agent.tasks import DISK_TIMEOUT, TimeLimit
from sds_agent.text import one_line
from sds_agent.values import Sensitive

T = TypeVar("T")
P = ParamSpec("P")

LARGEST_ANSWER = 4 << 20
"""Bytes of an answer's body."""
LONGEST_LINE = 1 << 20
"""Bytes of one line of an answer that comes line by line."""
LONGEST_WORDS = 300
"""Characters of a CA's own words in a message."""
SERVER_ROOTS = "the roots that vouch for the CA's server"
LONGEST_DELAY = 315_576_000_000.0
"""Seconds; a Retry-After that names more is no delay."""

_FAILURES = (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, ssl.SSLError, OSError, ValueError)


class CertificateRefusedError(AuthorityError):
    """The connection failed after our certificate was shown.

    With TLS 1.3 a server that refuses a client's certificate ends the connection with an alert, an end of file or a
    reset, by chance; so each of them means that.
    """

    def __init__(self, message: str) -> None:
        super().__init__(ErrorKind.UNAUTHENTICATED, message)


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
        until = _date(value)
        if until is None:
            return None
        delay = (until - (_date(self.headers.get("date", "")) or now)).total_seconds()
        return delay if delay > 0 else None

    def words(self, *secret: Token) -> str:
        """The body as one short line for a message, without these secrets."""
        text = self.body[: LARGEST_ANSWER >> 4].decode(errors="replace")
        for each in secret:
            text = each.removed_from(text)
        return one_line(text.strip(), LONGEST_WORDS)


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


async def send(request: HttpsRequest, what: str) -> HttpAnswer:
    """Send it and return the answer. `what` is the server for messages, such as "step-ca at https://ca.example:9000".

    Raises AuthorityError: TRANSIENT where no answer comes, INVALID for one that is larger than LARGEST_ANSWER, and
    CertificateRefusedError.
    """
    try:
        async with _response(request, what) as response:
            return _answer(response, request, await _body(response, what))
    except _FAILURES as error:
        # not chained: the library's errors may quote what was sent
        failure = _failure(error, request, what)
    raise failure


async def lines(request: HttpsRequest, what: str) -> AsyncGenerator[bytes | HttpAnswer, None]:
    """Send it and give each line of the answer as soon as it is there, without its line break and no empty one.

    For a server that goes on answering, as one does that is watched. An answer of another status than 200 comes whole,
    and alone. The connection ends with the iteration, so a caller that may stop early closes it (`aclosing`). Raises
    as `send` does; a line may be as long as LONGEST_LINE, and all of them together as LARGEST_ANSWER.
    """
    try:
        async with _response(request, what) as response:
            if response.status_code != 200:
                yield _answer(response, request, await _body(response, what))
                return
            async for line in _lines(response, what):
                yield line
            return
    except _FAILURES as error:
        # not chained, as above
        failure = _failure(error, request, what)
    raise failure


async def read_roots(disk: TimeLimit, file: Path | None) -> bytes | None:
    """The roots in `ca_file`, in PEM, as `HttpsRequest` takes them. Raises AuthorityError UNAUTHENTICATED."""
    return None if file is None else await read_files(disk, f"{SERVER_ROOTS} ({file})", roots_in, file)


async def read_files(disk: TimeLimit, what: str, read: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """What `read` gives, which reads the operator's files. Raises AuthorityError UNAUTHENTICATED, as `read` does, also
    where the disk does not answer.
    """
    try:
        return await disk.call(read, *arguments, **options)
    except TimeoutError as error:
        message = f"{what} cannot be read: {error.strerror}; check that the disk is there"
        raise AuthorityError(ErrorKind.UNAUTHENTICATED, message) from error


def roots_in(file: Path, what: str = SERVER_ROOTS) -> bytes:
    """The roots in a file, in PEM. Blocks on the disk. Raises AuthorityError UNAUTHENTICATED."""
    return write_pem(read_certificates(file, what).certificates)


def disk() -> TimeLimit:
    """Where an adapter reads its files: they may lie on a network disk that does not answer."""
    return TimeLimit(DISK_TIMEOUT)


def _context(request: HttpsRequest, what: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["http/1.1"])
    if request.unverified:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif request.roots is not None:
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # an anchor need not be self-signed
        openssl.trust_pem(context, request.roots)
    if request.certificate is not None:
        try:
            openssl.load_certificate(context, request.certificate.chain_pem + request.certificate.private_key_pem)
        except ssl.SSLError as error:
            raise AuthorityError(
                ErrorKind.UNAUTHENTICATED,
                f"OpenSSL does not load the certificate to show to {what} ({error.reason}); check its key and chain",
            ) from error
    return context


@asynccontextmanager
async def _response(request: HttpsRequest, what: str) -> AsyncIterator[httpx.Response]:
    """The answer, of which only the head has come."""
    connection = _RequestConnection()
    async with (
        connection,
        httpx.AsyncClient(verify=_context(request, what), trust_env=False, timeout=None) as client,  # noqa: S113 - the caller has a deadline
        client.stream(
            request.method,
            request.url,
            content=request.body or None,
            headers={"accept-encoding": "identity", **request.headers},
            extensions=(
                {"trace": connection.note}
                | ({} if request.server_name is None else {"sni_hostname": request.server_name})
            ),
        ) as response,
    ):
        yield response


class _RequestConnection(AbstractAsyncContextManager["_RequestConnection"]):
    """Closes the connection of a request at the end of the context.

    httpx does so too, but not where the request is cancelled during the TLS handshake: the socket would stay open for
    as long as it takes the garbage collector to find it.
    """

    def __init__(self) -> None:
        self._streams: list[Any] = []

    async def note(self, name: str, info: Mapping[str, Any]) -> None:
        """httpx tells what it does (https://www.python-httpx.org/advanced/extensions/#trace)."""
        if name == "connection.connect_tcp.complete":
            self._streams.append(info["return_value"])

    async def __aexit__(self, *_: object) -> None:
        for stream in self._streams:
            await stream.aclose()


def _answer(response: httpx.Response, request: HttpsRequest, body: bytes) -> HttpAnswer:
    headers = {name.lower(): value for name, value in response.headers.items()}
    return HttpAnswer(response.status_code, headers, body, urlsplit(request.url).netloc)


async def _body(response: httpx.Response, what: str) -> bytes:
    received = bytearray()
    async for chunk in response.aiter_raw():
        received += chunk
        if len(received) > LARGEST_ANSWER:
            raise _too_large(f"the answer of {what}", LARGEST_ANSWER)
    return bytes(received)


async def _lines(response: httpx.Response, what: str) -> AsyncIterator[bytes]:
    begun = bytearray()
    total = 0
    async for chunk in response.aiter_raw():
        total += len(chunk)
        if total > LARGEST_ANSWER:
            raise _too_large(f"the answer of {what}", LARGEST_ANSWER)
        first, *others = chunk.split(b"\n")
        begun += first
        for each in others:
            if begun.strip():
                yield bytes(begun)
            begun = bytearray(each)
        if len(begun) > LONGEST_LINE:
            raise _too_large(f"a line in the answer of {what}", LONGEST_LINE)
    if begun.strip():
        yield bytes(begun)


def _too_large(what: str, most: int) -> AuthorityError:
    return AuthorityError(ErrorKind.INVALID, f"{what} is larger than {most} bytes; check that it is the CA")


def _failure(error: BaseException, request: HttpsRequest, what: str) -> AuthorityError:
    causes = list(_causes(error))
    for each in causes:
        if isinstance(each, ssl.SSLCertVerificationError):
            return AuthorityError(ErrorKind.TRANSIENT, _distrust(each, request, what))
    # httpx gives an end of file and a reset as errors of its own, without what caused them
    broken = isinstance(error, httpx.ReadError | httpx.RemoteProtocolError | httpx.WriteError) or any(
        isinstance(each, ssl.SSLError | ConnectionResetError | BrokenPipeError) for each in causes
    )
    reason = _reason(causes)
    if broken and request.certificate is not None:
        return CertificateRefusedError(
            f"{what} ended the connection after the agent showed its certificate ({reason}); it may have expired, be "
            "revoked, or come from another CA"
        )
    if broken:
        return AuthorityError(ErrorKind.TRANSIENT, f"{what} ended the connection without a whole answer ({reason})")
    return AuthorityError(
        ErrorKind.TRANSIENT, f"{what} cannot be reached ({reason}); check that it runs at this address"
    )


def _distrust(error: ssl.SSLCertVerificationError, request: HttpsRequest, what: str) -> str:
    if error.verify_code in _WRONG_NAME:
        name = request.server_name or urlsplit(request.url).hostname
        return f"the certificate of {what} is not for {name} ({_said(error.verify_message)}); set server_name"
    if error.verify_code == _EXPIRED:
        return f"the certificate of {what} has expired, or this machine's clock is ahead; renew it, or set the clock"
    roots, fix = request.roots_from
    return f"{roots} not vouch for the certificate of {what} ({_said(error.verify_message)}); {fix}"


_WRONG_NAME = frozenset({62, 64})
"""X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH (openssl/x509_vfy.h)."""
_EXPIRED = 10
"""X509_V_ERR_CERT_HAS_EXPIRED (openssl/x509_vfy.h)."""


def _causes(error: BaseException | None) -> Iterable[BaseException]:
    seen = set[int]()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _reason(causes: list[BaseException]) -> str:
    """What the deepest cause with words of the system's or OpenSSL's says; no URL and no header."""
    for each in reversed(causes):
        if isinstance(each, ssl.SSLError) and each.reason:
            return _said(each.reason.replace("_", " ").lower())
        if isinstance(each, OSError) and each.strerror:
            return _said(os.strerror(each.errno) if each.errno and each.errno > 0 else each.strerror)
    return _CLAUSES.get(type(causes[0]).__name__, type(causes[0]).__name__)


_CLAUSES = {
    "ConnectError": "no connection",
    "ReadError": "the connection was cut",
    "RemoteProtocolError": "it is no HTTP, or was cut off",
    "InvalidURL": "its address is no URL",
}


def _said(text: str) -> str:
    return one_line(text, LONGEST_WORDS)


def _date(value: str) -> datetime | None:
    with suppress(ValueError, TypeError, OverflowError):
        read = parsedate_to_datetime(value)
        return read if read.tzinfo is not None else read.replace(tzinfo=UTC)
    return None
