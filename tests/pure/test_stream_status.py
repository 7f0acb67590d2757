"""What can be seen of a stream: which version of each name was sent, taken and refused, and how long that took."""

import itertools
import tracemalloc
from datetime import UTC, datetime, timedelta

import msgspec
import pytest
from fakes.served import Served

from sds_agent.log import LONGEST_VALUE
from sds_agent.sds.delta import MOST_OUTSTANDING, REMOVED, DeltaSession
from sds_agent.sds.protocol import Acked, DeltaRequest, Nacked, SotwRequest
from sds_agent.sds.sotw import SotwSession
from sds_agent.sds.status import MOST_TIMED, Nack, NameStatus, Replies, StreamRecord

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


class Sotw:
    """A client of StreamSecrets."""

    def __init__(self, served: Served) -> None:
        self.session = SotwSession(f"n{i}" for i in itertools.count(1))
        self.served = served

    def want(self, *names: str) -> None:
        """Say which names are wanted, and nothing of any answer."""
        self.session.receive(SotwRequest(names), self.served)

    def reply(self, nonce: str, error: str | None = None) -> None:
        """Take an answer, or refuse it."""
        self.session.receive(SotwRequest(self.session.names, nonce, error), self.served)


class Delta:
    """A client of DeltaSecrets."""

    def __init__(self, served: Served) -> None:
        self.session = DeltaSession(f"n{i}" for i in itertools.count(1))
        self.served = served

    def want(self, *names: str) -> None:
        """Say which names are wanted, and nothing of any answer."""
        had = self.session.names
        request = DeltaRequest(tuple(n for n in names if n not in had), tuple(n for n in had if n not in names))
        self.session.receive(request, self.served)

    def reply(self, nonce: str, error: str | None = None) -> None:
        """Take an answer, or refuse it."""
        self.session.receive(DeltaRequest(nonce=nonce, error=error), self.served)


Client = Sotw | Delta
BOTH = pytest.mark.parametrize("variant", [Sotw, Delta])


@pytest.fixture
def served() -> Served:
    view = Served()
    view.put("default", "v1")
    view.hold("late")
    return view


def push(client: Client, version: str) -> None:
    client.served.put("default", version)
    client.session.refresh(client.served)


@BOTH
def test_a_name_goes_from_waiting_to_sent_to_acked(served: Served, variant: type[Client]) -> None:
    client = variant(served)
    client.want("late", "default")
    assert client.session.status == (NameStatus("late"), NameStatus("default", sent="v1"))
    client.reply("n1")
    assert client.session.status == (NameStatus("late"), NameStatus("default", sent="v1", acked="v1"))
    served.put("late", "l1")
    client.session.refresh(served)
    client.reply("n2")
    assert client.session.status == (NameStatus("late", "l1", "l1"), NameStatus("default", "v1", "v1"))


@BOTH
def test_a_refused_version_stands_beside_the_one_in_use_until_a_later_one_is_taken(
    served: Served, variant: type[Client]
) -> None:
    client = variant(served)
    client.want("default")
    client.reply("n1")
    push(client, "v2")
    client.reply("n2", error="no such curve")
    refused = Nack("v2", "no such curve")
    assert client.session.status == (NameStatus("default", sent="v2", acked="v1", nacked=refused),)
    push(client, "v3")
    assert client.session.status == (NameStatus("default", sent="v3", acked="v1", nacked=refused),)
    client.reply("n3")
    assert client.session.status == (NameStatus("default", sent="v3", acked="v3"),)


@BOTH
def test_a_reply_is_about_the_version_that_it_answers(served: Served, variant: type[Client]) -> None:
    """Between an answer and its ACK the secret may change."""
    client = variant(served)
    client.want("default")
    served.put("default", "v2")
    client.reply("n1")
    assert client.session.status == (NameStatus("default", sent="v2", acked="v1"),)


@BOTH
def test_a_name_taken_out_and_put_back_begins_anew(served: Served, variant: type[Client]) -> None:
    client = variant(served)
    client.want("default")
    client.reply("n1", error="no")
    client.want()
    assert not client.session.status
    client.want("default")
    assert client.session.status == (NameStatus("default", sent="v1"),)


@BOTH
def test_a_stale_reply_changes_nothing(served: Served, variant: type[Client]) -> None:
    client = variant(served)
    client.want("default")
    client.reply("another", error="why")
    assert client.session.status == (NameStatus("default", sent="v1"),)


def test_a_delta_client_that_subscribes_again_has_nothing_until_it_says_so(served: Served) -> None:
    client = Delta(served)
    client.want("default")
    client.reply("n1")
    client.session.receive(DeltaRequest(("default",)), served)
    assert client.session.status == (NameStatus("default", sent="v1", acked=None),)


def test_that_a_name_is_not_served_is_sent_and_acked_over_delta_like_a_version(served: Served) -> None:
    client = Delta(served)
    client.want("nobody")
    client.reply("n1")
    assert client.session.status == (NameStatus("nobody", sent=REMOVED, acked=REMOVED),)


def test_a_secret_taken_back_is_still_in_use_where_it_was_taken(served: Served) -> None:
    """SotW cannot say "deleted"."""
    served.put("ROOTCA", "r1")
    client = Sotw(served)
    client.want("default", "ROOTCA")
    client.reply("n1")
    del served["default"]
    client.session.refresh(served)
    assert client.session.status[0] == NameStatus("default", sent=None, acked="v1")


def test_replies_about_names_that_are_not_subscribed_take_no_memory() -> None:
    """Or else a client that subscribes, leaves and acknowledges without end would fill it."""
    replies = Replies()
    replies.take(Acked("n", {"a": "v"}), ())
    replies.take(Nacked("n", {"b": "v"}, "no"), ())
    assert replies.status(["a", "b"], {}) == (NameStatus("a"), NameStatus("b"))


@BOTH
def test_the_names_of_answers_that_have_no_reply_count(served: Served, variant: type[Client]) -> None:
    """As long as they may get one; with files by name, a client can ask for as many as it likes."""
    client, long = variant(served), [f"{number}{'n' * 1000}" for number in range(10)]
    for name in long:
        served.put(name, "v1")
        client.want(name)
    assert 10 * 1000 < client.session.stored < 10 * 2500
    client.reply("n10")
    client.want("default")
    assert client.session.stored < 1000


@pytest.mark.parametrize(("names", "times", "replies"), [(100, MOST_OUTSTANDING, False), (10, 2, True)])
def test_a_delta_client_that_asks_again_counts_with_what_its_answers_need(
    served: Served, names: int, times: int, *, replies: bool
) -> None:
    """Short names need less than the places that they have in each answer that waits for its reply."""
    length = 1000 if replies else 1
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        client = Delta(served)
        for turn in range(times):
            client.session.receive(DeltaRequest(tuple(f"{n}{'n' * length}" for n in range(names))), served)
            if replies:
                client.reply(f"n{turn + 1}")
        client.session.receive(DeltaRequest(("default",)), served)
        kept = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert 0.75 * kept < client.session.stored < 1.6 * kept


def test_a_client_that_refuses_many_names_at_once_has_its_reason_remembered_once() -> None:
    replies, names = Replies(), [f"w{number}" for number in range(100)]
    replies.take(Nacked("n1", dict.fromkeys(names, "v1"), "no such curve " * 100), names)
    assert len({id(each.nacked.reason) for each in replies.status(names, {}) if each.nacked}) == 1


@pytest.mark.parametrize("text", ["x" * 1_000_000, "é" * 1_000_000, "\x1b[2J\n" * 100_000])
def test_a_clients_words_are_bounded_and_cannot_move_a_terminals_cursor(text: str) -> None:
    replies = Replies()
    replies.take(Nacked("n", {"a": "v"}, text), ["a"])
    (status,) = replies.status(["a"], {})
    assert status.nacked is not None
    record = StreamRecord(1, "StreamSecrets", "pid 7 (uid 101)", NOON)
    record.met(text, text)
    stream = record.status(Replies().status([text], {}))
    for shown in (status.nacked.reason, stream.node, stream.cluster, stream.names[0].name):
        assert shown.isascii()
        assert shown.isprintable()
        assert len(shown) <= 6 * (LONGEST_VALUE + 30)
        assert f"({len(text)} characters)" in shown


def record() -> StreamRecord:
    return StreamRecord(3, "StreamSecrets", "pid 7 (uid 101)", NOON)


def sent(stream: StreamRecord, nonce: str, monotonic: float, *, changed: bool = False) -> None:
    stream.sending(nonce, changed=changed, now=NOON + timedelta(seconds=monotonic), monotonic=monotonic)


def test_a_record_says_who_since_when_and_when_it_was_last_answered() -> None:
    stream = record()
    before = stream.status(())
    assert (before.number, before.method, before.peer) == (3, "StreamSecrets", "pid 7 (uid 101)")
    assert (before.connected_at, before.responded_at, before.ack_ms) == (NOON, None, None)
    sent(stream, "n1", 5)
    assert stream.status(()).responded_at == NOON + timedelta(seconds=5)


def test_only_the_first_message_is_sure_to_name_the_envoy() -> None:
    stream = record()
    stream.met("envoy-a", "edge")
    stream.met("", "")
    status = stream.status(())
    assert (status.node, status.cluster) == ("envoy-a", "edge")


def test_milliseconds_are_those_from_an_answer_to_its_own_ack() -> None:
    stream = record()
    sent(stream, "n1", 1.0)
    sent(stream, "n2", 1.5)
    assert stream.replied(Acked("n1", {}), monotonic=2.0) == 1000.0
    assert stream.status(()).ack_ms == 1000.0
    assert stream.replied(Acked("n2", {}), monotonic=2.0) == 500.0
    assert stream.replied(Acked("n2", {}), monotonic=3.0) is None, "it was replied to already"
    assert stream.status(()).ack_ms == 500.0


def test_a_nack_is_no_ack() -> None:
    stream = record()
    sent(stream, "n1", 1.0)
    assert stream.replied(Nacked("n1", {}, "no"), monotonic=2.0) == 1000.0
    assert stream.status(()).ack_ms is None


def test_the_stream_knows_which_answer_was_a_change_until_the_reply() -> None:
    stream = record()
    sent(stream, "n1", 1.0, changed=True)
    sent(stream, "n2", 1.0)
    assert [stream.is_change(nonce) for nonce in ("n1", "n2", "n3")] == [True, False, False]
    stream.replied(Acked("n1", {}), monotonic=2.0)
    assert not stream.is_change("n1")


def test_an_envoy_that_never_replies_leaves_no_times_behind() -> None:
    stream = record()
    for number in range(1000):
        sent(stream, f"n{number}", float(number), changed=True)
    known = [number for number in range(1000) if stream.is_change(f"n{number}")]
    assert known == list(range(1000 - MOST_TIMED, 1000))


def test_a_status_is_a_plain_value_that_any_view_can_write() -> None:
    stream = record()
    stream.met("envoy-a", "edge")
    status = stream.status((NameStatus("default", "v2", "v1", Nack("v2", "no")),))
    assert msgspec.json.decode(msgspec.json.encode(status), type=type(status)) == status
