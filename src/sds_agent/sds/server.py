"""The gRPC server on its socket: options, start, self-probe, the loss of the socket and a clean end."""

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
from sds_agent.sds.acceptor import BACKLOG, Acceptor
from sds_agent.sds.endpoint import Endpoint, SocketFile, claim
from sds_agent.sds.service import SERVICE, SecretDiscoveryService
from sds_agent.tasks import background_tasks, uninterrupted

LOG = logging.getLogger(__name__)

TIMEOUT = 30.0
"""Seconds that the server may take to answer its own probe: a machine that is starved at its start, when all else
starts too, is no reason to end.
"""

HEAD_START = 0.25
"""Seconds for which the probe lets others go first."""

DRAIN = 1.0
"""Seconds for streams to end cleanly at shutdown, and for their status to be sent."""

FLUSH = 0.2
"""Seconds for their peers to read it and to close their connections."""

LINGER = 0.1
"""Seconds between GOAWAY and the end of the streams, with which their connections are closed: a peer that is just
writing would find its connection closed, and never read how its stream ended.
"""

STOP = 0.3
"""Seconds for connections to be closed after that."""


STREAMS_EACH = 1000
"""Streams at one time on one connection. An Envoy has one for each of its secrets; one with more of them opens another
connection.
"""


MOST_PENDING = 20_000
"""Calls that may wait to be fetched."""

CONNECTIONS = 100
"""Connections beside those for which there are streams. An Envoy has one for two streams at least."""


class ProbeError(SdsAgentError):
    """The server does not answer on its own socket."""


class Service(Protocol):
    """What the server serves beside secrets."""

    def handler(self) -> grpc.GenericRpcHandler:
        """The service as a handler for a grpc.aio server."""
        ...

    def drain(self) -> None:
        """Let its streams end."""
        ...


class Limits(Struct, frozen=True):
    """What one peer can make the server hold: streams at a time in all, names on a stream, bytes in a request, and
    the seconds of silence after which it is asked whether it is still there.
    """

    streams: int = 10_000
    names: int = 100
    request_bytes: int = 1 << 20
    silence: float = 60


def options(limits: Limits) -> Sequence[tuple[str, int]]:
    """The channel arguments.

    gRPC fetches one call at a time, and cancels at once what comes while a thousand others wait to be fetched. So one
    connection is not to have more calls than that, those that it has reset among them, and more may wait: a new Envoy
    is held up by a flood and not sent away.

    Both of the keepalive's time-outs are needed to notice a frozen peer within seconds, and without the third an Envoy
    that is configured to ping often is sent away.
    """
    silence = int(limits.silence * 1000)
    return (
        ("grpc.max_receive_message_length", limits.request_bytes),
        ("grpc.max_concurrent_streams", STREAMS_EACH),
        ("grpc.server.max_pending_requests", MOST_PENDING),
        ("grpc.server.max_pending_requests_hard_limit", MOST_PENDING),
        ("grpc.keepalive_time_ms", silence),
        ("grpc.keepalive_timeout_ms", silence // 3),
        ("grpc.http2.ping_timeout_ms", silence // 3),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.keepalive_permit_without_calls", 1),
    )


@asynccontextmanager
async def serving(
    service: SecretDiscoveryService,
    file: SocketFile,
    limits: Limits,
    others: Sequence[Service] = (),
    *,
    before_probe: Callable[[], Awaitable[None]] | None = None,
    look_every: float = 5.0,
) -> AsyncIterator[None]:
    """Serve inside this context; it is entered only once the server answers at its path.

    It asks itself when `before_probe` returns, or after `HEAD_START`: an Envoy that waited for the socket is not to
    wait for that as well. Raises ConfigurationError or SocketInUseError (see `endpoint.claim`) and ProbeError. Every
    `look_every` seconds it looks whether the socket is still there, and makes a new one if not. Leaving it ends all
    streams with OK, stops the server and removes the socket.
    """
    listener = _Listener(service, file, limits, others)
    await listener.open(before_probe)
    try:
        async with background_tasks() as start:
            start(listener.keep(look_every))
            yield
    finally:
        await uninterrupted(listener.close())


class _Front:
    """A gRPC server and the acceptor of its peers, at an endpoint."""

    def __init__(self, server: grpc.aio.Server, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self._server = server
        self._acceptor: Acceptor | None = None

    async def open(self, services: Sequence[Service], connections: int, holders: dict[str, str]) -> None:
        """Listen, and serve so many connections at one time. Raises ConfigurationError."""
        self._server.add_generic_rpc_handlers([each.handler() for each in services])
        bind(self._server, self.endpoint)
        with ExitStack() as undo:
            backend = self.endpoint.hide()
            undo.callback(os.close, backend)
            listener = undo.enter_context(self.endpoint.listen(BACKLOG))
            self.endpoint.publish()
            await self._server.start()
            self._acceptor = Acceptor(listener, backend, connections, holders)
            undo.pop_all()
        self._acceptor.begin()

    async def stop(self, end_streams: Callable[[], None]) -> None:
        """Stop, once the calls that `end_streams` ends have ended or `DRAIN` seconds are over."""
        if self._acceptor is not None:
            self._acceptor.close()
        # First GOAWAY, which gRPC sends at once: a peer opens no more streams on a connection that said so. One that
        # it opened anew, as Envoy does when a stream ends, would be cancelled with the connection, and Envoy warns.
        stopping = asyncio.ensure_future(self._server.stop(LINGER + DRAIN))
        await asyncio.sleep(LINGER)
        end_streams()
        await _within(DRAIN, asyncio.shield(stopping))
        if self._acceptor is not None:
            # gRPC would wait for ever for the connection of a peer that sends all the time and reads nothing
            await _within(FLUSH, self._acceptor.emptied())
            self._acceptor.abort()
        await _within(STOP, stopping)


class _Listener:
    """A server at its path, and another one when the path is lost: gRPC cannot listen anew once it has started."""

    def __init__(
        self, service: SecretDiscoveryService, file: SocketFile, limits: Limits, others: Sequence[Service]
    ) -> None:
        self._service = service
        self._services = (service, *others)
        self._file = file
        self._limits = limits
        self._connections = room_for(limits.streams // 2 + CONNECTIONS)
        self._claimed = ExitStack()
        self._front: _Front | None = None
        self._lost = log.LogOnChange(LOG, "socket_lost")

    async def open(self, before_probe: Callable[[], Awaitable[None]] | None = None) -> None:
        """Claim the path and serve there, beside the server that was there before."""
        self._claimed.close()
        endpoint = self._claimed.enter_context(claim(self._file))
        front = _Front(grpc.aio.server(options=options(self._limits)), endpoint)
        try:
            await front.open(self._services, self._connections, self._service.holders)
            if before_probe is not None:
                await _within(HEAD_START, before_probe())
            await probe(endpoint.public_address)
        except BaseException:
            self._claimed.close()
            own = self._front is None  # or else the streams of the server before it are not to end
            await uninterrupted(front.stop(self._drain if own else _nothing))
            raise
        self._front = front

    async def keep(self, look_every: float) -> None:
        """Fix the loss of the socket, for ever: to Envoys that come later the agent would be dead."""
        while True:
            await asyncio.sleep(look_every)
            self._service.look()
            if self._front is None or not self._front.endpoint.in_place():
                await self._fix()

    async def _fix(self) -> None:
        before = self._front
        try:
            await self.open()
        except SdsAgentError as error:
            self._lost.report(str(error), socket=str(self._file.path))
            return
        if before is not None:  # its Envoys are to come to the new one
            await uninterrupted(before.stop(self._service.dismiss))
        self._lost.resolved()
        log.event(LOG, "socket_restored", level=logging.WARNING, socket=str(self._file.path))

    async def close(self) -> None:
        """Remove the socket, end all streams and stop."""
        self._claimed.close()
        if self._front is not None:
            await self._front.stop(self._drain)
            self._front = None  # the finalizer of gRPC's server needs the event loop

    def _drain(self) -> None:
        for each in self._services:
            each.drain()


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
    except RuntimeError as error:  # gRPC's, which does not say why
        raise endpoint.refusal() from error


async def probe(address: str) -> None:
    """Open a stream at the server's own socket and see it end well. Raises ProbeError."""
    async with grpc.aio.insecure_channel(address) as channel:
        ask: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(f"/{SERVICE}/StreamSecrets")
        call = ask(timeout=TIMEOUT)
        with suppress(grpc.aio.InternalError):  # the call has ended already; its code tells how
            await call.done_writing()
        code = await call.code()
        if code is not grpc.StatusCode.OK:
            raise ProbeError(f"the agent's own socket does not answer as it should: {code.name} {await call.details()}")
