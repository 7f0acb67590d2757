"""A stand-in for CAs that speak HTTP: real TLS on loopback, and one function that answers every request.

The function may give bytes of any kind, close, or be silent, as a CA may that is broken or hostile.
"""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from ipaddress import ip_address
from typing import Any

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from fakes.hierarchy import Ca, make_ca, make_leaf

from sds_agent.pki import openssl
from sds_agent.pki.certificates import write_pem
from sds_agent.pki.keys import to_pkcs8_pem

DAY = timedelta(days=1)


@dataclass(frozen=True)
class Request:
    """What a client sent. The names of `headers` are in lower case; `certificate` is the client's, if it showed one."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    certificate: x509.Certificate | None = None

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass(frozen=True)
class Reply:
    """An answer."""

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def wire(self) -> bytes:
        phrase = HTTPStatus(self.status).phrase if self.status in set(HTTPStatus) else "Unknown"
        headers = {"content-length": str(len(self.body)), "connection": "close", **self.headers}
        lines = [f"HTTP/1.1 {self.status} {phrase}", *(f"{name}: {value}" for name, value in headers.items())]
        return "\r\n".join(lines).encode() + b"\r\n\r\n" + self.body


def json_reply(value: object, status: int = 200, **headers: str) -> Reply:
    """An answer in JSON."""
    content = {"content-type": "application/json", **{name.replace("_", "-"): each for name, each in headers.items()}}
    return Reply(status, json.dumps(value).encode(), content)


@dataclass(frozen=True)
class GoingOn(Reply):
    """An answer that goes on: each part is sent when it is there, and the connection ends after the last."""

    parts: AsyncIterator[bytes] = field(kw_only=True)


Answer = Callable[[Request], Awaitable[Reply | bytes | None]]
"""What to answer: a reply, raw bytes after which the connection ends, or None to close it at once."""
CHUNKED = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
"""The head of an answer that goes on."""


def chunk(data: bytes) -> bytes:
    """One part of it; an empty one ends it."""
    return b"%x\r\n%s\r\n" % (len(data), data)


class HttpsServer:
    """A server on a port of its own. `answer` may be exchanged while it runs; `requests` are all that came.

    `trust` are the CAs of clients' certificates; with them it asks for one, and with `require` insists on it.
    """

    def __init__(self, answer: Answer, *, names: tuple[str, ...] = ("127.0.0.1", "localhost")) -> None:
        now = datetime.now(UTC)
        self.answer = answer
        self.requests: list[Request] = []
        self.ca: Ca = make_ca("server root", not_before=now - DAY, not_after=now + DAY)
        self.names = names
        self.validity = (now - DAY, now + DAY)
        self.usages = (ExtendedKeyUsageOID.SERVER_AUTH,)
        self.trust: tuple[x509.Certificate, ...] = ()
        self.require = False
        self.connections = 0
        self.port = 0

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self.port}"

    @property
    def roots_pem(self) -> bytes:
        """What vouches for it."""
        return write_pem([self.ca.certificate])

    @asynccontextmanager
    async def serving(self, *, port: int = 0, plaintext: bool = False) -> AsyncIterator["HttpsServer"]:
        """Serve inside this context; connections that are open at its end are cut."""
        open_ones: set[asyncio.Task[None]] = set()

        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            open_ones.add(task)
            self.connections += 1
            try:
                await self._serve(reader, writer)
            except (ConnectionError, ssl.SSLError, asyncio.IncompleteReadError, asyncio.CancelledError):
                pass
            finally:
                open_ones.discard(task)
                writer.transport.abort()

        context = None if plaintext else self.context()
        server = await asyncio.start_server(connected, "127.0.0.1", port, ssl=context)
        self.port = server.sockets[0].getsockname()[1]
        try:
            yield self
        finally:
            server.close()
            for task in tuple(open_ones):
                task.cancel()
            if open_ones:
                await asyncio.wait(tuple(open_ones))
            with suppress(TimeoutError):
                async with asyncio.timeout(5):
                    await server.wait_closed()

    def context(self) -> ssl.SSLContext:
        """The TLS of a connection, made of what the attributes say now."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        names = [_general_name(name) for name in self.names]
        begin, end = self.validity
        key = self.ca.key
        leaf = make_leaf(self.ca, None, key=key, names=names, usages=self.usages, not_before=begin, not_after=end)
        openssl.load_certificate(context, write_pem([leaf]) + to_pkcs8_pem(key))  # type: ignore[arg-type]  # a CA's key is one of ours
        if self.trust:
            context.verify_mode = ssl.CERT_REQUIRED if self.require else ssl.CERT_OPTIONAL
            openssl.trust(context, self.trust)
        return context

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        first, *lines = head.split("\r\n")
        method, path, _ = first.split(" ", 2)
        headers = {name.lower(): value.strip() for line in lines if line for name, _, value in [line.partition(":")]}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        request = Request(method, path, headers, body, _certificate(writer))
        self.requests.append(request)
        reply = await self.answer(request)
        if reply is not None:
            parts = (
                reply.parts if isinstance(reply, GoingOn) else _one(reply if isinstance(reply, bytes) else reply.wire)
            )
            async for part in parts:
                writer.write(part)
                await writer.drain()
            writer.close()
            with suppress(ConnectionError, ssl.SSLError, TimeoutError):
                await writer.wait_closed()


async def _one(part: bytes) -> AsyncIterator[bytes]:
    yield part


def _certificate(writer: asyncio.StreamWriter) -> x509.Certificate | None:
    secured = writer.get_extra_info("ssl_object")
    der = None if secured is None else secured.getpeercert(binary_form=True)
    return None if der is None else x509.load_der_x509_certificate(der)


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        return x509.DNSName(name)
