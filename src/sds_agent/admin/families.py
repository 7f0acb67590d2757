"""Metrics as values: families of measured numbers, which Prometheus' formats and OTLP are renderings of.

Names follow Prometheus' conventions: base units (seconds, bytes), `_total` for what only rises, `_info` for what is
always 1 and is read for its labels, `_timestamp_seconds` for moments, as seconds since 1970. Labels have values from
the configuration, from a fixed set of words, or from a bounded number of certificates: a peer that could choose them
would fill the memory of whatever stores the metrics.
"""

from collections.abc import Iterable, Mapping
from datetime import datetime
from itertools import accumulate
from typing import Literal

from msgspec import Struct

from sds_agent.tally import Counter, Distribution, Histogram, Labels

LEVELS = ("debug", "info", "warning", "error")
NumberKind = Literal["gauge", "counter"]


class NumberFamily(Struct, frozen=True):
    """A metric whose values are numbers: its name, what it says, the names of its labels, and a value for each
    combination of their values, in their order. A gauge rises and falls, a counter only rises.
    """

    name: str
    kind: NumberKind
    says: str
    labels: tuple[str, ...]
    values: Mapping[Labels, float]


class HistogramFamily(Struct, frozen=True):
    """A metric whose values are distributions."""

    name: str
    says: str
    labels: tuple[str, ...]
    values: Mapping[Labels, Distribution]


Family = NumberFamily | HistogramFamily


def gauge(name: str, says: str, values: float | Mapping[Labels, float], labels: tuple[str, ...] = ()) -> NumberFamily:
    """What rises and falls; without labels there is one value."""
    return NumberFamily(name, "gauge", says, labels, values if isinstance(values, Mapping) else {(): values})


def moments(name: str, says: str, values: Mapping[Labels, datetime | None], labels: tuple[str, ...]) -> NumberFamily:
    """Moments as seconds since 1970. One that is None has no value."""
    found = {key: moment.timestamp() for key, moment in values.items() if moment is not None}
    return gauge(name, says, found, labels)


def counted(name: str, says: str, counter: Counter, known: Iterable[Labels] = ()) -> NumberFamily:
    """A counter. Those of the `known` labels begin at zero, so that a query sees the first of each as a rise."""
    return NumberFamily(name, "counter", says, counter.labels, {**dict.fromkeys(known, 0.0), **counter.counts})


def logged(name: str, counts: Mapping[str, int]) -> NumberFamily:
    """The events that a program has logged, by level (`log.counts`)."""
    values: dict[Labels, float] = {(level,): float(counts.get(level, 0)) for level in LEVELS}
    says = "Events that were logged, by level; those below log.level are not. An error is for people to see."
    return NumberFamily(name, "counter", says, ("level",), values)


def distributed(name: str, says: str, histogram: Histogram, known: Iterable[Labels] = ()) -> HistogramFamily:
    """A histogram; those of the `known` labels are empty at first."""
    values = {**dict.fromkeys(known, histogram.nothing), **histogram.distributions}
    return HistogramFamily(name, says, histogram.labels, values)


def flags(name: str, says: str, values: Mapping[Labels, bool], labels: tuple[str, ...]) -> NumberFamily:
    """What is so (1) or not (0)."""
    return gauge(name, says, {key: float(value) for key, value in values.items()}, labels)


def info(name: str, says: str, values: Mapping[str, str]) -> NumberFamily:
    """Facts as labels."""
    return gauge(name, says, {tuple(values.values()): 1.0}, tuple(values))


def cumulative(distribution: Distribution) -> tuple[tuple[float, int], ...]:
    """How many values there are up to each bound, those of the bounds before included; last up to infinity."""
    return tuple(zip((*distribution.bounds, float("inf")), accumulate(distribution.counts), strict=True))
