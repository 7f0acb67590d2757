"""What the page of figures consists of: its pictures, and its blocks, each made from the reports that there are."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

from msgspec import Struct

from bench.figures import FLOOR, Figure, Report, Row, digits, ratios
from bench.plots import Chart, Course, Over, Runs
from bench.tables import OURS, machines, markdown, named, origin, shown, slope, tables

BENCHMARKS = {
    "cold": "From exec to the first secret",
    "fan_in": "Many streams",
    "push": "A push",
    "identities": "Many identities",
    "codec": "Reading and writing messages",
    "ca_serve": "The CA server",
    "traffic": "Traffic through renewals",
    "fleet": "A fleet and its CA",
    "soak": "A long run",
}
"""Every benchmark that scripts/bench runs, in its order, with the heading of its figures."""

NOTHING = "There are no figures here; `scripts/bench{}` measures them."

CHARTS: tuple[Over | Runs | Course, ...] = (
    Runs(
        name="cold",
        benchmark="cold",
        title="From exec to the first secret, every start",
        figure="exec to first secret",
    ),
    Over(
        name="fan_in",
        benchmark="fan_in",
        title="All Envoys of a node at once",
        x="streams",
        figures=("resident, wave 2", "processor"),
    ),
    Over(
        name="push-processor",
        benchmark="push",
        title="Processor time of a push and its ACKs",
        x="streams",
        figures=("processor",),
        panels=("node", "variant"),
        where={"node": ("first", "every")},
    ),
    Over(
        name="push-spread",
        benchmark="push",
        title="From the first stream that has a push to the last one",
        x="streams",
        figures=("first to last",),
        panels=("node", "variant"),
        where={"node": ("first", "every")},
    ),
    Over(
        name="identities",
        benchmark="identities",
        title="Identities in one agent",
        x="identities",
        figures=("resident memory", "all issued"),
    ),
    Runs(
        name="ca_serve",
        benchmark="ca_serve",
        title="Processor time of the CA server for a certificate, callers with tokens",
        figure="processor time a certificate",
        where={"proof": ("token",), "connection": ("kept",)},
    ),
    Course(
        name="fleet",
        benchmark="fleet",
        title="What a fleet asks of its CA in a week, with an outage and a restart of half of the agents",
        figure="each hour",
        x_label="hours",
    ),
)


class Line(Struct, frozen=True, kw_only=True):
    """A figure in one case that says most of its benchmark. `servers` are the rows that stand for the agent."""

    words: str
    benchmark: str
    figure: str
    case: Mapping[str, str | int] = {}
    servers: tuple[str, ...] = OURS


_NODE_ONCE: Mapping[str, str | int] = {"variant": "sotw", "node": "first"}
_NODES: Mapping[str, str | int] = {"variant": "sotw", "node": "every"}
_CA: Mapping[str, str | int] = {"signer": "ec-p256", "key": "ec-p256", "proof": "token", "callers": 8}

SUMMARY: tuple[Line, ...] = (
    Line(words="exec to first secret, kept", benchmark="cold", figure="exec to first secret", case={"state": "kept"}),
    Line(
        words="exec to first secret, nothing kept",
        benchmark="cold",
        figure="exec to first secret",
        case={"state": "nothing kept"},
    ),
    Line(words="memory, idle", benchmark="fan_in", figure="idle", case={"streams": 500}),
    Line(words="memory, 500 streams", benchmark="fan_in", figure="resident, wave 2", case={"streams": 500}),
    Line(words="500 streams served in", benchmark="fan_in", figure="all served", case={"streams": 500}),
    Line(words="2,000 streams served in", benchmark="fan_in", figure="all served", case={"streams": 2000}),
    Line(words="push to 500, processor", benchmark="push", figure="processor", case={**_NODE_ONCE, "streams": 500}),
    Line(
        words="push to 500, first to last",
        benchmark="push",
        figure="first to last",
        case={**_NODE_ONCE, "streams": 500},
    ),
    Line(
        words="push to 500, change to last",
        benchmark="push",
        figure="change to last",
        case={**_NODE_ONCE, "streams": 500},
    ),
    Line(
        words="push to 500 with whole Nodes, processor",
        benchmark="push",
        figure="processor",
        case={**_NODES, "streams": 500},
    ),
    Line(
        words="push to 2,000, first to last",
        benchmark="push",
        figure="first to last",
        case={**_NODE_ONCE, "streams": 2000},
    ),
    Line(words="10,000 identities issued in", benchmark="identities", figure="all issued", case={"identities": 10_000}),
    Line(words="memory an identity", benchmark="identities", figure="memory", case={"identities": 10_000}),
    Line(
        words="the event loop late while 1,000 renew, 99.9th percentile",
        benchmark="identities",
        figure="late, 99.9th percentile",
        case={"renewing": 1000, "streams": 500},
    ),
    Line(
        words="an Envoy's first request read",
        benchmark="codec",
        figure="processor",
        case={"step": "read the first request", "variant": "sotw"},
    ),
    Line(
        words="a certificate of the CA server, processor",
        benchmark="ca_serve",
        figure="processor time a certificate",
        case={**_CA, "connection": "kept"},
    ),
    Line(
        words="a certificate of the CA server on a new connection, processor",
        benchmark="ca_serve",
        figure="processor time a certificate",
        case={**_CA, "connection": "new"},
    ),
    Line(words="memory over a long run, growth", benchmark="soak", figure="resident, last quarter over first"),
    Line(
        words="slowest of a thousand requests through renewals (floor: without)",
        benchmark="traffic",
        figure="99.9th percentile",
        servers=("with renewals",),
    ),
    Line(
        words="busiest hour of a fleet's CA over the mean (floor: chance alone)",
        benchmark="fleet",
        figure="steady, peak to mean, by the hour",
        servers=("half restarts with stored certificates",),
    ),
)


class Growth(Struct, frozen=True, kw_only=True):
    """A figure that grows with a number of the case, `x`, and numbers of a bigger node at which to say how far."""

    words: str
    benchmark: str
    figure: str
    x: str
    case: Mapping[str, str | int] = {}
    at: tuple[int, ...] = (5_000, 10_000)


GROWTHS: tuple[Growth, ...] = (
    Growth(words="memory", benchmark="fan_in", figure="resident, wave 2", x="streams"),
    Growth(words="processor, all connect", benchmark="fan_in", figure="processor", x="streams"),
    Growth(words="push, processor", benchmark="push", figure="processor", x="streams", case=_NODE_ONCE),
    Growth(words="push, first to last", benchmark="push", figure="first to last", x="streams", case=_NODE_ONCE),
    Growth(words="push with whole Nodes, processor", benchmark="push", figure="processor", x="streams", case=_NODES),
    Growth(words="memory", benchmark="identities", figure="resident memory", x="identities", at=(20_000, 50_000)),
    Growth(words="all issued in", benchmark="identities", figure="all issued", x="identities", at=(20_000, 50_000)),
)


class Contents:
    """The page's contents from these reports, by the names of their benchmarks. What was not measured is left out."""

    def __init__(self, reports: Mapping[str, Report]) -> None:
        self._reports = reports

    def drawn(self, chart: Chart) -> str | None:
        """The picture, or None without its benchmark's report. Raises plots.UnknownFigureError."""
        report = self._reports.get(chart.benchmark)
        return None if report is None else chart.drawn(report)

    def blocks(self, folder: str) -> dict[str, Callable[[], str]]:
        """What makes each block, by its name. The pictures are in `folder`, as seen from the page."""
        made: dict[str, Callable[[], str]] = {
            "summary": self._summary,
            "growth": self._growth,
            "machines": self._machines,
        }
        return made | {name: partial(self._benchmark, name, folder) for name in BENCHMARKS}

    def alone(self) -> str:
        """A page of nothing but the blocks, beside its pictures."""
        parts = ["# Figures", self._summary()]
        headings = BENCHMARKS | {name: name for name in self._reports if name not in BENCHMARKS}
        parts += [f"## {heading}\n\n{self._benchmark(name, '.')}" for name, heading in headings.items()]
        parts += [f"## What grows\n\n{self._growth()}", f"## Machine\n\n{self._machines()}"]
        return "\n\n".join(parts) + "\n"

    def _benchmark(self, name: str, folder: str) -> str:
        report = self._reports.get(name)
        if report is None:
            return NOTHING.format(f" {name}")
        pictures = [f"![{each.title}]({folder}/{each.name}.svg)" for each in CHARTS if each.benchmark == name]
        how = f"<details><summary>How it is measured</summary>\n\n```text\n{report.method}\n```\n\n</details>"
        return "\n\n".join([*pictures, origin(report), *tables(report.rows), how])

    def _machines(self) -> str:
        return machines(self._reports.values()) if self._reports else NOTHING.format("")

    def _summary(self) -> str:
        """A line for each of `SUMMARY` that was measured: the agent, the floor, how many times that, and others."""
        body = list(self._summary_rows())
        if not body:
            return NOTHING.format("")
        return markdown(["measure", "sds-agent", "floor", "× floor", "others"], body, numbers=4)

    def _summary_rows(self) -> Iterator[Sequence[str]]:
        for line in SUMMARY:
            report = self._reports.get(line.benchmark)
            rows = [] if report is None else [each for each in report.rows if _fits(each, line.figure, line.case)]
            for case in _cases(rows):
                here = [each for each in rows if each.case == case]
                ours = next((each for each in here if each.server in line.servers), None)
                if ours is None:
                    continue
                floor = next((each for each in here if each.server == FLOOR), None)
                others = [each for each in here if each is not ours and each is not floor]
                over = ratios(ours, rows).get(line.figure)
                yield (
                    ", ".join(filter(None, (line.words, _figure(ours, line.figure).unit))),
                    shown(_figure(ours, line.figure)),
                    "" if floor is None else shown(_figure(floor, line.figure)),
                    "" if over is None else f"{over:.2f}",
                    "; ".join(f"{named(each.server)} {digits(_figure(each, line.figure).median)}" for each in others),
                )

    def _growth(self) -> str:
        body = list(self._growth_rows())
        if not body:
            return NOTHING.format(" fan_in push identities")
        return markdown(["measure", "server", "measured up to", "each more", "expected at"], body, numbers=3)

    def _growth_rows(self) -> Iterator[Sequence[str]]:
        for line in GROWTHS:
            report = self._reports.get(line.benchmark)
            rows = [] if report is None else [each for each in report.rows if _fits(each, line.figure, line.case)]
            for server in dict.fromkeys(each.server for each in rows):
                own = [(row.case[line.x], _figure(row, line.figure)) for row in rows if row.server == server]
                points = [(float(x), figure.median) for x, figure in own]
                if len({x for x, _ in points}) < 2:
                    continue
                begin, each = slope(points)
                unit = own[0][1].unit
                expected = "; ".join(f"{digits(begin + each * at)} {unit} at {digits(at)}" for at in line.at)
                most = max(x for x, _ in points)
                yield line.words, named(server), f"{digits(most)} {line.x}", f"{digits(each)} {unit}", expected


def _fits(row: Row, figure: str, case: Mapping[str, str | int]) -> bool:
    return any(each.name == figure for each in row.figures) and case.items() <= row.case.items()


def _cases(rows: Sequence[Row]) -> list[dict[str, str | int]]:
    """The different cases, in their order."""
    found: list[dict[str, str | int]] = []
    for row in rows:
        if row.case not in found:
            found.append(row.case)
    return found


def _figure(row: Row, name: str) -> Figure:
    return next(each for each in row.figures if each.name == name)
