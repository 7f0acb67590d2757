"""The streams that have ended: what is remembered of them, and that no peer can make it grow."""

from datetime import timedelta

from fakes.hierarchy import NOW
from fakes.observed import STREAM
from msgspec.structs import replace

from sds_agent.sds.departed import LONGEST, MOST_NAMES, Departures, gone
from sds_agent.sds.status import NameStatus, StreamStatus


def stream(node: str, *names: str) -> StreamStatus:
    return replace(STREAM, node=node, names=tuple(map(NameStatus, names)))


def test_an_envoy_that_comes_and_goes_takes_one_place() -> None:
    """Else one that asks for a name that is not served, again and again, would push out all others."""
    found = Departures(most=2)
    found.note(stream("other", "web"), NOW, "")
    for second in range(5):
        found.note(stream("edge"), NOW + timedelta(seconds=second), "no secret named 'wbe'", refused=("wbe",))
    assert [(each.node, each.names, each.left_at) for each in found.streams] == [
        ("other", ("web",), NOW),
        ("edge", ("wbe",), NOW + timedelta(seconds=4)),
    ]


def test_no_more_is_remembered_than_the_bound_and_what_ended_last_stays() -> None:
    found = Departures(most=3)
    for number in range(10):
        found.note(stream(f"edge-{number}", "web"), NOW, "")
    assert [each.node for each in found.streams] == ["edge-7", "edge-8", "edge-9"]


def test_a_probe_that_asks_for_nothing_is_no_envoy_that_left() -> None:
    found = Departures()
    found.note(stream("", *()), NOW, "")
    assert found.streams == ()


def test_long_names_take_bounded_memory() -> None:
    found = Departures()
    found.note(stream("n" * 600, *("x" * 500 + str(number) for number in range(100))), NOW, "c" * 600)
    (one,) = found.streams
    assert len(one.names) <= MOST_NAMES
    assert sum(map(len, (one.node, one.cause, *one.names))) < (MOST_NAMES + 4) * LONGEST


def test_an_envoy_that_has_come_back_has_not_left() -> None:
    found = Departures()
    found.note(stream("edge", "web"), NOW, "")
    found.note(stream("edge", "ROOTCA"), NOW, "")
    assert [each.names for each in gone(found.streams, (stream("edge", "web"),))] == [("ROOTCA",)]
    assert gone(found.streams, (stream("edge", "web", "ROOTCA"),)) == ()


def test_a_program_without_a_node_id_is_known_by_its_process() -> None:
    found = Departures()
    found.note(replace(stream("", "web"), peer="pid 1 (uid 0)"), NOW, "")
    found.note(replace(stream("", "web"), peer="pid 2 (uid 0)"), NOW, "")
    assert [each.peer for each in found.streams] == ["pid 1 (uid 0)", "pid 2 (uid 0)"]
