"""TLS in front of gRPC: an acceptor that asks for a client certificate without requiring one.

grpcio's own TLS either requires a client certificate or never asks for one, and a CA needs both kinds of caller on one
port. So connections are accepted here, and their bytes relayed to a gRPC server on a Unix socket in a directory of its
own (0700). Each relay's end of that socket is bound to an abstract name that nobody else knows: gRPC shows it as
the call's peer, and it leads to what is known of the connection. When gRPC ends a connection, because it is old or
idle, the relay passes on what is left and closes it too. A connection ends with its client's certificate: a client
that renewed in time comes back with the new one, where it would be refused on the old connection. It ends as well when
what the client sends would cost gRPC too much (see `rpc.frames`): the relay sees the plain bytes, and gRPC itself only
looks at them when it has taken them apart.
"""

import asyncio
import itertools
import logging
import math
import secrets
import socket
import ssl
import sys
from asyncio.sslproto import SSLProtocol
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import anyio
from cryptography import x509
from msgspec import Struct

from sds_agent import log
from sds_agent.ca.settings import Address
from sds_agent.pki.certificates import CertificateError, read_pem
from sds_agent.pki.signer import SignerError
from sds_agent.rpc.frames import Bounds, Inspection

LOG = logging.getLogger(__name__)

HANDSHAKE = 10.0
"""Seconds for the TLS handshake."""
FAREWELL = 5.0
"""Seconds that a closed connection may take to hand over what is still in its buffers."""
_PREFIX = "sds-agent-ca-"


class Peer(Struct, frozen=True, eq=False, weakref=True):
    """What is known of one connection: its address, and the chain that was verified in the handshake.

    `chain` is the client's certificate, then each certificate's issuer, an anchor at the time last; empty where the
    client showed none.
    """

    address: str
    chain: tuple[x509.Certificate, ...] = ()


UNKNOWN = Peer("unknown")


class Acceptor:
    """Accepts TLS connections and relays them to gRPC. At most `most` are open at one time."""

    def __init__(
        self,
        context: Callable[[], ssl.SSLContext],
        now: Callable[[], datetime],
        most: int,
        bounds: Bounds,
        handshake: float = HANDSHAKE,
    ) -> None:
        self._context = context
        self._now = now
        self._most = most
        self._bounds = bounds
        self._handshake = handshake
        self._open = 0
        self._full = False
        self._closing = False
        self._closed = anyio.Event()
        self._peers: dict[str, Peer] = {}

    def peer(self, grpc_peer: str) -> Peer:
        """The connection that `ServicerContext.peer` names."""
        return self._peers.get(grpc_peer.removeprefix("unix-abstract:"), UNKNOWN)

    async def run(self, listener: socket.socket, backends: Sequence[Path]) -> None:
        """Accept until cancelled, which closes what is open. Each is relayed to one of these Unix sockets, in turn."""
        loop = asyncio.get_running_loop()
        backend = itertools.cycle(backends)
        async with anyio.create_task_group() as tasks:
            while True:
                try:
                    connection, address = await loop.sock_accept(listener)
                except OSError as error:  # no descriptor left, or the caller is gone already
                    log.event(LOG, "not_accepted", level=logging.WARNING, cause=error.strerror)
                    await anyio.sleep(0.1)
                    continue
                if self._has_room():
                    self._open += 1
                    tasks.start_soon(self._serve, connection, written(address), next(backend))
                else:
                    connection.close()

    def close(self) -> None:
        """Take no more connections; those that are open go on."""
        self._closing = True

    async def emptied(self) -> None:
        """Wait until every connection has closed and handed over what it still held."""
        while self._open:
            self._closed = anyio.Event()
            await self._closed.wait()

    def _has_room(self) -> bool:
        if self._closing:
            return False
        full = self._open >= self._most
        if full and not self._full:
            log.event(LOG, "too_many_connections", level=logging.WARNING, most=self._most)
        self._full = full
        return not full

    async def _serve(self, connection: socket.socket, address: str, backend: Path) -> None:
        name = f"{_PREFIX}{secrets.token_hex(16)}"
        front, back = _Half(Inspection(self._bounds).take), _Half()
        try:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await self._shake_hands(connection, front, self._context())
            chain = _verified_chain(front.transport.get_extra_info("ssl_object"))
            self._peers[name] = Peer(address, chain)
            await _reach(backend, name, back)
            with anyio.move_on_after(self._left(chain)):
                await _relay(front, back)
        except (OSError, CertificateError, SignerError, TimeoutError, UnicodeDecodeError) as error:
            # OSError is also what ssl's errors derive from; anybody who connects can cause them. ssl itself decodes
            # the names in a client's certificate
            log.event(LOG, "connection_failed", level=logging.DEBUG, address=address, cause=str(error))
        except Exception as error:  # noqa: BLE001 - whatever one connection can cause must not end the others
            log.event(LOG, "bug", level=logging.ERROR, exception=type(error).__name__, address=address)
        finally:
            self._open -= 1
            self._closed.set()
            self._peers.pop(name, None)
            front.abort()
            back.abort()
            connection.close()

    def _left(self, chain: tuple[x509.Certificate, ...]) -> float:
        """Seconds until a connection with that client certificate has to end."""
        return (chain[0].not_valid_after_utc - self._now()).total_seconds() if chain else math.inf

    async def _shake_hands(self, connection: socket.socket, front: "_Half", context: ssl.SSLContext) -> None:
        loop = asyncio.get_running_loop()
        shaken = loop.create_future()
        protocol = _SmallTls(
            *(loop, front, context, shaken),
            server_side=True,
            ssl_handshake_timeout=self._handshake,
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
    """asyncio's TLS with a smaller buffer: its own is 256 KiB for each connection, and anybody can open thousands."""

    max_size = 32 << 10

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)  # which makes the buffer
        # What one read may bring, in memory that is given back at once. In pieces of the buffer's size it would be
        # taken from the system and given back to it with every request, for a tenth of the time that one takes.
        self.max_size = SSLProtocol.max_size  # type: ignore[misc]  # asyncio reads it of the instance

    def get_buffer(self, n: int) -> memoryview:
        """The buffer; asyncio's transport asks for any size (-1)."""
        return super().get_buffer(_SmallTls.max_size if n < 0 else n)


class _Half(asyncio.Protocol):
    """One end of a relay. What it reads it writes to the other end, and no faster than that takes it.

    `inspect` is shown everything first. What it objects to goes nowhere: the connection ends, and `fault` says why.
    """

    def __init__(self, inspect: Callable[[bytes], str | None] | None = None) -> None:
        self.other: _Half | None = None
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
        self._transport = cast("asyncio.Transport", transport)
        self._transport.pause_reading()  # until there is somewhere to write to

    def data_received(self, data: bytes) -> None:
        if self.other is None or self.fault is not None:
            return
        if self._inspect is not None:
            self.fault = self._inspect(data)
        if self.fault is None:
            self.other.transport.write(data)
        else:
            self.abort()

    def pause_writing(self) -> None:
        if self.other is not None and not self.other.closed.is_set():
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other is not None and not self.other.closed.is_set():
            self.other.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - the protocol's signature
        self.closed.set()

    def join(self, other: "_Half") -> None:
        """Relay what comes from now on."""
        self.other = other
        self.transport.resume_reading()

    def abort(self) -> None:
        """Close at once, whatever is left to write."""
        if self._transport is not None:
            with suppress(AttributeError):  # Python 3.11.2's for a TLS transport that is closed already
                self._transport.abort()


async def _reach(backend: Path, name: str, back: _Half) -> None:
    loop = asyncio.get_running_loop()
    inner = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        inner.setblocking(False)
        inner.bind(f"\0{name}")
        await loop.sock_connect(inner, str(backend))
        await loop.create_unix_connection(lambda: back, sock=inner)
    except BaseException:
        inner.close()
        raise


async def _relay(front: _Half, back: _Half) -> None:
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


async def _follow(one: _Half, other: _Half) -> None:
    await one.closed.wait()
    other.transport.close()
    with anyio.move_on_after(FAREWELL):
        await other.closed.wait()
    other.abort()


def _verified_chain(tls: ssl.SSLObject) -> tuple[x509.Certificate, ...]:
    """What the handshake verified, anchor included; nothing where the client showed no certificate.

    Raises CertificateError for a certificate that OpenSSL takes and cryptography does not.
    """
    if sys.version_info >= (3, 13):
        pems = [ssl.DER_cert_to_PEM_cert(der) for der in tls.get_verified_chain()]
    else:  # it is there since Python 3.10, under this name alone
        pems = [each.public_bytes() for each in tls._sslobj.get_verified_chain() or ()]  # type: ignore[attr-defined]  # noqa: SLF001
    return read_pem("".join(pems).encode())


def written(address: object) -> str:
    """A socket's address as text, an IPv6 one in brackets (RFC 3986 section 3.2.2). A Unix socket's is text itself."""
    return str(Address(*address[:2])) if isinstance(address, tuple) else str(address)
