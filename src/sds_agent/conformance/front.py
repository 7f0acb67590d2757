"""A server between an adapter and its CA: it passes the bytes on, or behaves as a broken or hostile CA may.

All is real: sockets on loopback, and TLS where the fault lies behind the handshake.
"""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime, timedelta
from enum import Enum
from ipaddress import ip_address
from typing import ClassVar, TypeAlias

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID

from sds_agent.conformance.subject import Address
from sds_agent.pki import openssl
from sds_agent.pki.certificates import write_pem
from sds_agent.pki.keys import KeyType, generate, to_pkcs8_pem
from sds_agent.signing.signer import make_root

HUGE = 100 << 20
"""Bytes of the largest answer that a hostile CA sends."""
RETRY_AFTER = 3600
"""Seconds that a busy CA asks its callers to wait."""
_CHUNK = 64 << 10
_LARGEST_HEAD = 1 << 20

Reader: TypeAlias = asyncio.StreamReader
Writer: TypeAlias = asyncio.StreamWriter


class Fault(Enum):
    """What the front does in place of the CA. The value says it for people."""

    REFUSES = "refuses the connection"
    SILENT = "accepts and is silent"
    SILENT_BEHIND_TLS = "completes the TLS handshake and is silent"
    DRIPS = "sends one byte after another, without an end"
    CLOSES = "closes after the request"
    GARBAGE = "answers with bytes of no protocol"
    UNTRUSTED = "has a certificate of another root"
    EXPIRED = "has an expired certificate"
    ANOTHER_HOST = "has a certificate for another host"
    # of CAs that speak HTTP:
    CUT_OFF = "closes in the middle of its answer"
    NONSENSE = "answers 200 with garbage"
    EMPTY = "answers 200 without a body"
    HUGE = "answers 200 with 100 MB"
    REDIRECT = "redirects to another host"
    THROTTLED = "answers 429 with Retry-After"
    UNAVAILABLE = "answers 503 with Retry-After"
    FAILING = "answers 500"


BEFORE_HTTP = tuple(Fault)[: tuple(Fault).index(Fault.CUT_OFF)]
"""The faults of any server on TCP."""


class Front:
    """A server on one port of loopback. `fault` says what it does with the next connection; None passes it on.

    `connected` is set at each connection, `left` when the other side has ended one that the front holds open. `tasks`
    serve the connections. `redirected` counts the connections to the host that REDIRECT names, `sent` the bytes of a
    HUGE answer, and `believed` those that came although the certificate is one to refuse.
    """

    def __init__(self, behind: Address) -> None:
        earlier = datetime.now(UTC) - timedelta(hours=3)  # so that it can issue what has expired
        self.fault: Fault | None = None
        self.connected = asyncio.Event()
        self.left = asyncio.Event()
        self.redirected = 0
        self.sent = 0
        self.believed = 0
        self.port = 0
        self._behind = behind
        self._root = make_root(generate(KeyType.EC_P256), "conformance", earlier, timedelta(days=1))
        self._stranger = make_root(generate(KeyType.EC_P256), "stranger", earlier, timedelta(days=1))
        self._contexts: dict[Fault | None, ssl.SSLContext] = {}
        self._elsewhere = 0
        self._server: asyncio.Server | None = None
        self.tasks = set[asyncio.Task[None]]()

    @property
    def address(self) -> Address:
        """Where an adapter finds it; the CA's roots count too."""
        return Address(self.port, write_pem([self._root.certificate]) + self._behind.roots_pem)

    @asynccontextmanager
    async def serving(self) -> AsyncIterator["Front"]:
        """Serve inside this context; at its end the connections are cut."""
        other = await asyncio.start_server(self._moved, "127.0.0.2", 0)
        self._elsewhere = other.sockets[0].getsockname()[1]
        with socket.socket() as reservation:  # or another program is given the port while the front refuses connections
            reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            reservation.bind(("127.0.0.1", 0))
            self.port = reservation.getsockname()[1]
            await self.listen()
            try:
                yield self
            finally:
                for server in (self._server, other):
                    if server is not None:
                        server.close()
                for task in tuple(self.tasks):
                    task.cancel()
                await asyncio.gather(*self.tasks, return_exceptions=True)

    async def set(self, fault: Fault | None) -> None:
        """Behave like this from the next connection on."""
        self.fault = fault
        self.connected.clear()
        self.left.clear()
        if fault is Fault.REFUSES and self._server is not None:
            self._server.close()
            self._server = None
        elif fault is not Fault.REFUSES:
            await self.listen()

    async def listen(self) -> None:
        """Accept connections."""
        if self._server is None:
            self._server = await asyncio.start_server(self._accepted, "127.0.0.1", self.port)

    async def _accepted(self, reader: Reader, writer: Writer) -> None:
        task = asyncio.current_task()
        if task is not None:
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)
        self.connected.set()
        try:
            await self._serve(reader, writer, self.fault)
        except (OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ssl.SSLError):
            self.left.set()
        except asyncio.CancelledError:
            pass  # the front ends
        finally:
            writer.transport.abort()

    async def _serve(self, reader: Reader, writer: Writer, fault: Fault | None) -> None:
        if fault is None:
            await self._pass_on(reader, writer)
        elif fault is Fault.SILENT:
            await self._wait(reader)
        else:
            await writer.start_tls(self._context(fault))
            await self._BEHIND_TLS.get(fault, Front._answer_http)(self, reader, writer)

    async def _pass_on(self, reader: Reader, writer: Writer) -> None:
        back, forth = await asyncio.open_connection("127.0.0.1", self._behind.port)
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(_copy(reader, forth))
                tasks.create_task(_copy(back, writer))
        except* OSError:
            pass  # one of the two has ended the connection
        finally:
            forth.transport.abort()

    async def _wait(self, reader: Reader, _writer: Writer | None = None) -> None:
        """Read until the other side ends the connection."""
        while await reader.read(_CHUNK):
            pass
        self.left.set()

    async def _count_believed(self, reader: Reader, _writer: Writer) -> None:
        """Whatever comes behind the handshake comes from somebody who took the certificate for the CA's."""
        self.believed += len(await reader.read(_CHUNK))

    async def _drip(self, reader: Reader, writer: Writer) -> None:
        await reader.read(_CHUNK)
        while True:
            writer.write(b"H")
            await writer.drain()
            await asyncio.sleep(0.01)

    async def _close(self, reader: Reader, _writer: Writer) -> None:
        await reader.read(_CHUNK)

    async def _garbage(self, reader: Reader, writer: Writer) -> None:
        await reader.read(_CHUNK)
        writer.write(b"\x00\xff not of any protocol \r\n\r\n" * 100)
        await _finish(writer)

    async def _answer_http(self, reader: Reader, writer: Writer) -> None:
        """The rest: an answer in HTTP. The request's body need not be read for it."""
        head = await reader.readuntil(b"\r\n\r\n")
        if len(head) > _LARGEST_HEAD:
            return
        if self.fault is Fault.HUGE:
            await self._huge(writer)
            return
        writer.write(self._http_answer(self.fault))
        await _finish(writer)

    def _http_answer(self, fault: Fault | None) -> bytes:
        answers: dict[Fault | None, bytes] = {
            Fault.CUT_OFF: b'HTTP/1.1 200 OK\r\ncontent-length: 5000\r\n\r\n{"crt": "-----BEGIN CERT',
            Fault.NONSENSE: _http("200 OK", b"\x00\xff<html>502 Bad Gateway</html>"),
            Fault.EMPTY: _http("200 OK"),
            Fault.REDIRECT: _http(
                "307 Temporary Redirect", b"", f"location: https://127.0.0.2:{self._elsewhere}/somewhere"
            ),
            Fault.THROTTLED: _http("429 Too Many Requests", b"slow down", f"retry-after: {RETRY_AFTER}"),
            Fault.UNAVAILABLE: _http("503 Service Unavailable", b"not now", f"retry-after: {RETRY_AFTER}"),
        }
        return answers.get(fault) or _http("500 Internal Server Error", b"Internal Server Error\n")

    async def _huge(self, writer: Writer) -> None:
        writer.write(f"HTTP/1.1 200 OK\r\ncontent-length: {HUGE}\r\n\r\n".encode())
        self.sent = 0
        while self.sent < HUGE:
            writer.write(b" " * _CHUNK)
            await writer.drain()
            self.sent += _CHUNK

    async def _moved(self, _reader: Reader, writer: Writer) -> None:
        self.redirected += 1
        writer.transport.abort()

    def _context(self, fault: Fault | None) -> ssl.SSLContext:
        """One for all connections of a fault: to make a key and a certificate takes longer than to answer."""
        if fault not in self._contexts:
            self._contexts[fault] = self._new_context(fault)
        return self._contexts[fault]

    def _new_context(self, fault: Fault | None) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.set_alpn_protocols(["h2", "http/1.1"])
        key = generate(KeyType.EC_P256)
        signer = self._stranger if fault is Fault.UNTRUSTED else self._root
        names: tuple[x509.GeneralName, ...] = (x509.DNSName("localhost"), x509.IPAddress(ip_address("127.0.0.1")))
        if fault is Fault.ANOTHER_HOST:
            names = (x509.DNSName("another.example"), x509.IPAddress(ip_address("127.0.0.2")))
        now = datetime.now(UTC) - timedelta(hours=2 if fault is Fault.EXPIRED else 0)
        leaf = signer.sign(key.public_key(), names, [ExtendedKeyUsageOID.SERVER_AUTH], now, timedelta(hours=1))
        openssl.load_certificate(context, write_pem([leaf]) + to_pkcs8_pem(key))
        return context

    _BEHIND_TLS: ClassVar[Mapping[Fault, Callable[["Front", Reader, Writer], Awaitable[None]]]] = {
        Fault.SILENT_BEHIND_TLS: _wait,
        Fault.DRIPS: _drip,
        Fault.CLOSES: _close,
        Fault.GARBAGE: _garbage,
        Fault.UNTRUSTED: _count_believed,
        Fault.EXPIRED: _count_believed,
        Fault.ANOTHER_HOST: _count_believed,
    }


def _http(status: str, body: bytes = b"", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"content-length: {len(body)}", "connection: close", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


async def _copy(source: Reader, target: Writer) -> None:
    while data := await source.read(_CHUNK):
        target.write(data)
        await target.drain()
    with suppress(OSError):
        target.write_eof()


async def _finish(writer: Writer) -> None:
    await writer.drain()
    writer.close()
    await writer.wait_closed()
