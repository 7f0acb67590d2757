"""The gRPC server on its socket: its options, start and self-probe, the loss of the socket, and its end."""

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from typing import Protocol

import grpc
import grpc.aio
from msgspec import Struct

from sds_agent import log
from sds_agent.descriptors import room_for
from sds_agent.errors import SdsAgentError
from sds_agent.files import may_access
from sds_agent.sds.acceptor import BACKLOG, UnixAcceptor
from sds_agent.sds.endpoint import Endpoint, SocketFile, claim, inherit
from sds_agent.sds.relay import READ_ESTIMATE
from sds_agent.sds.service import SERVICE, SecretDiscoveryService
from sds_agent.tasks import NoThreadError, background_tasks, in_thread, uninterrupted

LOG = logging.getLogger(__name__)

TIMEOUT = 30.0
"""Seconds that the server may take to answer its own probe. A machine that boots, and starts everything at once, is no
reason to give up.
"""

HEAD_START = 0.25
"""Seconds that the probe waits at most for `before_probe`."""

DRAIN = 1.0
"""Seconds for streams to end at shutdown, and for gRPC to send how they ended."""

SETTLED = 1.0
"""Seconds in which few streams have come or gone."""

FLUSH = 0.2
"""Seconds for the peers to read that and to close their connections."""

LINGER = 0.1
"""Seconds from GOAWAY to the end of the streams, with which gRPC closes their connections: a peer that is just writing
would find its connection closed, and never read how its stream ended.
"""

STOP = 0.3
"""Seconds for gRPC to close the connections after that."""

STREAMS_PER_CONNECTION = 1000
"""Streams at one time on one connection. An Envoy has one for each of its secrets, and opens another connection when it
has more of them.
"""

MOST_PENDING = 20_000
"""Calls that may wait until gRPC hands them to a handler."""

SPARE_CONNECTIONS = 100
"""Connections beyond one for every two streams; an Envoy has two streams on a connection at least."""


class ProbeError(SdsAgentError):
    """The server does not answer at its own socket."""


class Service(Protocol):
    """A gRPC service beside that for secrets."""

    def handler(self) -> grpc.GenericRpcHandler:
        """The service as a handler for a grpc.aio server."""
        ...

    def drain(self) -> None:
        """End its streams."""
        ...


class Limits(Struct, frozen=True):
    """What peers may use: streams at one time in all, names on a stream, bytes in a request; and the seconds of silence
    after which the server asks a peer whether it is still there.
    """

    streams: int = 10_000
    names: int = 100
    request_bytes: int = 1 << 20
    silence: float = 60


def options(limits: Limits) -> Sequence[tuple[str, int]]:
    """The channel arguments.

    gRPC fetches one call at a time, and cancels at once any that comes while a thousand others wait to be fetched. So
    one connection may have no more calls than that, those that it has reset among them, and more calls may wait: a
    flood delays a new Envoy and does not send it away.

    A frozen peer is noticed within seconds only if both of the keepalive's time-outs are set. Without
    `max_ping_strikes` an Envoy that is configured to ping often is sent away.

    Requests come uncompressed (1 allows that alone): names are kept, and would be a thousand times what came, which is
    what counts until the next look at what is stored. An Envoy compresses them only if its google_grpc is told to.
    """
    silence = int(limits.silence * 1000)
    return (
        ("grpc.max_receive_message_length", limits.request_bytes),
        ("grpc.max_concurrent_streams", STREAMS_PER_CONNECTION),
        ("grpc.server.max_pending_requests", MOST_PENDING),
        ("grpc.server.max_pending_requests_hard_limit", MOST_PENDING),
        ("grpc.keepalive_time_ms", silence),
        ("grpc.keepalive_timeout_ms", silence // 3),
        ("grpc.http2.ping_timeout_ms", silence // 3),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.compression_enabled_algorithms_bitset", 1),
        ("grpc.experimental.tcp_read_chunk_size", READ_ESTIMATE),
    )


@asynccontextmanager
async def serving(
    service: SecretDiscoveryService,
    file: SocketFile,
    limits: Limits,
    others: Sequence[Service] = (),
    *,
    before_probe: Callable[[], Awaitable[None]] | None = None,
    check_every: float = 5.0,
    listening: int | None = None,
) -> AsyncIterator[None]:
    """Serve inside this context; it is entered only once the server answers at its path, as far as the agent itself may
    connect there.

    The server probes itself when `before_probe` returns, or after `HEAD_START`: an Envoy that waited for the socket
    does not wait for the probe as well. Every `check_every` seconds it checks that the socket is still there, and makes
    a new one if not. Leaving the context ends all streams with OK, stops the server and removes the socket.

    `listening` is the descriptor of a socket at that path that a service manager listens on: it is taken in place of a
    new one, and stays. Raises ConfigurationError or SocketInUseError (see `endpoint.claim`), and ProbeError.
    """
    listener = _Listener(service, file, limits, others, listening)
    await listener.open(before_probe)
    try:
        async with background_tasks() as start:
            start(listener.watch(check_every))
            start(_tidy(service))
            yield
    finally:
        await uninterrupted(listener.close())


class _SocketServer:
    """A gRPC server and the acceptor of its peers, at an endpoint."""

    def __init__(self, server: grpc.aio.Server, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._server = server
        self._acceptor: UnixAcceptor | None = None

    async def open(self, secrets: SecretDiscoveryService, others: Sequence[Service], most: int) -> None:
        """Listen, and serve `most` connections at one time. Raises ConfigurationError."""
        self._server.add_generic_rpc_handlers([each.handler() for each in (secrets, *others)])
        bind(self._server, self.endpoint)
        with ExitStack() as undo:
            backend = self.endpoint.hide()
            undo.callback(os.close, backend)
            listener = undo.enter_context(self.endpoint.listen(BACKLOG))
            # From here on peers connect; they wait in the listener's backlog until the acceptor begins.
            self.endpoint.publish()
            await self._server.start()
            self._acceptor = UnixAcceptor(listener, backend, most, secrets.connections, secrets.stored)
            undo.pop_all()
        self._acceptor.begin()

    async def stop(self, end_streams: Callable[[], None]) -> None:
        """Stop once the calls that `end_streams` ends are over, and after `DRAIN` seconds in any case."""
        if self._acceptor is not None:
            self._acceptor.close()
        # First GOAWAY, which gRPC sends at once: a peer opens no more streams on that connection. Envoy opens a new one
        # when a stream ends; that would be cancelled with the connection, and Envoy would warn.
        stopping = asyncio.ensure_future(self._server.stop(LINGER + DRAIN))
        await asyncio.sleep(LINGER)
        end_streams()
        await _within(DRAIN, asyncio.shield(stopping))
        if self._acceptor is not None:
            # gRPC would wait for ever for a peer that sends all the time and reads nothing
            await _within(FLUSH, self._acceptor.emptied())
            self._acceptor.abort()
        await _within(STOP, stopping)


class _Listener:
    """A server at its path, and a new one when the path is lost: gRPC listens only at its start."""

    def __init__(
        self,
        service: SecretDiscoveryService,
        file: SocketFile,
        limits: Limits,
        others: Sequence[Service],
        listening: int | None,
    ) -> None:
        self._service = service
        self._others = others
        self._file = file
        self._limits = limits
        self._listening = listening
        self._connections = room_for(limits.streams // 2 + SPARE_CONNECTIONS)
        self._claimed = ExitStack()
        self._current: _SocketServer | None = None
        self._lost = log.LogOnChange(LOG, "socket_lost")

    async def open(self, before_probe: Callable[[], Awaitable[None]] | None = None) -> None:
        """Claim the path and serve there. A server that lost it goes on meanwhile."""
        self._claimed.close()
        # one that was handed over is good once: where its path is lost, a socket of our own takes that
        listening, self._listening = self._listening, None
        claimed = claim(self._file) if listening is None else inherit(self._file, listening)
        endpoint = self._claimed.enter_context(claimed)
        new = _SocketServer(grpc.aio.server(options=options(self._limits)), endpoint)
        try:
            await new.open(self._service, self._others, self._connections)
            if before_probe is not None:
                await _within(HEAD_START, before_probe())
            # not where it is another user's and group's, and the agent, without CAP_DAC_OVERRIDE, may not connect
            if may_access(endpoint.path, os.W_OK):
                await probe(endpoint.public_address)
        except BaseException:
            self._claimed.close()
            own = self._current is None  # a server before it keeps its streams
            await uninterrupted(new.stop(self._drain if own else _nothing))
            raise
        self._current = new

    async def watch(self, check_every: float) -> None:
        """Check the socket every so many seconds, for ever. Envoys that come later could not reach one that is lost."""
        while True:
            await asyncio.sleep(check_every)
            self._service.report_left_out()
            self._service.release_former()
            if self._current is None or not self._current.endpoint.in_place():
                await self._fix()

    async def _fix(self) -> None:
        before = self._current
        try:
            await self.open()
        except SdsAgentError as error:
            self._lost.report(str(error), socket=str(self._file.path))
            return
        if before is not None:  # its Envoys open their streams at the new one
            await uninterrupted(before.stop(self._service.dismiss))
        self._lost.resolved()
        log.event(LOG, "socket_restored", level=logging.WARNING, socket=str(self._file.path))

    async def close(self) -> None:
        """Remove the socket, end all streams and stop."""
        self._claimed.close()
        if self._current is not None:
            await self._current.stop(self._drain)
            self._current = None  # its finalizer needs the event loop

    def _drain(self) -> None:
        for each in (self._service, *self._others):
            each.drain()


async def _tidy(service: SecretDiscoveryService) -> None:
    """Give the memory back that many streams have needed as they came or left, once they are no more in motion."""
    while True:
        await service.crowd_moved.wait()
        from sds_agent import memory  # noqa: PLC0415 - not before there are many streams

        while service.crowd_moved.is_set():
            service.crowd_moved.clear()
            await asyncio.sleep(SETTLED)
        with suppress(NoThreadError):
            await in_thread(memory.give_back)
            log.event(LOG, "memory_given_back", level=logging.DEBUG)


async def _within(seconds: float, done: Awaitable[None]) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await done


def _nothing() -> None:
    pass


def bind(server: grpc.aio.Server, endpoint: Endpoint) -> None:
    """Bind the server to the endpoint's first name. Raises ConfigurationError."""
    try:
        with endpoint.private_umask():
            server.add_insecure_port(endpoint.address)
    except RuntimeError as error:  # gRPC's own, which gives no reason
        raise endpoint.refusal() from error


async def probe(address: str) -> None:
    """Open a stream at the server's own socket, and see it end with OK. Raises ProbeError."""
    async with grpc.aio.insecure_channel(address) as channel:
        ask: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(f"/{SERVICE}/StreamSecrets")
        call = ask(timeout=TIMEOUT)
        with suppress(grpc.aio.InternalError):  # the call has ended already; its code says how
            await call.done_writing()
        code = await call.code()
        if code is not grpc.StatusCode.OK:
            raise ProbeError(f"the agent does not answer at its own socket: {code.name} {await call.details()}")
