"""One line for each push: an operator counts by it who has the new secret, so it may neither lose a stream nor come
twice.
"""

from hypothesis import given
from hypothesis import strategies as st

from sds_agent.sds.pushes import LONGEST, MOST, Pushes, PushOutcome

NOW = 100.0


def changed(pushes: Pushes, streams: range, version: str, name: str = "a") -> None:
    for stream in streams:
        pushes.due(stream, name, version, NOW)


def sent(pushes: Pushes, streams: range, version: str, name: str = "a") -> list[bool]:
    return [pushes.sent(stream, name, version) for stream in streams]


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
    sent(pushes, range(1), "v1", "ROOTCA")
    sent(pushes, range(1, 2), "v1", "spiffe://demo.example")
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


def test_a_stream_that_has_both_names_of_a_secret_counts_once_and_both_are_sent() -> None:
    pushes = Pushes()
    for name in ("ROOTCA", "spiffe://demo.example"):
        changed(pushes, range(1), "v1", name)
    assert pushes.sent(0, "ROOTCA", "v1")
    assert pushes.sent(0, "spiffe://demo.example", "v1")
    pushes.replied(0, "v1", acked=True, now=NOW)
    (outcome,) = pushes.finished(NOW)
    assert (outcome.names, outcome.streams, outcome.acked) == (("ROOTCA", "spiffe://demo.example"), 1, 1)


def test_a_name_that_is_sent_after_its_secret_was_taken_by_another_ends_the_push() -> None:
    pushes = Pushes()
    for name in ("ROOTCA", "spiffe://demo.example"):
        changed(pushes, range(1), "v1", name)
    pushes.sent(0, "ROOTCA", "v1")
    pushes.replied(0, "v1", acked=True, now=NOW)
    assert list(pushes.finished(NOW)) == [], "the other name is not sent yet"
    assert pushes.sent(0, "spiffe://demo.example", "v1")
    assert [each.acked for each in pushes.finished(NOW)] == [1]


def test_a_stream_that_keeps_one_of_two_names_is_still_waited_for() -> None:
    pushes = Pushes()
    for name in ("ROOTCA", "spiffe://demo.example"):
        changed(pushes, range(1), "v1", name)
    pushes.unsubscribed(0, ["ROOTCA"])
    assert pushes.sent(0, "spiffe://demo.example", "v1")


def test_content_that_comes_back_is_another_push() -> None:
    pushes = Pushes()
    for version in ("v1", "v2", "v1"):
        changed(pushes, range(2), version)
        sent(pushes, range(2), version)
        pushes.replied(0, version, acked=True, now=NOW)
    first, second, third = (*pushes.finished(NOW), *pushes.finished(NOW + LONGEST))
    assert [each.version for each in (first, second, third)] == ["v1", "v2", "v1"]
    assert {(each.streams, each.acked, each.waiting) for each in (first, second, third)} == {(2, 1, 1)}


def test_a_change_that_is_taken_back_before_it_goes_out_is_not_waited_for() -> None:
    """The secret is withheld, or is again what the stream has."""
    pushes = Pushes()
    changed(pushes, range(1), "v1")
    pushes.due(0, "a", None, NOW)
    assert (list(pushes.finished(NOW)), pushes.under_way) == ([], 0)


def test_a_change_that_is_told_again_is_the_same_push() -> None:
    pushes = Pushes()
    changed(pushes, range(2), "v1")
    sent(pushes, range(1), "v1")
    pushes.replied(0, "v1", acked=True, now=NOW)
    pushes.due(1, "a", "v1", NOW + 1)
    assert list(pushes.finished(NOW + 1)) == []
    pushes.sent(1, "a", "v1")
    pushes.replied(1, "v1", acked=True, now=NOW + 2)
    assert [(each.streams, each.last_ack_ms) for each in pushes.finished(NOW + 2)] == [(2, 2000.0)]


class Told:
    """What was told of the pushes of one name, each version once, and the lines that came of it."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.pushes = Pushes()
        self.open = set(range(4))
        self.fate: dict[tuple[str, int], str] = {}
        self.lines: dict[str, PushOutcome] = {}

    def change(self, version: str) -> None:
        """The secret has changed for every stream that is open."""
        for stream in sorted(self.open):
            self.pushes.due(stream, "a", version, NOW)

    def step(self, version: str, stream: int) -> None:
        """Something happens on a stream."""
        steps = (self.send, self.take, self.refuse, self.leave, self.unsubscribe)
        self.data.draw(st.sampled_from(steps))(version, stream)

    def send(self, version: str, stream: int) -> None:
        if self.pushes.sent(stream, "a", version):
            self.fate[version, stream] = "waiting"

    def take(self, version: str, stream: int) -> None:
        self.pushes.replied(stream, version, acked=True, now=NOW)
        self.settle(version, stream, "acked")

    def refuse(self, version: str, stream: int) -> None:
        self.pushes.replied(stream, version, acked=False, now=NOW)
        self.settle(version, stream, "nacked")

    def leave(self, _version: str, stream: int) -> None:
        self.pushes.gone(stream)
        self.open.discard(stream)
        for version, other in tuple(self.fate):
            if other == stream:
                self.settle(version, stream, "left")

    def unsubscribe(self, _version: str, stream: int) -> None:
        self.pushes.unsubscribed(stream, ["a"])

    def settle(self, version: str, stream: int, fate: str) -> None:
        if self.fate.get((version, stream)) == "waiting":
            self.fate[version, stream] = fate

    def read(self, now: float) -> None:
        """Take the lines that are due."""
        for outcome in self.pushes.finished(now):
            assert outcome.version not in self.lines, "a second line"
            self.lines[outcome.version] = outcome


@given(st.data())
def test_whatever_happens_each_push_is_one_line_that_says_what_became_of_each_stream(data: st.DataObject) -> None:
    told, versions = Told(data), [f"v{number}" for number in range(4)]
    for version in versions:
        told.change(version)
        for _ in range(data.draw(st.integers(0, 12))):
            told.step(data.draw(st.sampled_from(versions)), data.draw(st.integers(0, 3)))
            told.read(NOW)
    told.read(NOW + LONGEST)
    assert told.pushes.under_way == 0
    for version in versions:
        fates = [fate for (sent, _), fate in told.fate.items() if sent == version]
        line = told.lines.get(version)
        if line is None:
            assert fates == [], "the line is missing"
            continue
        assert [line.streams, line.acked, line.nacked, line.left] == [
            len(fates),
            *(fates.count(fate) for fate in ("acked", "nacked", "left")),
        ]
        assert line.waiting >= fates.count("waiting")
