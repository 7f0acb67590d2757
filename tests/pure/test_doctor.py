"""What the doctor says: each line sends a person somewhere, so the right fault has to be called by its name."""

import copy
from collections.abc import Iterator
from datetime import timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from fakes.hierarchy import NOW
from fakes.observed import ABOUT, FAILURE, STREAM, Seen, workload
from msgspec.structs import replace

from sds_agent.admin.view import status
from sds_agent.doctor.agents import judged, of_agent, of_file, worst
from sds_agent.doctor.clocks import of_clock
from sds_agent.doctor.diagnosis import Diagnosis, bad, good, warning
from sds_agent.doctor.envoys import of_dump
from sds_agent.doctor.served import MOST_COMPARED, Served
from sds_agent.envoy_config import messages
from sds_agent.envoy_config.choices import EnvoyChoices
from sds_agent.issuance.status import TrustStatus
from sds_agent.sds.departed import DepartedStream
from sds_agent.sds.status import NameStatus

LEFT = DepartedStream(3, "StreamSecrets", "edge-2", "pid 5 (uid 101)", ("web",), NOW, NOW)
SOCKET = "/run/sds-agent/sds.sock"
NAMES = ("web", "ROOTCA")
CHOICES = EnvoyChoices(
    name="web", spiffe_id="spiffe://demo.example/web", trust_domain="demo.example", bundle="ROOTCA", socket=Path(SOCKET)
)


def dump() -> dict[str, Any]:
    """What Envoy's /config_dump shows of the configuration that we print."""
    made = messages.as_json(messages.bootstrap(CHOICES))
    static = made["static_resources"]
    return {
        "configs": [
            {"@type": "type.googleapis.com/envoy.admin.v3.BootstrapConfigDump", "bootstrap": made},
            {"static_clusters": [{"cluster": each} for each in static["clusters"]]},
            {"static_listeners": [{"listener": each} for each in static["listeners"]]},
        ]
    }


def tls(made: dict[str, Any], kind: str) -> Any:
    """The TLS context of the inbound listener, or of the cluster to the peer."""
    if kind == "down":
        return made["configs"][2]["static_listeners"][0]["listener"]["filter_chains"][0]["transport_socket"][
            "typed_config"
        ]
    cluster = next(
        each["cluster"] for each in made["configs"][1]["static_clusters"] if each["cluster"]["name"] == "peer"
    )
    return cluster["transport_socket"]["typed_config"]


def source(made: dict[str, Any]) -> Any:
    return tls(made, "down")["common_tls_context"]["tls_certificate_sds_secret_configs"][0]["sds_config"]


def sds_cluster(made: dict[str, Any]) -> Any:
    return next(
        each["cluster"] for each in made["configs"][1]["static_clusters"] if each["cluster"]["name"] == "sds-agent"
    )


def combined(made: dict[str, Any]) -> Any:
    return tls(made, "down")["common_tls_context"]["combined_validation_context"]


def plain(context: dict[str, Any]) -> None:
    """A listener for callers without certificates."""
    del context["require_client_certificate"], context["common_tls_context"]["combined_validation_context"]


def over_ads(made: dict[str, Any], name: str, cluster: str | None) -> None:
    """The listener asks for its certificate over ADS, which goes to that cluster."""
    config = tls(made, "down")["common_tls_context"]["tls_certificate_sds_secret_configs"][0]
    config.update(name=name, sds_config={"ads": {}, "resource_api_version": "V3"})
    if cluster is not None:
        ads = {"api_type": "GRPC", "grpc_services": [{"envoy_grpc": {"cluster_name": cluster}}]}
        made["configs"][0]["bootstrap"]["dynamic_resources"] = {"ads_config": ads}


def is_version(made: dict[str, Any], major: int, minor: int, patch: int) -> None:
    """The Envoy is of that version, as it says in its bootstrap; a patch of 0 is left out there."""
    version = {"major_number": major, "minor_number": minor} | ({"patch": patch} if patch else {})
    node = made["configs"][0]["bootstrap"]["node"]
    node["user_agent_build_version"] = {"version": version}


def repeats_its_node(made: dict[str, Any]) -> None:
    """An old Envoy that asks over Delta."""
    is_version(made, 1, 36, 4)
    source(made)["api_config_source"].update(api_type="DELTA_GRPC")


def pinned(made: dict[str, Any], version: tuple[int, int, int]) -> None:
    """The listener has keys of its own for session tickets."""
    tls(made, "down")["session_ticket_keys"] = {"keys": [{"inline_string": "[redacted]"}]}
    is_version(made, *version)


def spiffe(made: dict[str, Any], **config: Any) -> None:
    """The listener has the SPIFFE validator."""
    validator = {"name": "envoy.tls.cert_validator.spiffe", "typed_config": config}
    combined(made)["default_validation_context"]["custom_validator_config"] = validator


def test_the_configuration_that_we_print_has_no_mistake() -> None:
    assert of_dump(dump(), "edge", SOCKET, NAMES) == [good("Envoy edge", "no mistake in its 2 TLS contexts")]


@pytest.mark.parametrize(
    ("spoil", "condition", "words"),
    [
        (lambda made: combined(made)["default_validation_context"].clear(), "bad", "it matches no SAN"),
        (
            lambda made: tls(made, "down")["common_tls_context"].pop("combined_validation_context"),
            "bad",
            "has no roots",
        ),
        (lambda made: tls(made, "down").pop("require_client_certificate"), "bad", "asks callers for no certificate"),
        (lambda made: source(made).pop("initial_fetch_timeout"), "warning", "left out, which is 15s"),
        (lambda made: source(made).update(initial_fetch_timeout="1s"), "warning", "is 1s"),
        (
            lambda made: source(made)["api_config_source"].pop("set_node_on_first_message_only"),
            "warning",
            "repeats 60 KB",
        ),
        (
            lambda made: source(made)["api_config_source"]["grpc_services"][0]["envoy_grpc"].pop("retry_policy"),
            "warning",
            "up to 30 s",
        ),
        (lambda made: tls(made, "up")["common_tls_context"].pop("tls_params"), "warning", "stays at TLS 1.2"),
        (
            lambda made: tls(made, "up")["common_tls_context"]["tls_params"].update(
                tls_maximum_protocol_version="TLSv1_2"
            ),
            "warning",
            "stays at TLS 1.2",
        ),
        (lambda made: sds_cluster(made).pop("typed_extension_protocol_options"), "bad", "gRPC needs HTTP/2"),
        (
            lambda made: sds_cluster(made)["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"].update(
                address={"pipe": {"path": "/elsewhere"}}
            ),
            "warning",
            "it connects to /elsewhere",
        ),
        (
            lambda made: tls(made, "down")["common_tls_context"]["tls_certificate_sds_secret_configs"][0].update(
                name="wbe"
            ),
            "bad",
            "asks for wbe, which the agent does not serve; did you mean web?",
        ),
        (
            lambda made: combined(made)["default_validation_context"].update(
                trust_chain_verification="ACCEPT_UNTRUSTED"
            ),
            "bad",
            "it accepts certificates of any CA",
        ),
        (
            lambda made: combined(made)["default_validation_context"].update(allow_expired_certificate=True),
            "bad",
            "it accepts expired certificates",
        ),
        (lambda made: over_ads(made, "web", "xds"), "bad", "asks for web over ADS, so from the cluster xds, and not"),
        (lambda made: over_ads(made, "web", "sds-agent"), "bad", "asks the agent for web over ADS"),
        (lambda made: over_ads(made, "web", None), "bad", "from no server, as there is no ads_config"),
        (lambda made: over_ads(made, "other", "xds"), "warning", "gets other over ADS from the cluster xds; if"),
        (lambda made: pinned(made, (1, 39, 3)), "warning", "(1.39.3) a peer whose root was removed still resumes"),
        (
            repeats_its_node,
            "warning",
            "(1.36.4) repeats 60 KB about itself in each ACK",
        ),
    ],
)
def test_each_mistake_is_found_where_it_is(spoil: Any, condition: str, words: str) -> None:
    made = copy.deepcopy(dump())
    spoil(made)
    found = of_dump(made, "edge", SOCKET, NAMES)
    assert [(each.condition, words in each.text) for each in found] == [(condition, True)]
    assert found[0].subject.startswith("Envoy edge, ")


def test_a_listener_for_quic_is_judged_as_a_listener() -> None:
    """Its TLS context is inside of another message, and has no type there."""
    made = dump()
    plain(context := tls(made, "down"))
    chain = made["configs"][2]["static_listeners"][0]["listener"]["filter_chains"][0]
    del context["@type"]
    kind = "type.googleapis.com/envoy.extensions.transport_sockets.quic.v3.QuicDownstreamTransport"
    chain["transport_socket"]["typed_config"] = {"@type": kind, "downstream_tls_context": context}
    (only,) = of_dump(made, "edge", SOCKET, NAMES)
    assert (only.condition, only.subject) == ("warning", "Envoy edge, listener inbound")
    assert only.text.startswith("it asks callers for no certificate")


@pytest.mark.parametrize("version", [(1, 36, 0), (1, 37, 0), (1, 40, 0), (2, 0, 1)])
def test_no_envoy_that_the_agent_is_tried_with_is_blamed_for_its_version(version: tuple[int, int, int]) -> None:
    made = dump()
    is_version(made, *version)
    assert [each.condition for each in of_dump(made, "edge", SOCKET, NAMES)] == ["good"]


def test_from_137_on_delta_repeats_nothing() -> None:
    made = dump()
    source(made)["api_config_source"]["api_type"] = "DELTA_GRPC"
    is_version(made, 1, 37, 0)
    assert [each.condition for each in of_dump(made, "edge", SOCKET, NAMES)] == ["good"]


def test_one_service_without_a_policy_is_a_warning_though_another_has_one() -> None:
    made = dump()
    services = source(made)["api_config_source"]["grpc_services"]
    services.append({"envoy_grpc": {"cluster_name": "sds-agent"}})
    (found,) = of_dump(made, "edge", SOCKET, NAMES)
    assert (found.condition, "retry_policy" in found.text) == ("warning", True)


def test_where_no_socket_is_known_ads_is_not_said_to_lead_to_the_agent() -> None:
    made = dump()
    over_ads(made, "web", "sds-agent")
    endpoint = sds_cluster(made)["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"]
    endpoint["address"] = {"pipe": {"path": ""}}
    (found,) = of_dump(made, "edge", "", NAMES)
    assert "so from the cluster sds-agent, and not from the agent" in found.text


def test_an_envoy_older_than_any_that_was_tried_is_a_warning() -> None:
    made = dump()
    is_version(made, 1, 35, 12)
    assert [each.text.partition(",")[0] for each in of_dump(made, "edge", SOCKET, NAMES)] == ["it is version 1.35.12"]


def test_from_140_on_pinned_tickets_end_with_the_roots_but_not_for_the_spiffe_validator() -> None:
    made = dump()
    pinned(made, (1, 40, 0))
    assert [each.condition for each in of_dump(made, "edge", SOCKET, NAMES)] == ["good"]
    spiffe(made, trust_domains=[{"name": "demo.example"}])
    (found,) = of_dump(made, "edge", SOCKET, NAMES)
    assert "a peer that is revoked" in found.text


def test_a_trust_domain_that_matches_nobody_is_bad() -> None:
    """Envoy takes it, and then refuses every peer."""
    made = dump()
    spiffe(made, trust_domains=[{"name": "spiffe://Demo.example"}, {"name": "other.example"}])
    (found,) = of_dump(made, "edge", SOCKET, NAMES)
    assert (found.condition, found.text.rpartition("; ")[2]) == ("bad", "write demo.example")


def test_a_bundle_that_an_old_envoy_reads_once_is_a_warning() -> None:
    made = dump()
    spiffe(made, trust_bundles={"filename": "/b.json"})
    is_version(made, 1, 38, 0)
    (found,) = of_dump(made, "edge", SOCKET, NAMES)
    assert "reads /b.json once" in found.text
    is_version(made, 1, 38, 3)
    assert [each.condition for each in of_dump(made, "edge", SOCKET, NAMES)] == ["good"]


@pytest.mark.parametrize("odd", [{}, {"configs": None}, {"configs": [[], 1, "x", {"listener": 3}]}])
def test_a_dump_of_another_shape_is_no_traceback(odd: dict[str, Any]) -> None:
    assert of_dump(odd, "edge", SOCKET, NAMES)[0].condition == "warning"


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every place in a document: a mapping or a list, and the key in it."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


@pytest.mark.parametrize("odd", [None, 5, "x", [], [5], {}, {"x": 5}])
def test_no_value_in_a_dump_is_a_traceback(odd: Any) -> None:
    made = dump()
    over_ads(made, "other", "xds")
    pinned(made, (1, 35, 1))
    spiffe(made, trust_domains=[{"name": "demo.example"}], trust_bundles={"filename": "/b.json"})
    whole = of_dump(made, "edge", SOCKET, NAMES)
    for holder, key in list(places(made)):
        before, holder[key] = holder[key], odd
        assert of_dump(made, "edge", SOCKET, NAMES)
        holder[key] = before
    assert of_dump(made, "edge", SOCKET, NAMES) == whole, "each place is as it was"


@pytest.mark.parametrize(
    ("seconds", "condition"), [(0, "good"), (5, "good"), (-6, "warning"), (60, "warning"), (61, "bad"), (-3600, "bad")]
)
def test_a_clock_is_judged_by_how_far_it_is_from_the_cas(seconds: int, condition: str) -> None:
    found = of_clock("vault", format_datetime(NOW, usegmt=True), NOW + timedelta(seconds=seconds))
    assert found.condition == condition
    if condition != "good":
        assert ("ahead of" if seconds > 0 else "behind") in found.text


@pytest.mark.parametrize("date", [None, "", "yesterday", "Mon, 01 Jan 99999999999999999999 00:00:00 GMT"])
def test_a_ca_that_does_not_tell_its_time_is_not_blamed(date: str | None) -> None:
    assert of_clock("vault", date, NOW).condition == "good"


@pytest.mark.parametrize("zone", ["-0000", ""])
def test_a_time_without_a_zone_is_read_as_utc(zone: str) -> None:
    date = f"{NOW:%a, %d %b %Y %H:%M:%S} {zone}".strip()
    assert "agrees" in of_clock("vault", date, NOW).text
    assert of_clock("vault", date, NOW + timedelta(hours=1)).condition == "bad"


def test_where_the_agent_is_not_known_no_socket_is_the_wrong_one() -> None:
    """As for an agent that does not answer at its admin server."""
    assert [each.condition for each in of_dump(dump(), "edge", "", ())] == ["good"]


def found(seen: Seen) -> list[Diagnosis]:
    return list(of_agent(status(seen, NOW), "0.1"))


def asking(*names: NameStatus) -> Seen:
    return Seen(streams=(replace(STREAM, names=names),))


def test_an_agent_in_order_is_good_in_every_line_but_for_a_root_that_ends_soon() -> None:
    lines = found(asking(NameStatus("web", "v1", "v1")))
    assert [each.condition for each in lines if "root ends" not in each.text and "no root yet" not in each.text] == [
        "good",
        "good",
        "good",
    ]


@pytest.mark.parametrize(
    ("seen", "subject", "condition", "words"),
    [
        (Seen(workloads=(workload(None, served=False, failure=FAILURE),)), "workload web", "bad", FAILURE.cause),
        (Seen(workloads=(workload(failure=FAILURE),)), "workload web", "warning", "its renewal fails"),
        (Seen(trust=TrustStatus(None, ())), "bundle ROOTCA", "bad", "has no root yet"),
        (Seen(), "Envoy edge-1", "bad", "refuses ROOTCA: Invalid path"),
        (asking(NameStatus("wbe")), "Envoy edge-1", "bad", "did you mean web?"),
        (asking(NameStatus("web", "v0", "v0")), "Envoy edge-1", "warning", "has not acknowledged web"),
        (Seen(streams=()), "Envoys", "warning", "check the path in their clusters"),
        (Seen(streams=(), departed=(LEFT,)), "Envoys", "warning", "the last, edge-2, left at"),
        (
            Seen(streams=(), departed=(replace(LEFT, cause="a process of uid 5 may not have 'web'"),)),
            "Envoys",
            "warning",
            "UTC: a process of uid 5 may not have 'web'",
        ),
    ],
)
def test_what_is_wrong_with_an_agent_has_a_line(seen: Seen, subject: str, condition: str, words: str) -> None:
    assert any((e.subject, e.condition) == (subject, condition) and words in e.text for e in found(seen))


def test_a_bundle_whose_last_root_has_ended_is_bad() -> None:
    made = status(Seen(), NOW)
    end = max(each.not_after for each in made.bundles[0].anchors)
    for at, condition in ((end - timedelta(seconds=1), "warning"), (end, "bad")):
        lines = [each for each in of_agent(replace(made, at=at), "0.1") if each.subject == "bundle ROOTCA"]
        assert lines[0].condition == condition


def test_another_version_than_the_commands_is_a_warning() -> None:
    lines = list(of_agent(status(Seen(), NOW), "9.9"))
    assert lines[0].condition == "warning"
    assert "restart the agent" in lines[0].text


def test_only_what_is_bad_changes_the_exit_code() -> None:
    assert not worst([good("a", "b"), warning("a", "b")])
    assert worst(found(Seen()))


def test_an_authority_that_cannot_be_reached_is_bad_only_for_workloads_that_have_no_other() -> None:
    down, up = bad("authority first", "does not answer"), good("authority second", "it answers")
    tried = {"first": [down], "second": [up], "embedded": []}
    assert list(judged(tried, [("first",)])) == [down, up]
    for chain in (("first", "second"), ("first", "embedded")):
        assert [each.condition for each in judged(tried, [chain])] == ["warning", "good"]
    assert [each.condition for each in judged(tried, [("first", "second"), ("first",)])] == ["bad", "good"]


def test_what_serves_instead_of_a_place_that_cannot_be_reached_is_said() -> None:
    """One of several addresses of an authority is no other authority."""
    down, up = bad("authority a", "does not answer"), good("authority a", "it answers")
    said = [
        next(iter(judged(tried, chains))).text.partition("; ")[2]
        for tried, chains in (
            ({"a": [down, up]}, [("a",)]),
            ({"a": [down], "b": [up]}, [("a", "b")]),
            ({"a": [down], "b": [up]}, [("b",)]),
        )
    ]
    assert said == [
        "another address of it can be reached",
        "its workloads have another authority",
        "no workload has it",
    ]


def test_a_source_that_is_null_is_no_traceback() -> None:
    made = dump()
    tls(made, "down")["common_tls_context"]["tls_certificate_sds_secret_configs"][0]["sds_config"] = {
        "api_config_source": None
    }
    assert of_dump(made, "edge", SOCKET, NAMES)


REFUSED = ("keep_certificates has changed", "web: wrong")


@pytest.mark.parametrize("refused", [(), REFUSED])
@pytest.mark.parametrize(
    ("configured", "lacking", "surplus"),
    [
        ({"web": "spiffe://demo.example/web"}, "", ""),
        ({"web": "spiffe://demo.example/other"}, "web", ""),
        ({"web": "spiffe://demo.example/web", "new": "spiffe://demo.example/new"}, "new", ""),
        (
            {f"w{number}": f"spiffe://demo.example/{number}" for number in range(9)},
            "w0, w1, w2, w3, w4 and 4 more",
            "web",
        ),
    ],
)
def test_an_agent_that_serves_something_else_than_the_file_says_is_named_and_bad_where_it_says_so_itself(
    configured: dict[str, str], lacking: str, surplus: str, refused: tuple[str, ...]
) -> None:
    """Otherwise it may run on another file than the one that was read, or with other variables."""
    seen = status(Seen(about=replace(ABOUT, reload_refused=refused)), NOW)
    found = [(each.condition, each.subject, each.text.partition(";")[0]) for each in of_file(configured, seen)]
    expected = []
    if lacking:
        expected += [("bad" if refused else "warning", "agent", f"it does not serve as the file says: {lacking}")]
    if surplus:
        expected += [("warning", "agent", f"it serves what the file does not have: {surplus}")]
    assert found == expected


def test_an_agent_that_refuses_its_changed_file_says_why_without_that_file() -> None:
    found = [each for each in of_agent(status(Seen(), NOW), "0.1") if "not taken" in each.text]
    assert found == []
    seen = status(Seen(about=replace(ABOUT, reload_refused=REFUSED)), NOW)
    (said,) = (each for each in of_agent(seen, "0.1") if "not taken" in each.text)
    assert (said.condition, "keep_certificates has changed; web: wrong; " in said.text) == ("bad", True)


def test_a_hint_names_the_agent_as_the_call_did() -> None:
    """Else it leads to another agent, or to none."""
    waiting = replace(STREAM, names=(NameStatus("it's"),))
    seen = replace(Seen(workloads=(workload(None, served=False),), streams=(waiting,)), waiting=("it's",))
    shown = status(seen, NOW)
    said = [each.text for each in of_agent(shown, "0.1", " --socket /a.sock") if "explain" in each.text]
    assert [each.partition("; see ")[2] for each in said] == [
        "`sds-agent explain web --socket /a.sock`",
        """`sds-agent explain 'it'"'"'s' --socket /a.sock`""",
    ]


def test_the_nearest_of_thousands_of_names_is_looked_for_a_few_times_alone() -> None:
    """It takes most of a second each time."""
    served = Served([f"name-{number}" for number in range(50)])
    wrong = [f"name-{number}x" for number in range(MOST_COMPARED)]
    assert [served.instead_of(each) for each in wrong * 2] == [f"did you mean {each[:-1]}?" for each in wrong * 2]
    assert served.instead_of("name-40x").startswith("there are name-0, name-1, ")
    assert served.instead_of(wrong[0]) == "did you mean name-0?"
