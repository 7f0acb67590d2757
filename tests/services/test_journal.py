"""What an operator reads of the streams: who has what, who refused what and why, and no flood from a broken Envoy."""

from collections.abc import Iterator

import pytest
from fakes.events import Events, recorded

from sds_agent.sds.journal import MOST_NAMES, MOST_REFUSALS, MOST_TIMED, Journal
from sds_agent.sds.protocol import (
    Acked,
    Action,
    Finish,
    Nacked,
    Refused,
    Resource,
    Respond,
    Stale,
    Status,
    Subscribed,
    Unsubscribed,
)

NOT_FOUND = Finish(Status.NOT_FOUND, ("nobody",))


@pytest.fixture
def events() -> Iterator[Events]:
    with recorded() as events:
        yield events


class Time:
    """A clock that stands still until it is moved."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def refuse(journal: Journal, *actions: Action, node: str = "envoy-a") -> None:
    """One stream that comes to this."""
    stream = journal.open("StreamSecrets")
    stream.met(node)
    stream.note(actions)


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        (
            Subscribed(("a", "b"), ("b",)),
            {"event": "subscribed", "level": "info", "names": ["a", "b"], "held": ["b"], "method": "DeltaSecrets"},
        ),
        (Subscribed(("a",)), {"event": "subscribed", "level": "info", "names": ["a"], "method": "DeltaSecrets"}),
        (Unsubscribed(("a",)), {"event": "unsubscribed", "level": "debug", "names": ["a"]}),
        (
            Respond("n", (Resource("a", "v"), Resource("b", "w")), ("c",)),
            {
                "event": "pushed",
                "level": "info",
                "names": ["a", "b"],
                "removed": ["c"],
                "version": ["v", "w"],
                "nonce": "n",
            },
        ),
        (Acked("n", ("a",)), {"event": "acked", "level": "info", "names": ["a"], "nonce": "n"}),
        (
            Nacked("n", ("a",), "no such curve"),
            {"event": "nacked", "level": "warning", "names": ["a"], "nonce": "n", "reason": "no such curve"},
        ),
        (Stale("n", "why"), {"event": "stale", "level": "debug", "nonce": "n", "reason": "why"}),
        (Stale("n"), {"event": "stale", "level": "debug", "nonce": "n"}),
        (Refused(("x",)), {"event": "refused", "level": "warning", "cause": "unknown name", "names": ["x"]}),
        (NOT_FOUND, {"event": "refused", "level": "warning", "cause": "not found", "names": ["nobody"]}),
        (
            Finish(Status.INVALID_ARGUMENT, detail="type_url must be another"),
            {"event": "refused", "level": "warning", "cause": "type_url must be another"},
        ),
    ],
)
def test_every_action_is_a_line_that_names_the_envoy_and_the_stream(
    events: Events, action: Action, expected: dict[str, object]
) -> None:
    stream = Journal().open("DeltaSecrets")
    stream.met("envoy-a")
    stream.note([action])
    assert events.seen == [{"node": "envoy-a", "stream": 1, **expected}]


def test_streams_have_numbers_of_their_own_and_their_end_is_told(events: Events) -> None:
    journal = Journal()
    for _ in range(2):
        journal.open("StreamSecrets").left()
    assert [(e["event"], e["level"], e["stream"]) for e in events.seen] == [("left", "debug", 1), ("left", "debug", 2)]


def test_an_ack_tells_how_long_the_envoy_took(events: Events) -> None:
    time = Time()
    stream = Journal(time).open("StreamSecrets")
    stream.note([Respond("n1", (Resource("a", "v"),))])
    time.now += 0.0123
    stream.note([Respond("n2", (Resource("b", "v"),))])
    time.now += 0.5
    stream.note([Acked("n1", ("a",)), Acked("n2", ("b",)), Acked("n2", ("b",))])
    assert [event.get("after_ms") for event in events.named("acked")] == [512.3, 500.0, None]


def test_an_envoy_that_never_answers_leaves_no_times_behind() -> None:
    stream = Journal().open("DeltaSecrets")
    for number in range(10_000):
        stream.note([Respond(f"n{number}", (Resource("a", "v"),))])
    assert len(stream._sent_at) <= MOST_TIMED


def test_the_first_message_tells_the_node_for_all(events: Events) -> None:
    stream = Journal().open("StreamSecrets")
    stream.met("envoy-a")
    stream.met("")
    stream.note([Acked("n", ("a",))])
    assert events.seen[0]["node"] == "envoy-a"


def test_one_refusal_is_told_once_however_often_it_is_asked_for(events: Events) -> None:
    journal = Journal()
    for _ in range(1000):
        refuse(journal, Subscribed(("nobody",)), NOT_FOUND)
    assert [event["event"] for event in events.seen] == ["refused"]


@pytest.mark.parametrize(
    ("other", "node"),
    [
        (NOT_FOUND, "envoy-b"),
        (Finish(Status.NOT_FOUND, ("noone",)), "envoy-a"),
        (Refused(("nobody",)), "envoy-a"),
        (Finish(Status.NOT_FOUND, ("nobody", "noone")), "envoy-a"),
    ],
    ids=["another Envoy", "another name", "among others", "more names"],
)
def test_another_refusal_is_told_too(events: Events, other: Action, node: str) -> None:
    journal = Journal()
    refuse(journal, NOT_FOUND)
    refuse(journal, other, node=node)
    assert len(events.named("refused")) == 2


def test_an_envoy_that_asks_for_ever_new_names_cannot_grow_memory(events: Events) -> None:
    journal = Journal()
    for number in range(2 * MOST_REFUSALS):
        refuse(journal, Refused((f"{number}" * 200,) * 50))
    assert len(journal._refused) == MOST_REFUSALS
    assert sum(len(key) for key in journal._refused) <= 64 * MOST_REFUSALS
    events.seen.clear()
    refuse(journal, Refused((f"{2 * MOST_REFUSALS - 1}" * 200,) * 50))
    assert events.seen == [], "the newest are remembered"


def test_what_is_asked_for_all_the_time_is_not_forgotten_for_what_is_asked_for_once(events: Events) -> None:
    journal = Journal()
    for number in range(2 * MOST_REFUSALS):
        refuse(journal, NOT_FOUND)
        refuse(journal, Refused((f"{number}",)))
    assert len(events.named("refused", cause="not found")) == 1


@pytest.mark.parametrize("action", [Finish(Status.NOT_FOUND, ("x",) * 5000), Refused(("x",) * 5000)])
def test_a_line_about_many_names_is_bounded(events: Events, action: Action) -> None:
    refuse(Journal(), action)
    assert events.seen[0]["names"] == [*["x"] * MOST_NAMES, "and 4980 more"]


def test_a_line_about_many_subscriptions_is_bounded(events: Events) -> None:
    refuse(Journal(), Subscribed(("x",) * 5000, ("y",) * 5000), Unsubscribed(("z",) * 5000))
    (subscribed,), (unsubscribed,) = events.named("subscribed"), events.named("unsubscribed")
    for names in (subscribed["names"], subscribed["held"], unsubscribed["names"]):
        assert len(names) == MOST_NAMES + 1
