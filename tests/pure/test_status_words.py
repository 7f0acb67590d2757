"""The first line of `sds-agent status`: a person at night, and a script, go by it."""

import pytest
from fakes.hierarchy import NOW
from fakes.observed import ABOUT, FAILURE, STREAM, Seen, workload
from msgspec.structs import replace

from sds_agent.admin.view import status
from sds_agent.cli.status import headline, tables
from sds_agent.sds.status import Nack, NameStatus

GOOD = replace(STREAM, names=(NameStatus("web", "v1", "v1"),))
REFUSING = replace(STREAM, names=(NameStatus("web", "v1", None, Nack("v1", "no such curve")),))
LOST = replace(STREAM, names=(NameStatus("wbe"),))


@pytest.mark.parametrize(
    ("seen", "line"),
    [
        (Seen(streams=(GOOD,)), "ready: all is well"),
        (Seen(streams=(REFUSING,)), "ready, and not all is well: Envoys that refuse a secret: edge-1"),
        (Seen(streams=(LOST,)), "ready, and not all is well: Envoys that ask for a name that is not served: edge-1"),
        (
            Seen(workloads=(workload(failure=FAILURE),), streams=()),
            "ready, and not all is well: the renewal of web fails",
        ),
        (
            Seen(workloads=(workload(None, served=False),), streams=(GOOD,), lacking=("web has no certificate",)),
            "not ready: web has no certificate",
        ),
        (
            Seen(streams=(GOOD,), about=replace(ABOUT, reload_refused=("sds has changed",))),
            "ready, and not all is well: the configuration as it is now is not in force: sds has changed",
        ),
        (
            Seen(streams=(GOOD,), lacking=tuple(f"w{number}: not issued yet" for number in range(3000))),
            "not ready: " + "".join(f"w{number}: not issued yet; " for number in range(5)) + "and 2995 more",
        ),
    ],
)
def test_the_first_line_says_whether_all_is_well_and_why_not(seen: Seen, line: str) -> None:
    assert headline(status(seen, NOW)) == line
    assert next(tables(status(seen, NOW))) == line


def test_a_refusal_by_many_envoys_is_quoted_once() -> None:
    many = tuple(replace(REFUSING, number=number, node=f"edge-{number}") for number in range(1000))
    text = "\n".join(tables(status(Seen(streams=many), NOW)))
    assert text.count("no such curve") == 1
    assert "web is refused by edge-0, edge-1, edge-2, edge-3, edge-4 and 995 more: no such curve" in text
    assert "and 950 more; -o json has all" in text


def test_an_envoy_in_trouble_is_in_the_table_however_many_there_are() -> None:
    seen = Seen(streams=(*(replace(GOOD, number=number) for number in range(1000)), replace(LOST, node="edge-2")))
    (row,) = [line.split() for line in "\n".join(tables(status(seen, NOW))).splitlines() if line.startswith("edge-2")]
    assert row[2:4] == ["wbe", "unknown"]


def test_an_agent_that_has_just_started_has_a_time() -> None:
    seen = Seen(streams=(), about=replace(ABOUT, uptime_seconds=0))
    assert "up 0s;" in "\n".join(tables(status(seen, NOW)))
