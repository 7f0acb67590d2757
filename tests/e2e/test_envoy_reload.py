"""A real Envoy keeps its secret while another workload leaves the configuration, and the other's Envoy is told."""

import signal
from pathlib import Path

import grpc
from fakes.agents import agent, write_config
from fakes.envoys import Envoy, envoy


async def serials(envoy: Envoy) -> set[str]:
    """Of all certificates that it has loaded, in whichever contexts: it keeps one that is replaced for a while."""
    certificates = (await envoy.admin("/certs"))["certificates"]
    return {part["serial_number"] for each in certificates for parts in each.values() for part in parts}


async def test_an_envoy_keeps_its_secret_while_the_stream_of_a_removed_workload_ends(tmp_path: Path) -> None:
    config = write_config(tmp_path, default="1h", other="1h")
    for name in ("staying", "going"):
        (tmp_path / name).mkdir()
    async with (
        agent(config) as running,
        envoy(running.socket, tmp_path / "staying") as staying,
        envoy(running.socket, tmp_path / "going", name="other") as going,
    ):
        await staying.ready()
        await going.ready()
        before = await serials(staying)
        pushes = len(running.events("pushed"))
        write_config(tmp_path, default="1h")
        running.program.process.send_signal(signal.SIGHUP)
        reloaded = await running.event("reloaded")
        assert (reloaded["workloads_removed"], reloaded.get("workloads_changed")) == (["other"], None)
        # as Envoy logs a stream's end: the code, then the agent's words
        line = await going.program.line(f"closed: {grpc.StatusCode.NOT_FOUND.value[0]}, no secret named 'other'")
        assert "this agent serves 'default'" in line
        assert await serials(staying) == before
        assert len(running.events("pushed")) == pushes
        assert not [line for line in staying.program.lines if "closed:" in line]
