"""The composition root: builds the parts from the settings, owns their tasks and the order in which they end."""

import asyncio
import logging
import os
from collections import deque
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

from sds_agent import __version__, log, preflight, sources, systemd
from sds_agent.admin.settings import TelemetrySettings
from sds_agent.admin.start import administered, observed
from sds_agent.authority import registry
from sds_agent.authority.protocol import AdvertisesAnchors, AdvertisesLists, Authority, Supplier
from sds_agent.clock import Clock, SystemClock
from sds_agent.config.settings import Settings, WorkloadSettings
from sds_agent.directories import LockedDirectory, locked_directory
from sds_agent.identity.spiffe import SpiffeId
from sds_agent.issuance import expiry
from sds_agent.issuance.anchors_file import AnchorsFile
from sds_agent.issuance.anchors_refresh import maintain, refresh
from sds_agent.issuance.attempts import MOST_ATTEMPTS, AttemptRecord
from sds_agent.issuance.cache import CertificateCache, WorkloadCache, tidy
from sds_agent.issuance.counts import IssuanceCounts
from sds_agent.issuance.failover import FailoverPolicy
from sds_agent.issuance.federation import Federation, bundle_name
from sds_agent.issuance.issuer import Issuer
from sds_agent.issuance.list_refresh import follow_lists
from sds_agent.issuance.publication import PublicationTarget
from sds_agent.issuance.queue import IssuanceQueue
from sds_agent.issuance.schedule import Renewal
from sds_agent.issuance.source import Upstream
from sds_agent.issuance.standing import lack
from sds_agent.issuance.status import FederatedStatus, TrustStatus, WorkloadStatus
from sds_agent.issuance.trust import Trust
from sds_agent.issuance.workload import Workload
from sds_agent.rpc.health import Health
from sds_agent.sds.counts import SdsCounts
from sds_agent.sds.endpoint import Access, access
from sds_agent.sds.server import Limits, serving
from sds_agent.sds.service import SERVICE, SecretDiscoveryService
from sds_agent.sds.status import StreamStatus
from sds_agent.sealing import Seal
from sds_agent.secrets.readiness import complete, watched
from sds_agent.secrets.store import SecretStore
from sds_agent.signals import until_signalled
from sds_agent.state import Restorable, watch
from sds_agent.supervision import summary, supervised
from sds_agent.systemd import HandedOverSocket
from sds_agent.tasks import NoThreadError, Start, background_tasks, in_thread

if TYPE_CHECKING:
    from sds_agent.admin.observed import About
    from sds_agent.admin.otel import Telemetry
    from sds_agent.sds.file_secrets import FileSecrets

LOG = logging.getLogger(__name__)

NO_CACHES: Mapping[str, WorkloadCache] = {}


async def run(settings: Settings) -> None:
    """Run the agent until SIGTERM, SIGINT or SIGHUP.

    Raises ConfigurationError, SocketInUseError, StateInUseError or ProbeError when it cannot start, alone or in an
    exception group, as its parts run in one. `preflight.obstacles` finds all but the last without a start.
    """
    clock = SystemClock()
    manager, sockets = systemd.notifier(os.environ), systemd.handed_over(os.environ)
    listening = systemd.at(settings.sds.socket, sockets)
    with locked_directory(settings.state_dir, "state_dir", preflight.in_use(settings.state_dir)) as locked:
        # The agent ends before its authorities: it may ask them until then.
        async with (
            until_signalled(),
            authorities(settings, clock) as cas,
            agent(settings, cas, clock, locked, listening) as running,
            supervised(manager, running.store, running.summary, clock),
        ):
            await asyncio.Event().wait()
    log.event(LOG, "stopped")


@asynccontextmanager
async def authorities(settings: Settings, clock: Clock) -> AsyncIterator[Mapping[str, Authority | Supplier]]:
    """The configured CAs by name, opened in their order and closed in the reverse order. Raises ConfigurationError."""
    async with AsyncExitStack() as stack:
        opened = dict[str, Authority | Supplier]()
        for name, chosen in settings.authorities.items():
            authority = registry.kind_of(chosen).open(chosen, preflight.context(settings, name, clock))
            opened[name] = await stack.enter_async_context(authority)
        yield opened


def workloads(settings: Settings) -> tuple[Workload, ...]:
    """The configured identities."""
    return tuple(_workload(settings, chosen) for chosen in settings.workloads)


def _workload(settings: Settings, chosen: WorkloadSettings) -> Workload:
    kinds = {name: registry.name_of(settings.authorities[name]) for name in settings.authorities_of(chosen)}
    first, *others = kinds
    return Workload(
        name=chosen.name,
        identity=SpiffeId.parse(chosen.spiffe_id),
        key_type=chosen.key,
        ttl=chosen.ttl,
        authority=first,
        names=chosen.names,
        kind=kinds[first],
        renewal=Renewal(settings.renewal.fraction, settings.renewal.jitter),
        fallbacks={name: kinds[name] for name in others},
    )


class Agent(Struct, frozen=True):
    """A running agent: its parts, and what can be seen of them. The issuers are by their workload's name."""

    settings: Settings
    started_at: datetime
    store: SecretStore
    issuers: Mapping[str, Issuer]
    bundle: Trust
    federation: Federation
    sds: SecretDiscoveryService
    issuance_counts: IssuanceCounts

    @property
    def workloads(self) -> tuple[WorkloadStatus, ...]:
        """Every workload, in the order of the configuration."""
        return tuple(issuer.status for issuer in self.issuers.values())

    @property
    def trust(self) -> TrustStatus:
        """The trust bundle."""
        return self.bundle.status

    @property
    def federated(self) -> tuple[FederatedStatus, ...]:
        """The bundles of other trust domains."""
        return self.federation.status

    @property
    def versions(self) -> Mapping[str, str | None]:
        """The version of what is served under each name now; None while there is nothing."""
        return {name: None if secret is None else secret.version for name, secret in self.store.snapshot.items()}

    @property
    def sds_counts(self) -> SdsCounts:
        """What went out to Envoys."""
        return self.sds.counts

    @property
    def about(self) -> "About":
        """What the agent is, and what its configuration says."""
        from sds_agent.admin.observed import About  # noqa: PLC0415 - no view is needed before the first secret

        settings = self.settings
        return About(
            version=__version__,
            pid=os.getpid(),
            started_at=self.started_at,
            trust_domain=settings.trust_domain,
            socket=str(settings.sds.socket),
            names={each.name: each.names for each in settings.workloads},
            kinds={name: registry.name_of(chosen) for name, chosen in settings.authorities.items()},
            bundle_names=settings.bundle_names,
        )

    @property
    def streams(self) -> tuple[StreamStatus, ...]:
        """Every open stream, and every Fetch that waits, in the order in which they came."""
        return self.sds.streams

    def summary(self, now: datetime) -> str:
        """How the agent does at `now`, in one line."""
        return summary(self.workloads, self.lacks(now), len(self.streams))

    def lacks(self, now: datetime) -> Sequence[str]:
        """Why workloads have no certificate to serve at `now`, in words, one for each; empty if each has one."""
        reasons = (lack(status, now) for status in self.workloads)
        return [reason for reason in reasons if reason is not None]


@asynccontextmanager
async def agent(
    settings: Settings,
    cas: Mapping[str, Authority | Supplier],
    clock: Clock,
    locked: LockedDirectory | None = None,
    listening: HandedOverSocket | None = None,
) -> AsyncIterator[Agent]:
    """The agent, running inside this context: issuance and the SDS server around one store.

    `locked` is the state directory; a file that is lost there is written again. `listening` is the socket that a
    service manager has handed over; without one the agent makes its own.
    """
    identities = workloads(settings)
    names = (*(name for workload in identities for name in workload.names), *settings.bundle_names)
    store = SecretStore(names, map(bundle_name, settings.federated))
    seal = preflight.seal(settings)
    # The bundle from before comes first, and with it all that earlier certificates still chain to.
    anchors = _anchors(settings, store, cas, clock, seal)
    caches = _caches(settings, identities, seal)
    counts = IssuanceCounts()
    issuers = issuers_of(settings, cas, PublicationTarget(store, anchors.trust), clock, caches, counts=counts)
    limits = Limits(settings.sds.limits.streams, settings.sds.limits.names, settings.sds.limits.request_bytes)
    files = _files(settings, store, clock)
    service = SecretDiscoveryService(store, clock, most_streams=limits.streams, most_names=limits.names, files=files)
    running = Agent(settings, clock.now(), store, issuers, anchors.trust, anchors.federation, service, counts)
    async with background_tasks() as start, observed(settings.admin, store, service) as feed:
        # Issuance begins before the server: the first certificate is asked for while the server comes up.
        start(maintain(running.bundle, anchors.file, clock, running.federation if settings.federated else None))
        if not anchors.restored:
            _start_refreshes(start, cas, running, clock)
        attempts = _attempts(settings, issuers)
        for issuer in issuers.values():
            start(issuer.run())
        if locked is not None:
            parts = (*cas.values(), *caches.values(), anchors.file)
            start(watch(locked, [part for part in parts if isinstance(part, Restorable)]))
        _start_outputs(start, settings, running, clock)
        if files is not None:
            start(files.run())
        # The server ends first, and its streams with it, while the tasks above still run.
        async with _served(settings, running, limits, clock, listening):
            # Only now, as they take their time, and the first secret needs none of it.
            if anchors.restored:
                _start_refreshes(start, cas, running, clock)
            _start_warnings(start, settings, running, clock)
            if settings.telemetry is not None:
                start(_telemetry(settings.telemetry, running, attempts, clock))
            async with administered(settings.admin, running, feed, settings.sds.socket, clock):
                yield running


class _RestoredAnchors(Struct, frozen=True):
    """The trust bundle and the anchors of other trust domains, and the file that holds both from one start to the next.

    `restored` is whether there is a bundle to serve before any authority has answered.
    """

    trust: Trust
    federation: Federation
    file: AnchorsFile
    restored: bool


def _anchors(
    settings: Settings, store: SecretStore, cas: Mapping[str, Authority | Supplier], clock: Clock, seal: Seal | None
) -> _RestoredAnchors:
    """Those from before the start, published in the store."""
    trust = Trust(store, settings.bundle_names, clock, authorities=cas, with_lists=_with_lists(cas))
    federation = Federation(store, settings.federation, clock, trust.store_again)
    kinds = {name: registry.name_of(chosen) for name, chosen in settings.authorities.items()}
    file = AnchorsFile(settings.state_dir, kinds, seal)
    before = file.load()
    trust.restore(before.needed, before.advertised)
    federation.restore(before.federated)
    return _RestoredAnchors(trust, federation, file, trust.status.version is not None)


@asynccontextmanager
async def _served(
    settings: Settings, running: Agent, limits: Limits, clock: Clock, listening: HandedOverSocket | None
) -> AsyncIterator[None]:
    """Envoys can connect inside this context, and a probe sees whether each name has a secret."""
    store, socket = running.store, preflight.socket_file(settings.sds)
    readiness = Health(lambda: not store.missing, frozenset({SERVICE}), reasons=lambda: running.lacks(clock.now()))
    descriptor = None if listening is None else listening.descriptor
    async with serving(
        running.sds, socket, limits, [readiness], before_probe=lambda: complete(store), listening=descriptor
    ):
        _announce(settings.sds.socket)
        with watched(store), store.watching(lambda _changed: readiness.check_again()):
            yield


def _start_refreshes(start: Start, cas: Mapping[str, Authority | Supplier], running: Agent, clock: Clock) -> None:
    for name, authority in cas.items():
        if isinstance(authority, AdvertisesAnchors):
            start(refresh(running.bundle, name, authority, clock, federation=running.federation))
    for name, publishing in _with_lists(cas).items():
        start(follow_lists(running.bundle, name, publishing, clock))


def _with_lists(cas: Mapping[str, Authority | Supplier]) -> Mapping[str, AdvertisesLists]:
    """The authorities that the configuration wants revocation lists of."""
    return {name: ca for name, ca in cas.items() if isinstance(ca, AdvertisesLists) and ca.revocation_lists}


def issuers_of(
    settings: Settings,
    cas: Mapping[str, Authority | Supplier],
    target: PublicationTarget,
    clock: Clock,
    caches: Mapping[str, WorkloadCache] = NO_CACHES,
    *,
    counts: IssuanceCounts | None = None,
) -> dict[str, Issuer]:
    """An issuer for each workload, by its name."""
    chosen, requests = settings.failover, settings.requests
    policy = FailoverPolicy(chosen.failures, chosen.after, chosen.back_after)
    timeout = requests.timeout.total_seconds()
    upstreams = {name: Upstream(ca, IssuanceQueue(requests.concurrency), timeout) for name, ca in cas.items()}
    return {
        workload.name: Issuer(
            workload,
            upstreams[workload.authority],
            target,
            clock=clock,
            cache=caches.get(workload.name),
            fallbacks=[upstreams[name] for name in workload.fallbacks],
            policy=policy,
            counts=counts,
        )
        for workload in workloads(settings)
    }


def _caches(settings: Settings, identities: Iterable[Workload], seal: Seal | None) -> dict[str, WorkloadCache]:
    """The caches of the workloads' certificates, by their names; none where certificates are not to be cached."""
    directory = settings.state_dir / "certificates"
    tidy(directory, keep=settings.keep_certificates)
    if not settings.keep_certificates:
        return {}
    return {workload.name: WorkloadCache(workload, CertificateCache(directory, seal)) for workload in identities}


def _announce(socket: Path) -> None:
    """Log where the agent listens and who may connect: an Envoy that may not logs only that it cannot connect."""
    who = Access()
    with suppress(OSError):  # it was removed at once, which the server notices and fixes
        who = access(socket)
    log.event(LOG, "listening", socket=str(socket), mode=who.mode, owner=who.owner, group=who.group)


def _start_warnings(start: Start, settings: Settings, running: Agent, clock: Clock) -> None:
    """Check what is only warned of. To be called once the server runs: it must not delay the first secret."""
    start(sources.warn(preflight.sources(settings)))
    start(_check_credentials(settings, clock))
    start(expiry.watch(lambda: (running.workloads, running.trust), clock))


def _attempts(settings: Settings, issuers: Mapping[str, Issuer]) -> deque[AttemptRecord]:
    """The attempts at CAs from now on, as far as telemetry wants them."""
    attempts = deque[AttemptRecord](maxlen=MOST_ATTEMPTS)
    if settings.telemetry is not None:
        for issuer in issuers.values():
            issuer.watch_attempts(attempts.append)
    return attempts


async def _telemetry(chosen: TelemetrySettings, running: Agent, attempts: deque[AttemptRecord], clock: Clock) -> None:
    """Send metrics and spans, until cancelled. To be started once the server runs."""
    with suppress(NoThreadError):  # the machine has other needs then
        telemetry = await in_thread(_telemetry_of)
        await telemetry(chosen, running, attempts, clock).run()


def _telemetry_of() -> "type[Telemetry]":
    """What takes long to import is imported in a thread: the event loop has Envoys to serve."""
    from sds_agent.admin.otel import Telemetry  # noqa: PLC0415 - measured: half a second

    return Telemetry


async def _check_credentials(settings: Settings, clock: Clock) -> None:
    """Log what is wrong with the credentials for the CAs (`credential_unusable`)."""
    with suppress(NoThreadError):
        for cause in await in_thread(lambda: list(preflight.credentials(settings, clock))):
            log.event(LOG, "credential_unusable", level=logging.WARNING, cause=cause)


def _files(settings: Settings, store: SecretStore, clock: Clock) -> "FileSecrets | None":
    """The names of files that Envoys may ask for; None where the configuration allows none."""
    if not settings.sds.files:
        return None
    from sds_agent.sds.file_secrets import FileSecrets  # noqa: PLC0415 - measured: 8 ms

    return FileSecrets(settings.sds.files, store, clock)


def _start_outputs(start: Start, settings: Settings, running: Agent, clock: Clock) -> None:
    """Write the certificates of workloads with an output to files, and run the hooks there are."""
    chosen = {workload.name: workload.output for workload in settings.workloads if workload.output is not None}
    if not chosen:
        return
    from sds_agent.outputs.hooks import HookCommands, Hooks  # noqa: PLC0415 - measured: 10 ms
    from sds_agent.outputs.layout import LAYOUTS, OutputContents  # noqa: PLC0415 - measured: as above
    from sds_agent.outputs.writer import Output, write_changes  # noqa: PLC0415 - measured: as above

    others = {domain: bundle_name(domain) for domain in settings.federated}
    bundles = {settings.trust_domain: settings.bundle_names[0], **others}
    for name, output in chosen.items():
        hooks = Hooks(
            HookCommands(name, str(output.directory), output.on_renewed, output.on_failed, output.hook_timeout)
        )
        written = Output(
            output.directory,
            OutputContents(name, bundles),
            LAYOUTS[output.layout],
            output.owner,
            output.group,
            int(output.key_mode, 8),
            hooks,
        )
        start(write_changes(written, running.store, clock))
        running.issuers[name].watch_attempts(hooks.attempted)
        start(hooks.run())
