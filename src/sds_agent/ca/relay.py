"""The two ends of a relay between a TLS connection and gRPC's Unix socket, and how they end.

When gRPC ends a connection, because it is old or idle, the relay passes on what is left and closes it too. The relay
sees the plain bytes, and gRPC itself only looks at them when it has taken them apart: so a connection ends here when
what the client sends would cost gRPC too much (see `rpc.frames`).

TLS is OpenSSL's on two memory buffers (`ssl.MemoryBIO`), from and to which the ciphertext is moved here. asyncio's own
TLS has a buffer of 256 KiB for each connection, and everyone who reaches the port can open thousands of them: measured
were 187 KiB of the server's memory for a connection that says nothing, where it takes 11 KiB here, as all connections
read into one buffer. Nothing here is private to asyncio or ssl but `verified_chain` before Python 3.13.

The module is asyncio's, as are the transports.
"""

import asyncio
import os
import socket
import ssl
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, cast

from cryptography import x509

from sds_agent.pki.certificates import read_pem

_CREDENTIALS = struct.Struct("3i")
"""Process, user and group."""

_BUFFER: Final = memoryview(bytearray(64 << 10))
"""What one read may bring, for all connections: it is copied or encrypted before anything else is read."""

FAREWELL = 5.0
"""Seconds that a closed connection may take to hand over what is still in its buffers."""


class End(asyncio.BufferedProtocol):
    """One end of a relay. What it reads goes to the other end, and no faster than that takes it."""

    def __init__(self) -> None:
        self.other: End | None = None
        self.closed = asyncio.get_running_loop().create_future()
        self._transport: asyncio.Transport | None = None

    @property
    def transport(self) -> asyncio.Transport:
        """The transport, once connected. Raises ConnectionAbortedError."""
        if self._transport is None:
            raise ConnectionAbortedError("the connection is gone")
        return self._transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Store it."""
        self._transport = cast("asyncio.Transport", transport)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - the protocol's signature
        """Where the next read is to go."""
        return _BUFFER

    def pause_writing(self) -> None:
        """Let the other end read no more than this one takes."""
        if self.other is not None and not self.other.closed.done():
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        """Let the other end read again."""
        if self.other is not None and not self.other.closed.done():
            self.other.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the protocol's signature
        """Resolve `closed`."""
        if not self.closed.done():
            self.closed.set_result(None)

    def join(self, other: "End") -> None:
        """Relay what comes from now on."""
        self.other = other
        self.transport.resume_reading()

    def write(self, data: bytes | memoryview) -> None:
        """Send what the other end read. The memory is the caller's again afterwards."""
        raise NotImplementedError

    def close(self) -> None:
        """Close it once all is sent that was written."""
        self.transport.close()

    def abort(self) -> None:
        """Close at once, whatever is left to write.

        With no circle between the ends, OpenSSL forgets the session of the connection at once: it cannot be resumed.
        """
        self.other = None
        if self._transport is not None:
            self._transport.abort()


class Back(End):
    """The end towards gRPC, on a Unix socket."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Store it, and read nothing until there is another end."""
        super().connection_made(transport)
        self.transport.pause_reading()

    def buffer_updated(self, nbytes: int) -> None:
        """Pass on what was read."""
        if self.other is not None:
            self.other.write(_BUFFER[:nbytes])

    def write(self, data: bytes | memoryview) -> None:
        """Send it."""
        if not self.transport.is_closing():
            self.transport.write(bytes(data))


class Front(End):
    """The end towards the client, with TLS.

    `inspect` sees the plain bytes first. What it objects to goes nowhere: the connection ends, and `fault` says why.
    """

    def __init__(self, context: ssl.SSLContext, inspect: Callable[[bytes], str | None]) -> None:
        super().__init__()
        self.fault: str | None = None
        self._inspect = inspect
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self.handshake: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        self._closing = False

    def buffer_updated(self, nbytes: int) -> None:
        """Decrypt what was read."""
        if not self._closing:
            self._incoming.write(_BUFFER[:nbytes])
            self._go_on()

    def eof_received(self) -> None:
        """The client sends nothing more; the transport closes itself."""
        self._end_handshake(ConnectionAbortedError("the client closed the connection in the handshake"))

    def connection_lost(self, exc: Exception | None) -> None:
        """The handshake is over too."""
        super().connection_lost(exc)
        self._end_handshake(exc or ConnectionAbortedError("the connection was closed in the handshake"))

    def join(self, other: End) -> None:
        """Relay what comes from now on, and what came with the last bytes of the handshake."""
        super().join(other)
        self._go_on()

    def write(self, data: bytes | memoryview) -> None:
        """Encrypt and send it."""
        if not self._closing and not self.transport.is_closing():
            left = memoryview(data)
            while left:  # OpenSSL takes a record at a time
                left = left[self.tls.write(left) :]
            self._flush()

    def close(self) -> None:
        """Send all that was written and the ends of TLS and TCP, then wait for the client to close.

        Closed at once, TCP would take from a client that is just sending what it has not read yet (RFC 1122, 4.2.2.13).
        """
        if not self._closing:
            self._closing = True
            self._end_tls()
            self.transport.write_eof()
            self.transport.resume_reading()

    def _go_on(self) -> None:
        try:
            if self.handshake.done():
                self._read()
            else:
                self._shake_hands()
        except ssl.SSLError as error:
            self._flush()  # the alert that tells the client why
            self._end_handshake(error)
            self.transport.close()
        else:
            self._flush()

    def _shake_hands(self) -> None:
        try:
            self.tls.do_handshake()
        except ssl.SSLWantReadError:
            return
        self.transport.pause_reading()  # until there is somewhere to write to
        self._end_handshake(None)

    def _end_handshake(self, error: Exception | None) -> None:
        """The handshake is over."""
        if not self.handshake.done():
            self.handshake.set_result(error)

    def _read(self) -> None:
        while self.other is not None and self.fault is None:
            try:
                data = self.tls.read(len(_BUFFER))
            except ssl.SSLWantReadError:
                return
            if not data:  # the client ended TLS
                self._end_tls()
                self.transport.close()
                return
            self.fault = self._inspect(data)
            if self.fault is None:
                self.other.write(data)
            else:
                self.abort()

    def _end_tls(self) -> None:
        with suppress(ssl.SSLError):  # it has written its closure alert, and would wait for the client's
            self.tls.unwrap()
        self._flush()

    def _flush(self) -> None:
        if self._outgoing.pending:
            self.transport.write(self._outgoing.read())


async def shake_hands(connection: socket.socket, front: Front, seconds: float) -> None:
    """Connect `front` and let it do the TLS handshake. Raises OSError, which ssl's errors are too."""
    loop = asyncio.get_running_loop()
    await loop.connect_accepted_socket(lambda: front, connection)
    try:
        async with asyncio.timeout(seconds):
            error = await front.handshake
    except TimeoutError:
        error = ConnectionAbortedError(f"the TLS handshake was not complete within {seconds:g} s")
    if error is not None:
        raise error
    if front.tls.selected_alpn_protocol() != "h2":
        raise ConnectionAbortedError("the client does not speak HTTP/2 (no ALPN h2)")


async def reach(backend: Path, name: str, back: Back) -> None:
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


async def relay(front: Front, back: Back) -> None:
    """Relay until one end closes; then hand the other what is left and close it too.

    Raises ConnectionAbortedError where it is closed for what the client sent.
    """
    back.join(front)
    front.join(back)
    ends: tuple[End, ...] = (front, back)
    await asyncio.wait([end.closed for end in ends], return_when=asyncio.FIRST_COMPLETED)
    for end in ends:
        if not end.closed.done():
            end.close()
    await asyncio.wait([end.closed for end in ends], timeout=FAREWELL)
    if front.fault is not None:
        raise ConnectionAbortedError(front.fault)


def verified_chain(front: Front) -> tuple[x509.Certificate, ...]:
    """What the handshake verified, anchor included; nothing where the client showed no certificate.

    Raises CertificateError for a certificate that OpenSSL takes and cryptography does not.
    """
    if sys.version_info >= (3, 13):
        pems = [ssl.DER_cert_to_PEM_cert(der) for der in front.tls.get_verified_chain()]
    else:  # it is there since Python 3.10, under this name alone
        inner = front.tls._sslobj  # type: ignore[attr-defined]  # noqa: SLF001 - see above
        pems = [each.public_bytes() for each in inner.get_verified_chain() or ()]
    return read_pem("".join(pems).encode())
