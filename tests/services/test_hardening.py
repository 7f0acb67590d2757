"""A process that holds keys leaves no core dump and lets no other process of its user read its memory."""

import os
import signal
import sys
from pathlib import Path

import pytest
from fakes.processes import started

PROGRAM = """
import ctypes, os, resource, signal, sys, threading

def tell(*_):
    dumpable = ctypes.CDLL(None).prctl(3, 0, 0, 0, 0)
    print("dumpable", dumpable, "core", resource.getrlimit(resource.RLIMIT_CORE)[0], file=sys.stderr, flush=True)

resource.setrlimit(resource.RLIMIT_CORE, (4096, resource.getrlimit(resource.RLIMIT_CORE)[1]))
signal.signal(signal.SIGUSR1, tell)
from sds_agent.cli.main import main
code = main(sys.argv[1:])
tell()
sys.exit(code)
"""
"""The command in a process that says of itself what the kernel knows of it: at its end, and when it is asked."""
PRIVATE = "dumpable 0 core 0"

AGENT = (
    "trust_domain: demo.example\nstate_dir: state\nsds: {{socket: {}/s.sock}}\nauthorities: {{a: {{type: embedded}}}}\n"
)
WORKLOADS = "workloads: [{name: web, spiffe_id: 'spiffe://demo.example/web'}]\n"
CA = "trust_domain: demo.example\nlisten: 127.0.0.1:0\nsigner: {self_signed: root}\ncallers: {join_tokens: tokens}\n"


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """A directory with the configurations of both servers; what they name begins there."""
    (tmp_path / "agent.yaml").write_text(AGENT.format(tmp_path) + WORKLOADS)
    (tmp_path / "ca.yaml").write_text(CA)
    return tmp_path


def environment(**more: str) -> dict[str, str]:
    return {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "SDS_AGENT_DUMPABLE": "", **more}


@pytest.mark.parametrize("command", [["run", "agent.yaml"], ["ca", "serve", "ca.yaml"]], ids=["run", "ca serve"])
async def test_a_server_that_holds_keys_keeps_its_memory_to_itself(files: Path, command: list[str]) -> None:
    async with started([sys.executable, "-c", PROGRAM, *command], environment(), files) as program:
        await program.line("listening")
        program.process.send_signal(signal.SIGUSR1)
        assert await program.line("dumpable") == PRIVATE
        assert await program.stop() == 0


@pytest.mark.parametrize(
    "command",
    [
        ["root", "r", "--trust-domain", "demo.example"],
        ["intermediate", "i", "--root", "r", "--name", "i"],
        ["check", "i"],
        ["token", "ca.yaml", "spiffe://demo.example/web"],
    ],
    ids=lambda command: command[0],
)
async def test_a_command_that_holds_keys_keeps_its_memory_to_itself(files: Path, command: list[str]) -> None:
    """Also where it ends with an error: what it has read by then is in its memory."""
    async with started([sys.executable, "-c", PROGRAM, "ca", *command], environment(), files) as program:
        assert await program.line("dumpable") == PRIVATE


async def test_an_operator_may_allow_debuggers_to_read_the_process(files: Path) -> None:
    """And the agent logs a warning: it is not to be left like that."""
    allowed = environment(SDS_AGENT_DUMPABLE="1")
    async with started([sys.executable, "-c", PROGRAM, "run", "agent.yaml"], allowed, files) as program:
        assert "warning" in await program.line('"dumpable"')
        await program.line("listening")
        program.process.send_signal(signal.SIGUSR1)
        assert await program.line("dumpable 1") == "dumpable 1 core 4096"
