"""What an operator reads of the streams: which Envoy took or refused what and why, and no flood from a broken one."""

import logging
from collections.abc import Iterator

import pytest
from fakes.events import Events, recorded

from sds_agent.sds.journal import (
    ENVOYS,
    HOUR,
    LINE,
    LINES,
    MOST_NAMES,
    MOST_NODES,
    MOST_REFUSALS,
    Journal,
    StreamJournal,
)
from sds_agent.sds.protocol import (
    Acked,
    Action,
    Finish,
    Nacked,
    Refused,
    Resource,
    Respond,
    SotwRequest,
    Stale,
    StatusCode,
    Subscribed,
    Unsubscribed,
)
from sds_agent.sds.pushes import LONGEST

NOT_FOUND = Finish(StatusCode.NOT_FOUND, ("nobody",))


@pytest.fixture
def events() -> Iterator[Events]:
    with recorded() as events:
        yield events


class Time:
    """A clock that stands still until it is moved."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def opened(journal: Journal, node: str = "", method: str = "StreamSecrets") -> StreamJournal:
    """The journal of a stream whose Envoy says that it is `node`."""
    stream = journal.open(method, "pid 7 (uid 101)")
    stream.met(SotwRequest(node_id=node))
    return stream


CALL = {"method": "DeltaSecrets", "peer": "pid 7 (uid 101)"}


def denied(uid: int) -> Finish:
    """The end of a stream whose process may not have what it asks for."""
    return Finish(StatusCode.PERMISSION_DENIED, ("nobody",), f"a process of uid {uid} may not have 'nobody'")


def refuse(journal: Journal, *actions: Action, node: str = "envoy-a") -> None:
    """One stream that comes to this."""
    opened(journal, node).note(actions)


@pytest.mark.parametrize(
    ("action", "expected"),
    [
        (
            Subscribed(("a", "b"), ("b",)),
            {"event": "subscribed", "level": "debug", "names": ["a", "b"], "pending": ["b"], **CALL},
        ),
        (Subscribed(("a",)), {"event": "subscribed", "level": "debug", "names": ["a"], **CALL}),
        (Unsubscribed(("a",)), {"event": "unsubscribed", "level": "debug", "names": ["a"]}),
        (
            Respond("n", (Resource("a", "v"), Resource("b", "w")), ("c",)),
            {
                "event": "sent",
                "level": "debug",
                "names": ["a", "b"],
                "removed": ["c"],
                "version": ["v", "w"],
                "nonce": "n",
            },
        ),
        (
            Respond("", (Resource("a", "v"),)),  # a Fetch, of which no other line names the process
            {"event": "sent", "level": "debug", "names": ["a"], "version": ["v"], "nonce": "", "peer": CALL["peer"]},
        ),
        (Acked("n", {"a": "v"}), {"event": "acked", "level": "debug", "names": ["a"], "nonce": "n"}),
        (
            Nacked("n", {"a": "v"}, "no such curve"),
            {
                "event": "nacked",
                "level": "warning",
                "names": ["a"],
                "version": ["v"],
                "nonce": "n",
                "reason": "no such curve",
            },
        ),
        (Stale("n", "why"), {"event": "stale", "level": "debug", "nonce": "n", "reason": "why"}),
        (Stale("n"), {"event": "stale", "level": "debug", "nonce": "n"}),
        (Refused(("x",)), {"event": "refused", "level": "warning", "cause": "unknown name", "names": ["x"]}),
        (NOT_FOUND, {"event": "refused", "level": "warning", "cause": "not found", "names": ["nobody"]}),
        (
            Finish(StatusCode.INVALID_ARGUMENT, detail="type_url must be another"),
            {"event": "refused", "level": "warning", "cause": "type_url must be another"},
        ),
    ],
)
def test_every_action_is_a_line_that_names_the_envoy_and_the_stream(
    events: Events, action: Action, expected: dict[str, object]
) -> None:
    stream = opened(Journal(), "envoy-a", "DeltaSecrets")
    stream.note([action])
    assert [each for each in events.seen if each["event"] != "envoy_served"] == [
        {"node": "envoy-a", "stream": 1, **expected}
    ]


def test_streams_have_numbers_of_their_own_and_their_end_is_logged(events: Events) -> None:
    journal = Journal()
    for _ in range(2):
        opened(journal).left()
    assert [(e["event"], e["level"], e["stream"]) for e in events.seen] == [("left", "debug", 1), ("left", "debug", 2)]


def test_an_ack_says_how_long_the_envoy_took(events: Events) -> None:
    time = Time()
    stream = opened(Journal(time))
    stream.sending(Respond("n1", (Resource("a", "v"),)), changed=False)
    time.now += 0.0123
    stream.sending(Respond("n2", (Resource("b", "v"),)), changed=False)
    time.now += 0.5
    stream.note([Acked("n1", {"a": "v"}), Acked("n2", {"b": "v"}), Acked("n2", {"b": "v"})])
    assert [event.get("after_ms") for event in events.named("acked")] == [512.3, 500.0, None]


def test_the_first_message_names_the_node_for_all(events: Events) -> None:
    stream = opened(Journal(), "envoy-a")
    stream.met(SotwRequest())
    stream.note([Acked("n", {"a": "v"})])
    assert events.seen[0]["node"] == "envoy-a"


def test_one_refusal_is_logged_once_however_often_it_is_asked_for(events: Events) -> None:
    journal = Journal()
    for _ in range(1000):
        refuse(journal, Subscribed(("nobody",)), NOT_FOUND)
    assert [event["event"] for event in events.seen] == ["refused"]


@pytest.mark.parametrize(
    ("other", "node"),
    [
        (NOT_FOUND, "envoy-b"),
        (Finish(StatusCode.NOT_FOUND, ("noone",)), "envoy-a"),
        (Refused(("nobody",)), "envoy-a"),
        (Finish(StatusCode.NOT_FOUND, ("nobody", "noone")), "envoy-a"),
    ],
    ids=["another Envoy", "another name", "among others", "more names"],
)
def test_another_refusal_is_logged_too(events: Events, other: Action, node: str) -> None:
    journal = Journal()
    refuse(journal, NOT_FOUND)
    refuse(journal, other, node=node)
    assert len(events.named("refused")) == 2


def test_each_user_who_may_not_have_it_is_logged(events: Events) -> None:
    """Though another one was before, by the same node id, or by none."""
    journal = Journal()
    for uid in (1101, 1102, 1101):
        refuse(journal, denied(uid))
    assert [each["cause"] for each in events.named("refused")] == [denied(1101).detail, denied(1102).detail]


def test_an_envoy_that_asks_for_ever_new_names_cannot_grow_memory(events: Events) -> None:
    journal = Journal(most_streams=1_000_000)
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


@pytest.mark.parametrize("action", [Finish(StatusCode.NOT_FOUND, ("x",) * 5000), Refused(("x",) * 5000)])
def test_a_line_about_many_names_is_bounded(events: Events, action: Action) -> None:
    refuse(Journal(), action)
    assert events.seen[0]["names"] == [*["x"] * MOST_NAMES, "and 4980 more"]


def test_a_line_about_many_subscriptions_is_bounded(events: Events) -> None:
    refuse(Journal(), Subscribed(("x",) * 5000, ("y",) * 5000), Unsubscribed(("z",) * 5000))
    (subscribed,), (unsubscribed,) = events.named("subscribed"), events.named("unsubscribed")
    for names in (subscribed["names"], subscribed["pending"], unsubscribed["names"]):
        assert len(names) == MOST_NAMES + 1


# --- what a peer sends without end ---


def talk(stream: StreamJournal, answers: int, *, changed: bool = False, reason: str | None = None) -> None:
    """So many answers, each of them taken or refused."""
    for number in range(answers):
        answer = Respond(f"n{number}", (Resource("a", "v"),))
        stream.sending(answer, changed=changed)
        settled = Acked(answer.nonce, {"a": "v"}) if reason is None else Nacked(answer.nonce, {"a": "v"}, reason)
        stream.note([answer, settled])


def test_one_stream_cannot_fill_the_log_and_one_line_says_how_much_was_left_out(events: Events) -> None:
    time = Time()
    journal = Journal(time, most_streams=1000, most_names=5)
    talk(opened(journal), 10_000, reason="no")
    assert len(events.named("nacked")) == len(events.named("sent")) == LINES * 5
    time.now += 60
    events.seen.clear()
    journal.report_left_out()
    reported = {event["kind"]: event["lines"] for event in events.named("lines_left_out")}
    assert reported == {"warnings": 10_000 - LINES * 5 - 1, "others": 10_000 - LINES * 5 - 1}, (
        "the first was reported at once"
    )
    events.seen.clear()
    journal.report_left_out()
    assert events.seen == []


def test_streams_without_end_cannot_fill_the_log_either(events: Events) -> None:
    journal = Journal(Time(), most_streams=50, most_names=5)
    for number in range(10_000):
        stream = opened(journal, f"envoy-{number}")
        stream.note([Subscribed(("a",)), Refused((f"x{number}",))])
        stream.left()
    assert len(events.named("refused")) == LINES * 50
    assert len(events.named("subscribed")) + len(events.named("left")) == LINES * 50


def test_a_flood_hides_no_push_of_a_changed_secret_nor_the_reply(events: Events) -> None:
    journal = Journal(Time(), most_streams=50, most_names=5)
    good, bad = opened(journal), opened(journal)
    for _ in range(1000):
        refuse(journal, Refused(("nobody", f"{len(events.seen)}")))
        talk(opened(journal), 1)
    events.seen.clear()
    talk(good, 1, changed=True)
    talk(bad, 1, changed=True, reason="no")
    assert [event["event"] for event in events.seen] == ["sent", "acked", "sent", "nacked"]


def test_a_flood_of_ordinary_lines_hides_no_warning(events: Events) -> None:
    journal = Journal(Time(), most_streams=50, most_names=5)
    for _ in range(1000):
        talk(opened(journal), 1)
    events.seen.clear()
    talk(opened(journal), 1, reason="Failed to load certificate chain")
    assert [event["reason"] for event in events.named("nacked")] == ["Failed to load certificate chain"]


def test_as_many_streams_as_there_may_be_lose_no_line_when_all_come_at_once(events: Events) -> None:
    """As after a restart of the agent, with a bundle that none of them takes."""
    journal = Journal(Time(), most_streams=1000, most_names=5)
    for _ in range(1000):
        stream = opened(journal)
        stream.note([Subscribed(("a",))])
        talk(stream, 1, reason="no")
        stream.left()
    assert len(events.seen) == 4000
    assert events.named("lines_left_out") == []


def test_a_refusal_that_was_left_out_is_logged_when_there_is_room(events: Events) -> None:
    time = Time()
    journal = Journal(time, most_streams=1, most_names=1)
    for number in range(LINES):
        refuse(journal, Refused((f"{number}",)))
    refuse(journal, Refused(("late",)))
    assert events.named("refused", names=["late"]) == []
    time.now += HOUR
    refuse(journal, Refused(("late",)))
    assert len(events.named("refused", names=["late"])) == 1


def test_text_of_a_peer_counts_by_its_length(events: Events) -> None:
    """Or else a line of names without an end would count as much as one of an honest Envoy."""
    stream = opened(Journal(Time(), most_streams=1000, most_names=5))
    for _ in range(100):
        stream.note([Subscribed(tuple("x" * 600 for _ in range(5)))])
    assert len(events.named("subscribed")) == LINES * 5 // (1 + 5 * 600 // LINE)


def test_a_level_that_is_not_logged_costs_no_budget(events: Events) -> None:
    logging.getLogger("sds_agent").setLevel(logging.INFO)
    stream = opened(Journal(Time(), most_streams=1000, most_names=5))
    for _ in range(100):
        stream.note([Stale("n")])
    logging.getLogger("sds_agent").setLevel(logging.DEBUG)
    talk(stream, 1)
    assert [event["event"] for event in events.seen if event["level"] == "debug"] == ["sent", "acked"]


def push(streams: list[StreamJournal], version: str) -> None:
    """A secret changes to that version, and all of the streams subscribe to it."""
    for stream in streams:
        stream.due("a", version, Time.now)
    for stream in streams:
        stream.sending(Respond(f"n-{version}", (Resource("a", version),)), changed=True)


def test_a_changed_secret_is_one_line_however_many_streams_it_goes_to(events: Events) -> None:
    logging.getLogger("sds_agent").setLevel(logging.INFO)
    time = Time()
    journal = Journal(time, known=lambda: {"a"})
    streams = [opened(journal, "envoy-a") for _ in range(1000)]
    push(streams, "v1")
    time.now += 0.25
    for stream in streams[1:]:
        stream.note([Acked("n-v1", {"a": "v1"})])
    assert events.named("pushed") == []
    streams[0].note([Nacked("n-v1", {"a": "v1"}, "no such curve")])
    (line,) = events.named("pushed")
    assert {key: line[key] for key in ("names", "version", "streams", "acked", "nacked", "last_ack_ms")} == {
        "names": ["a"],
        "version": "v1",
        "streams": 1000,
        "acked": 999,
        "nacked": 1,
        "last_ack_ms": 250.0,
    }
    assert [each["event"] for each in events.seen] == ["envoy_served", "nacked", "pushed"]
    counts = journal.counts
    assert [dict(each.counts) for each in (counts.pushes, counts.acks, counts.nacks)] == [
        {("a",): 1000},
        {("a",): 999},
        {("a",): 1},
    ]


def test_a_push_that_some_envoys_never_reply_to_says_how_many(events: Events) -> None:
    time = Time()
    journal = Journal(time)
    streams = [opened(journal) for _ in range(3)]
    push(streams, "v1")
    streams[0].note([Acked("n-v1", {"a": "v1"})])
    streams[1].left()
    time.now += LONGEST
    journal.report_pushes()
    (line,) = events.named("pushed")
    assert (line["streams"], line["acked"], line["left"], line["waiting"]) == (3, 1, 1, 1)


def test_a_stream_that_has_both_names_of_a_bundle_counts_under_both() -> None:
    names = ("ROOTCA", "spiffe://demo.example")
    journal = Journal(Time(), known=lambda: names)
    stream = opened(journal)
    for name in names:
        stream.due(name, "v1", Time.now)
    stream.sending(Respond("n", tuple(Resource(name, "v1") for name in names)), changed=True)
    stream.note([Acked("n", dict.fromkeys(names, "v1"))])
    counts = journal.counts
    for each in (counts.responses, counts.pushes, counts.acks):
        assert dict(each.counts) == {(name,): 1 for name in names}


def test_a_push_of_many_files_with_one_content_is_a_bounded_line(events: Events) -> None:
    names = tuple(f"file-root:/etc/{number}.pem" for number in range(90))
    stream = opened(Journal(Time()))
    for name in names:
        stream.due(name, "v1", Time.now)
    stream.sending(Respond("n", tuple(Resource(name, "v1") for name in names)), changed=True)
    stream.note([Acked("n", dict.fromkeys(names, "v1"))])
    (line,) = events.named("pushed")
    assert line["names"][-1] == f"and {90 - MOST_NAMES} more"


def test_node_ids_that_a_peer_makes_up_cannot_grow_memory(events: Events) -> None:
    journal = Journal(Time())
    for number in range(MOST_NODES + 5):
        opened(journal, f"{number}" * 200).note([Acked("n", {"a": "v"})])
    assert len(journal._nodes) == MOST_NODES
    assert sum(map(len, journal._nodes)) <= 64 * MOST_NODES
    assert len(events.named("envoy_served")) == ENVOYS.burst


def test_each_envoy_is_named_once_when_it_has_its_first_secret(events: Events) -> None:
    journal = Journal(Time())
    for node in ("envoy-a", "envoy-a", "envoy-b"):
        stream = journal.open("StreamSecrets", "pid 7 (uid 101)")
        stream.met(SotwRequest(node_id=node, version="1.40.0"))
        stream.note([Nacked("n", {"a": "v"}, "no"), Acked("n", {"a": "v"}), Acked("n", {"a": "w"})])
    assert [(each["node"], each["envoy_version"], each["peer"]) for each in events.named("envoy_served")] == [
        ("envoy-a", "1.40.0", "pid 7 (uid 101)"),
        ("envoy-b", "1.40.0", "pid 7 (uid 101)"),
    ]


def test_a_name_that_is_not_served_is_no_secret_that_an_envoy_took(events: Events) -> None:
    journal = Journal(Time(), known=lambda: {"a"})
    stream = opened(journal, "envoy-a")
    stream.note([Acked("n", {"nobody": ""}), Nacked("o", {"nobody": ""}, "no")])
    assert events.named("envoy_served") == []
    stream.note([Acked("p", {"a": "v", "nobody": ""})])
    assert events.named("envoy_served")[0]["names"] == ["a"]
    assert (dict(journal.counts.acks.counts), dict(journal.counts.nacks.counts)) == ({("a",): 1}, {})


def test_all_envoys_of_a_node_that_come_at_once_do_not_fill_the_log(events: Events) -> None:
    time = Time()
    journal = Journal(time)
    for number in range(1000):
        opened(journal, f"envoy-{number}").note([Acked("n", {"a": "v"})])
    assert len(events.named("envoy_served")) == ENVOYS.burst
    time.now += 60
    journal.report_left_out()
    assert events.named("lines_left_out", kind="envoys")[0]["lines"] == 1000 - ENVOYS.burst


def test_names_that_clients_make_up_are_counted_together() -> None:
    journal = Journal(Time(), known=lambda: {"a"})
    stream = opened(journal)
    for number in range(1000):
        stream.sending(Respond("n", (Resource(f"file-cert:{number}", "v"),)), changed=False)
        stream.note([Acked("n", {f"file-cert:{number}": "v"}), Nacked("n", {f"x{number}": "v"}, "no")])
    counts = journal.counts
    assert [dict(each.counts) for each in (counts.responses, counts.acks, counts.nacks)] == [{("(others)",): 1000}] * 3


def test_streams_that_are_over_take_no_memory() -> None:
    journal = Journal(Time())
    for _ in range(100):
        stream = opened(journal)
        talk(stream, 1, reason="no")
        stream.left()
    assert len(journal._warnings._each) == len(journal._others._each) == 0
