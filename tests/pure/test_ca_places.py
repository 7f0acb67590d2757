"""Which connections stay at the CA when there are more than it has places for."""

import weakref

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sds_agent.ca.places import Places, origin_of

MOST = 160
"""Forty for one origin, a hundred and forty for proven callers."""


def arrived(places: Places[str], count: int, origin: str) -> list[str | None]:
    """Let so many arrive; what had to go for each."""
    return [places.arrive(f"{origin}-{number}", origin) for number in range(count)]


def test_one_origin_takes_its_share_and_no_more() -> None:
    places = Places[str](MOST)
    assert arrived(places, 50, "hostile") == [None] * 40 + [f"hostile-{number}" for number in range(10)]
    for other in ("a", "b", "c"):
        assert arrived(places, 40, other) == [None] * 40
    assert len(places) == MOST


def test_the_oldest_that_proved_nothing_gives_way_when_all_places_are_taken() -> None:
    places = Places[str](MOST)
    for origin in ("a", "b", "c", "d"):
        arrived(places, 40, origin)
    assert arrived(places, 3, "good") == ["a-0", "a-1", "a-2"]
    assert len(places) == MOST


def test_an_unproven_caller_takes_no_slot_of_a_proven_one() -> None:
    places = Places[str](MOST)
    for number in range(140):
        places.arrive(f"machine-{number}", f"10.0.0.{number}")
        assert places.prove(f"machine-{number}", f"caller-{number}") is None
    gone = [places.arrive(f"hostile-{number}", f"192.0.2.{number}") for number in range(500)]
    assert gone == [None] * 20 + [f"hostile-{number}" for number in range(480)]
    assert len(places) == MOST


def test_one_caller_with_many_connections_loses_its_own_alone() -> None:
    places = Places[str](MOST)
    places.arrive("machine", "10.0.0.1")
    places.prove("machine", "good")
    gone = []
    for number in range(145):
        places.arrive(f"hostile-{number}", f"192.0.2.{number}")
        gone.append(places.prove(f"hostile-{number}", "hostile"))
    assert gone == [None] * 139 + [f"hostile-{number}" for number in range(6)]


def test_a_full_house_without_a_reserve_turns_the_newcomer_away() -> None:
    places = Places[str](1)
    places.arrive("first", "a")
    places.prove("first", "caller")
    assert places.arrive("second", "b") == "second"
    places.leave("first")
    assert places.arrive("second", "b") is None


class Named(str):
    """A name of an origin or caller, whose weak references show whether the table still refers to it."""

    __slots__ = ("__weakref__",)


def test_an_origin_and_a_caller_that_have_left_take_no_memory() -> None:
    """An attacker comes from as many networks as it likes (IPv6), and the CA runs for years."""
    places, origin, caller = Places[str](MOST), Named("a"), Named("caller")
    seen = [weakref.ref(origin), weakref.ref(caller)]
    places.arrive("first", origin)
    places.arrive("second", origin)
    places.prove("first", caller)
    places.leave("first")
    places.leave("second")
    del origin, caller
    assert [each() for each in seen] == [None, None]


@given(
    st.integers(1, 12),
    st.lists(st.tuples(st.sampled_from(["arrive", "prove", "leave"]), st.integers(1, 30), st.sampled_from("abc"))),
)
def test_there_are_never_more_than_places(most: int, steps: list[tuple[str, int, str]]) -> None:
    """And a newcomer takes the place of none that proved a caller."""
    places, here = Places[int](most), dict[int, bool]()
    for step, number, group in steps:
        gone = None
        if step == "arrive" and number not in here:
            here[number] = False
            gone = places.arrive(number, group)
            assert gone in {None, number} or not here[gone]
        elif step == "prove" and number in here:
            here[number] = True
            gone = places.prove(number, group)
            assert gone is None or here[gone]
        elif step == "leave":
            here.pop(number, None)
            places.leave(number)
        if gone is not None:
            del here[gone]
        assert len(places) == len(here) <= most


@pytest.mark.parametrize(
    ("host", "origin"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"),
        ("2001:db8:1:2::9", "2001:db8:1:2::"),
        ("fe80::1%eth0", "fe80::"),
        ("", ""),
    ],
)
def test_origin_of_an_address(host: str, origin: str) -> None:
    assert origin_of(host) == origin
