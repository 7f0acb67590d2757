"""The two ends of a relay between a TLS connection and gRPC's Unix socket, and how they end.

When gRPC ends a connection, because it is old or idle, the relay passes on what is left and closes it too. The relay
sees the plain bytes, and gRPC itself only looks at them when it has taken them apart: so a connection ends here when
what the client sends would cost gRPC too much (see `rpc.frames`).
"""

import asyncio
import os
import socket
import ssl
import struct
import sys
from asyncio.sslproto import SSLProtocol
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import anyio
from cryptography import x509

from sds_agent.pki.certificates import read_pem

_CREDENTIALS = struct.Struct("3i")
"""Process, user and group."""

FAREWELL = 5.0
"""Seconds that a closed connection may take to hand over what is still in its buffers."""


async def shake_hands(connection: socket.socket, front: "Half", context: ssl.SSLContext, seconds: float) -> None:
    """The TLS handshake, behind which `front` is connected. Raises OSError, which ssl's errors are too."""
    loop = asyncio.get_running_loop()
    shaken = loop.create_future()
    protocol = _SmallTls(
        *(loop, front, context, shaken),
        server_side=True,
        ssl_handshake_timeout=seconds,
        ssl_shutdown_timeout=FAREWELL,
    )
    plain, _ = await loop.connect_accepted_socket(lambda: protocol, connection)
    try:
        await shaken
    except BaseException:
        plain.abort()
        raise
    tls = front.transport.get_extra_info("ssl_object")
    if tls is None or tls.selected_alpn_protocol() != "h2":
        raise ConnectionAbortedError("the client does not speak HTTP/2 (no ALPN h2)")


class _SmallTls(SSLProtocol):
    """asyncio's TLS with a smaller buffer: its own is 256 KiB for each connection, and one peer can open thousands."""

    max_size = 32 << 10

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)  # which makes the buffer
        # What one read may bring, in memory that is given back at once. In pieces of the buffer's size it would be
        # taken from the system and given back to it with every request, for a tenth of the time that one takes.
        self.max_size = SSLProtocol.max_size  # type: ignore[misc]  # asyncio reads it of the instance

    def get_buffer(self, n: int) -> memoryview:
        """The buffer; asyncio's transport asks for any size (-1)."""
        return super().get_buffer(_SmallTls.max_size if n < 0 else n)


class Half(asyncio.Protocol):
    """One end of a relay. What it reads it writes to the other end, and no faster than that takes it.

    `inspect` is shown everything first. What it objects to goes nowhere: the connection ends, and `fault` says why.
    """

    def __init__(self, inspect: Callable[[bytes], str | None] | None = None) -> None:
        self.other: Half | None = None
        self.fault: str | None = None
        self._inspect = inspect
        self.closed = anyio.Event()
        self._transport: asyncio.Transport | None = None

    @property
    def transport(self) -> asyncio.Transport:
        """The transport, once connected."""
        if self._transport is None:
            raise ConnectionAbortedError("the connection is gone")
        return self._transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep it, and read nothing yet."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.pause_reading()  # until there is somewhere to write to

    def data_received(self, data: bytes) -> None:
        """Pass it on, unless it is objected to."""
        if self.other is None or self.fault is not None:
            return
        if self._inspect is not None:
            self.fault = self._inspect(data)
        if self.fault is None:
            self.other.transport.write(data)
        else:
            self.abort()

    def pause_writing(self) -> None:
        """Let the other end read no more than this one takes."""
        if self.other is not None and not self.other.closed.is_set():
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        """Let the other end read again."""
        if self.other is not None and not self.other.closed.is_set():
            self.other.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the protocol's signature
        """Say so, to who waits for it."""
        self.closed.set()

    def join(self, other: "Half") -> None:
        """Relay what comes from now on."""
        self.other = other
        self.transport.resume_reading()

    def abort(self) -> None:
        """Close at once, whatever is left to write."""
        if self._transport is not None:
            with suppress(AttributeError):  # Python 3.11.2's for a TLS transport that is closed already
                self._transport.abort()


async def reach(backend: Path, name: str, back: Half) -> None:
    """Connect `back` to gRPC's socket, from an abstract address of that name. Raises OSError.

    A caller's bytes are for this process alone: what listens there has to be a socket of its own.
    """
    loop = asyncio.get_running_loop()
    inner = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        inner.setblocking(False)
        inner.bind(f"\0{name}")
        await loop.sock_connect(inner, str(backend))
        _check_listener(inner)
        await loop.create_unix_connection(lambda: back, sock=inner)
    except BaseException:
        inner.close()
        raise


def _check_listener(connected: socket.socket) -> None:
    """Who listens at the other end: see unix(7), SO_PEERCRED."""
    credentials = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    process, _, _ = _CREDENTIALS.unpack(credentials)
    if process != os.getpid():
        raise ConnectionAbortedError("another process listens in the place of gRPC's socket")


async def relay(front: Half, back: Half) -> None:
    """Relay until one end closes; then hand the other what is left and close it too.

    Raises ConnectionAbortedError where it is closed for what the client sent.
    """
    back.join(front)
    front.join(back)
    async with anyio.create_task_group() as tasks:
        for one, other in ((front, back), (back, front)):
            tasks.start_soon(_follow, one, other)
    if front.fault is not None:
        raise ConnectionAbortedError(front.fault)


async def _follow(one: Half, other: Half) -> None:
    await one.closed.wait()
    other.transport.close()
    with anyio.move_on_after(FAREWELL):
        await other.closed.wait()
    other.abort()


def verified_chain(front: Half) -> tuple[x509.Certificate, ...]:
    """What the handshake verified, anchor included; nothing where the client showed no certificate.

    Raises CertificateError for a certificate that OpenSSL takes and cryptography does not.
    """
    tls = front.transport.get_extra_info("ssl_object")
    if sys.version_info >= (3, 13):
        pems = [ssl.DER_cert_to_PEM_cert(der) for der in tls.get_verified_chain()]
    else:  # it is there since Python 3.10, under this name alone
        pems = [each.public_bytes() for each in tls._sslobj.get_verified_chain() or ()]  # noqa: SLF001 - see above
    return read_pem("".join(pems).encode())
