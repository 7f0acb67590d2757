"""The page of figures: a reader sees what was measured, in pictures that anybody can read, and nothing else."""

import math
import re
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path

import pytest
from bench import contents, figures, pages
from bench.charts import CHARACTER, Panel, Point, Scale, Series, Strip, apart, dots, lines, nice
from bench.contents import Contents
from bench.figures import FLOOR, Figure, Machine, Report, Row
from bench.plots import Course, Over, Runs, UnknownFigureError
from bench.tables import origin, slope, tables
from hypothesis import given
from hypothesis import strategies as st

SVG = "{http://www.w3.org/2000/svg}"
MACHINE = Machine("A Processor", 2, 7900, "6.1", "3.11.7", {"grpcio": "1.85"})
positive = st.floats(0.001, 1e7)


def report(*rows: Row, benchmark: str = "push", load: float = 0.1, **arguments: str) -> Report:
    return Report(benchmark, "How.", arguments, datetime(2026, 11, 29, tzinfo=UTC), MACHINE, load, rows)


def row(server: str, *values: float, name: str = "processor", **case: str | int) -> Row:
    return Row(server, case, (Figure(name, "ms", values),))


def texts(svg: str) -> list[str]:
    return [each.text or "" for each in ET.fromstring(svg).iter(f"{SVG}text")]  # noqa: S314 - ours


PUSH = report(
    *(
        row(server, streams * cost, streams * cost + 1, streams=streams, node=node, variant="sotw")
        for node in ("first", "every")
        for streams in (1, 500, 2000)
        for server, cost in (("agent", 0.3), (FLOOR, 0.2), ("peer 4711", 0.25))
    )
)
OVER = Over(name="push", benchmark="push", title="A <push>", x="streams", figures=("processor",), panels=("node",))


@given(positive)
def test_an_axis_has_few_round_numbers_and_holds_every_value(highest: float) -> None:
    ticks = nice(highest)
    assert ticks[0] == 0
    assert ticks[-1] >= highest * (1 - 1e-9)
    assert 4 <= len(ticks) <= 7


@given(st.lists(positive, min_size=1, max_size=30, unique=True))
def test_labels_of_an_axis_do_not_touch_and_its_end_has_one(values: list[float]) -> None:
    ordered = sorted(values)
    scale = Scale(0, ordered[-1], 0, 300)
    kept = sorted(apart(ordered, scale))
    assert kept[-1] == ordered[-1]
    for one, other in pairwise(kept):
        room = CHARACTER * (len(figures.digits(one)) + len(figures.digits(other))) / 2
        assert scale(other) - scale(one) >= room


@given(st.lists(st.tuples(positive, st.lists(positive, min_size=1, max_size=4)), min_size=1, max_size=60))
def test_whatever_was_measured_gives_a_picture_with_all_of_it_inside(points: list[tuple[float, list[float]]]) -> None:
    series = Series("sds-agent", 0, tuple(Point(x, tuple(y), y[0]) for x, y in sorted(points, key=lambda one: one[0])))
    strips = [Strip("case", "floor", 1, tuple(y), y[0]) for _, y in points]
    for svg in (lines("t", "streams", [Panel("p", "ms", (series,))]), dots("t", "ms", strips)):
        root = ET.fromstring(svg)  # noqa: S314 - ours
        width, height = float(root.attrib["width"]), float(root.attrib["height"])
        for mark in root.iter(f"{SVG}circle"):
            assert 0 <= float(mark.attrib["cx"]) <= width
            assert 0 <= float(mark.attrib["cy"]) <= height
        assert not re.search(r"\b(nan|inf)\b", svg)


def test_who_does_not_see_a_picture_hears_what_it_shows() -> None:
    root = ET.fromstring(OVER.drawn(PUSH))  # noqa: S314 - ours
    assert root.attrib["role"] == "img"
    assert root.attrib["aria-labelledby"].split() == ["title", "desc"]
    said = {each.attrib["id"]: each.text for each in root if "id" in each.attrib}
    assert said["title"] == "A <push>"
    assert "processor, every, in ms, over streams. sds-agent: 0.8 at 1, 150 at 500, 600 at 2,000" in (
        said["desc"] or ""
    )


def test_a_picture_brings_colours_for_a_light_and_a_dark_page() -> None:
    """On a dark page, dark text without a background of its own could not be read."""
    svg = OVER.drawn(PUSH)
    assert "prefers-color-scheme:dark" in svg
    assert '<rect class="ground"' in svg


def test_servers_are_named_beside_their_lines_and_differ_in_more_than_colour() -> None:
    svg = OVER.drawn(PUSH)
    for name in ("sds-agent", "floor", "peer 4711"):
        assert texts(svg).count(name) == 2  # one in each panel
    dashes = re.findall(r"\.c[012]\{[^}]*?(stroke-dasharray:[^;}]*)?\}", svg)
    assert len(set(dashes[:3])) == 3


def test_every_run_is_a_dot() -> None:
    """A median alone hides that one start in five took twice as long."""
    cold = report(row("agent", 1, 2, 3, state="kept"), row(FLOOR, 1, 1, 2, state="kept"), benchmark="cold")
    svg = Runs(name="cold", benchmark="cold", title="t", figure="processor").drawn(cold)
    assert svg.count("<circle") == 3
    assert svg.count("<rect class=") == 3 + 1  # and the background


def test_a_course_names_days_and_not_every_hour() -> None:
    week = report(row("agent", *(float(hour % 7) for hour in range(168)), name="each hour"), benchmark="fleet")
    svg = Course(name="f", benchmark="fleet", title="t", figure="each hour", x_label="hours").drawn(week)
    assert {"0", "24", "144"} <= set(texts(svg))
    assert "25" not in texts(svg)
    assert "greatest 6" in svg


def test_a_peak_does_not_hide_the_course_beside_it() -> None:
    """An outage that draws a hundred times the usual requests makes all other hours one flat line."""
    week = report(row("agent", *(900.0 if hour == 70 else 5 + hour % 2 for hour in range(168)), name="each hour"))
    svg = Course(name="f", benchmark="fleet", title="t", figure="each hour", x_label="hours").drawn(week)
    assert {"sds-agent", "the same, cut at 3 times the median"} <= set(texts(svg))
    assert "mean 5.58, greatest 18" in svg


def test_a_chart_of_what_a_benchmark_does_not_give_says_so() -> None:
    chart = Over(name="x", benchmark="push", title="t", x="streams", figures=("no such",))
    with pytest.raises(UnknownFigureError, match=r"benchmarks/push.py gives no 'no such', which x.svg shows"):
        chart.drawn(PUSH)


def test_a_table_has_the_median_its_spread_and_the_ratio_of_the_same_case() -> None:
    (table,) = tables((row("agent", 3, 2, 4, streams=1000), row(FLOOR, 1, 1, 2, streams=1000)))
    assert table.splitlines() == [
        "| streams | server | processor, ms |",
        "| --- | --- | --: |",
        "| 1,000 | sds-agent | 3 (2 to 4); 2.00 × floor |",
        "| 1,000 | floor | 1 (1 to 2) |",
    ]


def test_rows_of_different_kinds_stand_in_tables_of_their_own() -> None:
    rows = (row("agent", 1, streams=1), row("agent", 1, name="late", streams=1), row("agent", 1, key="rsa-2048"))
    assert len(list(tables(rows))) == 3


def test_many_figures_stand_below_each_other() -> None:
    wide = Row("agent", {"agents": 9}, tuple(Figure(f"f{number}", "", (number,)) for number in range(9)))
    (table,) = tables((wide,))
    assert "| f8 | 8 |" in table
    assert "| agents | 9 |" in table


def test_where_it_came_from_names_the_command_and_a_machine_that_was_not_idle() -> None:
    said = origin(report(load=3.2, rounds="3", small="False", streams="1 500", peer="/run/x"))
    assert said.startswith("`scripts/bench push -- --rounds 3 --streams 1 500` on 29 November 2026.")
    assert "load average before it was 3.2" in said
    assert "load" not in origin(report())


@given(st.floats(-100, 100), st.floats(-100, 100), st.lists(st.integers(0, 10_000), min_size=2, unique=True))
def test_what_each_more_costs_is_the_slope(begin: float, each: float, places: Sequence[int]) -> None:
    found = slope([(x, begin + each * x) for x in places])
    assert math.isclose(found[1], each, rel_tol=1e-6, abs_tol=1e-6)
    assert math.isclose(found[0], begin, rel_tol=1e-6, abs_tol=1e-2)


def test_a_bigger_node_is_reasoned_from_the_slope() -> None:
    text = Contents({"push": PUSH}).blocks("performance")["growth"]()
    assert "| push, processor | sds-agent | 2,000 streams | 0.3 ms | 1,500 ms at 5,000; 3,000 ms at 10,000 |" in text


def test_what_was_not_measured_makes_no_table_and_no_picture() -> None:
    nothing = Contents({})
    assert all(nothing.drawn(chart) is None for chart in contents.CHARTS)
    for name, block in nothing.blocks("performance").items():
        assert "|" not in block(), name


def test_every_benchmark_that_the_command_runs_has_its_place_on_the_page() -> None:
    root = Path(__file__).parents[2]
    found = re.search(r"^all=\((.*)\)$", (root / "scripts" / "bench").read_text(), re.MULTILINE)
    assert found is not None
    assert found[1].split() == list(contents.BENCHMARKS)
    blocks = re.findall(r"<!-- figures: (\w+) -->", pages.PAGE.read_text())
    assert sorted(blocks) == sorted(Contents({}).blocks(""))
    assert {each.benchmark for each in (*contents.CHARTS, *contents.SUMMARY, *contents.GROWTHS)} <= set(blocks)


class Reader:
    """Someone with figures of their own in a directory."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder = folder
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def plots(self, *arguments: str) -> tuple[int, str]:
        """The exit code and the error of `scripts/plots DIRECTORY`."""
        self._monkeypatch.setattr("sys.argv", ["plots", str(self.folder), *arguments])
        return pages.main(), self._capsys.readouterr().err


@pytest.fixture
def reader(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Reader:
    return Reader(tmp_path, monkeypatch, capsys)


def both_variants() -> Report:
    return report(*PUSH.rows, *(row(each.server, 9, name="first to last", **each.case) for each in PUSH.rows))


def test_figures_of_ones_own_become_pictures_and_a_page_beside_them(reader: Reader) -> None:
    figures.write(both_variants(), reader.folder / "push.json")
    assert reader.plots() == (0, "")
    page = (reader.folder / "figures.md").read_text()
    for picture in re.findall(r"\]\(\./(.*?)\)", page):
        assert (reader.folder / picture).is_file()
    assert reader.plots("--check") == (0, "")


def test_a_picture_that_is_not_what_the_figures_give_is_found(reader: Reader) -> None:
    figures.write(both_variants(), reader.folder / "push.json")
    reader.plots()
    (reader.folder / "push-spread.svg").write_text("<svg/>")
    code, said = reader.plots("--check")
    assert code == 1
    assert said == f"{reader.folder}/push-spread.svg is not what the figures give: run scripts/plots.\n"
    assert (reader.folder / "push-spread.svg").read_text() == "<svg/>"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"{", "is not what scripts/bench writes: Input data was truncated. Run it again, or remove the file."),
        (b'{"benchmark": "push"}', "is not what scripts/bench writes: Object missing required field `method`."),
        (b"\xff", "is not what scripts/bench writes: "),
        (None, "holds the figures of push: give it that name."),
    ],
)
def test_a_file_that_holds_no_figures_is_named_with_what_to_do(
    reader: Reader, content: bytes | None, words: str
) -> None:
    path = reader.folder / "cold.json"
    if content is None:
        figures.write(PUSH, path)
    else:
        path.write_bytes(content)
    code, said = reader.plots()
    assert code == 1
    assert said.startswith(f"{path} {words}")
    assert "Traceback" not in said


def test_a_directory_that_is_not_there_is_named_with_the_command_that_makes_it(reader: Reader) -> None:
    reader.folder /= "mine"
    assert reader.plots() == (
        1,
        f"There is no directory {reader.folder}: scripts/bench --json {reader.folder} makes it.\n",
    )


def test_pictures_of_a_directory_of_ones_own_that_are_not_ours_stay(reader: Reader) -> None:
    (reader.folder / "holiday.svg").write_text("<svg/>")
    assert reader.plots() == (0, "")
    assert (reader.folder / "holiday.svg").exists()


def test_a_page_with_a_block_that_does_not_end_is_refused() -> None:
    """All that follows would be replaced by figures."""
    with pytest.raises(pages.PageError, match="without '<!-- end of figures -->' below it"):
        pages.filled("<!-- figures: push -->\nno end\n", Contents({}), "performance")
    with pytest.raises(pages.PageError, match="a block 'pushes', which is none of: summary"):
        pages.filled("<!-- figures: pushes -->\n<!-- end of figures -->\n", Contents({}), "performance")
