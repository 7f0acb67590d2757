"""The composition root: builds the parts from the settings, owns their tasks and the order in which they end."""

import asyncio
import gc
import logging
import os
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sds_agent import log, preflight, systemd
from sds_agent.admin.settings import TelemetrySettings
from sds_agent.admin.start import administered, observed
from sds_agent.clock import Clock, SystemClock
from sds_agent.config.settings import Settings
from sds_agent.directories import LockedDirectory, locked_directory
from sds_agent.errors import SdsAgentError
from sds_agent.issuance.anchors_file import AnchorsFile
from sds_agent.issuance.anchors_refresh import maintain
from sds_agent.issuance.attempts import MOST_ATTEMPTS, AttemptRecord
from sds_agent.issuance.cache import CertificateCache, tidy
from sds_agent.issuance.federation import Federation
from sds_agent.issuance.trust import Trust
from sds_agent.live import assembly
from sds_agent.live.agent import Agent, AgentAnchors
from sds_agent.live.assembly import Authorities
from sds_agent.live.opening import OpenAuthorities
from sds_agent.live.origin import ConfigSource, ReloadHooks
from sds_agent.rpc import core
from sds_agent.rpc.health import Health
from sds_agent.sds.endpoint import Access, access
from sds_agent.sds.server import Limits, serving
from sds_agent.sds.service import SERVICE, SecretDiscoveryService
from sds_agent.sealing import Seal
from sds_agent.secrets.readiness import complete, watched
from sds_agent.secrets.store import SecretStore
from sds_agent.signals import until_signalled
from sds_agent.state import watch
from sds_agent.supervision import supervised
from sds_agent.systemd import HandedOverSocket
from sds_agent.tasks import NoThreadError, Start, background_tasks, in_thread

if TYPE_CHECKING:
    from sds_agent.admin.otel import Telemetry
    from sds_agent.sds.file_secrets import FileSecrets

LOG = logging.getLogger(__name__)

ENVOYS_FIRST = 0.05
"""Seconds after the first secret in which nothing else is started or imported, nor the server probed: Envoys that have
waited for it connect at once, and would wait for that too."""
COLLECTED_FROM = 15.0
"""Seconds after the start of the server from which on garbage is collected, whatever the CAs do."""
FIRST_SECRET = 2.0
"""Seconds after the start from which on a changed configuration file is noticed, whatever the CAs do."""


async def run(settings: Settings, origin: ConfigSource | None = None) -> None:
    """Run the agent until SIGTERM or SIGINT, or until its terminal is closed.

    Another SIGHUP, and a change of the file, has it reload its configuration from `origin`. From when each name has a
    secret, or COLLECTED_FROM after the start, the garbage collector is enabled; a start is quicker without it.

    Raises ConfigurationError, SocketInUseError, StateInUseError or ProbeError when it cannot start, alone or in an
    exception group, as its parts run in one. `preflight.obstacles` finds all but the last without a start.
    """
    clock = SystemClock()
    manager, sockets = systemd.notifier(os.environ), systemd.handed_over(os.environ)
    listening = systemd.at(settings.sds.socket, sockets)
    with locked_directory(settings.state_dir, "state_dir", preflight.in_use(settings.state_dir)) as locked:
        # The agent ends before its authorities: it may ask them until then.
        asked = asyncio.Event()
        async with (
            until_signalled(reload=asked.set),
            authorities(settings, clock) as cas,
            agent(settings, cas, clock, locked, listening) as running,
            supervised(manager, running.store, running.summary, clock),
            background_tasks() as start,
        ):
            gc.freeze()  # what the start has made stays
            start(_collect_garbage(running.store))
            hooks = ReloadHooks(manager.reloading, lambda: manager.ready(running.summary(clock.now())))
            await _reload(running, cas, origin, hooks, asked)
    log.event(LOG, "stopped")


async def _collect_garbage(store: SecretStore) -> None:
    """Enable the collector when all is issued, and spare it what is there then.

    Thousands of identities are millions of objects, which stay. While they come into being, the collector looks at all
    of them again for each quarter that they grow by: with 4,000 that was a fifth of the processor time of their issue,
    and each look holds the event loop up.
    """
    with suppress(TimeoutError):
        async with asyncio.timeout(COLLECTED_FROM):
            await complete(store)
    gc.collect()  # once, in some 50 microseconds for each identity: garbage that is frozen would stay for good
    gc.freeze()
    gc.enable()


async def _reload(
    running: Agent, cas: OpenAuthorities, origin: ConfigSource | None, hooks: ReloadHooks, asked: asyncio.Event
) -> None:
    """Reload the configuration when it changes or a signal asks for it, until cancelled."""
    with suppress(TimeoutError):  # the first secret comes first, if it comes soon
        async with asyncio.timeout(FIRST_SECRET):
            await complete(running.store)
    from sds_agent.live.reload import Reload  # noqa: PLC0415 - not before the first secret

    await Reload(running, cas, origin, SystemClock(), hooks).run(asked)


@asynccontextmanager
async def authorities(settings: Settings, clock: Clock) -> AsyncIterator[OpenAuthorities]:
    """The configured CAs by name, opened in their order and closed in the reverse order. Raises ConfigurationError."""
    failure: SdsAgentError | None = None
    async with background_tasks() as start:
        opened = OpenAuthorities(start)
        try:
            for name, chosen in settings.authorities.items():
                authority = await opened.opened(chosen, preflight.context(settings, name, clock))
                opened.replace({name: authority}, ())
        except SdsAgentError as error:
            failure = error
        else:
            yield opened
        finally:
            await opened.close()
    if failure is not None:  # alone, where the tasks' group would wrap it
        raise failure


@asynccontextmanager
async def agent(
    settings: Settings,
    cas: Authorities,
    clock: Clock,
    locked: LockedDirectory | None = None,
    listening: HandedOverSocket | None = None,
) -> AsyncIterator[Agent]:
    """The agent, running inside this context: issuance and the SDS server around one store.

    `locked` is the state directory; a file that is lost there is written again. `listening` is the socket that a
    service manager has handed over; without one the agent makes its own.
    """
    store = SecretStore(assembly.names(settings), assembly.optional_names(settings))
    seal, check = preflight.seal(settings), _unchecked if locked is None else locked.check_in_place
    # The bundle from before comes first, and with it all that earlier certificates still chain to.
    file = AnchorsFile(settings.state_dir, assembly.kinds(settings), seal, check)
    anchors = _anchors(settings, store, cas, clock, file)
    cache = _cache(settings, seal, check)
    limits = Limits(settings.sds.limits.streams, settings.sds.limits.names, settings.sds.limits.request_bytes)
    files = _files(settings, store, clock)
    service = SecretDiscoveryService(
        store,
        clock,
        most_streams=limits.streams,
        most_names=limits.names,
        stored_bytes=settings.sds.limits.stored_bytes,
        files=files,
    )
    service.permit(preflight.client_rules(settings))
    async with background_tasks() as start, observed(settings.admin, store, service) as feed:
        attempts = deque[AttemptRecord](maxlen=MOST_ATTEMPTS)
        attempted = None if settings.telemetry is None else attempts.append
        running = Agent(
            settings, cas, clock, start, store=store, anchors=anchors, sds=service, cache=cache, attempted=attempted
        )
        # Issuance begins before the server: the first certificate is asked for while the server comes up.
        start(maintain(running.bundle, anchors.file, clock, running.federation))
        if not anchors.restored:
            running.start_refreshes()
        running.start_issuing()
        if locked is not None:
            start(watch(locked, lambda: running.restorable))
        if files is not None:
            start(files.run())
        # The server ends first, and its streams with it, while the tasks above still run.
        async with _served(settings, running, limits, clock, listening):
            # Only now, as they take their time, and the first secret needs none of it.
            running.start_refreshes()
            _start_warnings(start, settings, running, clock)
            if settings.telemetry is not None:
                start(_telemetry(settings.telemetry, running, attempts, clock))
            async with administered(settings.admin, running, feed, settings.sds.socket, clock):
                yield running


def _unchecked() -> None:
    """Whether the state directory is still this process's, where nothing is locked."""


def _anchors(settings: Settings, store: SecretStore, cas: Authorities, clock: Clock, file: AnchorsFile) -> AgentAnchors:
    """Those from before the start, which are in the file, published in the store."""
    trust = Trust(store, settings.bundle_names, clock, authorities=cas, with_lists=assembly.with_lists(cas))
    federation = Federation(store, settings.federation, clock, trust.store_again)
    before = file.load()
    trust.restore(before.needed, before.advertised)
    federation.restore(before.federated)
    return AgentAnchors(trust, federation, file, trust.status.version is not None)


@asynccontextmanager
async def _served(
    settings: Settings, running: Agent, limits: Limits, clock: Clock, listening: HandedOverSocket | None
) -> AsyncIterator[None]:
    """Envoys can connect inside this context, and a probe sees whether each name has a secret."""
    store, socket = running.store, preflight.socket_file(settings.sds)
    readiness = Health(
        lambda: store.complete,
        frozenset({SERVICE}),
        reasons=lambda: running.lacks(clock.now()),
        hang_up=running.sds.hang_up,
        holder=running.sds.holder,
    )
    descriptor = None if listening is None else listening.descriptor
    with store.watching(lambda _changed: readiness.check_again()):
        async with serving(
            running.sds, socket, limits, [readiness], before_probe=lambda: _envoys_first(store), listening=descriptor
        ):
            _announce(settings.sds.socket)
            with watched(store):
                yield


async def _envoys_first(store: SecretStore) -> None:
    """Return once every name has a secret, and the Envoys that have waited for it have had the time to get it."""
    await complete(store)
    await asyncio.sleep(ENVOYS_FIRST)


def _cache(settings: Settings, seal: Seal | None, check: Callable[[], None]) -> CertificateCache | None:
    """The cache of all workloads' certificates; None where certificates are not to be cached."""
    directory = settings.state_dir / "certificates"
    tidy(directory, keep=settings.keep_certificates)
    return CertificateCache(directory, seal, check=check) if settings.keep_certificates else None


def _announce(socket: Path) -> None:
    """Log where the agent listens and who may connect: an Envoy that may not logs only that it cannot connect."""
    who = Access()
    with suppress(OSError):  # it was removed at once, which the server notices and fixes
        who = access(socket)
    log.event(LOG, "listening", socket=str(socket), mode=who.mode, owner=who.owner, group=who.group)
    log.event(LOG, "grpc_core", level=logging.DEBUG, **core.in_force())


def _start_warnings(start: Start, settings: Settings, running: Agent, clock: Clock) -> None:
    """Check what is only warned of. To be called once the server runs: it must not delay the first secret."""
    from sds_agent import sources  # noqa: PLC0415 - not before the first secret
    from sds_agent.issuance import expiry  # noqa: PLC0415 - likewise

    start(sources.warn(preflight.sources(settings)))
    start(_check_credentials(settings, clock))
    start(expiry.watch(lambda: running.issuers, lambda: running.trust, clock))


async def _telemetry(chosen: TelemetrySettings, running: Agent, attempts: deque[AttemptRecord], clock: Clock) -> None:
    """Send metrics and spans, until cancelled. To be started once the server runs."""
    try:
        telemetry = await in_thread(_telemetry_of)
    except NoThreadError:  # the machine has other needs then
        return
    except Exception as error:  # noqa: BLE001 - a bug in a library must not end what serves Envoys
        log.fault(LOG, "telemetry", error)
        return
    await telemetry(chosen, running, attempts, clock).run()


def _telemetry_of() -> "type[Telemetry]":
    """What takes long to import is imported in a thread: the event loop has Envoys to serve."""
    from sds_agent.admin.otel import Telemetry  # noqa: PLC0415 - measured: half a second

    return Telemetry


async def _check_credentials(settings: Settings, clock: Clock) -> None:
    """Log what is wrong with the credentials for the CAs (`credential_unusable`)."""
    from sds_agent import sources  # noqa: PLC0415 - not before the first secret

    with suppress(NoThreadError):
        sources.report_credentials(await in_thread(lambda: list(preflight.credentials(settings, clock))))


def _files(settings: Settings, store: SecretStore, clock: Clock) -> "FileSecrets | None":
    """The names of files that Envoys may ask for; None where the configuration allows none."""
    if not settings.sds.files:
        return None
    from sds_agent.sds.file_secrets import FileSecrets  # noqa: PLC0415 - measured: 8 ms

    return FileSecrets(settings.sds.files, store, clock)
