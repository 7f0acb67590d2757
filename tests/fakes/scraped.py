"""Metrics as a scraper reads them, and what Prometheus' own promtool says of them."""

import subprocess
from collections.abc import Iterable, Iterator

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

Labels = tuple[tuple[str, str], ...]
Series = dict[tuple[str, Labels], float]


def series(text: str) -> Series:
    """Every series in the text format, with its value."""
    return dict(samples(text_string_to_metric_families(text)))


def samples(families: Iterable[Metric]) -> Iterator[tuple[tuple[str, Labels], float]]:
    for family in families:
        for sample in family.samples:
            yield (sample.name, tuple(sorted(sample.labels.items()))), sample.value


def value(found: Series, metric: str, /, **labels: str) -> float | None:
    """One series' value; None if it is not there."""
    return found.get((metric, tuple(sorted(labels.items()))))


def promtool(*arguments: str, given: str | None = None) -> str:
    """What promtool says; nothing where it has nothing to say. Fails where it ends with another code than 0."""
    done = subprocess.run(["promtool", *arguments], input=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def assert_promtool_accepts(text: str) -> None:
    assert promtool("check", "metrics", given=text) == ""
