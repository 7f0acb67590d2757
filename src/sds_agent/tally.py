"""Counts of what happened, for views: plain numbers that cost a dictionary's update, whether anything reads them or
not.

A label is a value of a dimension that every count of one `Counter` has, as the result or the authority. Labels must
come from the configuration or from a fixed set of words: a peer that could choose them would fill the memory.
"""

from bisect import bisect_left
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TypeVar

from msgspec import Struct

Labels = tuple[str, ...]


class Counter:
    """How often something happened, by its labels. It never falls."""

    __slots__ = ("_counts", "labels")

    def __init__(self, *labels: str) -> None:
        """`labels` are the names of the dimensions; with none there is one count."""
        self.labels = labels
        self._counts: dict[Labels, int] = {}

    def add(self, *labels: str, by: int = 1) -> None:
        """It has happened `by` times more, with these values of the labels, in their order."""
        self._counts[labels] = self._counts.get(labels, 0) + by

    def copy(self) -> "Counter":
        """The counts so far, which do not go on."""
        found = Counter(*self.labels)
        found._counts = self._counts.copy()
        return found

    @property
    def counts(self) -> Mapping[Labels, int]:
        """Each count so far, by the values of its labels."""
        return MappingProxyType(self._counts)


class Distribution(Struct, frozen=True):
    """Measured values so far: how many there are up to each bound, without those of the bound before, then how many
    above the last; and their sum.
    """

    bounds: tuple[float, ...]
    counts: tuple[int, ...]
    total: float

    @property
    def count(self) -> int:
        """How many there are."""
        return sum(self.counts)


class Histogram:
    """How values of one unit are distributed, by labels."""

    __slots__ = ("_bounds", "_counts", "_totals", "labels")

    def __init__(self, bounds: Sequence[float], *labels: str) -> None:
        """`bounds` are the upper ends of the buckets, in rising order; a value above the last has a bucket too."""
        self.labels = labels
        self._bounds = tuple(bounds)
        self._counts: dict[Labels, list[int]] = {}
        self._totals: dict[Labels, float] = {}

    def observe(self, value: float, *labels: str) -> None:
        """A value was measured, with these values of the labels, in their order."""
        counts = self._counts.get(labels)
        if counts is None:
            counts = self._counts[labels] = [0] * (len(self._bounds) + 1)
        counts[bisect_left(self._bounds, value)] += 1
        self._totals[labels] = self._totals.get(labels, 0.0) + value

    def copy(self) -> "Histogram":
        """The values so far, which do not go on."""
        found = Histogram(self._bounds, *self.labels)
        found._counts = {labels: counts.copy() for labels, counts in self._counts.items()}
        found._totals = self._totals.copy()
        return found

    @property
    def nothing(self) -> Distribution:
        """The distribution of no value."""
        return Distribution(self._bounds, (0,) * (len(self._bounds) + 1), 0.0)

    @property
    def distributions(self) -> Mapping[Labels, Distribution]:
        """The values so far, by the values of their labels."""
        return {
            labels: Distribution(self._bounds, tuple(counts), self._totals[labels])
            for labels, counts in self._counts.items()
        }


T = TypeVar("T")


def copied(counts: T) -> T:
    """The counts of a class that is made without arguments and has counters and histograms alone, as they are now."""
    found = type(counts)()
    for name, each in vars(counts).items():
        setattr(found, name, each.copy())
    return found
