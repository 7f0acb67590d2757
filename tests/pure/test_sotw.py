"""StreamSecrets, rule by rule: each test is an exchange that a real Envoy has, or that a broken one may try."""

import itertools

import pytest
from fakes.compared import Name
from fakes.served import Served

from sds_agent.sds.protocol import (
    SECRET_TYPE,
    Acked,
    Action,
    Finish,
    Nacked,
    Refused,
    Respond,
    SotwRequest,
    Stale,
    StatusCode,
    Subscribed,
    Unsubscribed,
)
from sds_agent.sds.sotw import MOST_EARLIER, SotwSession


def session(most_names: int = 100) -> SotwSession:
    return SotwSession((f"n{i}" for i in itertools.count(1)), most_names=most_names)


def ask(*names: str, nonce: str = "", error: str | None = None, **more: str) -> SotwRequest:
    return SotwRequest(names=names, nonce=nonce, error=error, **more)


def answers(actions: list[Action]) -> list[Respond]:
    return [action for action in actions if isinstance(action, Respond)]


def sent(actions: list[Action]) -> list[tuple[str, str]]:
    """What goes to the client: (name, version) of every resource of every answer."""
    return [(r.name, r.version) for answer in answers(actions) for r in answer.resources]


@pytest.fixture
def served() -> Served:
    view = Served()
    view.put("default", "v1")
    view.put("ROOTCA", "r1")
    return view


def test_first_request_is_answered_with_the_secret(served: Served) -> None:
    actions = session().receive(ask("default"), served)
    assert actions == [Subscribed(("default",)), Respond("n1", (served["default"],))]  # type: ignore[arg-type] # a Resource here


def test_ack_is_noted_and_answered_with_nothing(served: Served) -> None:
    stream = session()
    stream.receive(ask("default"), served)
    assert stream.receive(ask("default", nonce="n1"), served) == [Acked("n1", {"default": "v1"})]


def test_new_content_is_pushed_once(served: Served) -> None:
    stream = session()
    stream.receive(ask("default"), served)
    stream.receive(ask("default", nonce="n1"), served)
    served.put("default", "v2")
    assert sent(stream.refresh(served)) == [("default", "v2")]
    assert stream.refresh(served) == []


def test_unchanged_content_is_not_pushed(served: Served) -> None:
    stream = session()
    stream.receive(ask("default"), served)
    stream.receive(ask("default", nonce="n1"), served)
    served.put("default", "v1")
    assert stream.refresh(served) == []


def test_nack_keeps_the_reason_and_does_not_resend_the_same(served: Served) -> None:
    stream = session()
    stream.receive(ask("default"), served)
    assert stream.receive(ask("default", nonce="n1", error="no such curve"), served) == [
        Nacked("n1", {"default": "v1"}, "no such curve")
    ]
    assert stream.refresh(served) == []


def test_after_a_nack_the_next_content_goes_out(served: Served) -> None:
    stream = session()
    stream.receive(ask("default"), served)
    stream.receive(ask("default", nonce="n1", error="no"), served)
    served.put("default", "v2")
    assert sent(stream.refresh(served)) == [("default", "v2")]


def test_nack_without_a_reason_is_still_a_nack(served: Served) -> None:
    stream = session()
    stream.receive(ask("default"), served)
    assert stream.receive(ask("default", nonce="n1", error=""), served) == [Nacked("n1", {"default": "v1"}, "")]


def test_nack_that_also_changes_names_does_both(served: Served) -> None:
    stream = session()
    stream.receive(ask("default"), served)
    actions = stream.receive(ask("ROOTCA", nonce="n1", error="no"), served)
    assert Nacked("n1", {"default": "v1"}, "no") in actions
    assert Unsubscribed(("default",)) in actions
    assert sent(actions) == [("ROOTCA", "r1")]


def test_request_that_crossed_a_push_is_ignored_with_its_names(served: Served) -> None:
    stream = session()
    stream.receive(ask("default"), served)
    stream.receive(ask("default", nonce="n1"), served)
    served.put("default", "v2")
    stream.refresh(served)
    assert stream.receive(ask("default", "ROOTCA", nonce="n1"), served) == [Stale("n1")]
    assert stream.names == ("default",)
    assert sent(stream.receive(ask("default", "ROOTCA", nonce="n2"), served)) == [("ROOTCA", "r1")]


@pytest.mark.parametrize("error", [None, "no"])
def test_first_reply_to_an_answer_counts_though_it_crossed_a_newer_one(served: Served, error: str | None) -> None:
    """No other message will say it, and a certificate waits for the ACK of its root."""
    stream = session()
    stream.receive(ask("ROOTCA"), served)
    assert sent(stream.receive(ask("ROOTCA", "default"), served)) == [("default", "v1")]
    reply = Acked("n1", {"ROOTCA": "r1"}) if error is None else Nacked("n1", {"ROOTCA": "r1"}, error)
    assert stream.receive(ask("ROOTCA", nonce="n1", error=error), served) == [reply]
    assert stream.names == ("ROOTCA", "default")
    assert stream.acknowledged == {"ROOTCA": "r1" if error is None else "", "default": ""}
    assert stream.receive(ask("ROOTCA", nonce="n1"), served) == [Stale("n1")]
    assert stream.receive(ask("ROOTCA", "default", nonce="n2"), served) == [Acked("n2", {"default": "v1"})]


def test_reply_to_an_answer_settles_those_before_it(served: Served) -> None:
    stream = session()
    stream.receive(ask("ROOTCA"), served)
    stream.receive(ask("ROOTCA", "default"), served)
    stream.receive(ask("ROOTCA", "default", nonce="n2"), served)
    assert stream.receive(ask("ROOTCA", "default", nonce="n1"), served) == [Stale("n1")]


def test_answers_that_are_never_replied_to_are_forgotten(served: Served) -> None:
    stream = session()
    for number in range(MOST_EARLIER + 2):
        stream.receive(ask("default" if number % 2 else "ROOTCA"), served)
    assert stream.receive(ask("ROOTCA", nonce="n1"), served) == [Stale("n1")]
    assert isinstance(stream.receive(ask("ROOTCA", nonce="n2"), served)[0], Acked)


def test_stale_nack_keeps_its_reason_for_the_log(served: Served) -> None:
    stream = session()
    stream.receive(ask("default"), served)
    assert stream.receive(ask("default", nonce="other", error="why"), served) == [Stale("other", "why")]


@pytest.mark.parametrize("error", [None, "from the old stream"])
def test_new_stream_with_an_old_streams_nonce_is_answered(served: Served, error: str | None) -> None:
    """A reconnecting Envoy that is met with silence would wait for a secret for ever."""
    actions = session().receive(ask("default", nonce="old.7", error=error), served)
    assert sent(actions) == [("default", "v1")]
    assert not [a for a in actions if isinstance(a, Nacked | Acked)]


def test_added_names_are_answered_at_once_and_only_they(served: Served) -> None:
    stream = session()
    stream.receive(ask("default"), served)
    stream.receive(ask("default", nonce="n1"), served)
    assert sent(stream.receive(ask("default", "ROOTCA", nonce="n1"), served)) == [("ROOTCA", "r1")]


def test_removed_names_are_silent_and_never_pushed_again(served: Served) -> None:
    stream = session()
    stream.receive(ask("default", "ROOTCA"), served)
    assert answers(stream.receive(ask("ROOTCA", nonce="n1"), served)) == []
    served.put("default", "v2")
    assert stream.refresh(served) == []


def test_emptied_list_unsubscribes_from_all(served: Served) -> None:
    stream = session()
    stream.receive(ask("default"), served)
    stream.receive(ask(nonce="n1"), served)
    served.put("default", "v2")
    assert stream.refresh(served) == []
    assert sent(stream.receive(ask("default", nonce="n1"), served)) == [("default", "v2")]


def test_name_taken_out_and_put_back_is_answered_again(served: Served) -> None:
    stream = session()
    stream.receive(ask("default", "ROOTCA"), served)
    stream.receive(ask("ROOTCA", nonce="n1"), served)
    assert sent(stream.receive(ask("ROOTCA", "default", nonce="n1"), served)) == [("default", "v1")]


def test_duplicated_names_are_answered_once(served: Served) -> None:
    assert sent(session().receive(ask("default", "default"), served)) == [("default", "v1")]


def test_empty_first_list_fetches_nothing(served: Served) -> None:
    """A message of zero bytes must not fetch a private key."""
    stream = session()
    assert stream.receive(ask(), served) == []
    served.put("default", "v2")
    assert stream.refresh(served) == []


def test_an_envoy_gets_a_name_as_soon_as_it_is_issued(served: Served) -> None:
    served.hold("late")
    stream = session()
    assert stream.receive(ask("late"), served) == [Subscribed(("late",), pending=("late",))]
    assert stream.refresh(served) == []
    served.put("late", "v1")
    assert sent(stream.refresh(served)) == [("late", "v1")]


def test_an_issued_name_does_not_wait_for_one_not_issued_yet(served: Served) -> None:
    served.hold("late")
    stream = session()
    assert sent(stream.receive(ask("default", "late"), served)) == [("default", "v1")]
    stream.receive(ask("default", "late", nonce="n1"), served)
    served.put("late", "v1")
    assert sent(stream.refresh(served)) == [("late", "v1")]


def test_withheld_secret_is_not_taken_back_and_the_next_is_pushed(served: Served) -> None:
    stream = session()
    stream.receive(ask("default"), served)
    stream.receive(ask("default", nonce="n1"), served)
    served.hold("default")
    assert stream.refresh(served) == []
    served.put("default", "v2")
    assert sent(stream.refresh(served)) == [("default", "v2")]


def test_unknown_name_alone_ends_the_stream(served: Served) -> None:
    actions = session().receive(ask("nobody"), served)
    assert actions[-1] == Finish(StatusCode.NOT_FOUND, ("nobody",))
    assert answers(actions) == []


def test_wildcard_is_an_unknown_name(served: Served) -> None:
    assert session().receive(ask("*"), served)[-1] == Finish(StatusCode.NOT_FOUND, ("*",))


def test_unknown_name_among_known_ones_is_reported_and_the_others_answered(served: Served) -> None:
    stream = session()
    actions = stream.receive(ask("default", "nobody"), served)
    assert Refused(("nobody",)) in actions
    assert sent(actions) == [("default", "v1")]


def test_unknown_name_that_comes_to_be_served_is_pushed(served: Served) -> None:
    stream = session()
    stream.receive(ask("default", "nobody"), served)
    stream.receive(ask("default", "nobody", nonce="n1"), served)
    served.put("nobody", "v1")
    assert sent(stream.refresh(served)) == [("nobody", "v1")]


def test_identity_withdrawn_in_mid_stream_ends_a_stream_that_has_no_other(served: Served) -> None:
    stream = session()
    stream.receive(ask("default"), served)
    del served["default"]
    assert stream.refresh(served) == [Finish(StatusCode.NOT_FOUND, ("default",))]


def test_identity_withdrawn_in_mid_stream_leaves_the_others(served: Served) -> None:
    stream = session()
    stream.receive(ask("default", "ROOTCA"), served)
    stream.receive(ask("default", "ROOTCA", nonce="n1"), served)
    del served["default"]
    assert stream.refresh(served) == [Refused(("default",))]
    assert stream.refresh(served) == []
    served.put("ROOTCA", "r2")
    assert sent(stream.refresh(served)) == [("ROOTCA", "r2")]
    stream.receive(ask("default", "ROOTCA", nonce="n2"), served)
    served.put("default", "v1")
    assert sent(stream.refresh(served)) == [("default", "v1")], "an identity that comes back is pushed"


def test_an_identity_withdrawn_before_its_first_answer_is_reported_too(served: Served) -> None:
    served.hold("late")
    stream = session()
    stream.receive(ask("default", "late"), served)
    del served["late"]
    assert stream.refresh(served) == [Refused(("late",))]
    assert stream.refresh(served) == []
    assert stream.receive(ask("default", "late", nonce="n1"), served) == [Acked("n1", {"default": "v1"})]


def test_identity_withdrawn_while_an_answer_is_outstanding_ends_the_stream_at_once(served: Served) -> None:
    stream = session()
    stream.receive(ask("default"), served)
    del served["default"]
    assert stream.refresh(served) == [Finish(StatusCode.NOT_FOUND, ("default",))]


def test_last_name_that_is_served_taken_out_leaves_a_stream_that_ends(served: Served) -> None:
    stream = session()
    stream.receive(ask("default", "nobody"), served)
    assert stream.receive(ask("nobody", nonce="n1"), served)[-1] == Finish(StatusCode.NOT_FOUND, ("nobody",))


@pytest.mark.parametrize("url", ["", SECRET_TYPE])
def test_empty_and_own_type_url_are_taken(served: Served, url: str) -> None:
    assert sent(session().receive(ask("default", type_url=url), served)) == [("default", "v1")]


def test_another_type_url_is_refused(served: Served) -> None:
    [finish] = session().receive(ask("default", type_url="type.googleapis.com/envoy.config.cluster.v3.Cluster"), served)
    assert isinstance(finish, Finish)
    assert finish.code is StatusCode.INVALID_ARGUMENT
    assert SECRET_TYPE in finish.detail


def test_too_many_names_end_the_stream(served: Served) -> None:
    assert sent(session(most_names=3).receive(ask("a", "default", "c", "a"), served)) == [("default", "v1")]
    [finish] = session(most_names=3).receive(ask("a", "b", "c", "d"), served)
    assert isinstance(finish, Finish)
    assert finish.code is StatusCode.RESOURCE_EXHAUSTED


def test_no_nonce_is_used_twice(served: Served) -> None:
    stream = session()
    seen = [a.nonce for a in answers(stream.receive(ask("default"), served))]
    for version in ("v2", "v1", "v2", "v3"):  # A to B and back to A is new content each time
        stream.receive(ask("default", nonce=seen[-1]), served)
        served.put("default", version)
        seen += [a.nonce for a in answers(stream.refresh(served))]
    assert len(seen) == 5
    assert len(set(seen)) == 5


def test_names_changed_before_the_first_answer(served: Served) -> None:
    served.hold("late")
    stream = session()
    stream.receive(ask("late"), served)
    assert sent(stream.receive(ask("late", "default"), served)) == [("default", "v1")]


def test_nack_before_any_answer_is_history(served: Served) -> None:
    served.hold("late")
    stream = session()
    assert stream.receive(ask("late", nonce="x", error="old"), served) == [Subscribed(("late",), pending=("late",))]
    assert stream.receive(ask("late", nonce="x", error="old"), served) == []
    served.put("late", "v1")
    assert sent(stream.refresh(served)) == [("late", "v1")]


def test_several_names_share_a_stream_and_a_push_holds_only_what_changed(served: Served) -> None:
    stream = session()
    assert sent(stream.receive(ask("default", "ROOTCA"), served)) == [("default", "v1"), ("ROOTCA", "r1")]
    stream.receive(ask("default", "ROOTCA", nonce="n1"), served)
    served.put("default", "v2")
    assert sent(stream.refresh(served)) == [("default", "v2")]


def test_envoy_that_does_not_answer_gets_only_the_newest_when_it_does(served: Served) -> None:
    stream = session()
    stream.receive(ask("default"), served)
    for version in ("v2", "v3", "v4"):
        served.put("default", version)
        assert stream.refresh(served) == []
    assert sent(stream.receive(ask("default", nonce="n1"), served)) == [("default", "v4")]


def test_empty_nonce_is_no_ack_but_its_names_count_at_once(served: Served) -> None:
    stream = session()
    stream.receive(ask("default"), served)
    actions = stream.receive(ask("default", "ROOTCA"), served)
    assert not [a for a in actions if isinstance(a, Acked)]
    assert sent(actions) == [("ROOTCA", "r1")], "a new subscription does not wait for the ACK of another"
    served.put("default", "v2")
    assert stream.refresh(served) == [], "a push does"
    assert sent(stream.receive(ask("default", "ROOTCA", nonce="n2"), served)) == [("default", "v2")]


def test_repeated_ack_says_nothing_new(served: Served) -> None:
    stream = session()
    stream.receive(ask("default"), served)
    stream.receive(ask("default", nonce="n1"), served)
    assert stream.receive(ask("default", nonce="n1"), served) == []


def test_answer_to_a_new_name_leaves_a_waiting_push_waiting(served: Served) -> None:
    stream = session()
    stream.receive(ask("default"), served)
    served.put("default", "v2")
    assert sent(stream.receive(ask("default", "ROOTCA"), served)) == [("ROOTCA", "r1")]


def test_thousands_of_names_that_change_or_are_acknowledged_are_compared_a_few_times_each(served: Served) -> None:
    """While they are compared, no other Envoy is served."""
    Name.compared = 0
    many, others = ([Name(f"{kind}{number}") for number in range(2000)] for kind in "ab")
    for name in (*many, *others):
        served.put(name, "v")
    stream = session(most_names=2000)
    stream.receive(ask(*many), served)
    (answer,) = answers(stream.receive(ask(*others), served))
    assert len(answer.resources) == len(others)
    assert len(stream.receive(ask(*map(Name, others), nonce=answer.nonce), served)) == 1
    assert Name.compared <= 20 * len(others)
