"""docs/first-machine.md and docs/uninstall.md lead through commands: a reader who pastes each of them arrives."""

import configparser
import os
import re
import shlex
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from fnmatch import fnmatch
from pathlib import Path

import anyio
import pytest
from fakes.processes import Program, started

DOCS = Path(__file__).parents[2] / "docs"
FIRST_MACHINE = (DOCS / "first-machine.md").read_text()
UNINSTALL = (DOCS / "uninstall.md").read_text()
TERMINALS = ("sds-agent ca serve", "sds-agent run")
"""The commands that go on until they are stopped."""


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page, re.MULTILINE | re.DOTALL)


class Reader:
    """Someone who pastes a page's lines into terminals, in a directory of their own."""

    def __init__(self, folder: Path, port: int) -> None:
        self.folder = folder
        self._port = port
        (folder / "bin").mkdir()
        command = folder / "bin" / "sds-agent"
        command.write_text(f'#!/bin/sh\nexec {sys.executable} -m sds_agent "$@"\n')
        command.chmod(0o755)
        (folder / "run").mkdir()
        (folder / "state").mkdir(mode=0o700)
        self.environment = {
            "PATH": f"{folder}/bin:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "RUNTIME_DIRECTORY": str(folder / "run"),
            "STATE_DIRECTORY": str(folder / "state"),
        }

    async def pastes(self, block: str) -> str:
        """What the block prints; only the port, which may be taken, is another."""
        script = block.replace("15012", str(self._port))
        command = ["bash", "-e", "-c", script]
        done = await anyio.run_process(command, env=os.environ | self.environment, cwd=self.folder)
        return done.stdout.decode()

    @asynccontextmanager
    async def terminal(self, block: str) -> AsyncIterator[Program]:
        async with started(shlex.split(block), self.environment, self.folder) as program:
            yield program

    def left(self) -> list[str]:
        """The files below the directory, by their paths in it."""
        found = [
            path.relative_to(self.folder) for path in self.folder.rglob("*") if not path.is_dir() or path.is_symlink()
        ]
        return sorted(str(path) for path in found if path.parts[0] != "bin")


@asynccontextmanager
async def joined(reader: Reader) -> AsyncIterator[tuple[Program, Program]]:
    """The CA server and the agent of first-machine.md, after its first five steps."""
    page = iter(blocks(FIRST_MACHINE, "sh"))
    for block in page:
        if block.startswith(TERMINALS):
            break
        await reader.pastes(block)
    async with reader.terminal(block) as ca:
        await ca.line('"listening"')
        for block in page:
            if block.startswith(TERMINALS):
                break
            await reader.pastes(block)
        async with reader.terminal(block) as agent:
            await agent.line('"ready"')
            yield ca, agent


@pytest.fixture
def reader(tmp_path: Path, port: int) -> Reader:
    return Reader(tmp_path, port)


async def test_a_machine_joins_from_nothing(reader: Reader) -> None:
    last = blocks(FIRST_MACHINE, "sh")[-1]
    async with joined(reader) as (ca, agent):
        assert "spiffe://demo.example/vm/db1" in await agent.line('"issued"')
        words = await reader.pastes(last)
        assert words.startswith("ready\n")
        assert '"proof":"join-token"' in words
        assert "spiffe://demo.example/vm/db1" in words
        assert await agent.stop() == 0
        assert await ca.stop() == 0


async def test_the_unit_that_the_command_writes_starts_an_agent(reader: Reader, tmp_path: Path) -> None:
    """What systemd would do with it: make two directories, name them in variables, and run the command."""
    (tmp_path / "sds-agent.yaml").write_text(
        "trust_domain: demo.example\nworkloads: [{name: web, spiffe_id: 'spiffe://demo.example/web'}]\n"
    )
    await reader.pastes(f"sds-agent install systemd sds-agent.yaml --write --root {tmp_path}")
    unit = configparser.ConfigParser(strict=False, interpolation=None, delimiters=["="])
    unit.optionxform = str  # type: ignore[assignment]  # as its documentation has it
    unit.read(tmp_path / "etc" / "systemd" / "system" / "sds-agent.service")
    service = unit["Service"]
    program, *arguments = service["ExecStart"].split()
    assert Path(program).name == "sds-agent"
    assert (service["RuntimeDirectory"], service["StateDirectory"]) == ("sds-agent", "sds-agent")
    async with reader.terminal(" ".join(["sds-agent", *arguments])) as agent:
        await agent.line('"ready"')
        assert await agent.stop() == 0


NAMED = re.findall(r"`([^`\n]+)`", UNINSTALL)
"""What docs/uninstall.md names, files among them, as patterns."""


def unnamed(files: list[str]) -> list[str]:
    """Those that docs/uninstall.md does not name."""
    return [path for path in files if not any(fnmatch(f"./{path}", f"*/{name}") for name in NAMED)]


async def test_the_page_names_every_file_that_is_left_and_its_commands_remove_them(reader: Reader) -> None:
    async with joined(reader) as (ca, agent):
        assert await agent.stop() == 0
        more = {"SDS_AGENT__WORKLOADS__0__OUTPUT": str(reader.folder / "state" / "certs")}
        reader.environment |= more
        async with reader.terminal("sds-agent run db1/sds-agent.yaml") as again:
            await again.line('"output_written"')
            assert await again.stop() == 0
        assert await ca.stop() == 0
    assert unnamed(reader.left()) == []
    agents, server = blocks(UNINSTALL, "sh")
    places = {"/run/sds-agent": f"{reader.folder}/run", "/var/lib/sds-agent": f"{reader.folder}/state"}
    for place, here in places.items():
        agents = agents.replace(place, here)
    await reader.pastes(agents + server)
    assert reader.left() == [
        "audit.log",
        "db1/root-cert.pem",
        "db1/sds-agent.yaml",
        "db1/token",
        "root/root-cert.pem",
        "root/root-key.pem",
    ]


@pytest.mark.parametrize("authority", ["embedded", "self_signed"])
async def test_the_page_names_what_a_root_of_its_own_leaves(reader: Reader, authority: str) -> None:
    """The embedded CA of an agent, and a CA server with `signer.self_signed`."""
    if authority == "embedded":
        (reader.folder / "sds-agent.yaml").write_text(
            "trust_domain: demo.example\nworkloads: [{name: web, spiffe_id: 'spiffe://demo.example/web'}]\n"
        )
        command, ready = "sds-agent run sds-agent.yaml", '"ready"'
    else:
        (reader.folder / "ca.yaml").write_text(
            "trust_domain: demo.example\nlisten: 127.0.0.1:0\nsigner: {self_signed: root}\n"
            "callers: {join_tokens: tokens}\naudit: audit.log\n"
        )
        command, ready = "sds-agent ca serve ca.yaml", '"listening"'
    async with reader.terminal(command) as program:
        await program.line(ready)
        assert await program.stop() == 0
    assert any(path.endswith("/roots.pem") for path in reader.left())
    assert unnamed(reader.left()) == []
