"""The commands that show what is served and what an Envoy uses, beside a real agent and a real Envoy."""

import asyncio
import base64
import json
import os
import signal
import socket
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import jsonschema  # type: ignore[import-untyped]  # it ships no types
import pytest
import yaml
from cryptography import x509
from fakes.agents import COMMAND, PATHS, Agent, agent, write_config
from fakes.envoys import Envoy, envoy
from fakes.peers import connected
from fakes.processes import started

from sds_agent.admin.schema import FILE
from sds_agent.cli.asking import place, unreachable
from sds_agent.cli.main import INTERRUPTED
from sds_agent.inspection.envoy_admin import statistic


async def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command of ours to its end."""
    env = {**os.environ, **PATHS, **environment}
    with anyio.fail_after(60):
        done = await anyio.run_process([*COMMAND, *arguments], env=env, check=False)
    return subprocess.CompletedProcess(arguments, done.returncode, done.stdout.decode(), done.stderr.decode())


class Scene:
    """An agent, and an Envoy that has its secrets."""

    def __init__(self, running: Agent, proxy: Envoy, folder: Path) -> None:
        self.running = running
        self.proxy = proxy
        self.agent = ("--socket", str(running.socket))
        self.envoy = ("--envoy", str(folder / "admin.sock"))


@asynccontextmanager
async def scene(folder: Path) -> AsyncIterator[Scene]:
    async with agent(write_config(folder, default="1h")) as running:
        await running.event("ready")
        async with envoy(running.socket, folder) as proxy:
            await proxy.ready()
            yield Scene(running, proxy, folder)


def inline(found: dict[str, Any], index: int, *path: str) -> bytes:
    """What jq and base64 make of the path `.dynamicActiveSecrets[index].secret...`."""
    value: Any = found["dynamicActiveSecrets"][index]["secret"]
    for key in path:
        value = value[key]
    return base64.b64decode(value)


async def test_what_is_served_and_what_envoy_uses_are_shown_alike(tmp_path: Path) -> None:
    async with scene(tmp_path) as here:
        certs = (await here.proxy.admin("/certs"))["certificates"][0]
        in_use = int(certs["cert_chain"][0]["serial_number"], 16)
        for source in (here.agent, here.envoy):
            done = await run("secret", *source, "-o", "json")
            assert done.returncode == 0, done.stderr
            assert "PRIVATE KEY" not in done.stdout
            found = json.loads(done.stdout)
            chain = inline(found, 0, "tlsCertificate", "certificateChain", "inlineBytes")
            assert x509.load_pem_x509_certificates(chain)[0].serial_number == in_use
            roots = inline(found, 1, "validationContext", "trustedCa", "inlineBytes")
            assert x509.load_pem_x509_certificates(roots)[0].serial_number == int(
                certs["ca_cert"][0]["serial_number"], 16
            )
            as_table = (await run("secret", *source)).stdout.splitlines()
            assert as_table[0].split("  ")[0] == "RESOURCE NAME"
            assert f"{in_use:x}" in as_table[1]
            as_yaml = yaml.safe_load((await run("secret", *source, "-o", "yaml")).stdout)
            assert as_yaml["dynamicActiveSecrets"][0]["name"] == "default"
        same = await run("secret", *here.agent, *here.envoy, "--diff")
        assert (same.returncode, same.stdout.count(": same; ")) == (0, 2), same.stdout + same.stderr

        chain_file, roots_file = tmp_path / "chain.pem", tmp_path / "roots.pem"
        chain_file.write_text((await run("secret", "default", *here.agent, "-o", "pem")).stdout)
        roots_file.write_text((await run("secret", "ROOTCA", *here.agent, "-o", "pem")).stdout)
        command = ["openssl", "verify", "-CAfile", str(roots_file), str(chain_file)]
        assert (await anyio.run_process(command)).stdout.decode().endswith(": OK\n")

        shown = await run("status", *here.agent, "-o", "json")
        status = json.loads(shown.stdout)
        jsonschema.validate(status, json.loads(FILE.read_text()))
        assert {each["node"] for each in status["subscribers"]} == {"envoy-under-test"}
        table = await run("status", *here.agent)
        assert (table.returncode, "envoy-under-test" in table.stdout, "\x1b" in table.stdout) == (0, True, False)
        why = await run("explain", "default", *here.agent, "--envoy", "envoy-under-test")
        assert (why.returncode, "has taken version" in why.stdout) == (0, True)
        wrong = await run("explain", "Default", *here.agent)
        assert (wrong.returncode, "ask for default" in wrong.stdout) == (1, True)
        missing = await run("secret", "nope", *here.agent)
        assert (missing.returncode, "nope: no secret named 'nope'" in missing.stderr) == (1, True)
        coloured = await run("secret", "a\x1b[31m", *here.agent)
        assert (coloured.returncode, "\x1b" in coloured.stdout + coloured.stderr) == (1, False)


async def test_envoy_names_its_statistics_as_the_command_expects(tmp_path: Path) -> None:
    """Else a refused bundle whose first root is in use would be called active."""
    name, roots = "spiffe://demo.example/default", "spiffe://demo.example"
    async with agent(write_config(tmp_path, default="1h")) as running:
        await running.event("ready")
        async with envoy(running.socket, tmp_path, name=name, roots=roots) as proxy:
            await proxy.ready()
            answer = await proxy.admin("/stats?filter=version_text&format=json")
    found = {each["name"]: each["value"] for each in answer["stats"]}
    assert all(found.get(statistic(each)) for each in (name, roots)), found


async def test_status_shows_each_change_while_it_is_watched(tmp_path: Path) -> None:
    async with agent(write_config(tmp_path, default="1h")) as running:
        await running.event("admin_listening")
        command = ["bash", "-c", 'exec "$@" 1>&2', "-", *COMMAND, "status", "--watch", "--socket", str(running.socket)]
        async with started(command, PATHS) as watching:
            await watching.line("No Envoy is connected.")
            async with connected(running.socket) as peer:
                await (await peer.stream().ask("default", node="envoy-a")).read()
                await watching.line("envoy-a")
            watching.process.send_signal(signal.SIGINT)
            assert await watching.process.wait() == INTERRUPTED
            assert not any("Traceback" in line for line in watching.lines)


async def test_a_user_who_may_not_ask_and_an_agent_without_an_admin_server_are_told_apart(tmp_path: Path) -> None:
    file = write_config(tmp_path, default="1h")
    file.write_text(json.dumps({**json.loads(file.read_text()), "admin": {"enabled": False}}))
    done = await run("status", "--config", str(file))
    assert (done.returncode, "has admin.enabled: false" in done.stderr) == (1, True)
    async with agent(file) as running:
        await running.event("ready")
        done = await run("status", "--socket", str(running.socket))
        assert (done.returncode, "serves secrets and no admin server answers" in done.stderr) == (1, True)
        assert (await run("secret", "default", "--socket", str(running.socket))).returncode == 0
        assert (await run("secret", "--config", str(file))).stdout.count("ACTIVE") == 2, "names of the configuration"


@pytest.mark.parametrize(
    ("words", "said"), [(b"", "has not answered within 2 s"), (b"SSH-2.0-x\r\n", "does not answer as an agent does")]
)
async def test_another_program_at_the_socket_is_not_said_to_serve_secrets(
    words: bytes, said: str, tmp_path: Path
) -> None:
    """As where `--socket` names another program's, or an agent hangs."""
    config = write_config(tmp_path, default="1h")
    place = tmp_path / "sds.sock"

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(words)
        with suppress(OSError):
            await reader.read()
        writer.close()

    async with await asyncio.start_unix_server(answer, place):
        for command in (["ready"], ["status"], ["explain", "default"], ["secret"]):
            done = await run(*command, "--socket", str(place))
            assert (done.returncode, done.stderr.count("\n"), done.stdout) == (1, 1, ""), done.stderr
            assert f"no agent answers at {place}: what listens there {said}" in done.stderr
        done = await run("doctor", "--config", str(config))
        assert done.returncode == 1
        assert f"bad      socket: no agent answers Envoys at {place}: what listens there {said}" in done.stdout
        assert "serves secrets" not in done.stdout


def test_why_a_socket_cannot_be_connected_to_is_said(tmp_path: Path) -> None:
    assert unreachable(tmp_path / "none.sock") == "there is no such socket"
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        listener.bind(str(tmp_path / "a.sock"))
        assert unreachable(tmp_path / "a.sock") == "no process listens there"
        listener.listen()
        assert unreachable(tmp_path / "a.sock") is None


@pytest.mark.parametrize("text", ["127.0.0.1:9902", "localhost:1", "[::1]:9902"])
def test_an_address_without_its_scheme_is_no_path(text: str) -> None:
    assert place(text) == f"http://{text}"


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("HTTP://127.0.0.1:9902/A", "http://127.0.0.1:9902/A"),
        ("Https://Agent", "https://Agent"),
        ("ftp://a", "ftp://a"),
    ],
)
def test_a_scheme_in_capitals_is_no_path(text: str, meant: str) -> None:
    assert place(text) == meant
    assert place(f"/run/{text}") == f"/run/{text}"


@pytest.mark.parametrize("command", [("status",), ("explain", "default"), ("secret", "default")])
async def test_without_an_agent_one_sentence_says_where_it_was_sought_and_how_to_start_it(
    tmp_path: Path, command: tuple[str, ...]
) -> None:
    done = await run(*command, "--socket", str(tmp_path / "sds.sock"))
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert str(tmp_path) in done.stderr
    assert "start one" in done.stderr


async def test_an_agent_that_was_killed_and_one_that_shows_nothing_are_no_tracebacks(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as left:
        left.bind(str(tmp_path / "sds.admin.sock"))
    done = await run("status", "--socket", str(tmp_path / "sds.sock"))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    done = await run("secret", "default", "--envoy", "http://127.0.0.1:1", "--socket", str(tmp_path / "sds.sock"))
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert "no Envoy answers at http://127.0.0.1:1" in done.stderr
    done = await run("secret", "--diff")
    assert (done.returncode, "--envoy" in done.stderr) == (2, True)
    done = await run("secret", "default", "--timeout", "nan")
    assert (done.returncode, "seconds above 0" in done.stderr) == (2, True)
    done = await run("secret", "default", "--envoy", "http://a:b")
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
