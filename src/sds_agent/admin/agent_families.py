"""A running agent's metrics at a moment: pure. docs/observability/README.md says what each is for.

Ends of certificates are moments, not seconds that are left: a rule subtracts `time()` itself, so what it finds does not
depend on when the agent was last scraped, and goes on counting down while the agent cannot be scraped.
"""

import platform
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import get_args

from sds_agent.admin.families import Family, counted, distributed, flags, gauge, info, logged, moments
from sds_agent.admin.model import DeliveryState
from sds_agent.admin.moment import Moment
from sds_agent.admin.observed import About
from sds_agent.admin.view import delivery
from sds_agent.authority.protocol import ErrorKind
from sds_agent.issuance.counts import IssuanceCounts
from sds_agent.issuance.expiry import Expiring, watched
from sds_agent.issuance.status import AnchorStatus, WorkloadStatus
from sds_agent.sds.counts import SdsCounts
from sds_agent.sds.status import StreamStatus
from sds_agent.tally import Labels

MOST_ANCHORS = 20
"""Anchors of a bundle with series of their own, those that end first: a CA may advertise thousands."""
MOST_INTERMEDIATES = 10
"""Intermediates of a chain, likewise."""
RESULTS = ("issued", "renewed", *(kind.value for kind in ErrorKind))
METHODS = ("StreamSecrets", "DeltaSecrets", "FetchSecrets")
CERTIFICATE = ("certificate", "workload", "trust_domain", "subject")
"""The labels of a certificate: what it is (leaf, intermediate or anchor), of which workload or trust domain, and its
subject, which is the SPIFFE ID of a leaf.
"""
WORKLOAD = ("workload",)


def families(seen: Moment) -> Sequence[Family]:
    """All of them."""
    return (
        *_agent(seen.about, seen.lacks),
        logged("sds_agent_log_events_total", seen.log_counts),
        *_workloads(seen.workloads),
        *_certificates(seen),
        *_bundles(seen),
        *_issuance(seen.issuance_counts, seen.about.kinds),
        *_sds(seen.sds_counts, tuple(seen.versions)),
        *_streams(seen.streams, seen.versions),
    )


def _agent(about: About, lacks: Sequence[str]) -> Iterator[Family]:
    facts = {"version": about.version, "python": platform.python_version(), "trust_domain": about.trust_domain}
    yield info("sds_agent_build_info", "The agent's version, that of its Python, and its trust domain.", facts)
    yield gauge("sds_agent_start_time_seconds", "When the agent started.", about.started_at.timestamp())
    yield gauge("sds_agent_ready", "Whether every workload has a valid certificate (1) or not (0).", float(not lacks))


def _workloads(workloads: Sequence[WorkloadStatus]) -> Iterator[Family]:
    yield flags(
        "sds_agent_workload_served",
        "Whether Envoys are given the workload's certificate (1), or there is none or it has ended (0).",
        {(each.name,): each.served for each in workloads},
        WORKLOAD,
    )
    yield moments(
        "sds_agent_workload_valid_until_timestamp_seconds",
        "Until when Envoys take the workload's certificate: the end of the leaf, of a CA above it or of the anchor.",
        {(each.name,): each.current.valid_until for each in workloads if each.current is not None},
        WORKLOAD,
    )
    yield moments(
        "sds_agent_workload_renewal_timestamp_seconds",
        "When the workload's next certificate is due. Absent where the CA decides that.",
        {(each.name,): each.renew_at for each in workloads},
        WORKLOAD,
    )
    yield gauge(
        "sds_agent_workload_consecutive_failures",
        "Attempts to get a certificate for the workload that failed since the last one that succeeded.",
        {(each.name,): 0.0 if each.failure is None else float(each.failure.attempts) for each in workloads},
        WORKLOAD,
    )
    yield flags(
        "sds_agent_workload_authority_in_use",
        "Whether the workload's certificates come from the authority (1), or would if another one failed (0). The one "
        "of rank 1 is asked first.",
        {
            (each.name, name, str(rank)): in_use
            for each in workloads
            for rank, (name, in_use) in enumerate(_authorities(each), start=1)
        },
        ("workload", "authority", "rank"),
    )


def _authorities(workload: WorkloadStatus) -> Iterable[tuple[str, bool]]:
    """The workload's authorities, and whether each is in use."""
    return [(each.name, each.in_use) for each in workload.authorities] or [(workload.authority, True)]


def _certificates(seen: Moment) -> Iterator[Family]:
    ends = {**_leaves(seen.workloads), **_anchors(seen)}
    expiring = {key: each for key, each in _expiring(seen).items() if key in ends}
    yield moments(
        "sds_agent_certificate_not_after_timestamp_seconds",
        "When the certificate ends. Of several anchors with one subject, the last to end.",
        ends,
        CERTIFICATE,
    )
    yield moments(
        "sds_agent_certificate_warning_timestamp_seconds",
        "From when on the agent warns that the certificate nears its end. Absent for what need not be renewed.",
        {key: each.warn_at for key, each in expiring.items()},
        CERTIFICATE,
    )
    yield moments(
        "sds_agent_certificate_alarm_timestamp_seconds",
        "From when on that is an error. Absent for what need not be renewed.",
        {key: each.alarm_at for key, each in expiring.items()},
        CERTIFICATE,
    )


def _leaves(workloads: Iterable[WorkloadStatus]) -> dict[Labels, datetime]:
    """The end of each workload's leaf, and of the intermediates that it came with: of two with one subject, the first
    to end, as the chain ends with it.
    """
    found = dict[Labels, datetime]()
    for each in workloads:
        if each.current is None:
            continue
        found["leaf", each.name, "", each.spiffe_id] = each.current.not_after
        for intermediate in each.current.intermediates[:MOST_INTERMEDIATES]:
            key = ("intermediate", each.name, "", intermediate.subject)
            found[key] = min(intermediate.not_after, found.get(key, intermediate.not_after))
    return found


def _anchors(seen: Moment) -> dict[Labels, datetime]:
    """The end of each trust domain's anchors, as far as they have series of their own."""
    return {
        ("anchor", "", domain, subject): end
        for domain, anchors in _bundles_of(seen)
        for subject, end in _by_subject(anchors).items()
    }


def _bundles_of(seen: Moment) -> Iterator[tuple[str, Sequence[AnchorStatus]]]:
    """Each trust domain with its anchors; the agent's own first."""
    yield seen.about.trust_domain, seen.trust.anchors
    for each in seen.federated:
        yield each.trust_domain, each.anchors


def _by_subject(anchors: Iterable[AnchorStatus]) -> Mapping[str, datetime]:
    """The last end of the anchors of each subject: one that another one outlives has been renewed. Of subjects that are
    too many, those that end first.
    """
    ends = dict[str, datetime]()
    for each in anchors:
        ends[each.subject] = max(each.not_after, ends.get(each.subject, each.not_after))
    return dict(sorted(ends.items(), key=lambda found: (found[1], found[0]))[:MOST_ANCHORS])


def _expiring(seen: Moment) -> Mapping[Labels, Expiring]:
    """What the log reports as `expiring` once it is time; of two with the same labels the first to end."""
    domain = seen.about.trust_domain
    found = sorted(watched(seen.workloads, seen.trust), key=lambda each: each.not_after, reverse=True)
    return {
        (each.certificate, each.workload or "", domain if each.certificate == "anchor" else "", each.subject): each
        for each in found
    }


def _bundles(seen: Moment) -> Iterator[Family]:
    yield gauge(
        "sds_agent_bundle_anchors",
        f"Trust anchors in the trust domain's bundle. At most {MOST_ANCHORS} of them have series of their own.",
        {(domain,): float(len(anchors)) for domain, anchors in _bundles_of(seen)},
        ("trust_domain",),
    )
    left_out = {each.authority: float(len(each.causes)) for each in seen.trust.left_out}
    yield gauge(
        "sds_agent_bundle_left_out",
        "Certificates and lists that the authority advertises and Envoys are not given; the status says why.",
        {(name,): left_out.get(name, 0.0) for name in seen.about.kinds},
        ("authority",),
    )


def _issuance(counts: IssuanceCounts, authorities: Iterable[str]) -> Iterator[Family]:
    names = [(name,) for name in authorities]
    yield counted(
        "sds_agent_issuance_attempts_total",
        "Attempts at the authority that ended: with a workload's first certificate (issued), with a later one "
        "(renewed), or with the kind of their failure.",
        counts.attempts,
        [(*name, result) for name in names for result in RESULTS],
    )
    yield counted(
        "sds_agent_issuance_retries_total",
        "Attempts at the authority that followed one that failed.",
        counts.retries,
        names,
    )
    yield distributed(
        "sds_agent_issuance_duration_seconds",
        "From the certificate signing request to the accepted certificate.",
        counts.seconds,
        names,
    )


def _sds(counts: SdsCounts, configured: Iterable[str]) -> Iterator[Family]:
    names = [(name,) for name in (*configured, SdsCounts.OTHERS)]
    yield counted("sds_agent_responses_total", "Secrets that were sent.", counts.responses, names)
    yield counted("sds_agent_pushes_total", "Secrets that were sent because they had changed.", counts.pushes, names)
    yield counted("sds_agent_acks_total", "Secrets that an Envoy took.", counts.acks, names)
    yield counted("sds_agent_nacks_total", "Secrets that an Envoy refused.", counts.nacks, names)
    yield distributed(
        "sds_agent_ack_duration_seconds", "From an answer to the Envoy's ACK.", counts.seconds_to_ack, [()]
    )
    yield counted(
        "sds_agent_streams_opened_total",
        "Streams that were opened, and calls of FetchSecrets.",
        counts.streams,
        [(method,) for method in METHODS],
    )


def _streams(streams: Sequence[StreamStatus], versions: Mapping[str, str | None]) -> Iterator[Family]:
    opened = dict.fromkeys(METHODS, 0)
    states: dict[tuple[str, str], int] = {
        (name, state): 0 for name in (*versions, SdsCounts.OTHERS) for state in get_args(DeliveryState)
    }
    for stream in streams:
        opened[stream.method] += 1
        for name in stream.names:
            states[name.name if name.name in versions else SdsCounts.OTHERS, delivery(name, versions)] += 1
    yield gauge(
        "sds_agent_streams",
        "Streams that are open, and calls of FetchSecrets that wait.",
        {(method,): float(count) for method, count in opened.items()},
        ("method",),
    )
    yield gauge(
        "sds_agent_subscriptions",
        "Subscriptions to the name by their state: whether the Envoy has acknowledged what is served now (current), "
        "not yet (behind), refused it (refused), waits for one (waiting), or asked for what is not served (unknown) or "
        "is for other users (denied).",
        {key: float(count) for key, count in states.items()},
        ("name", "state"),
    )
