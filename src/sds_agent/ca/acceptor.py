"""TLS in front of gRPC: an acceptor that asks for a client certificate without requiring one.

grpcio's own TLS either requires a client certificate or never asks for one, and a CA needs both kinds of caller on one
port. So the acceptor takes the connections, and relays their bytes (see `relay`) to a gRPC server on a Unix socket. Its
end of that socket is bound to an abstract name of its own for each connection: gRPC shows the name as the call's peer,
and it leads to what is known of the connection. The relay takes 0.14 of 1.4 ms of processor time a request.

A connection has UNPROVEN_TIMEOUT seconds for a call whose caller is proven, and may make UNPROVEN_CALLS calls until
then. Where there are too many connections, `places` decides which one ends. A connection with a client certificate ends
when that certificate does: a client that renewed in time comes back with the new one, where the CA would refuse it on
the old connection.

The module is asyncio's, as are the sockets and transports that it works on; each connection is a task of `run`.
"""

import asyncio
import itertools
import logging
import math
import secrets
import socket
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Protocol, Self

from cryptography import x509
from msgspec import Struct

from sds_agent import log
from sds_agent.ca.places import Places, origin_of
from sds_agent.ca.relay import BackEnd, FrontEnd, reach, relay, shake_hands, verified_chain
from sds_agent.configfile.listening import ListenAddress
from sds_agent.pki.certificates import CertificateError
from sds_agent.rpc.frames import Bounds, Inspection
from sds_agent.signing.signer import SignerError

LOG = logging.getLogger(__name__)

HANDSHAKE_TIMEOUT = 10.0
"""Seconds for the TLS handshake."""
UNPROVEN_TIMEOUT = 20.0
"""Seconds from the acceptance of a connection until a caller is proven; the CA may have to fetch an issuer's keys."""
UNPROVEN_CALLS = 200
"""Twice the calls that gRPC lets a client have at one time: an agent asks for all its workloads at once."""
REPORT_EVERY = 60.0
"""Seconds from one log line about too many connections to the next."""
ACCEPT_AGAIN = 0.1
"""Seconds until the next attempt to accept, where one failed."""
IN_VAIN = 8
"""Turns of the event loop in which a connection may wait that nobody accepts, until the loop looks no more."""
REMEMBERED = 5.0
"""Seconds for which the address of a connection is known after its end."""
_PREFIX = "sds-agent-ca-"


class Peer(Struct, frozen=True, eq=False, weakref=True):
    """What is known of one connection: the client's address, and the chain that the handshake verified.

    `chain` is the client's certificate, then the issuer of each, last what was an anchor at the time of the handshake.
    It is empty where the client showed no certificate.
    """

    address: str
    chain: tuple[x509.Certificate, ...] = ()


UNKNOWN = Peer("unknown")


class ConnectionLimits(Struct, frozen=True):
    """How many connections there may be at one time, and what each may send in how many seconds.

    `bounds` are for each connection; one on which a caller is proven may send `frames_when_proven` frames more.
    `handshake` and `unproven` are the seconds for the handshake, and from acceptance until a caller is proven.
    """

    most: int
    bounds: Bounds
    frames_when_proven: int = 0
    handshake: float = HANDSHAKE_TIMEOUT
    unproven: float = UNPROVEN_TIMEOUT


class Arrival(Struct, frozen=True, eq=False):
    """An accepted connection: the client's address as text, what it counts for, and the connection's own name."""

    plain: socket.socket
    address: str
    origin: str
    name: str


class Placing(Protocol):
    """The places that connections have, by their names, as `Places` has them."""

    def arrive(self, connection: str, origin: str) -> str | None:
        """Give a new connection a place. Returns the one that has to end for it, perhaps the new one itself."""
        ...

    def prove(self, connection: str, caller: str) -> str | None:
        """Give the connection a proven caller's place. Returns the one that has to end for it."""
        ...

    def leave(self, connection: str) -> None:
        """Free the place of a connection that has ended."""
        ...


class Full:
    """Says that a connection ended because there are too many, every REPORT_EVERY seconds at most."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._again = -math.inf

    def report(self, closed: str, now: float) -> None:
        """The connection from the address `closed` ended, at `now` in seconds of the event loop's clock."""
        if now >= self._again:
            self._again = now + REPORT_EVERY
            log.event(LOG, "too_many_connections", level=logging.WARNING, most=self._most, closed=closed)


class _Connection:
    """One connection from its acceptance on. It ends at `deadline`, in seconds of the event loop's clock."""

    def __init__(self, arrival: Arrival, bounds: Bounds, deadline: float) -> None:
        self.plain = arrival.plain
        self.address = arrival.address
        self.origin = arrival.origin
        self.name = arrival.name
        self.peer = UNKNOWN
        self.proven = False
        self.deadline = deadline
        self._timeout: asyncio.Timeout | None = None
        self.inspection = Inspection(bounds)

    def timeout(self) -> asyncio.Timeout:
        """The context in which the connection runs, entered once. It raises TimeoutError at the deadline."""
        self._timeout = asyncio.timeout_at(self.deadline)
        return self._timeout

    def end_at(self, deadline: float) -> None:
        """Move the deadline. One in the past ends the connection at once."""
        if deadline == self.deadline:
            return
        self.deadline = deadline
        if self._timeout is not None and not self._timeout.expired():
            self._timeout.reschedule(None if math.isinf(deadline) else deadline)

    @property
    def timed_out(self) -> bool:
        """Whether the deadline came."""
        return self._timeout is not None and self._timeout.expired()

    def inspect(self, data: bytes) -> str | None:
        """Inspect what the client sent. Returns why the connection has to end, or None."""
        fault = self.inspection.take(data)
        if fault is None and not self.proven and self.inspection.calls > UNPROVEN_CALLS:
            fault = f"it made more than {UNPROVEN_CALLS} calls and proved nothing"
        return fault


class TlsAcceptor:
    """Accepts TLS connections and relays them to gRPC. `context` gives the TLS context for the next one."""

    def __init__(
        self,
        context: Callable[[], ssl.SSLContext],
        now: Callable[[], datetime],
        limits: ConnectionLimits,
        places: Placing | None = None,
    ) -> None:
        self._context = context
        self._now = now
        self._limits = limits
        self._closing = False
        self._emptied = asyncio.Event()
        self._emptied.set()
        self._places = places or Places[str](limits.most)
        self._open: dict[str, _Connection] = {}
        self._named: dict[str, _Connection] = {}
        self._ended: dict[str, Peer] = {}
        self._ends = deque[tuple[float, str]]()
        self._full = Full(limits.most)

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._open)

    def peer(self, grpc_peer: str) -> Peer:
        """What is known of the connection that `ServicerContext.peer` names; UNKNOWN some seconds after its end."""
        connection = self._find(grpc_peer)
        return self._ended.get(_name_of(grpc_peer), UNKNOWN) if connection is None else connection.peer

    def proven(self, grpc_peer: str, caller: str) -> None:
        """Let the connection stay on which a call proved this caller. Another one of the caller may end for it."""
        connection = self._find(grpc_peer)
        if connection is None or connection.proven:
            return
        connection.proven = True
        connection.inspection.allow(self._limits.frames_when_proven)
        connection.end_at(_now() + self._seconds_left(connection.peer.chain))
        self._give_way(self._places.prove(connection.name, caller))

    def origin(self, grpc_peer: str) -> str:
        """What the connection that gRPC names so counts for: its client's address, or its network."""
        connection = self._find(grpc_peer)
        return grpc_peer if connection is None else connection.origin

    def hang_up(self, grpc_peer: str, why: str) -> None:
        """End a connection at once, and log why."""
        if (connection := self._find(grpc_peer)) is not None:
            log.event(LOG, "connection_failed", level=logging.DEBUG, address=connection.address, cause=why)
            connection.end_at(_now())

    def _find(self, grpc_peer: str) -> _Connection | None:
        return self._named.get(_name_of(grpc_peer))

    async def run(self, listener: socket.socket, backends: Sequence[Path]) -> None:
        """Accept until cancelled, which closes what is open. The Unix sockets `backends` get connections in turn."""
        with Accepting(listener) as accepting:
            await self.take(accepting.next, backends)

    async def take(self, arrive: Callable[[], Awaitable[Arrival]], backends: Sequence[Path]) -> None:
        """The same with connections that were accepted elsewhere: `arrive` waits for the next one."""
        loop = asyncio.get_running_loop()
        backend = itertools.cycle(backends)
        async with asyncio.TaskGroup() as tasks:
            while True:
                limits, arrival = self._limits, await arrive()
                connection = _Connection(arrival, limits.bounds, loop.time() + limits.unproven)
                if self._has_place(connection):
                    self._open[connection.name] = connection
                    self._emptied.clear()
                    tasks.create_task(self._serve(connection, next(backend)))
                else:
                    arrival.plain.close()
                await asyncio.sleep(0)  # a queue of new connections must not hold up the accepted ones

    def close(self) -> None:
        """Accept no more connections; those that are open go on."""
        self._closing = True

    async def emptied(self) -> None:
        """Wait until every connection has closed and handed over what was in its buffers."""
        await self._emptied.wait()

    def _has_place(self, connection: _Connection) -> bool:
        if self._closing:
            return False
        gives_way = self._places.arrive(connection.name, connection.origin)
        if gives_way == connection.name:
            self._full.report(connection.address, _now())
            return False
        self._give_way(gives_way)
        return True

    def _give_way(self, name: str | None) -> None:
        """End the connection that gives way to another one, if there is one."""
        if name is not None and name in self._open:
            self._full.report(self._open[name].address, _now())
            self.end(name)

    def end(self, name: str) -> None:
        """End the connection of that name at once, if it is open."""
        if name in self._open:
            self._open[name].end_at(_now())

    async def _serve(self, connection: _Connection, backend: Path) -> None:
        try:
            await self._hold(connection, backend)
        except (OSError, CertificateError, SignerError, TimeoutError, UnicodeDecodeError) as error:
            # what every client can cause: ssl's errors are OSErrors, and ssl itself decodes the names in a client's
            # certificate
            log.event(LOG, "connection_failed", level=logging.DEBUG, address=connection.address, cause=str(error))
        except Exception as error:  # noqa: BLE001 - whatever one connection can cause must not end the others
            log.fault(LOG, "CA connection", error, address=connection.address)
        finally:
            del self._open[connection.name]
            if not self._open:
                self._emptied.set()
            self._places.leave(connection.name)
            self._forget(connection)
            connection.inspection.end()
            connection.plain.close()

    def _forget(self, connection: _Connection) -> None:
        """Remember the address alone: calls that still wait in gRPC prove nothing by it, and the audit log names it."""
        if self._named.pop(connection.name, None) is not None:
            now = _now()
            self._ended[connection.name] = Peer(connection.address)
            self._ends.append((now, connection.name))
            while self._ends[0][0] < now - REMEMBERED:  # with a timer for each, all timers would take longer
                del self._ended[self._ends.popleft()[1]]

    async def _hold(self, connection: _Connection, backend: Path) -> None:
        try:
            async with connection.timeout():
                await self._relay(connection, backend)
        except TimeoutError:
            if not connection.timed_out:
                raise  # it is the operating system's
            if not connection.proven:
                raise ConnectionAbortedError("no caller was proven in time, or others needed the place") from None

    async def _relay(self, connection: _Connection, backend: Path) -> None:
        connection.plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        front, back = FrontEnd(self._context(), connection.inspect), BackEnd()
        try:
            await shake_hands(connection.plain, front, self._limits.handshake)
            chain = verified_chain(front)
            # gRPC may show a call as soon as it is reached: the peer has to be known before
            connection.peer = Peer(connection.address, chain)
            connection.end_at(min(connection.deadline, _now() + self._seconds_left(chain)))
            self._named[connection.name] = connection
            await reach(backend, connection.name, back)
            await relay(front, back)
        finally:
            front.abort()
            back.abort()

    def _seconds_left(self, chain: tuple[x509.Certificate, ...]) -> float:
        """Seconds until a connection with that client certificate has to end."""
        return (chain[0].not_valid_after_utc - self._now()).total_seconds() if chain else math.inf


class Accepting:
    """Accepts connections from a listening socket that does not block, inside this context.

    The event loop watches the socket until it was ready IN_VAIN times in a row without anyone waiting. To begin and end
    that for each connection, as `loop.sock_accept` does, costs two system calls; to go on would keep the loop busy
    while there is no room for a connection, or no worker.
    """

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._loop = asyncio.get_running_loop()
        self._waiting: asyncio.Future[None] | None = None
        self._is_watched = False
        self._in_vain = 0
        self._failed = log.LogOnChange(LOG, "not_accepted")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._loop.remove_reader(self._listener)

    async def next(self) -> Arrival:
        """The next connection, whenever it comes."""
        while True:
            try:
                plain, address = self._listener.accept()
            except BlockingIOError:
                await self._ready()
            except OSError as error:  # no descriptor is left, or the client is gone already
                self._failed.report(error.strerror or str(error))
                await asyncio.sleep(ACCEPT_AGAIN)
            else:
                self._failed.resolved()
                plain.setblocking(False)
                origin = origin_of(address[0]) if isinstance(address, tuple) else str(address)
                return Arrival(plain, address_text(address), origin, f"{_PREFIX}{secrets.token_hex(16)}")

    async def _ready(self) -> None:
        if not self._is_watched:
            self._is_watched = True
            self._loop.add_reader(self._listener, self._tell)
        self._waiting = self._loop.create_future()
        try:
            await self._waiting
        finally:
            self._waiting = None

    def _tell(self) -> None:
        if self._waiting is not None:
            self._in_vain = 0
            if not self._waiting.done():
                self._waiting.set_result(None)
            return
        self._in_vain += 1
        if self._in_vain >= IN_VAIN:
            self._in_vain, self._is_watched = 0, False
            self._loop.remove_reader(self._listener)


def _now() -> float:
    """The event loop's time, in seconds."""
    return asyncio.get_running_loop().time()


def _name_of(grpc_peer: str) -> str:
    return grpc_peer.removeprefix("unix-abstract:")


def address_text(address: object) -> str:
    """A socket's address as text, an IPv6 one in brackets (RFC 3986 section 3.2.2). A Unix socket's is text already."""
    return str(ListenAddress(*address[:2])) if isinstance(address, tuple) else str(address)
