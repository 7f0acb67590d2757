"""The two ends of a relay between a TLS connection and gRPC's Unix socket, and how they end.

When gRPC ends a connection, because it is old or idle, the relay passes on what is left and closes the client's side
too. The relay sees the plain bytes before gRPC does, and gRPC takes them apart before any code of ours is asked: so the
relay ends a connection when what the client sends would cost gRPC too much (see `rpc.frames`).

TLS is OpenSSL's on two memory buffers (`ssl.MemoryBIO`), from and to which the ciphertext is moved here. asyncio's own
TLS has a buffer of 256 KiB for each connection, and everyone who reaches the port can open thousands of them: measured
were 187 KiB of the server's memory for a connection that says nothing, where it takes 11 KiB here, as all connections
read into one buffer. Nothing here is private to asyncio or ssl but `verified_chain` before Python 3.13.

The module is asyncio's, as are the transports.
"""

import asyncio
import functools
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
"""Where every read of every connection goes: what it brought is copied or encrypted before the next one."""

MOST_CAS: Final = 100
"""Certificates of CAs above clients' that are kept, each as it was read."""
FAREWELL = 5.0
"""Seconds in which a closed connection may hand over what is still in its buffers."""


class End:
    """One end of a relay. What it reads goes to the other end, which stops its reading while it cannot send.

    `closed` is done once the connection is closed.
    """

    def __init__(self) -> None:
        self.other: End | None = None
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def join(self, other: "End") -> None:
        """Relay to this other end what comes from now on."""
        self.other = other
        self.resume_reading()

    def pause_reading(self) -> None:
        """Read nothing for now."""
        raise NotImplementedError

    def resume_reading(self) -> None:
        """Read on."""
        raise NotImplementedError

    def write(self, data: bytes | memoryview) -> None:
        """Send what the other end read. Afterwards the memory is the caller's again."""
        raise NotImplementedError

    def close(self) -> None:
        """Close once everything written is sent."""
        raise NotImplementedError

    def abort(self) -> None:
        """Close at once and drop what is left to write.

        With no circle of references between the ends, OpenSSL drops the connection's session: it cannot be resumed.
        """
        self.other = None

    def _say_closed(self) -> None:
        if not self.closed.done():
            self.closed.set_result(None)

    def _pause_other(self) -> None:
        if self.other is not None and not self.other.closed.done():
            self.other.pause_reading()

    def _resume_other(self) -> None:
        if self.other is not None and not self.other.closed.done():
            self.other.resume_reading()


class BackEnd(End):
    """The end towards gRPC, on a Unix socket, which `connected` gives it.

    It reads and writes the socket itself: what asyncio does to begin a transport takes as long as the connection. Once
    gRPC does not take all, the rest waits here and the other end reads no more.
    """

    def __init__(self) -> None:
        super().__init__()
        self._loop = asyncio.get_running_loop()
        self._socket: socket.socket | None = None
        self._rest = b""
        self._reads = False
        self._closing = False

    @property
    def is_reading(self) -> bool:
        """Whether it reads."""
        return self._reads

    @property
    def left(self) -> int:
        """Bytes that wait until gRPC takes them."""
        return len(self._rest)

    def connected(self, connection: socket.socket) -> None:
        """Take this socket, which is this end's from now on."""
        self._socket = connection

    def pause_reading(self) -> None:
        """Read nothing for now."""
        if self._reads and self._socket is not None:
            self._reads = False
            self._loop.remove_reader(self._socket)

    def resume_reading(self) -> None:
        """Read on."""
        if not self._reads and not self._closing and self._socket is not None:
            self._reads = True
            self._loop.add_reader(self._socket, self._read)

    def write(self, data: bytes | memoryview) -> None:
        """Send it as it is.

        gRPC may have closed its end already, while its last answers wait to be read here: reading shows the end.
        """
        if self._socket is None or self._closing:
            return
        if self._rest:
            self._rest += data
            return
        sent = self._send(data)
        if sent < len(data):
            self._rest = bytes(data[sent:])
            self._loop.add_writer(self._socket, self._write_rest)
            self._pause_other()

    def close(self) -> None:
        """Close once everything written is sent."""
        self._closing = True
        self.pause_reading()
        if not self._rest:
            self._end()

    def abort(self) -> None:
        """Close at once and drop what is left to write."""
        super().abort()
        self._end()

    def _read(self) -> None:
        if self._socket is None:
            return
        try:
            count = self._socket.recv_into(_BUFFER)
            if count and self.other is not None:
                self.other.write(_BUFFER[:count])
        except BlockingIOError:
            return
        except OSError:  # reset, which is as good as closed; or the other end has no TLS any more
            count = 0
        except Exception:
            self._end()  # or the event loop would call this again and again
            raise
        if not count:
            self._end()

    def _write_rest(self) -> None:
        self._rest = self._rest[self._send(self._rest) :]
        if self._rest or self._socket is None:
            return
        self._loop.remove_writer(self._socket)
        if self._closing:
            self._end()
        else:
            self._resume_other()

    def _send(self, data: bytes | memoryview) -> int:
        """How many bytes it took. One that has left takes all."""
        assert self._socket is not None  # noqa: S101 - for the type checker
        try:
            return self._socket.send(data)
        except BlockingIOError:
            return 0
        except OSError:
            return len(data)

    def _end(self) -> None:
        if self._socket is not None:
            self._loop.remove_reader(self._socket)
            self._loop.remove_writer(self._socket)
            self._socket.close()
            self._socket = None
        self._reads = False
        self._rest = b""
        self._say_closed()


class FrontEnd(End, asyncio.BufferedProtocol):
    """The end towards the client, with TLS.

    `inspect` gets the plain bytes first and returns why the connection has to end, or None. If it has to, the bytes go
    nowhere, and `fault` says why. `handshake` is done once the TLS handshake is, with the error that ended it or None.
    """

    def __init__(self, context: ssl.SSLContext, inspect: Callable[[bytes], str | None]) -> None:
        super().__init__()
        self.fault: str | None = None
        self._transport: asyncio.Transport | None = None
        self._inspect = inspect
        self._incoming = ssl.MemoryBIO()
        self._outgoing = ssl.MemoryBIO()
        self.tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self.handshake: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        self._closing = False

    @property
    def transport(self) -> asyncio.Transport:
        """The transport, once connected. Raises ConnectionAbortedError."""
        if self._transport is None:
            raise ConnectionAbortedError("the connection is gone")
        return self._transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast("asyncio.Transport", transport)

    def get_buffer(self, sizehint: int) -> memoryview:  # noqa: ARG002 - the protocol's signature
        """Where the next read is to go."""
        return _BUFFER

    def buffer_updated(self, nbytes: int) -> None:
        """Decrypt what was read."""
        if not self._closing:
            self._incoming.write(_BUFFER[:nbytes])
            if self.other is None and self.handshake.done():
                self.transport.pause_reading()  # until there is somewhere to write to
            self._go_on()

    def eof_received(self) -> None:
        """Let the transport close: the client sends nothing more."""
        self._end_handshake(ConnectionAbortedError("the client closed the connection in the handshake"))

    def connection_lost(self, exc: Exception | None) -> None:
        """Resolve `closed`, and end the handshake too."""
        self._say_closed()
        self._end_handshake(exc or ConnectionAbortedError("the connection was closed in the handshake"))

    def pause_writing(self) -> None:
        """Stop the other end's reading: the buffer of this one is full."""
        self._pause_other()

    def resume_writing(self) -> None:
        """Let the other end read on: the buffer of this one has room."""
        self._resume_other()

    def pause_reading(self) -> None:
        """Read nothing for now."""
        self.transport.pause_reading()

    def resume_reading(self) -> None:
        """Read on."""
        self.transport.resume_reading()

    def join(self, other: End) -> None:
        """Relay to this other end what comes from now on, and what came with the last bytes of the handshake."""
        super().join(other)
        self._go_on()

    def write(self, data: bytes | memoryview) -> None:
        """Send it encrypted."""
        if not self._closing and not self.transport.is_closing():
            left = memoryview(data)
            while left:  # ssl promises only to say how much it took
                left = left[self.tls.write(left) :]
            self._flush()

    def close(self) -> None:
        """Send everything written, then the end of TLS and of TCP, and wait for the client to close.

        If it closed at once, a client that is just sending would lose what it has not read yet, for TCP answers with a
        reset (RFC 1122 section 4.2.2.13).
        """
        if not self._closing:
            self._closing = True
            self._end_tls()
            self.transport.write_eof()
            self.transport.resume_reading()

    def abort(self) -> None:
        """Close at once and drop what is left to write."""
        super().abort()
        if self._transport is not None:
            self._transport.abort()

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
        self._end_handshake(None)

    def _end_handshake(self, error: Exception | None) -> None:
        """Say that it is over, unless that is said."""
        if not self.handshake.done():
            self.handshake.set_result(error)

    def _read(self) -> None:
        """Decrypt all that is there, and pass it on in one piece: a client's first bytes come in three TLS records."""
        read = list[bytes]()
        try:
            while self.other is not None and (data := self.tls.read(len(_BUFFER))):
                self.fault = self._inspect(data)
                if self.fault is not None:
                    self.abort()
                    return
                read.append(data)
                if not self._incoming.pending and not self.tls.pending():  # to ask would cost more than to know
                    return
        except ssl.SSLWantReadError:
            return
        finally:
            if self.other is not None and read:
                self.other.write(read[0] if len(read) == 1 else b"".join(read))
        if self.other is not None:  # the client ended TLS
            self._end_tls()
            self.transport.close()

    def _end_tls(self) -> None:
        with suppress(ssl.SSLError):  # it has written its closure alert, and would wait for the client's
            self.tls.unwrap()
        self._flush()

    def _flush(self) -> None:
        if self._outgoing.pending:
            self.transport.write(self._outgoing.read())


async def shake_hands(connection: socket.socket, front: FrontEnd, seconds: float) -> None:
    """Connect `front` and wait for its TLS handshake. Raises OSError, which ssl's errors are too."""
    loop = asyncio.get_running_loop()
    await loop.connect_accepted_socket(lambda: front, connection)
    try:
        async with asyncio.timeout(seconds):
            error = await front.handshake
    except TimeoutError:
        error = ConnectionAbortedError(f"the TLS handshake was not complete within {seconds:g} s")
    if error is not None:
        raise error
    if front.tls.session_reused:  # Python cannot have OpenSSL remember none where a TLS 1.2 connection ended properly
        raise ConnectionAbortedError("the client resumed a session, whose certificate was verified earlier")
    if front.tls.selected_alpn_protocol() != "h2":
        raise ConnectionAbortedError("the client does not speak HTTP/2 (no ALPN h2)")


async def reach(backend: Path, name: str, back: BackEnd) -> None:
    """Connect `back` to gRPC's socket, from an abstract address of that name. Raises OSError.

    No other process may get a caller's bytes, so a socket of this one has to listen there.
    """
    loop = asyncio.get_running_loop()
    inner = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        inner.setblocking(False)
        inner.bind(f"\0{name}")
        try:
            inner.connect(str(backend))  # which a socket of this machine takes at once, but where its queue is full
        except BlockingIOError:
            await loop.sock_connect(inner, str(backend))
        _check_listener(inner)
    except BaseException:
        inner.close()
        raise
    back.connected(inner)


def _check_listener(connected: socket.socket) -> None:
    """Raises ConnectionAbortedError where another process listens at the other end (unix(7), SO_PEERCRED)."""
    credentials = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    process, _, _ = _CREDENTIALS.unpack(credentials)
    if process != os.getpid():
        raise ConnectionAbortedError("another process listens in the place of gRPC's socket")


async def relay(front: FrontEnd, back: End) -> None:
    """Relay until one end closes, then hand over what is left and close the other one within FAREWELL.

    Raises ConnectionAbortedError where `front` closed for what the client sent.
    """
    back.join(front)
    front.join(back)
    ends: tuple[End, ...] = (front, back)
    await _one_of(ends)
    for end in ends:
        if not end.closed.done():
            end.close()
    if left := [end.closed for end in ends if not end.closed.done()]:
        await asyncio.wait(left, timeout=FAREWELL)
    if front.fault is not None:
        raise ConnectionAbortedError(front.fault)


async def _one_of(ends: tuple[End, ...]) -> None:
    """Wait until one is closed: as asyncio.wait does, at a third of its price."""
    closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def tell(_: object) -> None:
        if not closed.done():
            closed.set_result(None)

    for end in ends:
        end.closed.add_done_callback(tell)
    await closed


def verified_chain(front: FrontEnd) -> tuple[x509.Certificate, ...]:
    """The chain that the handshake verified, its anchor last; empty where the client showed no certificate.

    Raises CertificateError for a certificate that OpenSSL takes and cryptography does not.
    """
    if sys.version_info >= (3, 13):
        pems = [ssl.DER_cert_to_PEM_cert(der) for der in front.tls.get_verified_chain()]
    else:  # it is there since Python 3.10, under this name alone
        inner = front.tls._sslobj  # type: ignore[attr-defined]  # noqa: SLF001 - see above
        pems = [each.public_bytes() for each in inner.get_verified_chain() or ()]
    if not pems:
        return ()
    return (*read_pem(pems[0].encode()), *map(_ca_certificate, pems[1:]))


@functools.lru_cache(MOST_CAS)
def _ca_certificate(pem: str) -> x509.Certificate:
    """What all clients' certificates have above them is read once. Raises CertificateError."""
    (certificate,) = read_pem(pem.encode())
    return certificate
