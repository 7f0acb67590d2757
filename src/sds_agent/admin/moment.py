"""A running agent as it was at one moment, for views that are made in another thread: its metrics, which with ten
thousand identities are two hundred thousand numbers.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime

from msgspec import Struct

from sds_agent.admin.observed import About, Observed
from sds_agent.admin.slices import sliced
from sds_agent.issuance.counts import IssuanceCounts
from sds_agent.issuance.status import FederatedStatus, TrustStatus, WorkloadStatus
from sds_agent.sds.counts import SdsCounts
from sds_agent.sds.status import StreamStatus
from sds_agent.tally import copied


class Moment(Struct, frozen=True, kw_only=True):
    """What `Observed` says then. None of it changes any more."""

    about: About
    workloads: Sequence[WorkloadStatus]
    trust: TrustStatus
    federated: Sequence[FederatedStatus]
    streams: Sequence[StreamStatus]
    versions: Mapping[str, str | None]
    issuance_counts: IssuanceCounts
    sds_counts: SdsCounts
    log_counts: Mapping[str, int]
    lacks: Sequence[str]


async def taken(observed: Observed, now: datetime) -> Moment:
    """The agent now. While its workloads are read, other tasks have their turn."""
    return moment(observed, now, [each async for each in sliced(observed.each_workload())])


def moment(observed: Observed, now: datetime, workloads: Sequence[WorkloadStatus]) -> Moment:
    """The agent now, with these of its workloads."""
    return Moment(
        about=observed.about,
        workloads=workloads,
        trust=observed.trust,
        federated=tuple(observed.federated),
        streams=tuple(observed.streams),
        versions=dict(observed.versions),
        issuance_counts=copied(observed.issuance_counts),
        sds_counts=copied(observed.sds_counts),
        log_counts=dict(observed.log_counts),
        lacks=tuple(observed.lacks(now)),
    )
