"""docs/troubleshooting.md leads from what a real Envoy shows to the cause: Envoy has to show it."""

import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import anyio
import pytest
from fakes.agents import agent, write_config
from fakes.envoys import Envoy, envoy

PAGE = (Path(__file__).parents[2] / "docs" / "troubleshooting.md").read_text()


@dataclass(frozen=True)
class Symptom:
    """What is wrong, and what Envoy then shows: a line of its log and its statistics, those that count and those that
    do not. NAME is the secret's name.
    """

    line: str
    counted: tuple[str, ...]
    zero: tuple[str, ...] = ()
    name: str = "default"
    socket: str = "sds.sock"
    http1: bool = False
    ca: str = "{type: embedded}"


WRONG_PATH = Symptom(  # of which Envoy's log is silent for half a minute
    "starting main dispatch loop",
    ("cluster.sds-agent.upstream_cx_connect_fail", "sds.NAME.update_failure"),
    socket="other.sock",
)
UNKNOWN_NAME = Symptom(
    "no secret named 'defualt'; this agent serves",
    ("sds.NAME.update_failure",),
    ("cluster.sds-agent.upstream_cx_connect_fail",),
    name="defualt",
)
HTTP1 = Symptom(
    "starting main dispatch loop",
    ("cluster.sds-agent.upstream_cx_http1_total", "sds.NAME.update_failure"),
    ("cluster.sds-agent.upstream_cx_connect_fail",),
    http1=True,
)
WRONG_PLACE = Symptom("rejected:", ("sds.NAME.update_rejected",), name="ROOTCA")
NOT_ISSUED = Symptom(
    "all clusters initialized. initializing init manager",
    ("sds.NAME.control_plane.connected_state",),
    ("sds.NAME.update_success", "sds.NAME.update_failure"),
    ca="{type: istio, address: '127.0.0.1:1', ca_file: none, token_file: none}",
)


@asynccontextmanager
async def suffering(symptom: Symptom, folder: Path) -> AsyncIterator[Envoy]:
    """An Envoy beside an agent, with that fault."""
    config = write_config(folder, default="1h")
    config.write_text(f"{config.read_text()[:-1]}, authorities: {{ca: {symptom.ca}}}}}")
    async with agent(config) as running:
        await running.event("listening")
        async with envoy(folder / symptom.socket, folder, name=symptom.name, http1=symptom.http1) as proxy:
            await proxy.program.line(symptom.line)
            if symptom is NOT_ISSUED:
                await running.event("subscribed", pending="default")
            if symptom is HTTP1:
                assert (await running.event("connection_ended"))["cause"] in PAGE
            yield proxy


@pytest.mark.parametrize("symptom", [WRONG_PATH, HTTP1, UNKNOWN_NAME, WRONG_PLACE, NOT_ISSUED])
async def test_envoy_shows_what_the_page_says(symptom: Symptom, tmp_path: Path) -> None:
    for words in (*symptom.counted, *symptom.zero):
        assert words.removeprefix("sds.NAME.").removeprefix("cluster.sds-agent.") in PAGE
    counted, zero = ([n.replace("NAME", symptom.name) for n in names] for names in (symptom.counted, symptom.zero))
    async with suffering(symptom, tmp_path) as proxy:
        shown = await statistics(proxy)
        with anyio.move_on_after(20):
            while not all(shown[name] for name in counted):
                shown = await statistics(proxy)
    assert {name: shown[name] > 0 for name in (*counted, *zero)} == dict.fromkeys(counted, True) | dict.fromkeys(
        zero, False
    )


async def statistics(proxy: Envoy) -> dict[str, int]:
    stats = (await proxy.admin("/stats?format=json"))["stats"]
    return {each["name"]: each["value"] for each in stats if "name" in each}


async def test_the_first_command_of_the_page_shows_the_statistics(tmp_path: Path) -> None:
    (command,) = [line.strip() for line in PAGE.splitlines() if line.startswith("    curl ")]
    async with agent(write_config(tmp_path, default="1h")) as running:
        await running.event("ready")
        async with envoy(tmp_path / "sds.sock", tmp_path) as proxy:
            await proxy.ready()
            here = command.replace("curl", f"curl --unix-socket {tmp_path}/admin.sock").replace(":9901", "")
            done = await anyio.run_process(["bash", "-c", here], stderr=subprocess.STDOUT)
    shown = done.stdout.decode().splitlines()
    assert "sds.default.update_success: 1" in shown
    assert "sds.ROOTCA.control_plane.connected_state: 1" in shown
