"""The real agent as a process, and the events of its log."""

import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fakes.processes import Program, started

Event = dict[str, Any]

SOURCE = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "sds_agent"]
PATHS = {"PYTHONPATH": os.pathsep.join([str(SOURCE / "src"), str(SOURCE / "proto_gen")])}


def made(*arguments: str) -> None:
    """Run the command with these arguments as a process of its own, to a good end."""
    subprocess.run([*COMMAND, *arguments], env=PATHS, check=True, capture_output=True)


class Agent:
    """A running agent."""

    def __init__(self, program: Program, socket: Path) -> None:
        self.program = program
        self.socket = socket

    def events(self, name: str, **fields: object) -> list[Event]:
        """The events so far of that name with these fields; a field with a list matches if the value is in it."""
        found = (json.loads(line) for line in self.program.lines if line.startswith("{"))
        return [e for e in found if e["event"] == name and all(_matches(e.get(k), v) for k, v in fields.items())]

    async def event(self, name: str, *, count: int = 1, **fields: object) -> Event:
        """Wait for the count-th event of that name with these fields, and return it."""
        await self.program.until(lambda: len(self.events(name, **fields)) >= count)
        return self.events(name, **fields)[count - 1]


def _matches(found: object, wanted: object) -> bool:
    return found == wanted or (isinstance(found, list) and wanted in found)


def write_config(directory: Path, **ttls: str) -> Path:
    """Write a configuration with the embedded CA and workloads of these names and lifetimes; returns its path."""
    file = directory / "sds-agent.yaml"
    entries = [{"name": name, "spiffe_id": f"spiffe://demo.example/{name}", "ttl": ttl} for name, ttl in ttls.items()]
    config = {
        "trust_domain": "demo.example",
        "state_dir": str(directory / "state"),
        "sds": {"socket": str(directory / "sds.sock")},
        "workloads": entries,
    }
    file.write_text(json.dumps(config))  # JSON is YAML
    return file


@asynccontextmanager
async def agent(config: Path) -> AsyncIterator[Agent]:
    """Run the agent on a configuration made by `write_config`, inside this context."""
    async with _run([str(config)], {}, config.with_name("sds.sock")) as running:
        yield running


@asynccontextmanager
async def agent_by_environment(environment: Mapping[str, str], socket: Path) -> AsyncIterator[Agent]:
    """Run the agent without a file, on variables alone, inside this context."""
    async with _run([], {**environment, "SDS_AGENT__SDS__SOCKET": str(socket)}, socket) as running:
        yield running


@asynccontextmanager
async def _run(arguments: list[str], environment: Mapping[str, str], socket: Path) -> AsyncIterator[Agent]:
    command = [*COMMAND, "run", *arguments, "--log-format", "json", "--log-level", "debug"]
    async with started(command, {**PATHS, **environment}) as program:
        yield Agent(program, socket)
