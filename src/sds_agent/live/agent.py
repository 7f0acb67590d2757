"""A running agent as one object: what can be seen of it, and how it becomes what another configuration says.

A change has two steps. First the tasks of what goes or is another from now on are ended, one by one; all of it is still
served. Then, without a pause in which another task could run, the trust bundle, the names and the issuers become those
of the new configuration. Nothing in it can fail: what could has been done before (`reload`). What is the same in
both configurations keeps its tasks, and its streams get no message.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from msgspec import Struct

from sds_agent import __version__, log
from sds_agent.authority.protocol import AdvertisesAnchors
from sds_agent.clock import Beginning, Clock
from sds_agent.config.settings import Settings
from sds_agent.issuance.anchors_file import AnchorsFile
from sds_agent.issuance.anchors_refresh import refresh
from sds_agent.issuance.attempts import AttemptRecord
from sds_agent.issuance.cache import CertificateCache
from sds_agent.issuance.counts import IssuanceCounts
from sds_agent.issuance.federation import Federation
from sds_agent.issuance.issuer import Issuer
from sds_agent.issuance.publication import PublicationTarget
from sds_agent.issuance.standing import lack
from sds_agent.issuance.status import FederatedStatus, TrustStatus, WorkloadStatus
from sds_agent.issuance.trust import Trust
from sds_agent.live import assembly
from sds_agent.live.assembly import Authorities
from sds_agent.live.workloads import RunningWorkloads
from sds_agent.sds.counts import SdsCounts
from sds_agent.sds.service import SecretDiscoveryService
from sds_agent.sds.status import StreamStatus
from sds_agent.secrets.store import SecretStore
from sds_agent.state import Restorable, RestorableFiles
from sds_agent.supervision import summary
from sds_agent.tasks import BackgroundTask, Start, ended
from sds_agent.text import printable

if TYPE_CHECKING:
    from sds_agent.admin.observed import About
    from sds_agent.sds.departed import DepartedStream
    from sds_agent.sds.permissions import Rules


class AgentAnchors(Struct, frozen=True):
    """The trust bundle and the anchors of other trust domains, and the file that holds both from one start to the next.

    `restored` is whether there is a bundle to serve before any authority has answered.
    """

    trust: Trust
    federation: Federation
    file: AnchorsFile
    restored: bool


class Agent:
    """A running agent. `start` owns its tasks."""

    def __init__(
        self,
        settings: Settings,
        cas: Authorities,
        clock: Clock,
        start: Start,
        *,
        store: SecretStore,
        anchors: AgentAnchors,
        sds: SecretDiscoveryService,
        cache: CertificateCache | None,
        attempted: Callable[[AttemptRecord], None] | None = None,
    ) -> None:
        """`attempted` is called after each attempt at a CA. It must not wait or raise."""
        self.settings = settings
        self.reload_refused: tuple[str, ...] = ()
        """Why the configuration is not in force as it is now, in words."""
        self._beginning = Beginning(clock)
        self.store = store
        self.bundle = anchors.trust
        self.federation = anchors.federation
        self.sds = sds
        self.issuance_counts = IssuanceCounts()
        self._anchors = anchors
        self._clock = clock
        self._start = start
        self._cas = dict(cas)
        self._asked = assembly.upstreams(settings, cas)
        self._refreshes: dict[str, list[BackgroundTask]] = {}
        target = PublicationTarget(store, anchors.trust)
        self._workloads = RunningWorkloads(target, clock, self.issuance_counts, cache, attempted)
        self._workloads.replace(assembly.issuing(settings, self._asked))

    def start_issuing(self) -> None:
        """Start to obtain certificates, and to write the outputs that there are."""
        self._workloads.start_issuing(self._start)
        self._workloads.start_outputs(self._start, assembly.written(self.settings))

    def start_refreshes(self) -> None:
        """Start to ask the authorities for their anchors and their revocation lists, where that has not begun."""
        lists = assembly.with_lists(self._cas)
        for name, authority in self._cas.items():
            if name in self._refreshes:
                continue
            tasks = self._refreshes[name] = []
            if isinstance(authority, AdvertisesAnchors):
                tasks.append(
                    self._start(refresh(self.bundle, name, authority, self._clock, federation=self.federation))
                )
            if name in lists:
                from sds_agent.issuance.list_refresh import follow_lists  # noqa: PLC0415 - few configurations want lists

                tasks.append(self._start(follow_lists(self.bundle, name, lists[name], self._clock)))

    async def apply(self, settings: Settings, cas: Authorities, rules: "Rules") -> None:
        """Become what these settings say, with these authorities: those of before, and others where they are others.
        `rules` say who may have which secret.

        No key may differ that needs a restart. It cannot fail; those that are replaced are in use until it returns.
        """
        same_queues = settings.requests == self.settings.requests
        self._asked = assembly.upstreams(settings, cas, self._asked if same_queues else {})
        issuing = assembly.issuing(settings, self._asked)
        gone = [name for name, ca in self._cas.items() if cas.get(name) is not ca]
        await ended(task for name in gone for task in self._refreshes.pop(name, []))
        await self._workloads.stop(issuing, assembly.written(settings))
        kinds, before = assembly.kinds(settings), assembly.kinds(self.settings)
        replaced = [name for name in kinds if before.get(name, kinds[name]) != kinds[name]]
        # a workload that goes may have had the name of a trust domain that comes
        secrets = dict.fromkeys({*assembly.optional_names(settings)}.difference(assembly.optional_names(self.settings)))
        self.settings, self._cas = settings, dict(cas)
        secrets |= self._workloads.replace(issuing)
        self._anchors.file.know(kinds)
        self.bundle.follow(cas, assembly.with_lists(cas), replaced)
        self.federation.follow(settings.federation, replaced)
        self.sds.permit(rules)  # before the names are there, which not everybody may have
        self.store.replace_names(assembly.names(settings), assembly.optional_names(settings), secrets)
        self.start_refreshes()
        self.start_issuing()

    @property
    def restorable(self) -> list[Restorable | RestorableFiles]:
        """The parts that have files in the state directory."""
        parts = (*self._cas.values(), self._workloads.cache, self._anchors.file)
        return [part for part in parts if isinstance(part, Restorable | RestorableFiles)]

    @property
    def issuers(self) -> Mapping[str, Issuer]:
        """What issues for each workload, by its name."""
        return self._workloads.issuers

    @property
    def workloads(self) -> tuple[WorkloadStatus, ...]:
        """Every workload, in the order of the configuration."""
        return tuple(issuer.status for issuer in self.issuers.values())

    def each_workload(self) -> Iterator[WorkloadStatus]:
        """The same, each made when it is taken: between two of them others may have changed, and gone."""
        return (issuer.status for issuer in self._workloads.each_issuer())

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
            started_at=self._beginning.at,
            uptime_seconds=self._beginning.passed,
            trust_domain=settings.trust_domain,
            socket=str(settings.sds.socket),
            names={each.name: each.names for each in settings.workloads},
            kinds=assembly.kinds(settings),
            bundle_names=settings.bundle_names,
            reload_refused=tuple(printable(each, log.LONGEST_VALUE) for each in self.reload_refused[: log.MOST_VALUES]),
        )

    @property
    def streams(self) -> tuple[StreamStatus, ...]:
        """Every open stream, and every Fetch that waits, in the order in which they came."""
        return self.sds.streams

    @property
    def log_counts(self) -> Mapping[str, int]:
        """How many events this process has logged at each level."""
        return log.counts()

    @property
    def departed(self) -> "tuple[DepartedStream, ...]":
        """The streams that ended last and whose Envoys have not come back."""
        return self.sds.departed

    def summary(self, now: datetime) -> str:
        """How the agent does at `now`, in one line."""
        issuers = self.issuers.values()
        return summary(len(issuers), (each.renew_at for each in issuers), self.lacks(now), self.sds.open_streams)

    def lacks(self, now: datetime) -> Sequence[str]:
        """Why workloads have no certificate to serve at `now`, in words, one for each; empty if each has one."""
        reasons = (lack(each.status, now) for each in self.issuers.values() if not each.valid(now))
        return [reason for reason in reasons if reason is not None]
