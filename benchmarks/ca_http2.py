"""A stand-in for `sds-agent ca serve` that answers its one method over HTTP/2 of its own, in the place of gRPC's core.

    python benchmarks/ca_http2.py CONFIG

It shows what gRPC costs (`ca_serve.py --without-grpc`): with it a call goes over a Unix socket to a thread of gRPC's
core, and comes back by four wake-ups of the event loop. All else is the product's: TLS, the bounds on frames and header
fields, the proof, the signature, the audit log, in one process.

It is a prototype. It does what a client of gRPC's core needs for a call, and lacks what a server needs before it may
face others: headers in Huffman's code or in several frames, padding, bounds on the messages of callers that are not
proven, a call's deadline, the ends of connections in order (GOAWAY), keepalive, the health service, and tests against
other HTTP/2 implementations.
"""

import asyncio
import logging
import socket
import struct
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Final, Never, cast

import anyio
import grpc

from sds_agent import log
from sds_agent.ca.acceptor import Peer, TlsAcceptor
from sds_agent.ca.books import OwnBooks
from sds_agent.ca.opening import listening, opened
from sds_agent.ca.relay import End, FrontEnd, relay, shake_hands, verified_chain
from sds_agent.ca.server import connection_limits
from sds_agent.ca.service import METHOD, SERVICE, CertificateService, Rules
from sds_agent.ca.settings import load
from sds_agent.ca.tls import ServerTls
from sds_agent.clock import SystemClock
from sds_agent.descriptors import room_for
from sds_agent.rpc.calls import Context

LOG = logging.getLogger("sds_agent")

_HEAD: Final = struct.Struct(">HBBBI")
_DATA, _HEADERS, _RESET, _SETTINGS, _PING, _WINDOW = 0, 1, 3, 4, 6, 8
_ACK = _END_STREAM = 1
_END_HEADERS = 4
_MESSAGE_HEAD = 5
_WINDOW_SIZE: Final = 65_535
_PREFACE_SIZE: Final = 24
_TABLE_SIZE: Final = 4096
_ENTRY: Final = 32
_TABLE: Final = (
    ":authority :method=GET :method=POST :path=/ :path=/index.html :scheme=http :scheme=https :status=200 :status=204 "
    ":status=206 :status=304 :status=400 :status=404 :status=500 accept-charset accept-encoding=gzip,_deflate "
    "accept-language accept-ranges accept access-control-allow-origin age allow authorization cache-control "
    "content-disposition content-encoding content-language content-length content-location content-range content-type "
    "cookie date etag expect expires from host if-match if-modified-since if-none-match if-range if-unmodified-since "
    "last-modified link location max-forwards proxy-authenticate proxy-authorization range referer refresh retry-after "
    "server set-cookie strict-transport-security transfer-encoding user-agent vary via www-authenticate"
)
"""RFC 7541 appendix A; `_` stands for a space in a value."""
_STATIC: Final = _TABLE.split()

Field = tuple[str, str]
Create = Callable[[object, Context], Awaitable[bytes]]


def _integer(block: bytes, at: int, bits: int) -> tuple[int, int]:
    """A number with a prefix of so many bits, and where it ends (RFC 7541 section 5.1)."""
    most = (1 << bits) - 1
    value, at = block[at] & most, at + 1
    if value < most:
        return value, at
    shift = 0
    while True:
        digit, at = block[at], at + 1
        value += (digit & 0x7F) << shift
        shift += 7
        if digit < 0x80:
            return value, at


def _string(block: bytes, at: int) -> tuple[str, int]:
    if block[at] & 0x80:
        raise ValueError("the prototype reads no Huffman code")
    length, at = _integer(block, at, 7)
    return block[at : at + length].decode("ascii"), at + length


def _literal(name: str, value: str) -> bytes:
    """A field that enters no table (RFC 7541 section 6.2.2)."""
    return bytes((0, len(name))) + name.encode() + bytes((len(value),)) + value.encode()


class Fields:
    """The fields of one connection's header blocks (RFC 7541)."""

    _static: Final = [(name, value.replace("_", " ")) for name, _, value in (each.partition("=") for each in _STATIC)]

    def __init__(self) -> None:
        self._added: list[Field] = []  # the newest first
        self._size = 0
        self._most = _TABLE_SIZE

    def read(self, block: bytes) -> list[Field]:
        """The fields of a block."""
        found, at = list[Field](), 0
        while at < len(block):
            first = block[at]
            if first & 0x80:
                number, at = _integer(block, at, 7)
                found.append(self._entry(number))
            elif first & 0xE0 == 0x20:
                most, at = _integer(block, at, 5)
                self._most = min(most, _TABLE_SIZE)
                self._evict()
            else:
                number, at = _integer(block, at, 6 if first & 0x40 else 4)
                name, at = (self._entry(number)[0], at) if number else _string(block, at)
                value, at = _string(block, at)
                found.append((name, value))
                if first & 0x40:
                    self._added.insert(0, (name, value))
                    self._size += len(name) + len(value) + _ENTRY
                    self._evict()
        return found

    def _entry(self, number: int) -> Field:
        return self._static[number - 1] if number <= len(_STATIC) else self._added[number - len(_STATIC) - 1]

    def _evict(self) -> None:
        while self._size > self._most:
            name, value = self._added.pop()
            self._size -= len(name) + len(value) + _ENTRY


def _frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return _HEAD.pack(len(payload) >> 8, len(payload) & 0xFF, kind, flags, stream) + payload


_SETTINGS_OF_OURS = _frame(_SETTINGS, 0, 0, struct.pack(">HIHI", 3, 100, 6, 20 << 10))
_BEGINNING = b"\x88" + _literal("content-type", "application/grpc")
_GOOD_END = _literal("grpc-status", "0")


class _AbortedError(Exception):
    """The call has this status."""


class Call:
    """One call, as the service sees it: what it uses of `grpc.aio.ServicerContext`."""

    __slots__ = ("_peer", "data", "fields", "number", "task")

    def __init__(self, number: int, peer: str, fields: list[Field]) -> None:
        self.number = number
        self.fields = fields
        self.data = b""
        self.task: asyncio.Task[None] | None = None
        self._peer = peer

    def peer(self) -> str:
        """The name of its connection."""
        return self._peer

    def invocation_metadata(self) -> list[Field]:
        """Its header fields."""
        return self.fields

    async def read(self) -> bytes:
        """Its message, without the head that gRPC gives each; a call begins once it is there."""
        return self.data[_MESSAGE_HEAD:]

    async def abort(self, code: grpc.StatusCode, details: str) -> Never:
        """End it with this status."""
        raise _AbortedError(code.value[0], details)


class CallsEnd(End):
    """The other end of a client's connection: it answers the calls itself."""

    def __init__(self, create: Create, name: str) -> None:
        super().__init__()
        self._create = create
        self._peer = f"unix-abstract:{name}"
        self._fields = Fields()
        self._calls: dict[int, Call] = {}
        self._left = b""
        self._begun = False
        self._window = _WINDOW_SIZE
        self._received = 0
        self._room = asyncio.Event()

    def pause_reading(self) -> None:
        """It makes what it sends itself, a message for each call."""

    def resume_reading(self) -> None:
        """It has not stopped."""

    def close(self) -> None:
        """End the calls in work."""
        self.abort()

    def abort(self) -> None:
        """End the calls in work."""
        super().abort()
        for call in self._calls.values():
            if call.task is not None:
                call.task.cancel()
        self._say_closed()

    def write(self, data: bytes | memoryview) -> None:
        """Take what the client sent."""
        answer, data, at = b"", self._left + bytes(data), 0
        if not self._begun:
            if len(data) < _PREFACE_SIZE:
                self._left = data
                return
            answer, at, self._begun = _SETTINGS_OF_OURS, _PREFACE_SIZE, True
        while at + _HEAD.size <= len(data):
            high, low, kind, flags, stream = _HEAD.unpack_from(data, at)
            end = at + _HEAD.size + (high << 8) + low
            if end > len(data):
                break
            answer += self._take(kind, flags, stream, data[at + _HEAD.size : end])
            at = end
        self._left = data[at:]
        if self._received > _WINDOW_SIZE // 4:
            answer += _frame(_WINDOW, 0, 0, self._received.to_bytes(4, "big"))
            self._received = 0
        if answer and self.other is not None:
            self.other.write(answer)

    def _take(self, kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        """Take one frame; what has to be answered at once."""
        if kind == _HEADERS:
            self._calls[stream] = Call(stream, self._peer, self._fields.read(payload))
        elif kind == _DATA and stream in self._calls:
            call = self._calls[stream]
            call.data += payload
            self._received += len(payload)
            if flags & _END_STREAM:
                call.task = asyncio.get_running_loop().create_task(self._answer(call))
        elif kind == _RESET and (gone := self._calls.pop(stream, None)) is not None and gone.task is not None:
            gone.task.cancel()
        elif kind == _WINDOW and not stream:
            self._window += int.from_bytes(payload, "big")
            self._room.set()
        elif kind in {_SETTINGS, _PING} and not flags & _ACK:
            return _frame(kind, _ACK, 0, payload if kind == _PING else b"")
        return b""

    async def _answer(self, call: Call) -> None:
        end = _GOOD_END
        try:
            fields = dict(call.fields)
            assert fields[":path"] == f"/{SERVICE}/{METHOD}"
            message = await self._create(None, cast("Context", call))
            body = b"\0" + len(message).to_bytes(4, "big") + message
        except _AbortedError as error:
            status, details = error.args
            body, end = b"", _literal("grpc-status", str(status)) + _literal("grpc-message", details[:100])
        finally:
            self._calls.pop(call.number, None)
        while len(body) > self._window:
            self._room.clear()
            await self._room.wait()
        self._window -= len(body)
        if self.other is not None:
            answer = _frame(_HEADERS, _END_HEADERS, call.number, _BEGINNING)
            answer += _frame(_DATA, 0, call.number, body) if body else b""
            self.other.write(answer + _frame(_HEADERS, _END_HEADERS | _END_STREAM, call.number, end))


class Acceptor(TlsAcceptor):
    """Accepts connections and answers their calls."""

    create: Create

    async def _relay(self, connection, _: Path) -> None:  # type: ignore[no-untyped-def]  # noqa: ANN001 - a private one
        connection.plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        front, back = FrontEnd(self._context(), connection.inspect), CallsEnd(self.create, connection.name)
        try:
            await shake_hands(connection.plain, front, self._limits.handshake)
            chain = verified_chain(front)
            connection.peer = Peer(connection.address, chain)
            ends = asyncio.get_running_loop().time() + self._seconds_left(chain)
            connection.end_at(min(connection.deadline, ends))
            self._named[connection.name] = connection
            await relay(front, back)
        finally:
            front.abort()
            back.abort()


async def serve(config: Path) -> None:
    """Answer until ended."""
    settings, clock = load(config), SystemClock()
    log.configure(settings.log.format, settings.log.level)
    async with opened(settings, clock) as parts:
        tls = ServerTls(parts.source.current, settings.server_names, clock.now, ask_client=settings.callers.mtls)
        limits = settings.limits
        bounds = connection_limits(room_for(limits.connections), limits.connection_age)
        acceptor = Acceptor(tls.context, clock.now, bounds)
        rules = Rules(parts.authentication(), settings.node_agents, limits.per_caller, parts.denied)
        service = CertificateService(rules, parts.source.current, acceptor, OwnBooks(parts.ledger), clock)
        acceptor.create = service._create  # noqa: SLF001 - gRPC's handler would call it
        with listening(settings.listen) as listener:
            host, port = listener.getsockname()[:2]
            log.event(LOG, "listening", address=f"{host}:{port}")
            await acceptor.run(listener, [config])


if __name__ == "__main__":
    anyio.run(serve, Path(sys.argv[1]))
