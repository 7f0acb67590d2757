"""Which charts a page of figures has, and how each is drawn from the report of a benchmark."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby

from msgspec import Struct

from bench import charts
from bench.charts import Panel, Point, Series, Strip
from bench.figures import FLOOR, Figure, Report, Row, digits
from bench.tables import OURS, named

Case = Mapping[str, str | int]

CUT = 3
"""Times the median, up to which a course is drawn once more."""


class UnknownFigureError(Exception):
    """No row of the report has what a chart shows: the benchmark has changed, or its chart names it wrongly."""


class Chart(Struct, frozen=True, kw_only=True):
    """One picture, `name`.svg. It takes the rows that have every key of `where` with one of those values."""

    name: str
    benchmark: str
    title: str
    where: Mapping[str, tuple[str | int, ...]] = {}

    def drawn(self, found: Report) -> str:
        """The picture. Raises UnknownFigureError."""
        raise NotImplementedError

    def chosen(self, found: Report, figure: str) -> list[tuple[Row, Figure]]:
        """The rows with that figure, the agent's first. Raises UnknownFigureError."""
        rows = [
            (row, each)
            for row in found.rows
            for each in row.figures
            if each.name == figure and all(row.case.get(key) in values for key, values in self.where.items())
        ]
        if not rows:
            raise UnknownFigureError(
                f"benchmarks/{found.benchmark}.py gives no {figure!r}, which {self.name}.svg shows"
            )
        return sorted(rows, key=lambda one: (one[0].server not in OURS, one[0].server == FLOOR))


class Over(Chart, frozen=True, kw_only=True):
    """Lines over a number of the case, `x`: a panel for each figure and each value of the keys in `panels`."""

    x: str
    figures: tuple[str, ...]
    panels: tuple[str, ...] = ()

    def drawn(self, found: Report) -> str:
        made = []
        for figure in self.figures:
            rows = [one for one in self.chosen(found, figure) if self.x in one[0].case]
            for words, some in _grouped(rows, self.panels):
                heading = f"{figure}, {words}" if words else figure
                made.append(Panel(heading, some[0][1].unit, tuple(self._series(some))))
        return charts.lines(self.title, self.x, made)

    def _series(self, rows: Sequence[tuple[Row, Figure]]) -> Iterator[Series]:
        others = differing(rows, (self.x, *self.panels))
        for server in dict.fromkeys(row.server for row, _ in rows):
            own = [one for one in rows if one[0].server == server]
            for words, some in _grouped(own, others):
                points = [Point(_number(row.case[self.x]), each.values, each.median) for row, each in some]
                name = f"{named(server)}, {words}" if words else named(server)
                yield Series(name, looks(rows)[server], tuple(sorted(points, key=lambda point: point.x)))


class Runs(Chart, frozen=True, kw_only=True):
    """A dot for each run of a figure, and a heading for each case."""

    figure: str

    def drawn(self, found: Report) -> str:
        rows = self.chosen(found, self.figure)
        keys = differing(rows)
        strips = [
            Strip(words, named(row.server), looks(rows)[row.server], each.values, each.median)
            for words, some in _grouped(rows, keys)
            for row, each in some
        ]
        return charts.dots(f"{self.title}", rows[0][1].unit, strips)


class Course(Chart, frozen=True, kw_only=True):
    """A figure whose values follow each other in time: two panels for each server and case, the whole, and what a peak
    would hide, cut at `CUT` times the median.
    """

    figure: str
    x_label: str
    every: int = 24

    def drawn(self, found: Report) -> str:
        rows = self.chosen(found, self.figure)
        keys = differing(rows)
        panels = []
        for words, some in _grouped(rows, keys):
            for row, each in some:
                title = ", ".join(filter(None, (named(row.server), words)))
                panels.append(self._panel(title, each))
                low = Figure(each.name, each.unit, tuple(min(value, CUT * each.median) for value in each.values))
                panels.append(self._panel(f"the same, cut at {CUT} times the median", low))
        return charts.lines(self.title, self.x_label, panels, every=self.every)

    @staticmethod
    def _panel(title: str, figure: Figure) -> Panel:
        points = tuple(Point(place, (value,), value) for place, value in enumerate(figure.values))
        return Panel(title, figure.unit, (Series("", 0, points),))


def looks(rows: Sequence[tuple[Row, Figure]]) -> dict[str, int]:
    """The look of each server's marks: the agent's, the floor's, and those of others."""
    others = [each for each in dict.fromkeys(row.server for row, _ in rows) if each not in {*OURS, FLOOR}]
    return (
        dict.fromkeys(OURS, 0)
        | {FLOOR: 1}
        | {each: 2 + place % (charts.LOOKS - 2) for place, each in enumerate(others)}
    )


def differing(rows: Sequence[tuple[Row, Figure]], apart: Sequence[str] = ()) -> tuple[str, ...]:
    """The keys of the rows' cases in which they differ, without those in `apart`."""
    keys = dict.fromkeys(key for row, _ in rows for key in row.case if key not in apart)
    return tuple(key for key in keys if len({row.case.get(key) for row, _ in rows}) > 1)


def _grouped(rows: Sequence[tuple[Row, Figure]], keys: Sequence[str]) -> Iterator[tuple[str, list[tuple[Row, Figure]]]]:
    """The rows by their values of these keys, in the order in which those come, with the values in words."""
    order = {values: place for place, values in enumerate(dict.fromkeys(_values(row.case, keys) for row, _ in rows))}
    ordered = sorted(rows, key=lambda one: order[_values(one[0].case, keys)])
    for values, some in groupby(ordered, key=lambda one: _values(one[0].case, keys)):
        given = [(key, value) for key, value in zip(keys, values, strict=True) if value != ""]
        yield ", ".join(_words(key, value, alone=len(given) == 1) for key, value in given), list(some)


def _values(case: Case, keys: Sequence[str]) -> tuple[str | int, ...]:
    return tuple(case.get(key, "") for key in keys)


def _words(key: str, value: str | int, *, alone: bool) -> str:
    """A value that is a number, or has others beside it, needs the name of its key."""
    if isinstance(value, int):
        return f"{key} {digits(value)}"
    return value if alone else f"{key} {value}"


def _number(value: str | int) -> float:
    return float(value)
