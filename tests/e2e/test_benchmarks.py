"""Every benchmark runs, on a small scale, and gives what the page of figures shows: one that is only run by hand is
broken when somebody needs it. No time that it measures is looked at.
"""

import math
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from bench import figures
from bench.contents import BENCHMARKS, CHARTS, GROWTHS, SUMMARY, Contents, Growth, Line
from bench.figures import Report

FOLDER = Path(__file__).parents[2] / "benchmarks"
WITHIN = 120.0
PROTOTYPES = {
    "push": ("--core", "floor core"),
    "ca_serve": ("--without-grpc", "sds-agent, prototype without gRPC"),
}
"""What has a benchmark measure a prototype too, and what its rows are called: nothing else runs them."""


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_runs_and_the_page_of_figures_finds_what_it_shows(name: str, tmp_path: Path) -> None:
    found = small(name, tmp_path / f"{name}.json")
    assert found.benchmark == name
    assert found.method
    assert found.rows
    if name in PROTOTYPES:
        assert PROTOTYPES[name][1] in {row.server for row in found.rows}
    for row in found.rows:
        names = [each.name for each in row.figures]
        assert names
        assert len(set(names)) == len(names), f"{row.server} {row.case} has two figures of one name"
        for each in row.figures:
            assert each.values, each
            assert all(math.isfinite(value) for value in each.values), each
    for unit in units(found).values():
        assert len(unit) == 1, "a figure has one unit in all rows"
    page = Contents({name: found})
    for chart in CHARTS:
        if (picture := page.drawn(chart)) is not None:
            ET.fromstring(picture)  # noqa: S314 - ours
    for line in SUMMARY:
        assert line.benchmark != name or any(row.server in line.servers for row in found.rows), line.servers
    lines: list[Line | Growth] = [*SUMMARY, *GROWTHS]
    shown = [(each.figure, each.case) for each in lines if each.benchmark == name]
    for figure, case in shown:
        assert figure in units(found), f"the page shows {figure!r}"
        assert any(case.keys() <= row.case.keys() for row in found.rows), f"the page looks for {case}"


STARTED_BY_HAND = ["admin", "authorities", "floods", "kills", "outage", "restart", "stops"]
"""Those that CONTRIBUTING.md lists beside the others."""


@pytest.mark.parametrize("name", [*BENCHMARKS, *STARTED_BY_HAND])
def test_a_benchmark_that_is_asked_for_help_explains_itself_and_refuses_what_it_does_not_know(name: str) -> None:
    command = [sys.executable, str(FOLDER / f"{name}.py")]
    helped = subprocess.run([*command, "--help"], capture_output=True, text=True, timeout=WITHIN, check=False)
    assert (helped.returncode, helped.stderr) == (0, "")
    assert (FOLDER / f"{name}.py").read_text().split("\n")[0].removeprefix('"""') in helped.stdout
    refused = subprocess.run([*command, "many"], capture_output=True, text=True, timeout=WITHIN, check=False)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "'many'" in refused.stderr or "arguments: many" in refused.stderr


@pytest.mark.parametrize("arguments", [("kills", "1", "200"), ("restart", "2", "1"), ("stops", "2", "0")])
def test_a_benchmark_that_is_started_by_hand_comes_to_its_end(arguments: tuple[str, ...]) -> None:
    """One of them counts lines of the log, and would wait for ever for a line that changed its level."""
    name, *numbers = arguments
    command = [sys.executable, str(FOLDER / f"{name}.py"), *numbers]
    done = subprocess.run(command, capture_output=True, text=True, timeout=WITHIN, check=False)
    assert (done.returncode, done.stdout != "") == (0, True), done.stderr


def small(name: str, path: Path) -> Report:
    """The figures of a small run."""
    command = [sys.executable, str(FOLDER / f"{name}.py"), "--small", "--json", str(path)]
    if name in PROTOTYPES:
        command.append(PROTOTYPES[name][0])
    done = subprocess.run(command, capture_output=True, text=True, timeout=WITHIN, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    return figures.read(path)


def units(found: Report) -> dict[str, set[str]]:
    """The units of each figure, by its name."""
    made: dict[str, set[str]] = {}
    for row in found.rows:
        for each in row.figures:
            made.setdefault(each.name, set()).add(each.unit)
    return made
