"""A stand-in for a broken or hostile peer: it writes HTTP/2 frames byte by byte, and reads only if the test asks."""

import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Self

import anyio
from anyio.abc import ByteStream, SocketAttribute, SocketStream
from anyio.streams.buffered import BufferedByteReceiveStream
from fakes.peers import SERVICE

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, CONTINUATION = 0, 1, 2, 3, 4, 9
END_STREAM, END_HEADERS, PADDED = 1, 4, 8
CANCEL = b"\x00\x00\x00\x08"


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One frame (RFC 9113 section 4.1)."""
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def message(data: bytes, *, compressed: bool = False) -> bytes:
    """A gRPC message with its prefix."""
    return bytes([compressed]) + struct.pack(">I", len(data)) + data


def request_headers(method: str, service: str = SERVICE) -> bytes:
    """The headers that every gRPC client sends at the beginning of a call."""
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": f"{service}/{method}",
        ":authority": "localhost",
        "content-type": "application/grpc",
        "te": "trailers",
    }
    return b"".join(literal(name.encode(), value.encode()) for name, value in fields.items())


def literal(name: bytes, value: bytes) -> bytes:
    """A header as a literal without indexing (RFC 7541 section 6.2.2), both parts shorter than 127 bytes."""
    return b"\x00" + bytes([len(name)]) + name + bytes([len(value)]) + value


@asynccontextmanager
async def announcing(size: int) -> AsyncIterator[str]:
    """A server on loopback that answers a call with the beginning of a message of that size; its address."""

    async def serve(connection: SocketStream) -> None:
        async with connection:
            stream = BufferedByteReceiveStream(connection)
            await stream.receive_exactly(len(PREFACE))
            await connection.send(frame(SETTINGS, 0, 0))
            prefix = await stream.receive_exactly(9)
            while prefix[3] != HEADERS:
                await stream.receive_exactly(int.from_bytes(prefix[:3], "big"))
                prefix = await stream.receive_exactly(9)
            call = int.from_bytes(prefix[5:], "big")
            fields = b"\x88" + literal(b"content-type", b"application/grpc")  # 0x88 is :status 200
            await connection.send(frame(HEADERS, END_HEADERS, call, fields))
            await connection.send(frame(DATA, 0, call, b"\x00" + struct.pack(">I", size) + bytes(1000)))
            while await connection.receive():
                pass

    async with await anyio.create_tcp_listener(local_host="127.0.0.1") as listener, anyio.create_task_group() as tasks:
        tasks.start_soon(listener.serve, _until_closed(serve))
        yield f"127.0.0.1:{listener.extra(SocketAttribute.local_port)}"
        tasks.cancel_scope.cancel()


def _until_closed(serve: Callable[[SocketStream], Awaitable[None]]) -> Callable[[SocketStream], Awaitable[None]]:
    async def served(connection: SocketStream) -> None:
        with suppress(anyio.EndOfStream, anyio.BrokenResourceError, anyio.IncompleteRead):
            await serve(connection)

    return served


class RawPeer:
    """A connection that has sent the opening of every HTTP/2 client, unless the test says otherwise."""

    def __init__(self, connection: ByteStream) -> None:
        self.connection = connection

    @classmethod
    async def connect(cls, path: Path, first: bytes = PREFACE + frame(SETTINGS, 0, 0)) -> Self:
        """Connect and send `first`."""
        peer = cls(await anyio.connect_unix(path))
        await peer.send(first)
        return peer

    async def send(self, data: bytes) -> None:
        """Send bytes as they are; a server that has closed the connection is no error."""
        try:
            await self.connection.send(data)
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            return

    async def open(self, stream: int, method: str, service: str = SERVICE) -> None:
        """Begin a call."""
        await self.send(frame(HEADERS, END_HEADERS, stream, request_headers(method, service)))

    async def say(self, stream: int, data: bytes, *, compressed: bool = False) -> None:
        """Send a message on a call."""
        whole = message(data, compressed=compressed)
        for begin in range(0, len(whole), 16_384):
            await self.send(frame(DATA, 0, stream, whole[begin : begin + 16_384]))
