"""What the views need of a running agent: its statuses and its counts, read at the moment of the view."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Protocol

from msgspec import Struct

from sds_agent.issuance.counts import IssuanceCounts
from sds_agent.issuance.status import FederatedStatus, TrustStatus, WorkloadStatus
from sds_agent.sds.counts import SdsCounts
from sds_agent.sds.status import StreamStatus

if TYPE_CHECKING:
    from sds_agent.sds.departed import DepartedStream


class About(Struct, frozen=True, kw_only=True):
    """What the agent is and for how long it has run, and what its configuration says.

    `names` are the resource names of each workload, `kinds` the kind of each authority, by their names; `bundle_names`
    those of the trust bundle. `reload_refused` are the causes why a changed configuration is not in force.
    """

    version: str
    pid: int
    started_at: datetime
    uptime_seconds: float
    trust_domain: str
    socket: str
    names: Mapping[str, tuple[str, ...]]
    kinds: Mapping[str, str]
    bundle_names: tuple[str, ...]
    reload_refused: tuple[str, ...] = ()


class Observed(Protocol):
    """A running agent, as its views see it."""

    @property
    def about(self) -> About:
        """What it is."""
        ...

    @property
    def workloads(self) -> Sequence[WorkloadStatus]:
        """Every workload, in the order of the configuration."""
        ...

    def each_workload(self) -> Iterator[WorkloadStatus]:
        """The same, each made when it is taken, so that a view of thousands can let others work in between."""
        ...

    @property
    def trust(self) -> TrustStatus:
        """The trust bundle."""
        ...

    @property
    def federated(self) -> Sequence[FederatedStatus]:
        """The bundles of other trust domains."""
        ...

    @property
    def streams(self) -> Sequence[StreamStatus]:
        """Every open stream, in the order in which they came."""
        ...

    @property
    def departed(self) -> "Sequence[DepartedStream]":
        """The streams that ended last and whose Envoys have not come back; the last to end comes last."""
        ...

    @property
    def versions(self) -> Mapping[str, str | None]:
        """The version of what is served under each name now; None while there is nothing."""
        ...

    @property
    def issuance_counts(self) -> IssuanceCounts:
        """What came of the attempts at CAs."""
        ...

    @property
    def sds_counts(self) -> SdsCounts:
        """What went out to SDS clients."""
        ...

    @property
    def log_counts(self) -> Mapping[str, int]:
        """How many events the agent has logged at each level."""
        ...

    def lacks(self, now: datetime) -> Sequence[str]:
        """Why workloads have no certificate to serve at `now`, in words; empty if each has one."""
        ...
