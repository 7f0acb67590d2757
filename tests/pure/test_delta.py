"""DeltaSecrets, rule by rule."""

import itertools

import pytest
from fakes.served import Served

from sds_agent.sds.delta import MOST_OUTSTANDING, DeltaSession
from sds_agent.sds.protocol import (
    Acked,
    Action,
    DeltaRequest,
    Finish,
    Nacked,
    Refused,
    Respond,
    Stale,
    StatusCode,
    Subscribed,
    Unsubscribed,
)


def session(most_names: int = 100) -> DeltaSession:
    return DeltaSession((f"n{i}" for i in itertools.count(1)), most_names=most_names)


def add(*names: str, nonce: str = "", error: str | None = None) -> DeltaRequest:
    return DeltaRequest(subscribe=names, nonce=nonce, error=error)


def drop(*names: str, nonce: str = "") -> DeltaRequest:
    return DeltaRequest(unsubscribe=names, nonce=nonce)


def ack(nonce: str, error: str | None = None) -> DeltaRequest:
    return DeltaRequest(nonce=nonce, error=error)


def answers(actions: list[Action]) -> list[Respond]:
    return [action for action in actions if isinstance(action, Respond)]


def sent(actions: list[Action]) -> list[tuple[str, str]]:
    return [(r.name, r.version) for answer in answers(actions) for r in answer.resources]


def removed(actions: list[Action]) -> list[str]:
    return [name for answer in answers(actions) for name in answer.removed]


@pytest.fixture
def served() -> Served:
    view = Served()
    view.put("default", "v1")
    view.put("ROOTCA", "r1")
    return view


def test_subscription_is_answered(served: Served) -> None:
    actions = session().receive(add("default"), served)
    assert actions[0] == Subscribed(("default",))
    assert sent(actions) == [("default", "v1")]


def test_ack_then_push_of_new_content_only(served: Served) -> None:
    stream = session()
    stream.receive(add("default", "ROOTCA"), served)
    assert stream.receive(ack("n1"), served) == [Acked("n1", {"default": "v1", "ROOTCA": "r1"})]
    served.put("default", "v2")
    assert sent(stream.refresh(served)) == [("default", "v2")]


def test_unsubscribed_name_is_not_pushed(served: Served) -> None:
    stream = session()
    stream.receive(add("default", "ROOTCA"), served)
    assert stream.receive(drop("default", nonce="n1"), served)[-1] == Unsubscribed(("default",))
    served.put("default", "v2")
    assert stream.refresh(served) == []


def test_unsubscribe_of_what_was_never_subscribed_is_no_error(served: Served) -> None:
    assert session().receive(drop("default", "nobody"), served) == []


def test_subscribing_again_is_answered_again(served: Served) -> None:
    stream = session()
    stream.receive(add("default"), served)
    stream.receive(ack("n1"), served)
    assert sent(stream.receive(add("default"), served)) == [("default", "v1")]


def test_subscribe_after_unsubscribe_is_answered(served: Served) -> None:
    stream = session()
    stream.receive(add("default"), served)
    stream.receive(drop("default", nonce="n1"), served)
    assert sent(stream.receive(add("default"), served)) == [("default", "v1")]


def test_name_in_both_lists_ends_up_subscribed(served: Served) -> None:
    stream = session()
    stream.receive(add("default"), served)
    request = DeltaRequest(subscribe=("default",), unsubscribe=("default",), nonce="n1")
    actions = stream.receive(request, served)
    assert sent(actions) == [("default", "v1")]
    assert not [a for a in actions if isinstance(a, Unsubscribed)]
    assert stream.names == ("default",)


def test_stale_nonce_never_loses_a_subscription_change(served: Served) -> None:
    stream = session()
    stream.receive(add("default"), served)
    actions = stream.receive(add("ROOTCA", nonce="gone"), served)
    assert Stale("gone") in actions
    assert sent(actions) == [("ROOTCA", "r1")]


def test_nack_keeps_its_reason_and_is_not_resent_but_the_next_goes_out(served: Served) -> None:
    stream = session()
    stream.receive(add("default"), served)
    assert stream.receive(ack("n1", error="bad key"), served) == [Nacked("n1", {"default": "v1"}, "bad key")]
    assert stream.refresh(served) == []
    served.put("default", "v2")
    assert sent(stream.refresh(served)) == [("default", "v2")]


def test_nack_with_a_subscription_does_both(served: Served) -> None:
    stream = session()
    stream.receive(add("default"), served)
    actions = stream.receive(add("ROOTCA", nonce="n1", error="bad"), served)
    assert actions[0] == Nacked("n1", {"default": "v1"}, "bad")
    assert sent(actions) == [("ROOTCA", "r1")]


def test_unknown_name_is_removed_at_once_and_the_stream_stays(served: Served) -> None:
    stream = session()
    actions = stream.receive(add("nobody", "default"), served)
    assert Refused(("nobody",)) in actions
    assert removed(actions) == ["nobody"]
    assert sent(actions) == [("default", "v1")]
    assert not [a for a in actions if isinstance(a, Finish)]
    stream.receive(ack("n1"), served)
    assert stream.refresh(served) == [], "sent once"


def test_unknown_name_that_comes_to_be_served_is_pushed(served: Served) -> None:
    stream = session()
    stream.receive(add("nobody"), served)
    stream.receive(ack("n1"), served)
    served.put("nobody", "v1")
    assert sent(stream.refresh(served)) == [("nobody", "v1")]


def test_an_envoy_is_sent_no_removal_for_a_name_not_issued_yet(served: Served) -> None:
    """If it were "removed", Envoy would open its listener without a certificate."""
    served.hold("late")
    stream = session()
    assert stream.receive(add("late"), served) == [Subscribed(("late",), pending=("late",))]
    assert stream.refresh(served) == []
    served.put("late", "v1")
    assert sent(stream.refresh(served)) == [("late", "v1")]


def test_withheld_secret_is_not_removed(served: Served) -> None:
    stream = session()
    stream.receive(add("default"), served)
    stream.receive(ack("n1"), served)
    served.hold("default")
    assert stream.refresh(served) == []


def test_identity_withdrawn_in_mid_stream_is_removed(served: Served) -> None:
    stream = session()
    stream.receive(add("default"), served)
    stream.receive(ack("n1"), served)
    del served["default"]
    actions = stream.refresh(served)
    assert actions[0] == Refused(("default",))
    assert removed(actions) == ["default"]


def test_identity_withdrawn_while_an_answer_is_outstanding_is_reported_and_removed_with_the_ack(served: Served) -> None:
    stream = session()
    stream.receive(add("default", "ROOTCA"), served)
    del served["default"]
    assert stream.refresh(served) == []
    acked, refused, answer = stream.receive(ack("n1"), served)
    assert (acked, refused) == (Acked("n1", {"default": "v1", "ROOTCA": "r1"}), Refused(("default",)))
    assert removed([answer]) == ["default"]


def test_an_identity_withdrawn_before_its_first_answer_is_removed(served: Served) -> None:
    served.hold("late")
    stream = session()
    stream.receive(add("late"), served)
    del served["late"]
    assert removed(stream.refresh(served)) == ["late"]
    assert stream.refresh(served) == []


def test_stale_nack_keeps_its_reason_for_the_log(served: Served) -> None:
    stream = session()
    stream.receive(add("default"), served)
    assert stream.receive(ack("other", error="why"), served) == [Stale("other", "why")]
    assert stream.refresh(served) == [], "the answer is still outstanding"


def test_content_refused_before_an_unsubscribe_is_sent_again_on_request(served: Served) -> None:
    """What the client has dropped it has to be given anew, whatever it said of it."""
    stream = session()
    stream.receive(add("default"), served)
    stream.receive(ack("n1", error="bad"), served)
    stream.receive(drop("default"), served)
    assert sent(stream.receive(add("default"), served)) == [("default", "v1")]


def test_duplicated_names_are_answered_once(served: Served) -> None:
    stream = session()
    stream.receive(add("default"), served)
    served.put("default", "v2")
    actions = stream.receive(add("default", "default", nonce="n1"), served)
    assert actions[1] == Subscribed(("default",))
    assert sent(actions) == [("default", "v2")]


def test_ack_of_a_removal_names_what_was_removed(served: Served) -> None:
    stream = session()
    stream.receive(add("nobody"), served)
    assert stream.receive(ack("n1"), served) == [Acked("n1", {"nobody": ""})]


def test_name_taken_out_makes_room_for_another(served: Served) -> None:
    stream = session(most_names=2)
    stream.receive(add("default", "b"), served)
    actions = stream.receive(DeltaRequest(subscribe=("c",), unsubscribe=("b",), nonce="n1"), served)
    assert not [a for a in actions if isinstance(a, Finish)], "one out, one in: still two"
    assert stream.names == ("default", "c")


def test_first_message_without_names_and_the_wildcard_fetch_nothing(served: Served) -> None:
    stream = session()
    assert stream.receive(DeltaRequest(), served) == []
    assert removed(stream.receive(add("*"), served)) == ["*"]


def test_envoy_that_does_not_answer_gets_only_the_newest_when_it_does(served: Served) -> None:
    stream = session()
    stream.receive(add("default"), served)
    for version in ("v2", "v3"):
        served.put("default", version)
        assert stream.refresh(served) == []
    assert sent(stream.receive(ack("n1"), served)) == [("default", "v3")]


def test_answering_the_newest_settles_the_older_ones(served: Served) -> None:
    stream = session()
    stream.receive(add("default"), served)
    stream.receive(add("ROOTCA"), served)
    served.put("default", "v2")
    assert sent(stream.receive(ack("n2"), served)) == [("default", "v2")]


def test_each_of_two_answers_is_settled_by_itself(served: Served) -> None:
    stream = session()
    stream.receive(add("default"), served)
    stream.receive(add("ROOTCA"), served)
    assert stream.receive(ack("n1", error="bad"), served) == [Nacked("n1", {"default": "v1"}, "bad")]
    served.put("default", "v2")
    assert stream.refresh(served) == [], "the other is still outstanding"
    assert sent(stream.receive(ack("n2"), served)) == [("default", "v2")]


def test_client_that_never_answers_cannot_grow_memory(served: Served) -> None:
    stream = session()
    for _ in range(10 * MOST_OUTSTANDING):
        stream.receive(add("default"), served)
    newest = 10 * MOST_OUTSTANDING
    assert stream.receive(ack(f"n{newest - MOST_OUTSTANDING}"), served) == [Stale(f"n{newest - MOST_OUTSTANDING}")]
    oldest = f"n{newest - MOST_OUTSTANDING + 1}"
    assert stream.receive(ack(oldest), served) == [Acked(oldest, {"default": "v1"})]


def test_client_that_asks_for_ever_new_names_cannot_grow_memory(served: Served) -> None:
    stream = session()
    for number in range(1000):
        stream.receive(DeltaRequest(subscribe=(f"x{number}",), unsubscribe=(f"x{number - 1}",)), served)
    assert len(stream._sent) == len(stream.names) == 1


def test_forgotten_answers_are_the_oldest(served: Served) -> None:
    stream = session()
    for _ in range(MOST_OUTSTANDING + 1):
        stream.receive(add("default"), served)
    assert stream.receive(ack("n1"), served) == [Stale("n1")]
    assert stream.receive(ack("n2"), served) == [Acked("n2", {"default": "v1"})]
    assert stream.receive(ack(f"n{MOST_OUTSTANDING + 1}"), served) == [
        Acked(f"n{MOST_OUTSTANDING + 1}", {"default": "v1"})
    ]


def test_too_many_names_end_the_stream(served: Served) -> None:
    stream = session(most_names=2)
    stream.receive(add("a", "b"), served)
    [finish] = stream.receive(add("c"), served)
    assert isinstance(finish, Finish)
    assert finish.code is StatusCode.RESOURCE_EXHAUSTED


def test_another_type_url_is_refused(served: Served) -> None:
    [finish] = session().receive(DeltaRequest(subscribe=("default",), type_url="x"), served)
    assert isinstance(finish, Finish)
    assert finish.code is StatusCode.INVALID_ARGUMENT


def test_answer_to_a_new_name_leaves_a_waiting_push_waiting(served: Served) -> None:
    stream = session()
    stream.receive(add("default"), served)
    served.put("default", "v2")
    assert sent(stream.receive(add("ROOTCA"), served)) == [("ROOTCA", "r1")]


def test_client_that_lost_a_secret_while_it_is_withheld_gets_it_when_it_returns(served: Served) -> None:
    stream = session()
    stream.receive(add("default"), served)
    stream.receive(ack("n1"), served)
    served.hold("default")
    stream.receive(add("default"), served)
    served.put("default", "v1")
    assert sent(stream.refresh(served)) == [("default", "v1")]


class Counted(str):
    """A name that counts how often it is compared with another one."""

    __slots__ = ()
    compared = 0

    def __eq__(self, other: object) -> bool:
        type(self).compared += 1
        return str.__eq__(self, other)

    __hash__ = str.__hash__


def test_a_message_with_very_many_names_takes_no_longer_for_those_that_it_drops(served: Served) -> None:
    """One of 1 MB has more than a hundred thousand names: compared one by one, it holds up everybody for a second."""
    stream = session()
    stream.receive(add(*(f"old{number}" for number in range(100))), served)
    drops = [Counted(f"old{number}") for number in range(100)]
    adds = [f"new{number}" for number in range(1000)]
    (action,) = stream.receive(DeltaRequest(subscribe=(*adds,), unsubscribe=(*drops,)), served)
    assert isinstance(action, Finish)
    assert Counted.compared < 1000
