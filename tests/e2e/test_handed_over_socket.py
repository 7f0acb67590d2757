"""A socket that a service manager listens on: an Envoy that connects while the agent restarts waits, and is refused
nothing.
"""

import os
import shutil
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest
from fakes.agents import COMMAND, PATHS, Agent, write_config
from fakes.peers import chain_of, connected
from fakes.processes import started

TAKE = 'exec 3<&"$1"; shift; export LISTEN_PID=$$ LISTEN_FDS=1 LISTEN_FDNAMES=sds; exec "$@"'
"""Hands a descriptor over as systemd does: as number 3, and with the process's own id."""


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as made:
        made.bind(str(tmp_path / "sds.sock"))
        (tmp_path / "sds.sock").chmod(0o660)
        made.listen(64)
        made.set_inheritable(True)
        yield made


def command(descriptor: int, *arguments: str) -> list[str]:
    bash = shutil.which("bash")
    assert bash is not None
    return [bash, "-c", TAKE, "-", str(descriptor), *COMMAND, *arguments]


@asynccontextmanager
async def agent_on(listening: socket.socket, config: Path) -> AsyncIterator[Agent]:
    """The agent, which gets the descriptor as its own number 3."""
    duplicate = os.dup(listening.fileno())
    os.set_inheritable(duplicate, True)
    arguments = ["run", str(config), "--log-format", "json", "--log-level", "debug"]
    try:
        async with started(command(duplicate, *arguments), PATHS, pass_fds=[duplicate]) as program:
            yield Agent(program, config.with_name("sds.sock"))
    finally:
        os.close(duplicate)


async def test_a_restart_refuses_no_connection(tmp_path: Path, listening: socket.socket) -> None:
    config = write_config(tmp_path, default="1h")
    async with agent_on(listening, config) as first, connected(first.socket) as peer:
        chain = chain_of((await peer.fetch("default"))["default"])
        assert await first.program.stop() == 0
    assert first.socket.exists(), "it is the service manager's"
    async with connected(first.socket) as peer, anyio.create_task_group() as tasks:
        received: list[object] = []

        async def ask() -> None:
            received.append(chain_of((await peer.fetch("default"))["default"]))

        tasks.start_soon(ask)  # connects while there is no agent
        async with agent_on(listening, config):
            with anyio.fail_after(10):
                while not received:
                    await anyio.lowlevel.checkpoint()
    assert received == [chain]


async def test_a_handed_over_socket_that_was_removed_is_replaced_by_one_of_the_agents_own(
    tmp_path: Path, listening: socket.socket
) -> None:
    async with agent_on(listening, write_config(tmp_path, default="1h")) as running:
        await running.event("ready")
        running.socket.unlink()
        await running.event("socket_restored")
        async with connected(running.socket) as peer:
            await peer.fetch("default")


def refused(listening: socket.socket, config: Path) -> str:
    """Why the agent does not start on this socket."""
    done = subprocess.run(
        command(listening.fileno(), "run", str(config)),
        env={**os.environ, **PATHS},
        pass_fds=[listening.fileno()],
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )
    assert done.returncode == 2, done.stderr
    return done.stderr.splitlines()[-1]


def test_a_socket_to_which_every_user_may_connect_is_refused(tmp_path: Path, listening: socket.socket) -> None:
    (tmp_path / "sds.sock").chmod(0o666)
    assert "write SocketMode=0660" in refused(listening, write_config(tmp_path, default="1h"))


def test_a_socket_at_another_path_is_refused(tmp_path: Path, listening: socket.socket) -> None:
    config = write_config(tmp_path, default="1h")
    (tmp_path / "sds.sock").rename(tmp_path / "moved.sock")
    config.write_text(config.read_text().replace("sds.sock", "other.sock"))
    assert "write ListenStream=" in refused(listening, config)


def test_what_is_no_socket_is_refused(tmp_path: Path) -> None:
    config = write_config(tmp_path, default="1h")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as wrong:
        wrong.bind(str(tmp_path / "sds.sock"))
        wrong.set_inheritable(True)
        assert "which is no Unix stream socket; write ListenStream=PATH" in refused(wrong, config)
