"""`sds-agent ready`, as a person and a service manager use it: whom it finds, what it says, and the exit code."""

import os
import socket
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import anyio
import pytest
from fakes.agents import agent, agent_by_environment, write_config
from fakes.ca_servers import WEB, fresh, plug, served

from sds_agent.ca.tokens import JoinTokens


async def ready(*arguments: str, **environment: str) -> tuple[int, str]:
    """The exit code, and what was said."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment}
    command = [sys.executable, "-m", "sds_agent", "ready", *arguments]
    done = await anyio.run_process(command, env=env, stderr=subprocess.STDOUT, check=False)
    said = done.stdout.decode()
    assert "Traceback" not in said
    return done.returncode, said


async def test_each_workload_is_named_with_the_reason_until_it_has_a_certificate_and_once_it_has_none(
    tmp_path: Path, port: int
) -> None:
    root = fresh("root")
    plug(tmp_path / "ca", fresh("signer", root), [], [root])
    tokens = JoinTokens(tmp_path / "tokens")
    tokens.prepare()
    (tmp_path / "token").write_text(tokens.make(WEB, datetime.now(UTC) + timedelta(minutes=5)))
    config = tmp_path / "sds-agent.yaml"
    config.write_text(
        f"trust_domain: demo.example\nstate_dir: state\nsds: {{socket: sds.sock}}\nworkloads:\n"
        f"  - {{name: web, spiffe_id: {WEB}, ttl: 5s, authority: ca}}\n"
        f"  - {{name: own, spiffe_id: spiffe://demo.example/own, authority: own}}\n"
        f"authorities:\n  own: {{type: embedded}}\n"
        f"  ca: {{type: istio, address: '127.0.0.1:{port}', ca_file: ca/root-cert.pem, token_file: token}}\n"
    )
    async with agent(config) as running:
        await running.event("retrying", workload="web")
        code, said = await ready(str(config))
        assert code == 1
        first, reason = said.splitlines()
        assert first == f"sds-agent: the agent at {tmp_path}/sds.sock is not ready; its log has more:"
        assert reason.startswith("sds-agent: web: not issued yet; the last ")
        assert "(transient: the CA cannot be reached, or is not ready)" in reason
        async with served(tmp_path, signer="{cacerts: ca}", roots=b"", listen=f"127.0.0.1:{port}"):
            await running.event("ready")
            assert await ready(str(config)) == (0, "ready\n")
        await running.event("expired", workload="web")
        code, said = await ready("--socket", str(tmp_path / "sds.sock"))
        assert code == 1
        assert "sds-agent: web: expired at " in said
        assert "own" not in said


async def test_the_agent_that_runs_on_the_defaults_is_found(tmp_path: Path) -> None:
    """By another shell than its own, which has not the variables that the service manager gave it."""
    (tmp_path / "run").mkdir()
    run = {"XDG_RUNTIME_DIR": str(tmp_path / "run"), "SDS_AGENT__STATE_DIR": str(tmp_path / "state")}
    there = tmp_path / "run" / "sds-agent" / "sds.sock"
    async with agent_by_environment(run, there) as running:
        await running.event("ready")
        assert await ready(**run, RUNTIME_DIRECTORY=str(tmp_path / "elsewhere")) == (0, "ready\n")


async def test_an_agent_by_istios_variables_is_asked_by_the_same(tmp_path: Path, port: int) -> None:
    variables = {
        "CA_ADDR": f"127.0.0.1:{port}",
        "POD_NAMESPACE": "shop",
        "SERVICE_ACCOUNT": "web",
        "SDS_AGENT__STATE_DIR": str(tmp_path / "state"),
    }
    async with agent_by_environment(variables, tmp_path / "sds.sock") as running:
        await running.event("retrying")
        code, said = await ready(**variables, SDS_AGENT__SDS__SOCKET=str(tmp_path / "sds.sock"))
        assert code == 1
        assert "sds-agent: default: not issued yet; the last " in said


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ("missing", "there is no socket"),
        ("killed", "no process listens at it"),
        ("no socket", "that is no socket"),
        ("silent", "what listens there has not answered within 2 s; it is starting, hangs, or is another program"),
    ],
)
async def test_ready_says_why_no_agent_answers(tmp_path: Path, state: str, said: str) -> None:
    path = tmp_path / "sds.sock"
    if state == "no socket":
        path.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        if state in {"killed", "silent"}:
            listener.bind(str(path))
        if state == "silent":
            listener.listen()
        code, printed = await ready("--socket", str(path))
    assert (code, said in printed) == (1, True), printed


async def test_an_agent_that_ended_says_nothing_and_a_broken_file_is_no_matter_of_its_socket(tmp_path: Path) -> None:
    """A health check by `--socket` reads no file: a mistake in it must not end an agent that runs."""
    config = write_config(tmp_path, default="1h")
    async with agent(config) as running:
        await running.event("ready")
        config.write_text("trust_domain: [")
        assert (await ready(str(config)))[0] == 2
        assert await ready("--socket", str(running.socket)) == (0, "ready\n")
