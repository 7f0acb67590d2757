"""Counts for views: a wrong bucket is a wrong latency on somebody's dashboard."""

from bisect import bisect_left
from functools import reduce
from operator import add

from hypothesis import given
from hypothesis import strategies as st

from sds_agent.tally import Counter, Distribution, Histogram

BOUNDS = (0.1, 1.0, 10.0)


def test_each_combination_of_labels_has_a_count_of_its_own() -> None:
    counter = Counter("authority", "result")
    counter.add("vault", "issued")
    counter.add("vault", "denied", by=2)
    counter.add("vault", "denied")
    assert dict(counter.counts) == {("vault", "issued"): 1, ("vault", "denied"): 3}


def test_a_value_on_a_bound_counts_below_it_as_prometheus_has_it() -> None:
    histogram = Histogram(BOUNDS, "authority")
    for value in (0.1, 0.11, 10.0, 10.1):
        histogram.observe(value, "vault")
    assert dict(histogram.distributions) == {("vault",): Distribution(BOUNDS, (1, 1, 1, 1), 0.1 + 0.11 + 10.0 + 10.1)}


def test_what_was_read_does_not_change_with_later_values() -> None:
    histogram = Histogram(BOUNDS)
    histogram.observe(1.0)
    before = histogram.distributions[()]
    histogram.observe(2.0)
    assert (before.count, histogram.distributions[()].count) == (1, 2)


@given(st.lists(st.floats(0, 100)))
def test_every_value_is_in_one_bucket_and_in_the_sum(values: list[float]) -> None:
    histogram = Histogram(BOUNDS)
    for value in values:
        histogram.observe(value)
    found = histogram.distributions.get((), Distribution(BOUNDS, (0, 0, 0, 0), 0.0))
    places = [bisect_left(BOUNDS, value) for value in values]
    assert found.counts == tuple(places.count(place) for place in range(len(BOUNDS) + 1))
    added = reduce(add, values, 0.0)  # one after another: from Python 3.12 on `sum` makes up for what rounding loses
    assert (found.count, found.total) == (len(values), added)
