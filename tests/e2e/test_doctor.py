"""`sds-agent doctor` beside a real agent and real Envoys: one with mistakes, one as we print it."""

import io
import json
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from anyio import to_thread
from fakes.agents import agent, write_config
from fakes.envoys import BINARY, bootstrap, envoy
from fakes.processes import started

from sds_agent.cli.main import main


async def examined(*arguments: str) -> tuple[int, list[dict[str, str]]]:
    """The exit code, and the lines as values."""

    def run() -> tuple[int, str]:
        out = io.StringIO()
        with redirect_stdout(out), redirect_stderr(io.StringIO()):
            return main(["doctor", *arguments, "-o", "json"]), out.getvalue()

    code, text = await to_thread.run_sync(run)
    return code, json.loads(text)


def of(lines: list[dict[str, str]], subject: str) -> list[tuple[str, str]]:
    return [(each["condition"], each["text"]) for each in lines if each["subject"].startswith(subject)]


async def test_the_mistakes_of_an_envoy_are_named_and_one_as_we_print_it_has_none(tmp_path: Path) -> None:
    config = write_config(tmp_path, default="1h")
    async with agent(config) as running:
        await running.event("admin_listening")
        async with envoy(running.socket, tmp_path) as proxy:
            await proxy.ready()
            code, lines = await examined("--config", str(config), "--envoy", str(tmp_path / "admin.sock"))
            assert code == 1
            assert [text for condition, text in of(lines, f"Envoy {tmp_path}") if condition == "bad"] == [
                text for _, text in of(lines, f"Envoy {tmp_path}") if "it matches no SAN" in text
            ]
            assert any("retry_policy" in text for _, text in of(lines, f"Envoy {tmp_path}"))
            assert (
                of(lines, "workload default")[0][0] == of(lines, "socket")[0][0] == of(lines, "Envoys")[0][0] == "good"
            )
            assert not any("PRIVATE" in str(each) for each in lines)
        out = io.StringIO()
        with redirect_stdout(out):
            assert main(["envoy-config", "default", "--config", str(config), "--bootstrap", "-o", "json"]) == 0
        made = json.loads(out.getvalue())
        made["admin"] = {"address": {"pipe": {"path": str(tmp_path / "good.sock")}}}
        for each in made["static_resources"]["listeners"]:
            each["address"]["socket_address"]["port_value"] = 0
        (tmp_path / "good.json").write_text(json.dumps(made))
        command = [
            BINARY,
            "-c",
            str(tmp_path / "good.json"),
            "--disable-hot-restart",
            "--concurrency",
            "1",
            "-l",
            "info",
        ]
        async with started(command) as proxy_of_ours:
            await proxy_of_ours.line("all dependencies initialized. starting workers")
            code, lines = await examined("--config", str(config), "--envoy", str(tmp_path / "good.sock"), "--probe")
        assert [each for each in lines if each["condition"] == "bad"] == []
        assert code == 0
        assert of(lines, f"Envoy {tmp_path}") == [("good", "no mistake in its 2 TLS contexts")]
        assert of(lines, "authority local")[0][0] == "good"


async def test_an_envoy_that_starts_and_is_not_safe_or_waits_for_ever_is_told_so(tmp_path: Path) -> None:
    """Envoy's log has `Method not found` for secrets that it asks the agent for over ADS, and nothing for a CA that it
    does not check.
    """
    sds, place = tmp_path / "sds.sock", tmp_path / "admin.sock"
    made = bootstrap(sds, place, api_type="GRPC", name="default", http={"http2_protocol_options": {}})
    services = [{"envoy_grpc": {"cluster_name": "sds-agent"}}]
    made["dynamic_resources"] = {
        "ads_config": {"api_type": "GRPC", "transport_api_version": "V3", "grpc_services": services}
    }
    listener = made["static_resources"]["listeners"][0]
    context = listener["filter_chains"][0]["transport_socket"]["typed_config"]["common_tls_context"]
    context["tls_certificate_sds_secret_configs"][0]["sds_config"] = {"ads": {}, "resource_api_version": "V3"}
    context["combined_validation_context"] = {
        "default_validation_context": {"trust_chain_verification": "ACCEPT_UNTRUSTED"},
        "validation_context_sds_secret_config": context.pop("validation_context_sds_secret_config"),
    }
    (tmp_path / "envoy.json").write_text(json.dumps(made))
    command = [BINARY, "-c", str(tmp_path / "envoy.json"), "--disable-hot-restart", "--concurrency", "1", "-l", "info"]
    async with started(command) as proxy:
        await proxy.line("starting main dispatch loop")
        _, lines = await examined("--socket", str(sds), "--envoy", str(place))
    said = [text for condition, text in of(lines, f"Envoy {place}, listener") if condition == "bad"]
    assert any("asks the agent for default over ADS" in text for text in said)
    assert any("it accepts certificates of any CA" in text for text in said)
    assert not any("is tried with" in text for _, text in of(lines, f"Envoy {place}"))


async def test_a_socket_that_is_named_is_examined_beside_the_admin_server_that_answers(tmp_path: Path) -> None:
    """Else all is said to be good where no Envoy can connect."""
    config, gone = write_config(tmp_path, default="1h"), tmp_path / "gone.sock"
    async with agent(config) as running:
        await running.event("admin_listening")
        _, lines = await examined("--socket", str(running.socket))
        assert of(lines, "socket") == [("good", f"{running.socket} answers")]
        gone.with_suffix(".admin.sock").symlink_to(running.socket.with_suffix(".admin.sock"))
        code, lines = await examined("--socket", str(gone))
    assert code == 1
    assert of(lines, "socket")[0][0] == "bad"
    assert of(lines, "workload default")[0][0] == "good"


async def test_a_change_that_the_agent_refuses_is_seen_although_all_that_it_serves_is_good(tmp_path: Path) -> None:
    config = write_config(tmp_path, default="1h")
    async with agent(config) as running:
        await running.event("admin_listening")
        code, _ = await examined("--config", str(config))
        assert code == 0
        changed = json.loads(config.read_text())
        changed["workloads"].append({"name": "new", "spiffe_id": f"spiffe://{changed['trust_domain']}/new"})
        config.write_text(json.dumps({**changed, "keep_certificates": False}))
        await running.event("reload_refused")
        code, lines = await examined("--config", str(config))
    assert code == 1
    why, which = (text for condition, text in of(lines, "agent") if condition == "bad")
    assert "as that is now: keep_certificates has changed" in why
    assert which == "it does not serve as the file says: new"


@pytest.mark.parametrize("spoilt", [{"workload": []}, {"workloads": [{"name": 5}]}, {"sds": {"socket": "sds.sock"}}])
async def test_an_agent_whose_file_cannot_be_used_any_more_is_examined(
    tmp_path: Path, spoilt: dict[str, object]
) -> None:
    """It goes on with what the file held before, and what ails it meanwhile is not about the file alone."""
    config = write_config(tmp_path, default="1h")
    async with agent(config) as running:
        await running.event("admin_listening")
        changed = {**json.loads(config.read_text()), "trust_domain": 5, **spoilt}
        config.write_text(json.dumps(changed))
        await running.event("reload_refused")
        code, lines = await examined("--config", str(config))
    assert code == 1
    assert of(lines, "configuration")[0][0] == "bad"
    assert of(lines, "socket") == [("good", f"{running.socket} answers")]
    assert "it has not taken its configuration as that is now: " in dict(of(lines, "agent"))["bad"]
    assert of(lines, "workload default")[0][0] == "good"


async def test_a_file_that_the_agent_does_not_run_on_is_no_fault_of_the_agent(tmp_path: Path) -> None:
    """As one in the working directory, or one whose variables the agent alone has."""
    config, other = write_config(tmp_path, default="1h"), tmp_path / "other.yaml"
    async with agent(config) as running:
        await running.event("admin_listening")
        made = json.loads(config.read_text())
        made["workloads"][0]["name"] = "mine"
        other.write_text(json.dumps(made))
        code, lines = await examined("--config", str(other))
    assert code == 0, lines
    said = [(condition, text.partition(";")[0]) for condition, text in of(lines, "agent")]
    assert ("warning", "it does not serve as the file says: mine") in said


async def test_without_an_agent_the_rest_is_examined_all_the_same(tmp_path: Path) -> None:
    code, lines = await examined("--config", str(write_config(tmp_path, default="1h")))
    assert code == 1
    assert of(lines, "configuration")[0][0] == "good"
    assert {each["subject"] for each in lines if each["condition"] == "bad"} == {"agent", "socket"}


@pytest.mark.parametrize("text", ["x: 1", "trust_domain: [", ""])
async def test_each_problem_of_the_configuration_is_a_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    code, lines = await examined("--config", str(tmp_path / "bad.yaml"))
    assert code == 1
    assert of(lines, "configuration")[0][0] == "bad"


async def test_an_authority_that_cannot_be_reached_is_bad(tmp_path: Path) -> None:
    config = write_config(tmp_path, default="1h")
    made = json.loads(config.read_text())
    made["authorities"] = {"mesh": {"type": "istio", "address": "127.0.0.1:1", "ca_file": "x", "token_file": "y"}}
    config.write_text(json.dumps(made))
    _, lines = await examined("--config", str(config))
    assert of(lines, "authority mesh")[0][0] == "bad"
    assert "127.0.0.1:1 does not accept (Connection refused)" in of(lines, "authority mesh")[0][1]
