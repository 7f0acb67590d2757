"""`sds-agent ca serve` put together: the signer, the service on its Unix socket, TLS in front, and how they end.

The module is anyio's. It only starts and stops what is asyncio's: gRPC's servers and the acceptor.
"""

import errno
import logging
import os
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager, contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import anyio
import grpc
import grpc.aio
from msgspec import structs

from sds_agent import log, sources
from sds_agent.admin.settings import AdminSettings
from sds_agent.ca.acceptor import ConnectionLimits, TlsAcceptor
from sds_agent.ca.audit import AuditLog
from sds_agent.ca.authentication import TIMEOUT, Authentication
from sds_agent.ca.callers import ClaimRule
from sds_agent.ca.deny_list import DenyList
from sds_agent.ca.jwks import IssuerKeys, Location
from sds_agent.ca.jwt import LONGEST_TOKEN, TrustedIssuer
from sds_agent.ca.observed import RunningCa
from sds_agent.ca.policy import overreaching
from sds_agent.ca.service import LARGEST_REQUEST, SERVICE, CertificateService, Rules
from sds_agent.ca.settings import CaSettings, JwtSettings
from sds_agent.ca.source import PluggedSource, SelfSignedSource, Source
from sds_agent.ca.tls import ServerTls
from sds_agent.ca.tokens import JoinTokens
from sds_agent.clock import Clock, SystemClock
from sds_agent.configfile.listening import ListenAddress
from sds_agent.descriptors import room_for
from sds_agent.directories import LockedDirectory, locked_directory
from sds_agent.errors import ConfigurationError
from sds_agent.files import LONGEST_SOCKET_PATH, socket_path_size
from sds_agent.rpc import core
from sds_agent.rpc.frames import Bounds
from sds_agent.rpc.health import Health
from sds_agent.signals import until_signalled
from sds_agent.signing.self_signed import SelfSignedCa
from sds_agent.signing.signer import SignerError
from sds_agent.state import Restorable, watch
from sds_agent.tasks import TimeLimit

if TYPE_CHECKING:
    from sds_agent.admin.asgi import Application

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
BACKLOG = 1024
_UNKNOWN = "give a name that leads to an address of this machine, or the address itself"
_FIXES = {
    errno.EADDRINUSE: "free it or choose another port",
    errno.EADDRNOTAVAIL: "give an address of this machine, or 0.0.0.0 or [::] for all of them",
    errno.EACCES: "choose a port from 1024 on, or give the server the capability CAP_NET_BIND_SERVICE",
}
"""How to fix it, by the error of the operating system."""


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
    # 1. What can be wrong comes before the first caller does: the audit log, without which nothing is signed; the
    #    directory of a root of our own, locked before one is made in it; what signs, and who may ask.
    started_at, audit = clock.now(), AuditLog(settings.audit)
    audit.check()
    with _locked(settings) as locked, _settled(audit, clock):
        source = await open_source(settings, clock)
        authentication = await _authentication(settings, clock)
        deny_list = await _deny_list(settings, clock)
        tls = ServerTls(source.current, settings.server_names, clock.now, ask_client=settings.callers.mtls)
        _check_signer(tls)
        _warn_of_reach(settings)
        acceptor = _acceptor(settings, tls, clock)
        rules = _rules(settings, authentication, deny_list)
        service = CertificateService(rules, source.current, acceptor, audit, clock)
        with _listening(settings.listen) as listener:
            async with anyio.create_task_group() as tasks:
                # 2. gRPC serves before the first connection is relayed to it.
                async with _grpc_serving(service, settings) as backends:
                    tasks.start_soon(source.follow)
                    tasks.start_soon(audit.follow, clock)
                    if locked is not None and isinstance(source, Restorable):
                        tasks.start_soon(watch, locked, lambda: [source])
                    if deny_list is not None:
                        tasks.start_soon(deny_list.follow)
                    for issuer in authentication.issuers:
                        tasks.start_soon(issuer.keys.follow)
                    tasks.start_soon(acceptor.run, listener, backends)
                    host, port = listener.getsockname()[:2]
                    address = ListenAddress(host, port)
                    log.event(LOG, "listening", address=str(address), trust_domain=settings.trust_domain)
                    log.event(LOG, "grpc_core", level=logging.DEBUG, **core.in_force())
                    tasks.start_soon(sources.warn, _sources(settings))
                    running = _running(settings, started_at, address, (source, service, audit, acceptor))
                    try:
                        async with _administered(settings.admin, running, clock):
                            yield address
                    finally:
                        # 3. At the end no connection is taken any more, gRPC ends the calls in work as this context is
                        #    left, their answers leave the relays, and only then do the relays and what follows files
                        #    end. The audit log is settled last, when nothing can be refused any more.
                        acceptor.close()
                with anyio.CancelScope(shield=True), anyio.move_on_after(FLUSH):
                    await acceptor.emptied()
                tasks.cancel_scope.cancel()


@asynccontextmanager
async def _administered(settings: AdminSettings, ca: RunningCa, clock: Clock) -> AsyncIterator[None]:
    """Serve the CA's status inside this context, if the configuration says where."""
    if not settings.enabled or (settings.socket is None and settings.address is None):
        yield
        return
    from sds_agent.admin.server import serving as admin_serving  # noqa: PLC0415 - few have one

    def make() -> "Application":
        from sds_agent.ca.application import application  # noqa: PLC0415 - measured: 60 ms for starlette

        return application(ca, clock)

    async with admin_serving(settings, make, clock):
        yield


def _running(
    settings: CaSettings,
    started_at: datetime,
    address: ListenAddress,
    parts: tuple[Source, CertificateService, AuditLog, TlsAcceptor],
) -> RunningCa:
    """The server as its views see it."""
    source, service, audit, acceptor = parts
    return RunningCa(
        started_at=started_at,
        trust_domain=settings.trust_domain,
        address=str(address),
        current=source.current,
        service=service,
        audit=audit,
        acceptor=acceptor,
    )


def _acceptor(settings: CaSettings, tls: ServerTls, clock: Clock) -> TlsAcceptor:
    frames = int(FRAMES_A_SECOND * settings.limits.connection_age.total_seconds())
    most = room_for(settings.limits.connections)
    return TlsAcceptor(tls.context, clock.now, ConnectionLimits(most, FRAMES, frames_when_proven=frames))


@contextmanager
def _settled(audit: AuditLog, clock: Clock) -> Iterator[None]:
    """Write at the end how many refusals the audit log left out and has not counted yet."""
    try:
        yield
    finally:
        audit.settle(clock.now())


async def open_source(settings: CaSettings, clock: Clock) -> Source:
    """The configured signer. Raises ConfigurationError."""
    chosen = settings.signer
    if chosen.cacerts is not None:
        return await PluggedSource.open(
            chosen.cacerts, trust_domain=settings.trust_domain, passphrase_file=chosen.passphrase_file, clock=clock
        )
    assert chosen.self_signed is not None, "the settings hold one of the two"  # noqa: S101 - for the type checker
    ca = await SelfSignedCa.open(
        chosen.self_signed,
        trust_domain=settings.trust_domain,
        key_type=chosen.key,
        lifetime=chosen.root_lifetime,
        clock=clock,
        setting="signer.self_signed",
    )
    return await SelfSignedSource.open(ca, clock)


async def _authentication(settings: CaSettings, clock: Clock) -> Authentication:
    callers = settings.callers
    tokens = None if callers.join_tokens is None else await _tokens(callers.join_tokens)
    issuers = [await _issuer(each, clock) for each in callers.jwt]
    return Authentication(settings.trust_domain, issuers, callers.mtls, tokens)


async def _tokens(directory: Path) -> JoinTokens:
    tokens = JoinTokens(directory)
    try:
        await TimeLimit(TIMEOUT).call(tokens.prepare)
    except TimeoutError as error:
        raise ConfigurationError(
            f"callers.join_tokens: cannot use {directory}: {error.strerror}; check that its disk is there"
        ) from error
    return tokens


async def _deny_list(settings: CaSettings, clock: Clock) -> DenyList | None:
    file = settings.callers.deny_file
    return None if file is None else await DenyList.open(file, settings.trust_domain, clock)


def _rules(settings: CaSettings, authentication: Authentication, deny_list: DenyList | None) -> Rules:
    limits = settings.limits
    rules = Rules(authentication, settings.node_agents, limits.at_once, limits.per_caller)
    return rules if deny_list is None else structs.replace(rules, deny_list=deny_list.current)


async def _issuer(chosen: JwtSettings, clock: Clock) -> TrustedIssuer:
    location = Location(chosen.jwks, chosen.ca_file, chosen.token_file)
    rule = ClaimRule(chosen.issuer, chosen.audience, chosen.claim, chosen.allow)
    return TrustedIssuer(rule, await IssuerKeys.open(location, clock))


def _warn_of_reach(settings: CaSettings) -> None:
    """Report settings that give access to more identities than their author may expect."""
    for issuer in settings.callers.jwt:
        if issuer.claim is not None and not issuer.allow:
            log.event(
                LOG,
                "issuer_names_anybody",
                level=logging.WARNING,
                issuer=issuer.issuer,
                effect="its tokens can name every identity of the trust domain, the node agents' among them",
                fix="list in callers.jwt[].allow which ones it may name",
            )
    for agent, other in overreaching(settings.node_agents.values()):
        log.event(
            LOG,
            "node_agent_covers_another",
            level=logging.WARNING,
            node_agent=agent.identity,
            other=other.identity,
            effect="it can get the other's certificate, and with that act for all that the other may act for",
            fix="list in may_act_for the branches with workloads alone",
        )


def _check_signer(tls: ServerTls) -> None:
    try:
        tls.context()
    except SignerError as error:
        raise ConfigurationError(f"signer: {error}") from error


@asynccontextmanager
async def _grpc_serving(service: CertificateService, settings: CaSettings) -> AsyncIterator[Sequence[Path]]:
    """gRPC's servers, running inside this context; gives the path to the socket of each, for this process alone."""
    health = Health(_always, frozenset({SERVICE}))
    servers = [_grpc_server(settings) for _ in range(SERVERS)]
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


def _grpc_server(settings: CaSettings) -> grpc.aio.Server:
    age = int(settings.limits.connection_age.total_seconds() * 1000)
    return grpc.aio.server(
        options=(
            ("grpc.max_receive_message_length", LARGEST_REQUEST),
            ("grpc.max_metadata_size", LARGEST_HEADERS),
            ("grpc.max_concurrent_streams", 100),
            ("grpc.max_connection_age_ms", age),
            ("grpc.max_connection_age_grace_ms", 10_000),
            ("grpc.max_connection_idle_ms", age),
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
def _listening(address: ListenAddress) -> Iterator[socket.socket]:
    """The listening socket. Raises ConfigurationError."""
    try:
        family, kind, protocol, _, bound = socket.getaddrinfo(
            address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except UnicodeError as error:  # a part of the name is empty or too long
        raise _cannot_listen(address, "it is no host's name", _UNKNOWN) from error
    except OSError as error:
        raise _cannot_listen(address, error.strerror, _UNKNOWN) from error
    with ExitStack() as stack:
        try:
            listener = stack.enter_context(socket.socket(family, kind, protocol))
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.setblocking(False)
            listener.bind(bound)
            listener.listen(BACKLOG)
        except OSError as error:
            fix = _FIXES.get(error.errno or 0, "choose another")
            raise _cannot_listen(address, error.strerror, fix) from error
        yield listener


def _cannot_listen(address: ListenAddress, cause: str | None, fix: str) -> ConfigurationError:
    return ConfigurationError(f"listen: cannot listen at {address}: {cause}; {fix}")


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


def _sources(settings: CaSettings) -> list[sources.Source]:
    """What the operator provides: the signer, the keys that verify tokens, and the deny list."""
    signer = {
        "signer.cacerts": settings.signer.cacerts,
        "signer.passphrase_file": settings.signer.passphrase_file,
        "callers.deny_file": settings.callers.deny_file,
    }
    issuers: dict[str, Path | None] = {}
    for number, each in enumerate(settings.callers.jwt):
        key = f"callers.jwt[{number}]"
        keys = None if each.jwks.startswith("https://") else Path(each.jwks)
        issuers |= {f"{key}.jwks": keys, f"{key}.ca_file": each.ca_file, f"{key}.token_file": each.token_file}
    return [(key, path) for key, path in (signer | issuers).items() if path is not None]


@contextmanager
def _locked(settings: CaSettings) -> Iterator[LockedDirectory | None]:
    """Lock a self-signed root's directory, so that no second server makes a root of its own there."""
    directory = settings.signer.self_signed
    if directory is None:
        yield None
        return
    in_use = ConfigurationError(f"signer.self_signed: another CA server runs on {directory}; stop it first")
    with locked_directory(directory, "signer.self_signed", in_use) as locked:
        yield locked
