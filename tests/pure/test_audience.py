"""Who is told of a change: an Envoy that is left out keeps an old certificate until that expires."""

from hypothesis import given
from hypothesis import strategies as st

from sds_agent.sds.audience import Audience

NAMES = st.lists(st.sampled_from("abc"), unique=True).map(tuple)


@given(st.lists(st.tuples(st.integers(0, 3), NAMES)))
def test_each_name_reaches_those_that_subscribe_to_it_now(moves: list[tuple[int, tuple[str, ...]]]) -> None:
    audience = Audience[int]()
    subscribed: dict[int, tuple[str, ...]] = dict.fromkeys(range(4), ())
    for member, names in moves:
        audience.move(member, subscribed[member], names)
        subscribed[member] = names
        for name in "abc":
            assert sorted(audience.of(name)) == [each for each, names in subscribed.items() if name in names]


def test_those_who_came_first_are_told_first() -> None:
    audience = Audience[int]()
    for member in (3, 1, 2):
        audience.move(member, (), ("a",))
    audience.move(3, ("a",), ("a", "b"))
    assert (audience.of("a"), audience.of("b")) == ((3, 1, 2), (3,))


def test_a_name_without_members_takes_no_memory() -> None:
    audience = Audience[int]()
    for number in range(100):
        audience.move(1, () if not number else (f"{number - 1}",), (f"{number}",))
    assert list(audience._by_name) == ["99"]
