"""The composition root: builds the parts from the settings, owns their tasks and the order in which they end."""

import logging
import os
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path

import anyio
from anyio.abc import TaskGroup

from sds_agent import log
from sds_agent.authority.embedded import EmbeddedAuthority
from sds_agent.authority.protocol import Authority, TellsTrust
from sds_agent.clock import Clock, SystemClock
from sds_agent.config.settings import Settings
from sds_agent.errors import ConfigurationError, SdsAgentError
from sds_agent.files import UntrustedDirectoryError, locked, own_directory
from sds_agent.identity.spiffe import SpiffeId
from sds_agent.issuance.gate import Gate
from sds_agent.issuance.issuer import Issuer, Workload
from sds_agent.issuance.schedule import Renewal
from sds_agent.issuance.trust import Trust, refresh
from sds_agent.sds import health
from sds_agent.sds.endpoint import SocketFile
from sds_agent.sds.server import Limits, serving
from sds_agent.sds.service import SERVICE, SecretDiscoveryService
from sds_agent.secrets.readiness import missing, watched
from sds_agent.secrets.store import SecretStore

LOG = logging.getLogger(__name__)


class StateInUseError(SdsAgentError):
    """Another agent runs on the state directory."""


async def run(settings: Settings) -> None:
    """Run the agent until SIGTERM or SIGINT.

    Raises ConfigurationError, SocketInUseError, StateInUseError or ProbeError when it cannot start, alone or in an
    exception group, as its parts run in one.
    """
    clock = SystemClock()
    with _state_locked(settings.state_dir):
        async with anyio.create_task_group() as tasks:
            with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                tasks.start_soon(_run_parts, settings, clock, tasks)
                await _stop_on(signals, tasks)
    log.event(LOG, "stopped")


async def _run_parts(settings: Settings, clock: Clock, tasks: TaskGroup) -> None:
    async with agent(settings, await authorities(settings, clock), clock):
        await anyio.sleep_forever()
    tasks.cancel_scope.cancel()


async def _stop_on(signals: AsyncIterator[signal.Signals], tasks: TaskGroup) -> None:
    async for number in signals:
        log.event(LOG, "stopping", signal=number.name)
        tasks.cancel_scope.cancel()
        # from here on a second signal does what it does to any program: it ends it at once
        return


async def authorities(settings: Settings, clock: Clock) -> dict[str, Authority]:
    """The configured CAs by name. Raises ConfigurationError."""
    return {
        name: await EmbeddedAuthority.open(
            settings.state_dir / "authorities" / name,
            trust_domain=settings.trust_domain,
            key_type=chosen.key,
            lifetime=chosen.root_lifetime,
            clock=clock,
        )
        for name, chosen in settings.authorities.items()
    }


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
        )
        for chosen in settings.workloads
    )


@asynccontextmanager
async def agent(settings: Settings, cas: dict[str, Authority], clock: Clock) -> AsyncIterator[SecretStore]:
    """The agent's parts, running inside this context: issuance and the SDS server around one store."""
    identities = workloads(settings)
    store = SecretStore((*(name for workload in identities for name in workload.names), *settings.bundle_names))
    trust = Trust(store, settings.bundle_names)
    gates = {name: Gate() for name in cas}  # one for each CA: one that hangs must not hold up the others
    renewal = Renewal(settings.renewal.fraction, settings.renewal.jitter)
    limits = Limits(settings.sds.limits.streams, settings.sds.limits.names, settings.sds.limits.request_bytes)
    service = SecretDiscoveryService(store, most_names=limits.names)
    async with anyio.create_task_group() as tasks:
        for name, authority in cas.items():
            if isinstance(authority, TellsTrust):
                tasks.start_soon(refresh, trust, name, authority, clock)
        for workload in identities:
            issuer = Issuer(
                workload,
                cas[workload.authority],
                store=store,
                trust=trust,
                gate=gates[workload.authority],
                clock=clock,
                renewal=renewal,
            )
            tasks.start_soon(issuer.run)
        readiness = health.handler(lambda: not missing(store.snapshot), frozenset({SERVICE}))
        async with serving(service, _socket_file(settings), limits, [readiness]):
            log.event(LOG, "listening", socket=str(settings.sds.socket))
            with watched(store):
                yield store
        tasks.cancel_scope.cancel()


def _socket_file(settings: Settings) -> SocketFile:
    sds = settings.sds
    return SocketFile(sds.socket, mode=sds.mode, owner=sds.owner, group=sds.group)


@contextmanager
def _state_locked(directory: Path) -> Iterator[None]:
    with ExitStack() as stack:
        try:
            own_directory(directory, 0o700)
            stack.enter_context(locked(directory / "lock"))
        except UntrustedDirectoryError as error:
            raise ConfigurationError(f"state_dir: {error}") from error
        except BlockingIOError as error:
            raise StateInUseError(
                f"another sds-agent runs on {directory}; stop it first, or give this one another state_dir"
            ) from error
        except OSError as error:
            raise ConfigurationError(
                f"state_dir: cannot use {error.filename or directory}: {error.strerror}; "
                f"make it writable for the agent's user (uid {os.geteuid()}) or choose another"
            ) from error
        yield
