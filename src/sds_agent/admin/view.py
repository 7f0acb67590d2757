"""A running agent's statuses as the status model: pure, with the time as an argument."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from heapq import nsmallest

from msgspec import structs

from sds_agent.admin.model import (
    TIME,
    AgentView,
    AnchorView,
    AuthorityView,
    BundleView,
    CertificateView,
    CountsView,
    DeliveryState,
    DepartedView,
    FailureView,
    IdentityState,
    IdentityView,
    LeafView,
    LeftOutView,
    NackView,
    Status,
    SubscriberView,
    SubscriptionView,
)
from sds_agent.admin.observed import About, Observed
from sds_agent.issuance.expiry import anchor_warned_from, not_outlived, warned_from
from sds_agent.issuance.status import (
    AnchorStatus,
    AuthorityStatus,
    CertificateEnd,
    FailureStatus,
    FederatedStatus,
    LeafStatus,
    TrustStatus,
    WorkloadStatus,
)
from sds_agent.sds.departed import DepartedStream
from sds_agent.sds.status import NameStatus, StreamStatus
from sds_agent.tally import Counter


def status(observed: Observed, now: datetime) -> Status:
    """Everything that can be seen at `now`."""
    about, versions = observed.about, observed.versions
    return structs.replace(
        frame(observed, now),
        identities=tuple(identity(each, about) for each in observed.workloads),
        subscribers=tuple(subscriber(each, versions) for each in observed.streams),
    )


def frame(observed: Observed, now: datetime) -> Status:
    """The same without identities and subscribers, of which there may be thousands."""
    return Status(
        at=now,
        agent=agent(observed, now),
        identities=(),
        bundles=(bundle(observed.about, observed.trust), *map(federated_bundle, observed.federated)),
        subscribers=(),
        departed=tuple(map(departed, observed.departed)),
    )


def first_workloads(workloads: Sequence[WorkloadStatus], most: int) -> Sequence[WorkloadStatus]:
    """At most so many; of more those that are not served, then those whose attempts fail."""
    return workloads if len(workloads) <= most else nsmallest(most, workloads, key=_trouble_of_workload)


def first_streams(
    streams: Sequence[StreamStatus], versions: Mapping[str, str | None], most: int
) -> Sequence[StreamStatus]:
    """At most so many; of more those with a refused name, then those that are behind in another way."""
    if len(streams) <= most:
        return streams
    return nsmallest(
        most, streams, key=lambda each: min((_RANK[delivery(n, versions)] for n in each.names), default=len(_RANK))
    )


def _trouble_of_workload(workload: WorkloadStatus) -> int:
    return 0 if not workload.served else 1 if workload.failure is not None else 2


_RANK: Mapping[DeliveryState, int] = {
    "refused": 0,
    "unknown": 1,
    "denied": 2,
    "behind": 3,
    "waiting": 4,
    "current": 5,
}


def departed(found: DepartedStream) -> DepartedView:
    """A stream that has ended."""
    return DepartedView(
        stream=found.number,
        method=found.method,
        node=found.node,
        peer=found.peer,
        names=found.names,
        since=found.connected_at,
        left_at=found.left_at,
        cause=found.cause,
    )


def agent(observed: Observed, now: datetime) -> AgentView:
    """The agent itself."""
    about, lacks = observed.about, tuple(observed.lacks(now))
    return AgentView(
        version=about.version,
        pid=about.pid,
        started_at=about.started_at,
        uptime_seconds=round(about.uptime_seconds, 3),
        trust_domain=about.trust_domain,
        socket=about.socket,
        ready=not lacks,
        lacks=lacks,
        counts=_counts(observed),
        reload_refused=about.reload_refused,
    )


def _counts(observed: Observed) -> CountsView:
    attempts, sds = observed.issuance_counts.attempts.counts, observed.sds_counts
    issued = sum(count for (_, result), count in attempts.items() if result in {"issued", "renewed"})
    return CountsView(
        issued=issued,
        failed=sum(attempts.values()) - issued,
        responses=_sum(sds.responses),
        pushes=_sum(sds.pushes),
        acks=_sum(sds.acks),
        nacks=_sum(sds.nacks),
    )


def _sum(counter: Counter) -> int:
    return sum(counter.counts.values())


def identity(workload: WorkloadStatus, about: About) -> IdentityView:
    """A workload."""
    current = workload.current
    state: IdentityState = "serving" if workload.served else "pending" if current is None else "expired"
    return IdentityView(
        name=workload.name,
        spiffe_id=workload.spiffe_id,
        names=about.names.get(workload.name, ()),
        state=state,
        authority=workload.authority,
        authorities=_authorities(workload, about),
        current=None if current is None else leaf(current),
        coming=tuple(map(leaf, workload.coming)),
        earlier=tuple(map(leaf, workload.earlier)),
        next_renewal=workload.renew_at,
        attempt=workload.attempt,
        failure=_failure(workload.failure),
    )


def _authorities(workload: WorkloadStatus, about: About) -> tuple[AuthorityView, ...]:
    only = AuthorityStatus(workload.authority, in_use=True, failure=workload.failure)
    return tuple(
        AuthorityView(
            name=each.name, kind=about.kinds.get(each.name, ""), in_use=each.in_use, failure=_failure(each.failure)
        )
        for each in workload.authorities or (only,)
    )


def _failure(failure: FailureStatus | None) -> FailureView | None:
    if failure is None:
        return None
    return FailureView(
        kind=failure.kind.value,
        cause=failure.cause,
        at=failure.at,
        attempts=failure.attempts,
        next_attempt=failure.next_attempt,
    )


def leaf(found: LeafStatus) -> LeafView:
    """A workload's certificate."""
    own = CertificateView(
        subject=found.subject,
        issuer=found.issuer,
        serial=found.serial,
        key=found.key,
        not_before=found.not_before,
        not_after=found.not_after,
    )
    return LeafView(
        serial=found.serial,
        issuer=found.issuer,
        key=found.key,
        authority=found.authority,
        issued_at=found.issued_at,
        not_before=found.not_before,
        not_after=found.not_after,
        valid_from=found.valid_from,
        valid_until=found.valid_until,
        ends_with=found.ends_with,
        renew_at=found.renew_at,
        foreign=found.foreign,
        chain=(own, *map(_certificate, found.intermediates)),
        anchor=None if found.anchor is None else _certificate(found.anchor),
        warn_at=warned_from(found),
    )


def _certificate(found: CertificateEnd) -> CertificateView:
    return CertificateView(
        subject=found.subject,
        issuer=found.issuer,
        serial=found.serial,
        key=found.key,
        not_before=found.not_before,
        not_after=found.not_after,
    )


def bundle(about: About, trust: TrustStatus) -> BundleView:
    """The trust bundle of the agent's own trust domain."""
    return BundleView(
        trust_domain=about.trust_domain,
        names=about.bundle_names,
        federated=False,
        version=trust.version,
        anchors=_anchors(trust.anchors, [each for each in trust.anchors if each.advertised_by]),
        left_out=tuple(LeftOutView(authority=each.authority, causes=each.causes) for each in trust.left_out),
    )


def federated_bundle(found: FederatedStatus) -> BundleView:
    """The bundle of another trust domain."""
    return BundleView(
        trust_domain=found.trust_domain,
        names=(f"spiffe://{found.trust_domain}",),
        federated=True,
        version=found.version,
        anchors=_anchors(found.anchors, found.anchors),
        left_out=(),
    )


def _anchors(found: Sequence[AnchorStatus], watched: Sequence[AnchorStatus]) -> tuple[AnchorView, ...]:
    """Trust anchors; the end of those that are `watched` matters, but for one that another of its name outlives."""
    warned = set(map(id, not_outlived(found))).intersection(map(id, watched))
    return tuple(anchor(each, warned=id(each) in warned) for each in found)


def anchor(found: AnchorStatus, *, warned: bool = False) -> AnchorView:
    """A trust anchor; `warned` is whether there is a warning before it ends."""
    return AnchorView(
        subject=found.subject,
        serial=found.serial,
        key=found.key,
        not_before=found.not_before,
        not_after=found.not_after,
        advertised_by=found.advertised_by,
        needed_until=found.needed_until,
        why=_why(found.advertised_by, found.needed_until),
        warn_at=anchor_warned_from(found) if warned else None,
    )


def _why(advertised_by: Sequence[str], needed_until: datetime | None) -> str:
    """Why an anchor is still in the bundle."""
    needed = "" if needed_until is None else f"certificates chain to it until {needed_until:{TIME}}"
    if not advertised_by:
        return needed or "an earlier certificate chained to it"
    names = " and ".join(advertised_by) if len(advertised_by) < 3 else ", ".join(advertised_by)
    advertised = f"{names} advertise{'s' if len(advertised_by) == 1 else ''} it"
    return f"{advertised}; {needed}" if needed else advertised


def subscriber(stream: StreamStatus, versions: Mapping[str, str | None]) -> SubscriberView:
    """An open stream; `versions` are what is served under each name now."""
    return SubscriberView(
        stream=stream.number,
        method=stream.method,
        node=stream.node,
        cluster=stream.cluster,
        version=stream.version,
        peer=stream.peer,
        since=stream.connected_at,
        last_response=stream.responded_at,
        ack_ms=stream.ack_ms,
        subscriptions=tuple(subscription(each, versions) for each in stream.names),
    )


def subscription(name: NameStatus, versions: Mapping[str, str | None]) -> SubscriptionView:
    """A name that a stream asked for."""
    nacked = None if name.nacked is None else NackView(version=name.nacked.version, reason=name.nacked.reason)
    return SubscriptionView(
        name=name.name, state=delivery(name, versions), sent=name.sent, acked=name.acked, nacked=nacked
    )


def delivery(name: NameStatus, versions: Mapping[str, str | None]) -> DeliveryState:
    """How a subscriber stands to what is served under a name now. For the name of a file the newest that was sent
    counts, and not what took back one that was refused.
    """
    if name.denied:
        return "denied"
    if name.name not in versions and (name.waits or not name.sent):
        return "waiting" if name.waits else "unknown"
    served = versions.get(name.name, name.sent)
    if served is None:
        return "waiting"
    if name.acked == served:
        return "current" if name.name in versions or name.nacked is None else "refused"
    return "refused" if name.nacked is not None and name.nacked.version == served else "behind"
