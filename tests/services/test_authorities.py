"""The life of the authorities: opened in their order, closed in the reverse one, however the agent ends."""

import asyncio
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from fakes import packages
from fakes.loops import anyio_backend, loop_of_the_module, one_loop  # noqa: F401 - fixtures
from fakes.processes import started

from sds_agent import app
from sds_agent.clock import SystemClock
from sds_agent.config.loading import load
from sds_agent.config.settings import Settings
from sds_agent.errors import ConfigurationError

SOURCE = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def others(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A place for modules where a package with the kind `leased` is installed."""
    with packages.leases(tmp_path_factory.mktemp("packages")) as folder:
        yield folder


def write(folder: Path, **keys: dict[str, Any]) -> Path:
    """A file with an authority of each of these names; returns its path."""
    leases = {name: {"type": "leased", "journal": "journal", **more} for name, more in keys.items()}
    workload = {"name": "default", "spiffe_id": "spiffe://demo.example/web", "authority": next(iter(keys))}
    config = {
        "trust_domain": "demo.example",
        "state_dir": "state",
        "sds": {"socket": "sds.sock"},
        "authorities": leases,
        "workloads": [workload],
    }
    file = folder / "agent.yaml"
    file.write_text(json.dumps(config))  # JSON is YAML
    return file


def read(file: Path) -> Settings:
    return load(file, {}).settings


def journal(folder: Path) -> list[str]:
    return (folder / "journal").read_text().splitlines()


OPENED = ["opening a", "opening b", "opening c"]


async def test_authorities_open_in_their_order_and_close_in_the_reverse_one(tmp_path: Path) -> None:
    settings = read(write(tmp_path, a={}, b={}, c={}))
    async with app.authorities(settings, SystemClock()) as opened:
        assert list(opened) == ["a", "b", "c"]
        assert journal(tmp_path) == OPENED
    assert journal(tmp_path) == [*OPENED, "closed c", "closed b", "closed a"]


async def test_one_that_refuses_to_open_leaves_none_open(tmp_path: Path) -> None:
    settings = read(write(tmp_path, a={}, b={"refuses": True}, c={}))
    with pytest.raises(ConfigurationError, match=r"^authorities\.b\.refuses: it is true$"):
        async with app.authorities(settings, SystemClock()):
            raise AssertionError("an agent would run without its authorities")
    assert journal(tmp_path) == ["opening a", "opening b", "closed b", "closed a"]


async def test_an_agent_that_is_ended_while_one_opens_closes_those_before_it(tmp_path: Path) -> None:
    settings = read(write(tmp_path, a={}, b={"hangs": True}, c={}))

    async def run() -> None:
        async with app.authorities(settings, SystemClock()):
            raise AssertionError("an agent would run without its authorities")

    running = asyncio.create_task(run())
    with anyio.fail_after(10):
        while not (tmp_path / "journal").exists() or "opening b" not in journal(tmp_path):
            await anyio.lowlevel.checkpoint()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert journal(tmp_path) == ["opening a", "opening b", "closed b", "closed a"]


async def test_an_agent_that_is_cancelled_closes_all(tmp_path: Path) -> None:
    settings = read(write(tmp_path, a={}, b={}, c={}))
    serving = asyncio.Event()

    async def run() -> None:
        async with app.authorities(settings, SystemClock()) as opened, app.agent(settings, opened, SystemClock()):
            serving.set()
            await asyncio.Event().wait()

    running = asyncio.create_task(run())
    with anyio.fail_after(10):
        await serving.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    assert journal(tmp_path) == [*OPENED, "closed c", "closed b", "closed a"]


async def test_a_signal_ends_an_agent_in_order_with_leases_given_back(tmp_path: Path, others: Path) -> None:
    command = [sys.executable, "-m", "sds_agent", "run", str(write(tmp_path, a={}, b={})), "--log-format", "json"]
    path = os.pathsep.join([str(SOURCE / "src"), str(SOURCE / "proto_gen"), str(others)])
    async with started(command, {"PYTHONPATH": path}) as program:
        await program.line('"listening"')
        await program.line("no lease is free")
        assert await program.stop() == 0
    assert journal(tmp_path) == ["opening a", "opening b", "closed b", "closed a"]
