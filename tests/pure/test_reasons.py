"""Why a name is or is not served to an Envoy: each answer sends a person somewhere, so it has to be the right one."""

from datetime import datetime, timedelta

import pytest
from fakes.hierarchy import NOW
from fakes.observed import ABOUT, FAILURE, HOUR, LEAF, STREAM, Seen, workload
from msgspec.structs import replace

from sds_agent.admin.model import TIME
from sds_agent.admin.reasons import explain
from sds_agent.admin.view import status
from sds_agent.cli.status import headline
from sds_agent.doctor.agents import of_agent
from sds_agent.issuance.expiry import watched
from sds_agent.issuance.status import AnchorStatus, LeftOut, TrustStatus
from sds_agent.log import LONGEST_VALUE
from sds_agent.sds.departed import MOST, DepartedStream, Departures
from sds_agent.sds.status import Nack, NameStatus
from sds_agent.text import printable


def found(seen: Seen, name: str, node: str | None = None) -> list[tuple[str, str]]:
    return [(each.verdict, each.text) for each in explain(status(seen, NOW), name, node)]


def asking(*names: NameStatus) -> Seen:
    return Seen(streams=(replace(STREAM, names=names),))


CURRENT = NameStatus("web", "v1", "v1")


@pytest.mark.parametrize("name", ["web", "spiffe://demo.example/web"])
def test_a_name_that_is_served_and_taken_is_good_from_end_to_end(name: str) -> None:
    answers = found(asking(CURRENT), name, "edge-1")
    assert [verdict for verdict, _ in answers] == ["good"] * 4
    assert f"configured as {ABOUT.names['web'][1]}" in answers[0][1]
    assert LEAF.serial in answers[1][1]
    assert "has taken version v1, 1.5 ms after it was sent" in answers[-1][1]


def test_a_bundle_is_explained_by_its_roots() -> None:
    answers = found(asking(NameStatus("ROOTCA", "v2", "v2")), "ROOTCA")
    assert "the trust bundle of demo.example" in answers[0][1]
    assert "'CN=root'" in answers[1][1]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("Web", "names differ by case: ask for web"),
        ("wbe", "did you mean web?"),
        ("zzz", "the agent serves web, spiffe://demo.example/web, ROOTCA"),
    ],
)
def test_a_name_that_is_not_served_is_bad_and_the_right_one_is_named(name: str, hint: str) -> None:
    verdict, text = found(Seen(), name)[0]
    assert verdict == "bad"
    assert hint in text


def test_a_workload_without_a_certificate_says_why_and_when_it_is_tried_next() -> None:
    verdict, text = found(Seen(workloads=(workload(None, served=False, failure=FAILURE),)), "web")[1]
    assert verdict == "bad"
    assert f"{FAILURE.kind.value}: {FAILURE.cause}" in text
    assert "the next is at" in text


def test_an_expired_certificate_is_bad_and_a_failing_renewal_is_a_warning() -> None:
    assert found(Seen(workloads=(workload(served=False),)), "web")[1][0] == "bad"
    answers = found(Seen(workloads=(workload(failure=FAILURE),)), "web")
    assert answers[2][0] == "warning"
    assert "its renewal fails" in answers[2][1]


@pytest.mark.parametrize(
    ("at", "served", "words"),
    [
        (LEAF.valid_until, False, "its certificate 4f ended at 2026-"),
        (LEAF.valid_from - HOUR, True, "its certificate 4f is not valid before 2026-"),
        (LEAF.valid_from, False, "its certificate 4f had ended and is withheld"),
    ],
)
def test_a_certificate_that_is_not_valid_is_never_called_good(at: datetime, words: str, *, served: bool) -> None:
    """As where the clock was set back: the agent is not ready then, and says why."""
    shown = status(Seen(workloads=(workload(served=served),)), at)
    assert [each.text for each in explain(shown, "web") if each.verdict == "bad" and words in each.text]
    assert [each.condition for each in of_agent(shown, "0.1") if each.subject == "workload web"] == ["bad"]


@pytest.mark.parametrize(
    ("refused", "goes_on"),
    [
        (NameStatus("web", "v0", "v0", Nack("v1", "no such curve")), "it goes on with version v0"),
        (
            NameStatus("web", "v1", "v0", Nack("v1", "no such curve")),
            "it goes on with version v0; these words may be about another secret of its own, for which it refuses all "
            "until it is restarted",
        ),
    ],
)
def test_an_envoy_that_was_sent_the_former_once_more_is_not_to_be_restarted(refused: NameStatus, goes_on: str) -> None:
    shown = status(asking(refused), NOW)
    assert f"no such curve; {goes_on}; " in explain(shown, "web")[-1].text
    (said,) = (each.text for each in of_agent(shown, "0.1") if each.subject == "Envoy edge-1")
    assert f"refuses web: no such curve; {goes_on}; " in said


def test_a_secret_that_was_taken_beside_one_that_was_refused_may_be_what_is_wrong() -> None:
    """As a real Envoy says at its start of its roots what is wrong with its certificate, which it acknowledges."""
    roots = NameStatus("ROOTCA", "v2", None, Nack("v2", "OCSP response is required"))
    one = Seen(streams=(replace(STREAM, names=(CURRENT, roots)),))
    two = Seen(streams=(replace(STREAM, names=(CURRENT,)), replace(STREAM, number=8, names=(roots,))))
    other = Seen(streams=(replace(STREAM, names=(CURRENT,)), replace(STREAM, node="b", peer="pid 2", names=(roots,))))
    back = NameStatus("ROOTCA", "v1", "v1", Nack("v2", "OCSP response is required"))
    taken_back = Seen(streams=(replace(STREAM, names=(CURRENT, back)),))
    for seen, said in ((one, True), (two, True), (other, False), (taken_back, False)):
        last = found(seen, "web")[-1]
        assert last[0] == ("warning" if said else "good")
        assert ("it refuses ROOTCA (OCSP response is required)" in last[1]) == said


def test_a_certificate_that_nears_its_end_is_said_to_as_the_log_says_it() -> None:
    """As where the program has stopped that makes the files of an authority: nothing fails, and nothing is renewed."""
    given = replace(LEAF, renew_at=None, valid_until=LEAF.not_after)
    (leaf, *_) = watched([workload(given)], TrustStatus(None, ()))
    seen = Seen(workloads=(workload(given),), streams=(replace(STREAM, names=(CURRENT,)),))
    for at, near in ((leaf.warn_at - timedelta(seconds=1), False), (leaf.warn_at, True)):
        shown = status(seen, at)
        assert ("the certificate of web nears its end" in headline(shown)) == near
        assert [each.condition for each in of_agent(shown, "0.1") if each.subject == "workload web"] == [
            "warning" if near else "good"
        ]
        assert [each.verdict for each in explain(shown, "web") if "that is near" in each.text] == ["warning"] * near


def test_a_bundle_whose_last_root_has_ended_is_never_called_good() -> None:
    made = status(Seen(), NOW)
    end = max(each.not_after for each in made.bundles[0].anchors)
    for at, verdict in ((end - timedelta(seconds=1), "good"), (end, "bad")):
        step = explain(replace(made, at=at), "ROOTCA")[1]
        assert (step.verdict, "no peer is accepted" in step.text) == (verdict, verdict == "bad")


def test_a_root_that_nears_its_end_is_said_to_as_the_log_says_it() -> None:
    """Whatever its life is, and though a root of another CA goes on for years."""
    old = AnchorStatus("'CN=old'", "1", NOW - 9 * HOUR, NOW + HOUR, ("vault",), None, "k")
    renewed = replace(old, subject="'CN=new'", serial="2")
    bundle = (old, renewed, replace(renewed, serial="3", not_after=NOW + 10_000 * HOUR, not_before=NOW - 9 * HOUR))
    trust = TrustStatus("v2", bundle)
    (warn_at,) = (each.warn_at for each in watched([], trust) if each.serial == "1")
    for at, conditions in ((warn_at - timedelta(seconds=1), ["good"]), (warn_at, ["warning"])):
        shown = status(Seen(trust=trust, federated=(), workloads=(), streams=()), at)
        assert ("roots near their end: 'CN=old'" in headline(shown)) == (conditions == ["warning"])
        said = [each for each in of_agent(shown, "0.1") if each.subject == "bundle ROOTCA"]
        assert [each.condition for each in said] == conditions


def test_an_envoy_that_refused_it_is_quoted() -> None:
    refused = NameStatus("web", "v1", None, Nack("v1", "no such curve"))
    verdict, text = found(asking(refused), "web")[-1]
    assert (verdict, "no such curve" in text, "it has none; these words may be about another" in text) == (
        "bad",
        True,
        True,
    )


@pytest.mark.parametrize(
    ("name", "verdict", "words"),
    [
        (NameStatus("web", "v1", None), "warning", "was sent version v1 and has not acknowledged it"),
        (NameStatus("web"), "warning", "was sent version nothing"),
    ],
)
def test_an_envoy_that_is_behind_is_named(name: NameStatus, verdict: str, words: str) -> None:
    assert found(asking(name), "web")[-1][0] == verdict
    assert words in found(asking(name), "web")[-1][1]


def test_an_envoy_that_may_not_have_it_is_told_from_one_that_is_busy() -> None:
    """Else its user looks for what keeps it, and waits for a secret that never comes."""
    seen = asking(NameStatus("web", denied=True))
    verdict, text = found(seen, "web")[-1]
    assert (verdict, STREAM.peer in text, text.endswith("that workloads[].clients names")) == ("bad", True, True)
    shown = status(seen, NOW)
    assert "Envoys that ask for what is for other users: " in headline(shown)
    (said,) = [each for each in of_agent(shown, "0.1") if each.subject.startswith("Envoy ")]
    assert said.condition == "bad"
    assert said.text.startswith(f"may not have web: add a user or group of its process, {STREAM.peer}")


def test_an_envoy_that_asks_for_something_else_is_told_from_one_that_never_came() -> None:
    seen = asking(NameStatus("other", None))
    verdict, text = found(seen, "web", "edge-1")[-1]
    assert "the Envoy edge-1 is connected and does not ask for it, but for other" in text
    assert verdict == "bad", "the exit code of explain"
    assert found(seen, "web")[-1][0] == "warning", "nothing keeps the name from an Envoy that asks"
    verdict, text = found(seen, "web", "edge-2")[-1]
    assert (verdict, text.startswith("no Envoy with the node id edge-2 is connected")) == ("bad", True)
    assert text.endswith("; did you mean edge-1?")
    verdict, text = found(Seen(streams=()), "web")[-1]
    assert (verdict, "no Envoy is connected to /run/sds-agent/sds.sock" in text) == ("warning", True)


LEFT = DepartedStream(3, "StreamSecrets", "edge-2", "pid 5 (uid 101)", ("web",), NOW - 2 * HOUR, NOW - HOUR)


def test_an_envoy_that_left_is_told_from_one_that_never_came() -> None:
    """Else its user looks for a fault in its configuration, where its process has ended."""
    seen = Seen(streams=(STREAM,), departed=(LEFT,))
    verdict, text = found(seen, "web", "edge-2")[-1]
    assert verdict == "bad"
    assert f"stream 3 of edge-2 for web was open from {NOW - 2 * HOUR:%Y-%m-%d %H:%M:%S} UTC until" in text
    assert "see whether pid 5 (uid 101) still runs" in text
    never = found(seen, "web", "edge-3")[-1][1]
    assert f"and none was since {ABOUT.started_at:%Y-%m-%d %H:%M:%S} UTC; check that it runs, that its node.id" in never
    assert "stream 3" in found(Seen(streams=(), departed=(LEFT,)), "web")[-1][1]
    assert "none was since" in found(Seen(streams=()), "web")[-1][1]


@pytest.mark.parametrize("node", ["über-1", "sidecar~" + "x" * 200, "sidecar~" + "ü" * 200])
def test_an_envoy_is_found_by_its_node_id_whatever_the_status_makes_of_it(node: str) -> None:
    """It escapes what is not ASCII, and of an Envoy that left it has the beginning alone."""
    shown, departures = printable(node, LONGEST_VALUE), Departures()
    stream = replace(STREAM, node=shown, names=(CURRENT,))
    departures.note(stream, NOW, "")
    left = Seen(streams=(), departed=departures.streams)
    for known in (node, shown):
        assert "has taken version v1" in found(Seen(streams=(stream,)), "web", known)[-1][1]
        assert f"was open from {STREAM.connected_at:{TIME}}" in found(left, "web", known)[-1][1]


@pytest.mark.parametrize("directory", ["/etc/über", "/etc/" + "x" * 200, "/etc/" + "x" * 900])
def test_who_asks_or_has_asked_for_a_file_is_found_by_its_name_whatever_the_status_makes_of_that(
    directory: str,
) -> None:
    name, departures = f"file-root:{directory}/ca.crt", Departures()
    stream = replace(STREAM, names=(NameStatus(printable(name, LONGEST_VALUE), "v1", "v1"),))
    assert "has taken version v1" in found(Seen(streams=(stream,)), name)[-1][1]
    departures.note(stream, NOW, "")
    left = Seen(streams=(), departed=departures.streams)
    assert f"was open from {STREAM.connected_at:{TIME}}" in found(left, name)[-1][1]


def test_an_envoy_that_has_another_stream_is_told_why_the_agent_ended_this_one() -> None:
    """An Envoy asks for each secret on a stream of its own: the one for the roots goes on."""
    cause = "a process of uid 101 may not have 'web'"
    denied = replace(LEFT, node=STREAM.node, peer=STREAM.peer, cause=cause, left_at=NOW - timedelta(seconds=30))
    seen = Seen(streams=(replace(STREAM, names=(NameStatus("ROOTCA", "v2", "v2"),)),), departed=(denied,))
    for node in (None, STREAM.node):
        verdict, text = found(seen, "web", node)[-1]
        assert (verdict, text.endswith("when the agent ended it: a process of uid 101 may not have 'web'")) == (
            "bad",
            True,
        )
    shown = status(seen, NOW)
    (said,) = [each for each in of_agent(shown, "0.1") if each.subject == f"Envoy {STREAM.node}"]
    assert (said.condition, said.text.startswith("did not get web at ")) == ("bad", True)
    assert not [each for each in of_agent(shown, "0.1") if "all have what is served" in each.text]
    assert f"Envoys that ask again and again for what they do not get: {STREAM.node}" in headline(shown)
    for other in (replace(denied, peer="pid 5 (uid 5)"), replace(denied, left_at=NOW - HOUR)):
        others = of_agent(status(replace(seen, departed=(other,)), NOW), "0.1")
        assert [each for each in others if "all have what is served" in each.text], "it may be past"


def test_an_envoy_whose_stream_the_agent_ended_is_told_why() -> None:
    seen = Seen(streams=(), departed=(replace(LEFT, names=("wbe",), cause="no secret named 'wbe'"),))
    assert found(seen, "web", "edge-2")[-1][1].endswith("when the agent ended it: no secret named 'wbe'")


def test_a_stream_of_a_connected_envoy_that_ended_is_named() -> None:
    seen = replace(asking(NameStatus("other", None)), departed=(replace(LEFT, node="edge-1"),))
    assert "does not ask for it (the stream of edge-1 for it ended at" in found(seen, "web", "edge-1")[-1][1]


def test_an_agent_that_does_not_say_who_left_is_not_taken_to_say_that_nobody_did() -> None:
    earlier = replace(status(Seen(streams=()), NOW), departed=None)
    assert "it never was, or its stream has ended" in explain(earlier, "web", "edge-2")[-1].text


def test_an_agent_that_has_forgotten_streams_says_so() -> None:
    seen = Seen(streams=(), departed=tuple(replace(LEFT, node=f"edge-{n}") for n in range(MOST)))
    assert "as far as the agent remembers" in found(seen, "web", "odd")[-1][1]


def test_a_thousand_envoys_do_not_hide_the_one_that_refuses() -> None:
    good = tuple(replace(STREAM, number=n, node=f"edge-{n}", names=(CURRENT,)) for n in range(1000))
    refused = replace(STREAM, node="odd", names=(NameStatus("web", "v1", None, Nack("v1", "no such curve")),))
    answers = found(Seen(streams=(*good, refused)), "web")
    assert len(answers) < 12
    assert ("good", "995 more Envoys are like that (current); name one by --envoy") in answers
    assert "the Envoy odd refuses" in answers[-1][1]


def test_a_name_that_no_envoy_asks_for_is_no_fault_of_the_agent() -> None:
    assert found(asking(NameStatus("other", None)), "web")[-1][0] == "warning"


def test_the_name_of_a_file_is_called_neither_unknown_nor_good() -> None:
    """The status does not say which files may be asked for."""
    assert found(Seen(), "file-root:/etc/roots.pem")[0][0] == "warning"


def test_a_bundle_without_roots_and_one_with_less_than_advertised_say_so() -> None:
    assert found(Seen(trust=TrustStatus(None, ())), "ROOTCA")[1][0] == "bad"
    left_out = TrustStatus("v2", Seen().trust.anchors, (LeftOut("vault", ("it has ended",)),))
    assert ("warning", "what vault advertises is not all in it: it has ended") in found(Seen(trust=left_out), "ROOTCA")
