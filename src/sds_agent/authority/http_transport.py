"""How a request to a CA goes over the wire, with httpx, and what its failures mean.

It stands apart from `http_client`, whose values every adapter has: importing httpx takes as long as all the rest of the
way to the first secret, and an agent that serves a certificate from its disk asks no CA before that.
"""

import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

import httpx

from sds_agent.authority.answers import LONGEST_WORDS
from sds_agent.authority.http_message import (
    LARGEST_ANSWER,
    LONGEST_LINE,
    CertificateRefusedError,
    HttpAnswer,
    HttpsRequest,
)
from sds_agent.authority.protocol import AuthorityError, CurrentIdentity, ErrorKind
from sds_agent.pki import openssl
from sds_agent.text import one_line

MOST_CONTEXTS = 4
"""Ways to verify a server, and to show a certificate, that are kept for the next request."""
_FAILURES = (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, ssl.SSLError, OSError, ValueError)


async def send(request: HttpsRequest, what: str) -> HttpAnswer:
    """As `http_client.send`."""
    connection = _RequestConnection()
    try:
        async with _response(request, what, connection) as response:
            return _answer(response, request, await _body(response, what))
    except _FAILURES as error:
        # not chained: the library's errors may quote what was sent
        failure = _failure(error, request, what, connection)
    raise failure


async def lines(request: HttpsRequest, what: str) -> AsyncGenerator[bytes | HttpAnswer, None]:
    """As `http_client.lines`."""
    connection = _RequestConnection()
    try:
        async with _response(request, what, connection) as response:
            if response.status_code != 200:
                yield _answer(response, request, await _body(response, what))
                return
            async for line in _lines(response, what):
                yield line
            return
    except _FAILURES as error:
        # not chained, as above
        failure = _failure(error, request, what, connection)
    raise failure


def _context(request: HttpsRequest, what: str) -> ssl.SSLContext:
    try:
        return _tls(request.roots, request.certificate, unverified=request.unverified)
    except ssl.SSLError as error:
        raise AuthorityError(
            ErrorKind.UNAUTHENTICATED,
            f"OpenSSL does not load the certificate to show to {what} ({error.reason}); check its key and chain",
        ) from error


@lru_cache(MOST_CONTEXTS)
def _tls(roots: bytes | None, certificate: CurrentIdentity | None, *, unverified: bool) -> ssl.SSLContext:
    """As `HttpsRequest` has these. Raises ssl.SSLError.

    To read the roots that a system trusts takes longer than all else of a request, and holds up the event loop.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.set_alpn_protocols(["http/1.1"])
    if unverified:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    elif roots is not None:
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # an anchor need not be self-signed
        openssl.trust_pem(context, roots)
    if certificate is not None:
        openssl.load_certificate(context, certificate.chain_pem + certificate.private_key_pem)
    return context


@asynccontextmanager
async def _response(
    request: HttpsRequest, what: str, connection: "_RequestConnection"
) -> AsyncIterator[httpx.Response]:
    """The answer, of which only the head has come."""
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
        connection.is_answered = True
        yield response


class _RequestConnection(AbstractAsyncContextManager["_RequestConnection"]):
    """Closes the connection of a request at the end of the context.

    httpx does so too, but not where the request is cancelled during the TLS handshake: the socket would stay open for
    as long as it takes the garbage collector to find it.
    """

    def __init__(self) -> None:
        self.is_secured = False
        """Whether its TLS handshake has ended well."""
        self.is_answered = False
        """Whether an answer has begun."""
        self._streams: list[Any] = []

    async def note(self, name: str, info: Mapping[str, Any]) -> None:
        """httpx tells what it does (https://www.python-httpx.org/advanced/extensions/#trace)."""
        if name == "connection.connect_tcp.complete":
            self._streams.append(info["return_value"])
        self.is_secured |= name == "connection.start_tls.complete"

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


def _failure(error: BaseException, request: HttpsRequest, what: str, connection: _RequestConnection) -> AuthorityError:
    """What an error of this connection means."""
    causes = openssl.causes_of(error)
    for each in causes:
        if isinstance(each, ssl.SSLCertVerificationError):
            return AuthorityError(ErrorKind.TRANSIENT, _distrust(each, request, what))
    # httpx gives an end of file and a reset as errors of its own, without what caused them
    broken = isinstance(error, httpx.ReadError | httpx.RemoteProtocolError | httpx.WriteError) or any(
        isinstance(each, ssl.SSLError | ConnectionResetError | BrokenPipeError) for each in causes
    )
    reason = _said(openssl.words_of(causes))
    if broken and request.certificate is not None and not connection.is_answered:
        if connection.is_secured or any(isinstance(each, ssl.SSLError) and _is_alert(each) for each in causes):
            return CertificateRefusedError(
                f"{what} ended the connection after the agent showed its certificate ({reason}); it may have expired, "
                "be revoked, or come from another CA"
            )
        return CertificateRefusedError(
            f"{what} ended the connection in the TLS handshake ({reason}); check that it runs, and what is before it; "
            "where it goes on, it may refuse the agent's certificate",
            ErrorKind.TRANSIENT,
        )
    if broken:
        return AuthorityError(ErrorKind.TRANSIENT, f"{what} ended the connection without a whole answer ({reason})")
    return AuthorityError(
        ErrorKind.TRANSIENT, f"{what} cannot be reached ({reason}); check that it runs at this address"
    )


def _is_alert(error: ssl.SSLError) -> bool:
    """Whether the other side said why it ended the connection (RFC 8446 section 6.2)."""
    return "ALERT" in (error.reason or "")


def _distrust(error: ssl.SSLCertVerificationError, request: HttpsRequest, what: str) -> str:
    if error.verify_code in _WRONG_NAME:
        name = request.server_name or urlsplit(request.url).hostname
        return f"the certificate of {what} is not for {name} ({_said(error.verify_message)}); set server_name"
    if fault := openssl.fault_of_server(error, f"the certificate of {what}"):
        return fault
    roots, fix = request.roots_from
    return f"{roots} not vouch for the certificate of {what} ({_said(error.verify_message)}); {fix}"


_WRONG_NAME = frozenset({62, 64})
"""X509_V_ERR_HOSTNAME_MISMATCH and X509_V_ERR_IP_ADDRESS_MISMATCH (openssl/x509_vfy.h)."""


def _said(text: str) -> str:
    return one_line(text, LONGEST_WORDS)
