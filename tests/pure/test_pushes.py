"""One line for each push: an operator counts by it who has the new secret, so it may neither lose a stream nor come
twice.
"""

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from sds_agent.sds.pushes import LONGEST, MOST, Pushes, PushOutcome

NOW = 100.0


def changed(pushes: Pushes, streams: range, version: str, name: str = "a") -> None:
    for stream in streams:
        pushes.due(stream, name, version, NOW)


def sent(pushes: Pushes, streams: range, version: str) -> list[bool]:
    return [pushes.sent(stream, version) for stream in streams]


def test_a_push_is_over_when_everybody_has_replied() -> None:
    pushes = Pushes()
    changed(pushes, range(3), "v1")
    assert sent(pushes, range(3), "v1") == [True] * 3
    pushes.replied(0, "v1", acked=True, now=NOW + 0.5)
    pushes.replied(1, "v1", acked=False, now=NOW + 0.7)
    assert list(pushes.finished(NOW + 1)) == []
    pushes.replied(2, "v1", acked=True, now=NOW + 0.6)
    assert list(pushes.finished(NOW + 1)) == [PushOutcome(("a",), "v1", 3, 2, 1, 0, 0, 600.0)]
    assert (list(pushes.finished(NOW + 1)), pushes.under_way) == ([], 0)


def test_the_names_of_one_secret_are_one_push() -> None:
    pushes = Pushes()
    changed(pushes, range(1), "v1", "ROOTCA")
    changed(pushes, range(1, 2), "v1", "spiffe://demo.example")
    sent(pushes, range(2), "v1")
    for stream in range(2):
        pushes.replied(stream, "v1", acked=True, now=NOW)
    (outcome,) = pushes.finished(NOW)
    assert (outcome.names, outcome.streams) == (("ROOTCA", "spiffe://demo.example"), 2)


def test_an_answer_to_a_new_subscription_is_no_push() -> None:
    pushes = Pushes()
    assert sent(pushes, range(1), "v1") == [False]
    pushes.replied(0, "v1", acked=True, now=NOW)
    assert (list(pushes.finished(NOW + LONGEST)), pushes.under_way) == ([], 0)


def test_a_stream_that_is_overtaken_by_the_next_change_is_waited_for_in_that_one_alone() -> None:
    pushes = Pushes()
    changed(pushes, range(2), "v1")
    sent(pushes, range(1), "v1")
    changed(pushes, range(2), "v2")
    pushes.replied(0, "v1", acked=True, now=NOW)
    (first,) = pushes.finished(NOW)
    assert (first.version, first.streams, first.acked, first.waiting) == ("v1", 1, 1, 0)
    assert sent(pushes, range(2), "v1") == [False, False]
    assert sent(pushes, range(2), "v2") == [True, True]


def test_a_stream_that_leaves_or_unsubscribes_is_not_waited_for() -> None:
    pushes = Pushes()
    changed(pushes, range(3), "v1")
    sent(pushes, range(1), "v1")
    pushes.gone(0)
    pushes.gone(1)
    pushes.unsubscribed(2, ["a"])
    (outcome,) = pushes.finished(NOW)
    assert (outcome.streams, outcome.left, outcome.waiting) == (1, 1, 0)


def test_a_push_that_reached_nobody_is_no_line() -> None:
    pushes = Pushes()
    changed(pushes, range(1), "v1")
    pushes.gone(0)
    assert (list(pushes.finished(NOW)), pushes.under_way) == ([], 0)


def test_a_client_that_never_replies_delays_the_line_and_does_not_lose_it() -> None:
    pushes = Pushes()
    changed(pushes, range(2), "v1")
    sent(pushes, range(2), "v1")
    pushes.replied(0, "v1", acked=True, now=NOW)
    assert list(pushes.finished(NOW + LONGEST - 0.1)) == []
    (outcome,) = pushes.finished(NOW + LONGEST)
    assert (outcome.streams, outcome.acked, outcome.waiting) == (2, 1, 1)
    pushes.replied(1, "v1", acked=True, now=NOW + LONGEST)
    assert list(pushes.finished(NOW + 2 * LONGEST)) == []


def test_more_changes_than_there_is_room_for_give_up_the_oldest() -> None:
    pushes = Pushes()
    for number in range(MOST + 5):
        pushes.due(1, f"name{number}", f"v{number}", NOW)
    assert pushes.under_way == MOST


@given(st.data())
def test_whatever_happens_each_push_is_one_line_and_no_stream_is_lost(data: st.DataObject) -> None:
    pushes, lines, open_streams = Pushes(), dict[str, PushOutcome](), set(range(4))
    sends: dict[str, set[int]] = {}
    versions = [f"v{number}" for number in range(4)]

    def take(now: float) -> None:
        for outcome in pushes.finished(now):
            assert outcome.version not in lines, "a second line"
            lines[outcome.version] = outcome

    def leave(stream: int) -> None:
        pushes.gone(stream)
        open_streams.discard(stream)

    def step(version: str, stream: int) -> None:
        kinds: list[Callable[[], object]] = [
            lambda: sends.setdefault(version, set()).add(stream) if pushes.sent(stream, version) else None,
            lambda: pushes.replied(stream, version, acked=data.draw(st.booleans()), now=NOW),
            lambda: leave(stream),
            lambda: pushes.unsubscribed(stream, ["a"]),
        ]
        data.draw(st.sampled_from(kinds))()

    for version in versions:
        for stream in sorted(open_streams):
            pushes.due(stream, "a", version, NOW)
        for _ in range(data.draw(st.integers(0, 12))):
            step(data.draw(st.sampled_from(versions)), data.draw(st.integers(0, 3)))
            take(NOW)
    take(NOW + LONGEST)
    assert pushes.under_way == 0
    for version, outcome in lines.items():
        assert outcome.streams == len(sends.get(version, set()))
        accounted = outcome.acked + outcome.nacked + outcome.left + outcome.waiting
        assert outcome.streams <= accounted
