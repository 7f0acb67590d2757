"""Who gives way when peers make the agent store too much, and how often that is looked at."""

from fakes.raw_http2 import DATA, END_HEADERS, END_STREAM, HEADERS, PREFACE, RST_STREAM, frame
from hypothesis import given
from hypothesis import strategies as st

from sds_agent.rpc.frames import Inspection, Messages
from sds_agent.sds.acceptor import BOUNDS, Connection, StoredBytes
from sds_agent.sds.surplus import Share, surplus


def shares(**holders: list[int]) -> list[Share]:
    return [
        Share(Connection(f"{name}{at}"), name, size) for name, held in holders.items() for at, size in enumerate(held)
    ]


def gone(most: int, **holders: list[int]) -> list[str]:
    return [each.connection.holder for each in surplus(shares(**holders), most)]


def test_up_to_the_limit_nobody_gives_way() -> None:
    assert gone(100, a=[50, 30], b=[20]) == []
    assert gone(100) == []


def test_the_process_with_most_loses_its_largest_connection() -> None:
    """Not the largest connection of all: a process may spread what it makes the agent store."""
    assert gone(110, a=[20, 31, 25], b=[60]) == ["a1"]


def test_no_more_give_way_than_needed() -> None:
    assert sorted(gone(100, a=[70, 80, 90], b=[10])) == ["a1", "a2"]


@given(st.dictionaries(st.sampled_from("abcd"), st.lists(st.integers(0, 50), min_size=1)), st.integers(0, 300))
def test_what_is_left_fits_and_who_has_least_goes_last(holders: dict[str, list[int]], most: int) -> None:
    all_of_them = shares(**holders)
    went = surplus(all_of_them, most)
    left = [each for each in all_of_them if each not in went]
    assert len(set(went)) == len(went)
    assert sum(each.stored for each in left) <= most
    if went:
        assert sum(each.stored for each in left) + went[-1].stored > most, "no more than needed"
        before = {name: sum(e.stored for e in (*left, went[-1]) if e.holder == name) for name in holders}
        assert before[went[-1].holder] == max(before.values())


class Looked:
    """A count, and how often it was looked at; each look finds `others`."""

    def __init__(self, most: int) -> None:
        self.looks = self.others = 0
        self.stored = StoredBytes(most, self._look)

    def _look(self) -> None:
        self.looks += 1
        self.stored.found(self.others)


def test_a_look_comes_once_as_much_has_passed_as_may_be_stored() -> None:
    here = Looked(1000)
    for _ in range(100):
        here.stored.add(10)
    assert here.looks == 0
    here.stored.add(10)
    assert here.looks == 1
    for _ in range(100):
        here.stored.add(10)
    assert here.looks == 1, "nothing was kept"


def test_while_much_is_stored_a_look_comes_for_each_quarter_more() -> None:
    """Each takes time for each stream: a peer that keeps the agent near its limit must not cause one all the time."""
    here = Looked(1000)
    here.others = 1000
    here.stored.add(1001)
    assert here.looks == 1
    for _ in range(25):
        here.stored.move(10)
    assert here.looks == 1
    here.stored.move(10)
    assert here.looks == 2
    here.stored.move(-260)
    assert here.looks == 2
    assert here.stored.unfinished == 0


def test_a_request_that_has_ended_counts_until_the_next_look() -> None:
    """It may wait for the agent, which has a look at that."""
    here = Looked(1000)
    here.stored.move(900)
    here.stored.move(-900)
    here.stored.add(100)
    assert here.looks == 0
    here.stored.add(1)
    assert here.looks == 1
    here.stored.add(1000)
    assert here.looks == 1, "it was not kept"


def test_what_a_connection_stores_counts_until_it_is_over_or_gives_way() -> None:
    here = Looked(1000)
    one, two = (Connection(name, stored=here.stored) for name in "ab")
    one.moved(100)
    two.moved(300)
    assert here.stored.unfinished == 400
    two.give_way()
    assert (here.stored.unfinished, two.unfinished) == (100, 0)
    two.moved(50)
    two.moved(-350)
    two.over()
    assert here.stored.unfinished == 100
    one.over()
    assert here.stored.unfinished == 0


class Talk:
    """A connection whose frames are followed, with two calls on it."""

    def __init__(self, stored: StoredBytes) -> None:
        self.connection = Connection("a process", stored=stored)
        self._messages = Messages(self.connection)
        self._inspection = Inspection(BOUNDS, self._messages)
        self._last = -1
        self.says(PREFACE)
        self.begins()
        self.begins()

    def says(self, data: bytes) -> None:
        """The peer sends this. Where the connection gives way, nobody looks at it any more."""
        if not self.connection.gives_way:
            assert self._inspection.take(data) is None

    def begins(self) -> None:
        """The peer begins a call."""
        self._last += 2
        self.says(frame(HEADERS, END_HEADERS, self._last, b"\x82"))

    def ends(self, stream: int) -> None:
        """The server ends a call."""
        self._messages.answered(memoryview(frame(HEADERS, END_HEADERS | END_STREAM, stream)))


streams = st.sampled_from([1, 3, 5])
steps = st.one_of(
    st.tuples(st.just(Talk.begins)),
    st.tuples(st.just(Talk.ends), streams),
    st.builds(lambda n: (Talk.says, frame(RST_STREAM, 0, n, bytes(4))), streams),
    st.builds(lambda n, data: (Talk.says, frame(DATA, 0, n, data)), streams, st.binary(max_size=40)),
    st.builds(
        lambda n, size: (Talk.says, frame(DATA, 0, n, bytes((0, 0, 0, 1, 0)) + bytes(size))),
        streams,
        st.integers(0, 256),
    ),
)


@given(st.lists(st.tuples(st.integers(0, 2), st.none() | steps), min_size=10, max_size=60), st.integers(100, 2000))
def test_the_count_is_that_of_all_connections_and_nothing_is_left_of_one_that_is_over(
    said: list[tuple[int, tuple[object, ...] | None]], most: int
) -> None:
    """Also where a look comes in the middle of a piece of data, and its own connection gives way."""
    here: list[Talk] = []

    def look() -> None:
        for each in surplus((Share(t.connection, str(at), t.connection.unfinished) for at, t in enumerate(here)), most):
            each.connection.give_way()
        stored.found(0)

    stored = StoredBytes(most, look)
    here += [Talk(stored) for _ in range(3)]
    for number, step in said:
        if step is None:
            here[number].connection.over()
            here[number] = Talk(stored)
        else:
            do, *arguments = step
            assert callable(do)
            do(here[number], *arguments)
        assert stored.unfinished == sum(each.connection.unfinished for each in here)
        assert all(each.connection.unfinished >= 0 for each in here)
        assert stored.unfinished <= 5 * most // 4 + 300
    for each in here:
        each.connection.over()
    assert stored.unfinished == 0
