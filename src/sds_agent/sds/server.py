"""The gRPC server on its socket: options, start, self-probe and a clean end."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Protocol

import grpc
import grpc.aio
from msgspec import Struct

from sds_agent.errors import SdsAgentError
from sds_agent.sds.endpoint import SocketFile, claim
from sds_agent.sds.service import SERVICE, SecretDiscoveryService
from sds_agent.tasks import uninterrupted

PATIENCE = 5.0
"""Seconds that the server may take to answer its own probe."""

HEAD_START = 0.25
"""Seconds for which the probe lets others go first."""

DRAIN = 1.0
"""Seconds for streams to end cleanly at shutdown."""
FLUSH = 0.2
"""Seconds for what ended them to reach the peers; it is over as soon as it has."""


class ProbeError(SdsAgentError):
    """The server does not answer on its own socket."""


class Service(Protocol):
    """What the server serves beside secrets."""

    def handler(self) -> grpc.GenericRpcHandler:
        """The service as a handler for a grpc.aio server."""
        ...

    async def drain(self) -> None:
        """End its streams."""
        ...


class Limits(Struct, frozen=True):
    """What one peer can make the server hold: streams at a time in all, names on a stream, bytes in a request."""

    streams: int = 10_000
    names: int = 100
    request_bytes: int = 1 << 20


def options(limits: Limits) -> Sequence[tuple[str, int]]:
    """The channel arguments.

    Both of the keepalive's time-outs are needed to notice a frozen peer within seconds, and without the third an
    Envoy that is configured to ping often is sent away.
    """
    return (
        ("grpc.max_receive_message_length", limits.request_bytes),
        ("grpc.keepalive_time_ms", 60_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.ping_timeout_ms", 20_000),
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
) -> AsyncIterator[None]:
    """Serve inside this context; it is entered only once the server answers at its path.

    It asks itself when `before_probe` returns, or after `HEAD_START`: an Envoy that waited for the socket is not to
    wait for that as well. Raises ConfigurationError or SocketInUseError (see `endpoint.claim`) and ProbeError. Leaving
    it ends all streams with OK, stops the server and removes the socket.
    """
    with claim(file) as endpoint:
        server = grpc.aio.server(options=options(limits), maximum_concurrent_rpcs=limits.streams)
        services = (service, *others)
        server.add_generic_rpc_handlers([each.handler() for each in services])
        with endpoint.private_umask():
            server.add_insecure_port(endpoint.address)
        endpoint.appear()
        await server.start()
        try:
            if before_probe is not None:
                await _within(HEAD_START, before_probe())
            await probe(endpoint.public_address)
            yield
        finally:
            endpoint.disappear()
            await uninterrupted(_end(server, services))


async def _end(server: grpc.aio.Server, services: Sequence[Service]) -> None:
    await _within(DRAIN, _drain(services))
    await server.stop(FLUSH)


async def _drain(services: Sequence[Service]) -> None:
    async with asyncio.TaskGroup() as tasks:
        for each in services:
            tasks.create_task(each.drain())


async def _within(seconds: float, done: Awaitable[None]) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await done


async def probe(address: str) -> None:
    """Open a stream at the server's own socket and see it end well. Raises ProbeError."""
    async with grpc.aio.insecure_channel(address) as channel:
        ask: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(f"/{SERVICE}/StreamSecrets")
        call = ask(timeout=PATIENCE)
        await call.done_writing()
        code = await call.code()
        if code is not grpc.StatusCode.OK:
            raise ProbeError(f"the agent's own socket does not answer as it should: {code.name} {await call.details()}")
