"""The agent as a process: how it starts and ends, and what it refuses, as an operator and a service manager see it."""

import asyncio
import grp
import json
import os
import pty
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import anyio
import grpc
import pytest
from envoy_data_plane.envoy.service.discovery.v3 import DeltaDiscoveryRequest
from fakes.agents import SOURCE, agent, write_config
from fakes.peers import chain_of, connected
from fakes.processes import started, with_descriptors
from fakes.raw_http2 import RawPeer

from sds_agent.pki.certificates import read_pem, subject_alternative_uris

PATHS = {"PYTHONPATH": os.pathsep.join([str(SOURCE / "src"), str(SOURCE / "proto_gen")])}


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the agent that is expected to end by itself."""
    command = [sys.executable, "-m", "sds_agent", *arguments]
    env = {**os.environ, **PATHS, **environment}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False, timeout=30)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_the_agent_cleanly_and_quickly(tmp_path: Path, number: signal.Signals) -> None:
    async with agent(write_config(tmp_path, default="1h")) as running, connected(running.socket) as peer:
        await running.event("ready")
        stream = await peer.stream().ask("default")
        await stream.read()
        before = time.monotonic()
        assert await running.program.stop(number) == 0
        assert time.monotonic() - before < 2
        assert (await stream.end())[0] is grpc.StatusCode.OK
        assert not running.socket.exists()
        await running.event("stopped")


async def test_sighup_has_an_agent_reload_its_file_and_it_goes_on(tmp_path: Path) -> None:
    config = write_config(tmp_path, default="1h", other="1h")
    async with agent(config) as running, connected(running.socket) as peer:
        await running.event("ready")
        going, staying = await peer.stream().ask("other"), await peer.stream().ask("default")
        await going.read()
        await staying.read()
        write_config(tmp_path, default="1h")
        running.program.process.send_signal(signal.SIGHUP)
        assert (await going.end())[0] is grpc.StatusCode.NOT_FOUND
        reloaded = await running.event("reloaded")
        assert reloaded["workloads_removed"] == ["other"]
        assert "default" in await peer.fetch("default")
        assert await running.program.stop() == 0
        assert (await staying.end())[0] is grpc.StatusCode.OK


async def test_sighup_does_not_have_an_agent_wait_for_a_pipe(tmp_path: Path) -> None:
    config = write_config(tmp_path, default="1h")
    async with agent(config) as running:
        await running.event("ready")
        config.unlink()
        os.mkfifo(config)
        running.program.process.send_signal(signal.SIGHUP)
        assert "it is a pipe, and not a file" in (await running.event("reload_refused"))["causes"][0]
        config.unlink()
        write_config(tmp_path, default="1h", other="1h")
        assert (await running.event("reloaded"))["workloads_added"] == ["other"]


async def left_by_its_terminal(program: list[str], said: bytes) -> int | None:
    """The exit code of an agent whose terminal is closed once it has said that."""
    terminal, inside = pty.openpty()
    command, environment = ["setsid", "--ctty", *program], {**os.environ, **PATHS}
    async with await anyio.open_process(command, stdin=inside, stdout=inside, stderr=inside, env=environment) as agent:
        os.close(inside)
        try:
            shown = b""
            while said not in shown:
                shown += await anyio.to_thread.run_sync(os.read, terminal, 4096)
        finally:
            os.close(terminal)
        with anyio.fail_after(30):
            return await agent.wait()


async def test_an_agent_whose_terminal_is_closed_removes_its_socket_and_ends(tmp_path: Path) -> None:
    """The kernel sends SIGHUP. Every Envoy would take a socket left behind for an agent."""
    program = [sys.executable, "-m", "sds_agent", "run", str(write_config(tmp_path, default="1h"))]
    assert await left_by_its_terminal(program, b" ready") == 0
    assert not (tmp_path / "sds.sock").exists()


async def test_an_agent_under_nohup_outlives_its_terminal(tmp_path: Path) -> None:
    config = write_config(tmp_path, default="1h")
    async with started(["nohup", sys.executable, "-m", "sds_agent", "run", str(config)], PATHS) as program:
        await program.line('"ready"')
        program.process.send_signal(signal.SIGHUP)
        async with connected(tmp_path / "sds.sock") as peer:
            assert "default" in await peer.fetch("default")
        assert await program.stop() == 0
    assert [line for line in program.lines if '"stopping"' in line and "SIGTERM" not in line] == []


async def test_an_agent_whose_configuration_came_by_a_pipe_does_not_read_it_again(tmp_path: Path) -> None:
    """As of `sds-agent run <(...)`: the pipe is empty from then on, which is no error of anybody's."""
    config, pipe = write_config(tmp_path, default="1h"), tmp_path / "pipe"
    os.mkfifo(pipe)
    async with started([sys.executable, "-m", "sds_agent", "run", str(pipe)], PATHS) as program:
        await anyio.to_thread.run_sync(pipe.write_bytes, config.read_bytes())
        await program.line('"ready"')
        program.process.send_signal(signal.SIGHUP)
        assert "no configuration file to read again" in await program.line('"nothing_to_reload"')
        assert await program.stop() == 0


EARLY = """
import os, select, signal, sys

def hang_up(event, arguments):
    if event == "import" and arguments[0] == "asyncio":
        ACTION

sys.addaudithook(hang_up)
from sds_agent.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
"""An agent, and what happens to it early in its start."""


async def test_a_sighup_during_the_start_is_answered_when_the_agent_can_reload(tmp_path: Path) -> None:
    config = write_config(tmp_path, default="1h")
    early = EARLY.replace("ACTION", "os.kill(os.getpid(), signal.SIGHUP)")
    async with started([sys.executable, "-c", early, "run", str(config)], PATHS) as program:
        await program.line('"ready"')
        await program.line('"nothing_to_reload"')
        assert await program.stop() == 0


async def test_an_agent_whose_terminal_is_closed_during_the_start_ends(tmp_path: Path) -> None:
    early = EARLY.replace("ACTION", "print('starts', flush=True); select.select([0], [], [])")  # until the hang-up
    program = [sys.executable, "-c", early, "run", str(write_config(tmp_path, default="1h"))]
    assert await left_by_its_terminal(program, b"starts\r\n") == 0


@asynccontextmanager
async def flooded(socket: Path) -> AsyncIterator[None]:
    """A peer that sends until nothing more is taken of it, and reads nothing."""
    peer = await RawPeer.connect(socket)
    await peer.open(1, "DeltaSecrets")
    everything = bytes(DeltaDiscoveryRequest(resource_names_subscribe=["default"]))
    while True:
        with anyio.move_on_after(1) as waited:
            for _ in range(100):
                await peer.say(1, everything)
        if waited.cancelled_caught:
            break
    yield
    await peer.connection.aclose()


async def test_a_peer_that_floods_and_reads_nothing_does_not_stop_the_agent_from_ending(tmp_path: Path) -> None:
    async with agent(write_config(tmp_path, default="1h")) as running:
        await running.event("ready")
        async with flooded(running.socket):
            assert await running.program.stop() == 0
        assert not running.socket.exists()


async def test_signal_that_comes_twice_in_a_moment_tears_no_stream(tmp_path: Path) -> None:
    """GNU timeout sends one to the program and one to its group."""
    async with agent(write_config(tmp_path, default="1h")) as running, connected(running.socket) as peer:
        await running.event("ready")
        streams = [await peer.stream().ask("default") for _ in range(10)]
        for stream in streams:
            await stream.read()
        for _ in range(3):
            running.program.process.terminate()
        assert await running.program.stop(signal.SIGINT) == 0
        assert {(await stream.end())[0] for stream in streams} == {grpc.StatusCode.OK}
        await running.event("stopped")


async def test_the_agent_is_ready_only_when_every_name_has_a_secret_and_the_socket_answers(tmp_path: Path) -> None:
    async with agent(write_config(tmp_path, default="1h", other="1h")) as running:
        await running.event("ready")
        async with connected(running.socket) as peer:
            names = ("default", "other", "ROOTCA", "spiffe://demo.example", "spiffe://demo.example/default")
            assert set(await peer.fetch(*names)) == set(names)


@pytest.mark.parametrize(("hard", "served"), [(4096, 60), (190, 30)], ids=["soft limit", "hard limit"])
async def test_connections_never_take_the_descriptors_that_the_agent_needs(
    tmp_path: Path, hard: int, served: int
) -> None:
    """Most systems let a process have 1024. Without one to spare new Envoys hung, and no line said why."""
    config = write_config(tmp_path, default="5s")
    config.write_text(config.read_text().replace('"socket":', '"limits": {"streams": 200}, "socket":'))
    command = [sys.executable, *with_descriptors(128, hard), "-m", "sds_agent", "run", str(config)]
    async with started([*command, "--log-format", "json"], PATHS) as program, AsyncExitStack() as open_until_the_end:
        await program.line('"ready"')
        got = 0
        first = await open_until_the_end.enter_async_context(connected(tmp_path / "sds.sock"))
        stream = await first.stream().ask("default")
        before = chain_of((await stream.read())["default"])
        for _ in range(59):
            other = await open_until_the_end.enter_async_context(connected(tmp_path / "sds.sock"))
            with suppress(grpc.aio.AioRpcError):
                got += "default" in await other.fetch("default")
        assert got + 1 == served
        await stream.ack("default")
        assert chain_of((await stream.read())["default"]) != before, "it renews, and pushes to who is connected"
        assert await program.stop() == 0
    log = "".join(program.lines)
    assert ("few_descriptors" in log) is ("too_many_connections" in log) is (served < 60)


async def test_clients_of_the_admin_server_never_take_the_descriptors_that_envoys_need(tmp_path: Path) -> None:
    config = write_config(tmp_path, default="1h")
    command = [sys.executable, *with_descriptors(64, 64), "-m", "sds_agent", "run", str(config), "--log-format", "json"]
    async with started(command, PATHS) as program, AsyncExitStack() as open_until_the_end:
        await program.line('"admin_listening"')
        opened = [await asyncio.open_unix_connection(str(tmp_path / "sds.admin.sock")) for _ in range(80)]
        for _, writer in opened:
            open_until_the_end.callback(writer.close)
        reader, writer = opened[-1]
        writer.write(b"GET /livez HTTP/1.1\r\nHost: agent\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200 "), "all others have been accepted before"
        async with connected(tmp_path / "sds.sock") as peer:
            assert "default" in await peer.fetch("default")
        assert await program.stop() == 0
    assert "Too many open files" not in "".join(program.lines)


async def test_log_says_who_may_connect(tmp_path: Path) -> None:
    """An Envoy of another user says no more than that it cannot connect."""
    group = grp.getgrgid(os.getegid()).gr_name
    config = write_config(tmp_path, default="1h")
    config.write_text(config.read_text().replace('"socket":', f'"mode": "0600", "group": "{group}", "socket":'))
    async with agent(config) as running:
        listening = await running.event("listening")
        assert (listening["mode"], listening["group"]) == ("0600", group)
        assert listening["owner"] == pwd.getpwuid(os.geteuid()).pw_name


async def test_secret_is_the_workloads_own(tmp_path: Path) -> None:
    async with agent(write_config(tmp_path, default="1h", other="1h")) as running, connected(running.socket) as peer:
        await running.event("ready")
        for name in ("default", "other"):
            (leaf,) = read_pem(chain_of((await peer.fetch(name))[name]))
            assert subject_alternative_uris(leaf) == (f"spiffe://demo.example/{name}",)


async def test_an_agent_without_a_file_serves_default_in_the_users_directories(tmp_path: Path) -> None:
    home = {"XDG_RUNTIME_DIR": str(tmp_path / "run"), "XDG_STATE_HOME": str(tmp_path / "state"), "HOME": str(tmp_path)}
    overrides = {
        "SDS_AGENT__SDS__SOCKET": str(tmp_path / "run" / "sds.sock"),
        "SDS_AGENT__STATE_DIR": str(tmp_path / "state"),
    }
    command = [sys.executable, "-m", "sds_agent", "run", "--log-format", "text"]
    async with started(command, {**PATHS, **home, **overrides}) as program:
        line = await program.line("no configuration file")
        assert str(tmp_path / "run" / "sds.sock") in line
        await program.line(" ready")
        async with connected(tmp_path / "run" / "sds.sock") as peer:
            assert "default" in await peer.fetch("default")
        assert await program.stop() == 0


async def test_second_agent_on_the_same_socket_is_refused_and_the_first_goes_on(tmp_path: Path) -> None:
    config = write_config(tmp_path, default="1h")
    async with agent(config) as running:
        await running.event("ready")
        second = run("run", str(config), SDS_AGENT__STATE_DIR=str(tmp_path / "elsewhere"))
        assert second.returncode == 1
        assert "another sds-agent serves at" in second.stderr
        assert "Traceback" not in second.stderr
        async with connected(running.socket) as peer:
            assert "default" in await peer.fetch("default")


async def test_second_agent_on_the_same_state_is_refused(tmp_path: Path) -> None:
    config = write_config(tmp_path, default="1h")
    async with agent(config) as running:
        await running.event("ready")
        second = run("run", str(config), SDS_AGENT__SDS__SOCKET=str(tmp_path / "other.sock"))
        assert second.returncode == 1
        assert "another state_dir" in second.stderr
        assert "Traceback" not in second.stderr


async def test_killed_agent_is_followed_by_another_at_once_with_the_same_root(tmp_path: Path) -> None:
    config = write_config(tmp_path, default="1h")
    async with agent(config) as running:
        bundle = (await running.event("trust_changed"))["version"]
        await running.event("ready")
        await running.program.stop(signal.SIGKILL)
        assert running.socket.exists(), "a killed agent leaves its socket behind"
        async with agent(config) as second:
            await second.event("ready")
            assert (await second.event("trust_changed"))["version"] == bundle


async def test_restarted_agent_serves_what_it_had_and_false_leaves_no_key_on_the_disk(tmp_path: Path) -> None:
    """Without the stored certificate an agent that came with a join token would have nothing: that token is spent."""
    config, stored = write_config(tmp_path, default="1h"), tmp_path / "state" / "certificates"
    async with agent(config) as running:
        serial = (await running.event("issued"))["serial"]
        await running.program.stop()
    async with agent(config) as running:
        assert (await running.event("restored"))["serial"] == serial
        await running.program.stop(signal.SIGKILL)
    assert list(stored.iterdir()) != []
    config.write_text(json.dumps({**json.loads(config.read_text()), "keep_certificates": False}))
    async with agent(config) as running:
        await running.event("kept_certificates_removed", count=1)
        assert (await running.event("issued"))["serial"] != serial
        assert not stored.exists()


async def test_state_that_is_removed_under_agent_and_ca_outlives_both(tmp_path: Path) -> None:
    """Else each makes another root at its next start, and every peer on other machines refuses it."""
    config, ca = write_config(tmp_path, default="1h"), tmp_path / "ca.yaml"
    ca.write_text(
        "trust_domain: demo.example\nlisten: 127.0.0.1:0\nsigner: {self_signed: root}\naudit: audit.log\n"
        "log: {format: json}\ncallers: {join_tokens: tokens}\n"
    )
    command = [sys.executable, "-m", "sds_agent", "ca", "serve", str(ca)]
    root, state = tmp_path / "root", tmp_path / "state"
    async with agent(config) as running:
        await running.event("ready")
        await running.program.stop()  # with what it was still writing; one that finds its certificate writes nothing
    async with agent(config) as running, started(command, PATHS) as server:
        await running.event("restored")
        await server.line('"listening"')
        before = {directory: contents(directory) for directory in (root, state)}
        for directory in before:
            shutil.rmtree(directory)
        await running.event("state_restored", directory=str(state))
        await server.line('"state_restored"')
        assert {directory: contents(directory) for directory in before} == before


def contents(directory: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


async def test_agent_says_who_could_change_what_it_trusts(tmp_path: Path) -> None:
    config = write_config(tmp_path, default="1h")
    (tmp_path / "token").touch()
    (tmp_path / "token").chmod(0o664)
    authority = {"type": "istio", "address": "127.0.0.1:1", "ca_file": "roots.pem", "token_file": "token"}
    config.write_text(json.dumps({**json.loads(config.read_text()), "authorities": {"ca": authority}}))
    async with agent(config) as running:
        reported = await running.event("source_shared", setting="authorities.ca.token_file", level="warning")
        assert f"may write to {tmp_path / 'token'} (chmod g-w" in reported["cause"]
        reported = await running.event("credential_unusable", level="warning")
        assert f"authorities.ca.token_file: every user can read the secret in {tmp_path / 'token'}" in reported["cause"]


async def test_hooks_run_after_a_renewal_and_after_a_failure(tmp_path: Path) -> None:
    config = write_config(tmp_path, good="5s", bad="1h")
    hook = tmp_path / "hook"
    hook.write_text(f'#!/bin/sh\necho "$SDS_AGENT_WORKLOAD $SDS_AGENT_EVENT" >> {tmp_path / "seen"}\n')
    hook.chmod(0o755)
    text = json.loads(config.read_text())
    (tmp_path / "token").touch(0o600)
    nowhere = {"type": "istio", "address": "127.0.0.1:1", "ca_file": "roots.pem", "token_file": "token"}
    text["authorities"] = {"local": {"type": "embedded"}, "nowhere": nowhere}
    for workload, authority in zip(text["workloads"], text["authorities"], strict=True):
        output = {"directory": workload["name"], "on_renewed": [str(hook)], "on_failed": [str(hook)]}
        workload |= {"authority": authority, "output": output}
    config.write_text(json.dumps(text))
    async with agent(config) as running:
        await running.event("hook_succeeded", workload="good", hook="on_renewed", count=2)
        await running.event("hook_succeeded", workload="bad", hook="on_failed")
    assert set((tmp_path / "seen").read_text().splitlines()) == {"good renewed", "bad failed"}


def test_foreign_live_socket_is_not_touched(tmp_path: Path) -> None:
    config = write_config(tmp_path, default="1h")
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "sds.sock"))
        other.listen()
        refused = run("run", str(config))
        assert refused.returncode == 1
        assert "another server answers" in refused.stderr
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "sds.sock"))


def test_the_agent_reports_damaged_state_and_leaves_it_unchanged(tmp_path: Path) -> None:
    config = write_config(tmp_path, default="1h")
    roots = tmp_path / "state" / "authorities" / "local" / "roots.pem"
    roots.parent.mkdir(parents=True)
    roots.write_text("not a root")
    roots.chmod(0o600)
    refused = run("run", str(config))
    assert refused.returncode == 2
    assert str(roots) in refused.stderr
    assert "Traceback" not in refused.stderr
    assert roots.read_text() == "not a root"


def test_the_agent_reports_a_state_directory_that_it_cannot_make(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("a file")
    refused = run("run", str(write_config(tmp_path, default="1h")))
    assert refused.returncode == 2
    assert "state_dir" in refused.stderr
    assert "Traceback" not in refused.stderr


async def test_ready_says_so_and_a_stopped_agent_is_not(tmp_path: Path) -> None:
    config = write_config(tmp_path, default="1h")
    async with agent(config) as running:
        await running.event("ready")
        asked = run("ready", str(config))
        assert (asked.returncode, asked.stdout) == (0, "ready\n")
        await running.program.stop()
    asked = run("ready", str(config))
    assert asked.returncode == 1
    assert "no agent answers" in asked.stderr
    assert "Traceback" not in asked.stderr


async def test_the_first_secret_waits_for_no_library_it_does_not_need(tmp_path: Path) -> None:
    """Each of these costs as much as all that is needed, or a tenth of it (anyio) or a hundredth (json, shutil)."""
    config = write_config(tmp_path, default="1h")
    command = [sys.executable, "-X", "importtime", "-m", "sds_agent", "run", str(config)]
    async with started(command, PATHS) as program:
        await program.line('"listening"')
        async with connected(tmp_path / "sds.sock") as peer:
            assert "default" in await peer.fetch("default")
        imported = {line.rpartition("|")[2].strip() for line in program.lines if line.startswith("import time:")}
    assert {"grpc.aio", "sds_agent.app"} <= imported
    heavy = {"envoy_data_plane", "betterproto2", "httpx", "rich", "jwt", "jsonschema", "anyio", "json", "shutil"}
    assert imported & heavy == set()


async def test_the_agent_ends_quickly_while_it_makes_a_large_key(tmp_path: Path) -> None:
    names = {f"w{number}": "1h" for number in range(6)}
    config = write_config(tmp_path, **names)
    config.write_text(config.read_text().replace('"ttl": "1h"', '"ttl": "1h", "key": "rsa-4096"'))
    async with agent(config) as running:
        await running.event("trust_changed")  # the six keys are begun, and take some seconds
        before = time.monotonic()
        assert await running.program.stop() == 0
        assert time.monotonic() - before < 2


async def test_agent_whose_log_no_process_reads_serves_renews_and_ends(tmp_path: Path) -> None:
    """A log collector that stands still must not take every Envoy's certificate with it.

    The file is not named, of which a person is told on the same stream.
    """
    write_config(tmp_path, default="5s", other="5s")
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with suppress(BlockingIOError):
        while True:
            os.write(writer, b"." * 4096)
    os.set_blocking(writer, True)
    command = [sys.executable, "-m", "sds_agent", "run", "--log-level", "debug"]
    environment = {**os.environ, **PATHS}
    async with await anyio.open_process(command, stderr=writer, env=environment, cwd=tmp_path) as process:
        os.close(writer)
        try:
            async with connected(tmp_path / "sds.sock") as peer:
                await peer.reached()
                stream = await peer.stream().ask("default")
                seen = set()
                for _ in range(3):
                    seen.add(chain_of((await stream.read())["default"]))
                    await stream.ack("default")
                assert len(seen) == 3
            process.terminate()
            with anyio.fail_after(10):
                assert await process.wait() == 0
        finally:
            os.close(reader)
            if process.returncode is None:
                process.kill()
