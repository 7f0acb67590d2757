"""Families of metrics in Prometheus' text format or OpenMetrics, with the process's own metrics beside them.

Imported at the first scrape alone: prometheus_client takes 70 ms and 14 MB.
"""

import math
from collections.abc import Iterable, Iterator, Sequence

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, choose_encoder, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from sds_agent.admin.families import Family, HistogramFamily, NumberFamily, NumberKind, cumulative


def render(families: Sequence[Family], accept: str) -> tuple[bytes, str]:
    """The body and the Content-Type of the answer to a scrape with that Accept header, empty where there is none."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_process())
    registry.register(_Families(families))
    try:
        encode, content_type = choose_encoder(accept)
    except TypeError:  # prometheus_client compares the version that it asks for, whatever stands there, with numbers
        encode, content_type = generate_latest, CONTENT_TYPE_PLAIN_0_0_4
    return encode(registry), content_type


def process_families() -> Iterator[NumberFamily]:
    """The process's own metrics: processor time, memory, descriptors and its start."""
    for metric in _process().collect():
        for sample in metric.samples:
            kind: NumberKind = "counter" if metric.type == "counter" else "gauge"
            yield NumberFamily(sample.name, kind, metric.documentation, (), {(): float(sample.value)})


def _process() -> Collector:
    """The process's own metrics now. A collector keeps the time of the boot, which moves where the clock is set."""
    return ProcessCollector(registry=None)


class _Families(Collector):
    def __init__(self, families: Iterable[Family]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        return map(_metric, self._families)


def _metric(family: Family) -> Metric:
    return _histogram(family) if isinstance(family, HistogramFamily) else _numbers(family)


def _numbers(family: NumberFamily) -> Metric:
    kind = GaugeMetricFamily if family.kind == "gauge" else CounterMetricFamily
    found = kind(family.name, family.says, labels=family.labels)
    for labels, value in family.values.items():
        found.add_metric(labels, value)
    return found


def _histogram(family: HistogramFamily) -> Metric:
    found = HistogramMetricFamily(family.name, family.says, labels=family.labels)
    for labels, value in family.values.items():
        found.add_metric(labels, [(_bound(most), count) for most, count in cumulative(value)], value.total)
    return found


def _bound(most: float) -> str:
    return "+Inf" if math.isinf(most) else str(most)
