"""`sds-agent ca serve` put together: the signer, the service on its Unix socket, TLS in front, and how they end.

The module is anyio's. It only starts and stops what is asyncio's: gRPC's servers and the acceptor.
"""

import logging
import os
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from datetime import timedelta
from pathlib import Path
from urllib.parse import quote

import anyio
import grpc
import grpc.aio

from sds_agent import log
from sds_agent.ca.acceptor import ConnectionLimits, TlsAcceptor
from sds_agent.ca.books import OwnBooks
from sds_agent.ca.jwt import LONGEST_TOKEN
from sds_agent.ca.opening import administered, listening, opened
from sds_agent.ca.service import LARGEST_REQUEST, SERVICE, CertificateService, Rules
from sds_agent.ca.settings import CaSettings
from sds_agent.ca.tls import ServerTls
from sds_agent.clock import Clock, SystemClock
from sds_agent.configfile.listening import ListenAddress
from sds_agent.descriptors import room_for
from sds_agent.errors import ConfigurationError
from sds_agent.files import LONGEST_SOCKET_PATH, socket_path_size
from sds_agent.rpc import core
from sds_agent.rpc.frames import Bounds
from sds_agent.rpc.health import Health
from sds_agent.signals import until_signalled
from sds_agent.signing.signer import SignerError

LOG = logging.getLogger(__name__)

LARGEST_HEADERS = LONGEST_TOKEN + (4 << 10)
"""Bytes. gRPC's own default is half a token's: between that and the whole it refuses calls at random."""
FRAMES = Bounds(LARGEST_HEADERS)
"""gRPC counts a header as 32 bytes more than it is long, so that a block that it takes is shorter than this."""
FRAMES_A_SECOND = 2
"""Frames that a proven caller may send beside its calls, as long as a connection may last: pings and their answers."""
SERVERS = 8
"""gRPC servers that share the connections. Each fetches one call at a time, by way of a thread of its own: with several
the event loop finds several calls ready at once. With 8 of them a request takes 0.92 to 0.97 of the processor time that
it takes with 2, with 8 or 32 callers; 16 gain nothing more, and memory shows no difference.
"""
FAREWELL = 5.0
"""Seconds at shutdown for the requests in work to end."""
FLUSH = 0.2
"""Seconds at most, after that, for the last answers to reach their callers."""


async def run(settings: CaSettings) -> None:
    """Serve until SIGTERM, SIGINT or SIGHUP.

    Raises ConfigurationError when it cannot start, alone or in an exception group, as its parts run in one.
    """
    async with until_signalled(), serving(settings, SystemClock()):
        await anyio.sleep_forever()
    log.event(LOG, "stopped")


@asynccontextmanager
async def serving(settings: CaSettings, clock: Clock) -> AsyncIterator[ListenAddress]:
    """The CA, running inside this context; gives the address it listens at. Raises ConfigurationError."""
    # 1. What can be wrong comes before the first caller does.
    async with opened(settings, clock) as parts:
        source = parts.source
        tls = ServerTls(source.current, settings.server_names, clock.now, ask_client=settings.callers.mtls)
        check_signer(tls)
        limits = settings.limits
        acceptor = TlsAcceptor(
            tls.context, clock.now, connection_limits(room_for(limits.connections), limits.connection_age)
        )
        rules = Rules(parts.authentication(), settings.node_agents, limits.per_caller, parts.denied)
        service = CertificateService(rules, source.current, acceptor, OwnBooks(parts.ledger), clock)
        with listening(settings.listen) as listener:
            async with anyio.create_task_group() as tasks:
                # 2. gRPC serves before the first connection is relayed to it.
                async with grpc_serving(service, acceptor, limits.connection_age) as backends:
                    for loop in parts.loops():
                        tasks.start_soon(loop)
                    tasks.start_soon(acceptor.run, listener, backends)
                    host, port = listener.getsockname()[:2]
                    address = ListenAddress(host, port)
                    log.event(LOG, "listening", address=str(address), trust_domain=settings.trust_domain)
                    log.event(LOG, "grpc_core", level=logging.DEBUG, **core.in_force())
                    try:
                        async with administered(settings.admin, parts.running(address, acceptor), clock):
                            yield address
                    finally:
                        # 3. At the end no connection is taken any more, gRPC ends the calls in work as this context is
                        #    left, their answers leave the relays, and only then do the relays and what follows files
                        #    end.
                        acceptor.close()
                with anyio.CancelScope(shield=True), anyio.move_on_after(FLUSH):
                    await acceptor.emptied()
                tasks.cancel_scope.cancel()


def connection_limits(most: int, age: timedelta) -> ConnectionLimits:
    """The limits of at most so many connections, each of which may last so long."""
    return ConnectionLimits(most, FRAMES, frames_when_proven=int(FRAMES_A_SECOND * age.total_seconds()))


def check_signer(tls: ServerTls) -> None:
    """Raises ConfigurationError where there is no certificate for the server and none can be issued."""
    try:
        tls.context()
    except SignerError as error:
        raise ConfigurationError(f"signer: {error}") from error


@asynccontextmanager
async def grpc_serving(
    service: CertificateService, acceptor: TlsAcceptor, age: timedelta
) -> AsyncIterator[Sequence[Path]]:
    """gRPC's servers, running inside this context; gives the path to the socket of each, for this process alone.

    A connection may last for `age`.
    """
    health = Health(_always, frozenset({SERVICE}), hang_up=acceptor.hang_up, holder=acceptor.origin)
    servers = [_grpc_server(age) for _ in range(SERVERS)]
    with ExitStack() as stack:
        backends = [Path(f"/proc/self/fd/{descriptor}") for descriptor in _bind(servers, stack)]
        for server in servers:
            server.add_generic_rpc_handlers((service.handler(), health.handler()))
            await server.start()
        try:
            yield backends
        finally:
            health.drain()
            with anyio.CancelScope(shield=True):
                async with anyio.create_task_group() as stopping:
                    for server in servers:
                        stopping.start_soon(server.stop, FAREWELL)


def _bind(servers: Sequence[grpc.aio.Server], stack: ExitStack) -> list[int]:
    """Bind each to a socket; returns the descriptors that lead there, which `stack` closes.

    The sockets have paths only while this runs: no other process finds them, to call gRPC past the acceptor as one of
    its peers, and nothing is left of them however the process ends.
    """
    descriptors = []
    with _private_directory() as directory:
        for number, server in enumerate(servers):
            path = directory / f"grpc-{number}"
            server.add_insecure_port(f"unix:{quote(str(path))}")
            descriptors.append(os.open(path, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW))
            stack.callback(os.close, descriptors[-1])
    return descriptors


def _grpc_server(age: timedelta) -> grpc.aio.Server:
    milliseconds = int(age.total_seconds() * 1000)
    return grpc.aio.server(
        options=(
            ("grpc.max_receive_message_length", LARGEST_REQUEST),
            ("grpc.max_metadata_size", LARGEST_HEADERS),
            ("grpc.max_concurrent_streams", 100),
            ("grpc.max_connection_age_ms", milliseconds),
            ("grpc.max_connection_age_grace_ms", 10_000),
            ("grpc.max_connection_idle_ms", milliseconds),
            ("grpc.server_handshake_timeout_ms", 10_000),
            ("grpc.keepalive_time_ms", 60_000),
            ("grpc.keepalive_timeout_ms", 20_000),
            ("grpc.http2.max_ping_strikes", 0),
            ("grpc.http2.bdp_probe", 0),  # a ping to the client, which answers it, for each connection
        )
    )


def _always() -> bool:
    """The service is there only while it can answer: it answers from memory."""
    return True


@contextmanager
def _private_directory() -> Iterator[Path]:
    """A directory (0700) for gRPC's sockets, in memory where no directory on disk is writable."""
    try:
        base = tempfile.gettempdir()
    except FileNotFoundError:
        base = "/dev/shm"  # noqa: S108 - mkdtemp makes a directory of its own there
    try:
        with tempfile.TemporaryDirectory(prefix="sds-agent-ca-", dir=base) as directory:
            if socket_path_size(Path(directory, "grpc-0")) > LONGEST_SOCKET_PATH:
                raise ConfigurationError(
                    f"{base} is too long for the path of the server's socket; set TMPDIR to a shorter one"
                )
            yield Path(directory)
    except PermissionError as error:
        raise ConfigurationError(
            f"cannot make a directory for the server's socket in {base}: {error.strerror}; set TMPDIR to one"
        ) from error
