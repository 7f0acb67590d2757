"""The agent's metrics in Prometheus' formats, made of its statuses and counts when they are scraped.

Every label is a word of ours or a name of the configuration. Names and node ids that peers choose are none: they are
counted together under `SdsCounts.OTHERS`. Trust anchors come from CAs, so their number is bounded.
"""

from collections import Counter as Tallied
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from sds_agent.admin import view
from sds_agent.admin.observed import Observed
from sds_agent.issuance.status import AnchorStatus, WorkloadStatus
from sds_agent.sds.counts import SdsCounts
from sds_agent.tally import Counter, Histogram

MOST_ANCHORS = 64
"""Trust anchors of one trust domain that have an end of their own: those that end first."""
RESULTS = ("issued", "renewed")


def render(observed: Observed, now: datetime, accept: str) -> tuple[bytes, str]:
    """All metrics, and their media type: OpenMetrics where the Accept header names it, else Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    ProcessCollector(registry=registry)
    registry.register(AgentCollector(observed, now))
    encode, media = choose_encoder(accept)
    return encode(registry), media


class AgentCollector(Collector):
    """Collects the metrics of one moment."""

    def __init__(self, observed: Observed, now: datetime) -> None:
        self._observed = observed
        self._now = now

    def collect(self) -> Iterator[Metric]:
        """Every family, each once."""
        yield from self._agent()
        workloads = tuple(self._observed.workloads)
        yield from _certificates(workloads)
        yield from _attempts(workloads, self._observed)
        yield from _anchors(self._observed)
        yield from self._sds()

    def _agent(self) -> Iterator[Metric]:
        about = self._observed.about
        info = GaugeMetricFamily("sds_agent_build_info", "The agent's version; the value is 1.", labels=["version"])
        info.add_metric([about.version], 1)
        yield info
        yield gauge("sds_agent_start_time_seconds", "When the agent started.", about.started_at.timestamp())
        ready = not self._observed.lacks(self._now)
        yield gauge("sds_agent_ready", "1 while every workload has a valid certificate.", float(ready))

    def _sds(self) -> Iterator[Metric]:
        counts, versions = self._observed.sds_counts, self._observed.versions
        names = tuple(versions)
        for name, text, counter in (
            ("sds_agent_responses", "Secrets sent to Envoys, by the resource name.", counts.responses),
            ("sds_agent_pushes", "Secrets sent because they had changed.", counts.pushes),
            ("sds_agent_acks", "Secrets that an Envoy took (ACK).", counts.acks),
            ("sds_agent_nacks", "Secrets that an Envoy refused (NACK).", counts.nacks),
        ):
            yield counted(name, text, counter, ((each,) for each in names))
        yield distributed("sds_agent_ack_duration_seconds", "From an answer to its ACK.", counts.seconds_to_ack, [()])
        yield counted("sds_agent_streams_opened", "Streams and calls that were opened.", counts.streams, ())
        yield from self._streams(frozenset(names))

    def _streams(self, names: frozenset[str]) -> Iterator[Metric]:
        streams, versions = self._observed.streams, self._observed.versions
        opened = GaugeMetricFamily("sds_agent_streams", "Open streams, and calls that wait.", labels=["method"])
        for method, count in Tallied(each.method for each in streams).items():
            opened.add_metric([method], count)
        yield opened
        states = Tallied(
            (each.name if each.name in names else SdsCounts.OTHERS, view.delivery(each, versions))
            for stream in streams
            for each in stream.names
        )
        family = GaugeMetricFamily(
            "sds_agent_subscriptions",
            "Subscriptions by the resource name, and how they stand to what is served: current, behind, refused, "
            "waiting or unknown.",
            labels=["name", "state"],
        )
        for (name, state), count in states.items():
            family.add_metric([name, state], count)
        yield family


def _certificates(workloads: Iterable[WorkloadStatus]) -> Iterator[Metric]:
    served = GaugeMetricFamily(
        "sds_agent_workload_served", "1 while Envoys are given the workload's certificate.", labels=["workload"]
    )
    ends = GaugeMetricFamily(
        "sds_agent_certificate_expiration_timestamp_seconds",
        "When a part of the served chain ends: the leaf, the first of its intermediates to end, the anchor above it, "
        "and the chain as a whole, which is as long as Envoys take it.",
        labels=["workload", "part"],
    )
    renewals = GaugeMetricFamily(
        "sds_agent_certificate_renewal_timestamp_seconds",
        "When the workload's next certificate is due; absent where the CA decides that.",
        labels=["workload"],
    )
    for workload in workloads:
        served.add_metric([workload.name], float(workload.served))
        for part, end in _ends(workload).items():
            ends.add_metric([workload.name, part], end.timestamp())
        if workload.renew_at is not None:
            renewals.add_metric([workload.name], workload.renew_at.timestamp())
    yield from (served, ends, renewals)


def _ends(workload: WorkloadStatus) -> Mapping[str, datetime]:
    current = workload.current
    if current is None or not workload.served:
        return {}
    ends = {"leaf": current.not_after, "chain": current.valid_until}
    if current.intermediates:
        ends["intermediate"] = min(each.not_after for each in current.intermediates)
    if current.anchor is not None:
        ends["anchor"] = current.anchor.not_after
    return ends


def _attempts(workloads: Iterable[WorkloadStatus], observed: Observed) -> Iterator[Metric]:
    counts, authorities = observed.issuance_counts, tuple(observed.about.kinds)
    yield counted(
        "sds_agent_certificate_requests",
        "Attempts at an authority that ended: issued, renewed, or the kind of the failure.",
        counts.attempts,
        ((authority, result) for authority in authorities for result in RESULTS),
    )
    yield counted(
        "sds_agent_certificate_request_retries",
        "Attempts that followed a failed one.",
        counts.retries,
        ((authority,) for authority in authorities),
    )
    yield distributed(
        "sds_agent_certificate_request_duration_seconds",
        "From the request to the accepted certificate.",
        counts.seconds,
        [(authority,) for authority in authorities],
    )
    failures = GaugeMetricFamily(
        "sds_agent_workload_failures", "Attempts that failed since the last good one.", labels=["workload"]
    )
    in_use = GaugeMetricFamily(
        "sds_agent_workload_authority", "1 for the authority in use.", labels=["workload", "authority"]
    )
    for workload in workloads:
        failures.add_metric([workload.name], 0 if workload.failure is None else workload.failure.attempts)
        in_use.add_metric([workload.name, workload.authority], 1)
    yield from (failures, in_use)


def _anchors(observed: Observed) -> Iterator[Metric]:
    number = GaugeMetricFamily("sds_agent_trust_anchors", "Trust anchors in a bundle.", labels=["trust_domain"])
    ends = GaugeMetricFamily(
        "sds_agent_trust_anchor_expiration_timestamp_seconds",
        f"When a trust anchor ends; of more than {MOST_ANCHORS} those that end first.",
        labels=["trust_domain", "serial", "subject"],
    )
    bundles: list[tuple[str, tuple[AnchorStatus, ...]]] = [
        (observed.about.trust_domain, observed.trust.anchors),
        *((each.trust_domain, each.anchors) for each in observed.federated),
    ]
    for trust_domain, anchors in bundles:
        number.add_metric([trust_domain], len(anchors))
        for anchor in sorted(anchors, key=lambda each: each.not_after)[:MOST_ANCHORS]:
            ends.add_metric([trust_domain, anchor.serial, anchor.subject], anchor.not_after.timestamp())
    yield from (number, ends)


def gauge(name: str, text: str, value: float) -> Metric:
    """A gauge without labels."""
    return GaugeMetricFamily(name, text, value=value)


def counted(name: str, text: str, counter: Counter, always: Iterable[tuple[str, ...]]) -> Metric:
    """A counter by its labels. Those in `always` are there from the start: a rate needs a value before the first."""
    family = CounterMetricFamily(name, text, labels=counter.labels)
    for labels, count in {**dict.fromkeys(always, 0), **counter.counts}.items():
        family.add_metric(labels, count)
    return family


def distributed(name: str, text: str, histogram: Histogram, always: Iterable[tuple[str, ...]]) -> Metric:
    """A histogram by its labels. Those in `always` are there from the start."""
    family = HistogramMetricFamily(name, text, labels=histogram.labels)
    found = histogram.distributions
    for labels in dict.fromkeys((*always, *found)):
        distribution = found.get(labels, histogram.nothing)
        total, buckets = 0, []
        for bound, count in zip((*distribution.bounds, float("inf")), distribution.counts, strict=True):
            total += count
            buckets.append(("+Inf" if bound == float("inf") else str(bound), float(total)))
        family.add_metric(labels, buckets, distribution.total)
    return family
