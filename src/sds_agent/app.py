"""The composition root: builds the parts from the settings, owns their tasks and the order in which they end."""

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path

from sds_agent import log, preflight, sources
from sds_agent.authority.embedded import EmbeddedAuthority
from sds_agent.authority.protocol import Authority, TellsTrust
from sds_agent.clock import Clock, SystemClock
from sds_agent.config.istio import IstioSettings
from sds_agent.config.settings import AuthoritySettings, CacertsSettings, EmbeddedSettings, Settings
from sds_agent.directories import HeldDirectory, held_directory
from sds_agent.errors import within
from sds_agent.identity.spiffe import SpiffeId
from sds_agent.issuance.cache import CertificateCache, WorkloadCache, tidy
from sds_agent.issuance.issuer import Issuer, Upstream
from sds_agent.issuance.needed import NeededAnchorsFile
from sds_agent.issuance.publication import Destination
from sds_agent.issuance.queue import IssuanceQueue
from sds_agent.issuance.schedule import Renewal
from sds_agent.issuance.standing import lack
from sds_agent.issuance.trust import Trust, maintain, refresh
from sds_agent.issuance.workload import Workload
from sds_agent.rpc.health import Health
from sds_agent.sds.endpoint import Access, access
from sds_agent.sds.server import Limits, serving
from sds_agent.sds.service import SERVICE, SecretDiscoveryService
from sds_agent.secrets.readiness import complete, missing, watched
from sds_agent.secrets.store import SecretStore
from sds_agent.signals import until_signalled
from sds_agent.state import PutsBack, watch
from sds_agent.tasks import Start, background_tasks

LOG = logging.getLogger(__name__)


async def run(settings: Settings) -> None:
    """Run the agent until SIGTERM, SIGINT or SIGHUP.

    Raises ConfigurationError, SocketInUseError, StateInUseError or ProbeError when it cannot start, alone or in an
    exception group, as its parts run in one. All but the last `preflight.obstacles` tells beforehand.
    """
    clock = SystemClock()
    with held_directory(settings.state_dir, "state_dir", preflight.in_use(settings.state_dir)) as held:
        async with until_signalled(), agent(settings, await authorities(settings, clock), clock, held):
            await asyncio.Event().wait()
    log.event(LOG, "stopped")


async def authorities(settings: Settings, clock: Clock) -> dict[str, Authority]:
    """The configured CAs by name. Raises ConfigurationError."""
    return {name: await _authority(name, chosen, settings, clock) for name, chosen in settings.authorities.items()}


async def _authority(name: str, chosen: AuthoritySettings, settings: Settings, clock: Clock) -> Authority:
    match chosen:
        case IstioSettings():
            return _istio(chosen, clock)
        case CacertsSettings():
            return await _cacerts(name, chosen, settings.trust_domain, clock)
        case EmbeddedSettings():
            return await EmbeddedAuthority.open(
                preflight.authority_directory(settings, name),
                trust_domain=settings.trust_domain,
                key_type=chosen.key,
                lifetime=chosen.root_lifetime,
                clock=clock,
            )


async def _cacerts(name: str, chosen: CacertsSettings, trust_domain: str, clock: Clock) -> Authority:
    from sds_agent.authority.cacerts import CacertsAuthority  # noqa: PLC0415 - only where there is such a CA

    with within(f"authorities.{name}.directory"):
        return await CacertsAuthority.open(
            chosen.directory, trust_domain=trust_domain, passphrase_file=chosen.passphrase_file, clock=clock
        )


def _istio(chosen: IstioSettings, clock: Clock) -> Authority:
    from sds_agent.authority.istio.client import IstioAuthority, IstioOptions  # noqa: PLC0415 - only where there is such a CA

    options = IstioOptions(
        addresses=chosen.address,
        ca_file=chosen.ca_file,
        token_file=chosen.token_file,
        server_name=chosen.server_name,
        cluster_id=chosen.cluster_id,
        cert_signer=chosen.cert_signer,
        impersonate=chosen.impersonate,
        mtls=chosen.mtls,
        provisioned=chosen.provisioned,
        extra_anchors=chosen.extra_anchors,
        plaintext=chosen.plaintext_loopback,
    )
    return IstioAuthority(options, clock)


def workloads(settings: Settings) -> tuple[Workload, ...]:
    """The configured identities."""
    return tuple(
        Workload(
            name=chosen.name,
            identity=SpiffeId.parse(chosen.spiffe_id),
            key_type=chosen.key,
            ttl=chosen.ttl,
            authority=settings.authority_of(chosen),
            names=chosen.names,
            kind=settings.authorities[settings.authority_of(chosen)].type,
            renewal=Renewal(settings.renewal.fraction, settings.renewal.jitter),
        )
        for chosen in settings.workloads
    )


@asynccontextmanager
async def agent(
    settings: Settings, cas: dict[str, Authority], clock: Clock, held: HeldDirectory | None = None
) -> AsyncIterator[SecretStore]:
    """The agent's parts, running inside this context: issuance and the SDS server around one store.

    `held` is the state directory; what is lost there is put back.
    """
    identities = workloads(settings)
    store = SecretStore((*(name for workload in identities for name in workload.names), *settings.bundle_names))
    trust = Trust(store, settings.bundle_names, clock, authorities=cas)
    needs_file = NeededAnchorsFile(settings.state_dir)
    trust.restore(needs_file.load())
    upstreams = {name: Upstream(authority, IssuanceQueue()) for name, authority in cas.items()}
    destination = Destination(store, trust)
    limits = Limits(settings.sds.limits.streams, settings.sds.limits.names, settings.sds.limits.request_bytes)
    caches = _caches(settings)
    service = SecretDiscoveryService(store, clock, most_streams=limits.streams, most_names=limits.names)
    issuers: list[Issuer] = []
    async with background_tasks() as start:
        start(maintain(trust, needs_file, clock))
        for name, authority in cas.items():
            if isinstance(authority, TellsTrust):
                start(refresh(trust, name, authority, clock))
        for workload in identities:
            issuer = Issuer(
                workload,
                upstreams[workload.authority],
                destination,
                clock=clock,
                cache=WorkloadCache(workload, caches[workload.name]) if workload.name in caches else None,
            )
            issuers.append(issuer)
            start(issuer.run())
        if held is not None:
            kept = (*cas.values(), *caches.values(), needs_file)
            start(watch(held, [each for each in kept if isinstance(each, PutsBack)]))
        _start_outputs(start, settings, store, clock)
        readiness = Health(
            lambda: not missing(store.snapshot), frozenset({SERVICE}), reasons=lambda: _lacks(issuers, clock)
        )
        async with serving(
            service, preflight.socket_file(settings.sds), limits, [readiness], before_probe=lambda: complete(store)
        ):
            _announce(settings.sds.socket)
            start(sources.warn(preflight.sources(settings)))
            with watched(store), store.watching(lambda _changed: readiness.look()):
                yield store


def _caches(settings: Settings) -> dict[str, CertificateCache]:
    """What keeps the workloads' certificates, by their names; none where they are not to be kept."""
    directory = settings.state_dir / "certificates"
    tidy(directory, keep=settings.keep_certificates)
    return {workload.name: CertificateCache(directory) for workload in settings.workloads if settings.keep_certificates}


def _lacks(issuers: Iterable[Issuer], clock: Clock) -> Sequence[str]:
    reasons = (lack(issuer.status, clock.now()) for issuer in issuers)
    return [reason for reason in reasons if reason is not None]


def _announce(socket: Path) -> None:
    """Say where the agent listens and who may connect: an Envoy that may not says only that it cannot connect."""
    who = Access()
    with suppress(OSError):  # it was taken away at once, which is noticed and fixed elsewhere
        who = access(socket)
    log.event(LOG, "listening", socket=str(socket), mode=who.mode, owner=who.owner, group=who.group)


def _start_outputs(start: Start, settings: Settings, store: SecretStore, clock: Clock) -> None:
    directories = {chosen.name: chosen.output for chosen in settings.workloads if chosen.output is not None}
    if not directories:
        return
    from sds_agent.outputs.writer import Output, keep  # noqa: PLC0415 - only where files are wanted

    for name, directory in directories.items():
        start(keep(Output(directory, name, settings.bundle_names[0]), store, clock))
