"""A real Envoy and the real agent: renewal under traffic, and what may go wrong on the way."""

import json
import signal
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest
from fakes.agents import Agent, agent, write_config
from fakes.envoys import Client, Envoy, client, envoy

BOTH = pytest.mark.parametrize("api_type", ["GRPC", "DELTA_GRPC"])


async def acked(running: Agent, count: int, name: str = "default") -> None:
    """Wait until an Envoy has taken `count` secrets of that name."""
    await running.event("acked", names=name, count=count)


def serials(running: Agent, name: str = "default") -> list[str]:
    issued = [*running.events("issued", workload=name), *running.events("renewed", workload=name)]
    return [str(each["serial"]) for each in issued]


async def newest_serial(running: Agent, name: str = "default") -> str:
    return serials(running, name)[-1]


@BOTH
async def test_each_new_certificate_is_presented_on_the_wire(tmp_path: Path, api_type: str) -> None:
    config = write_config(tmp_path, default="6s", client="1h")
    async with agent(config) as running, envoy(running.socket, tmp_path, api_type=api_type) as proxy:
        await proxy.ready()
        visitor, port = await client(running.socket, tmp_path), await proxy.port()
        seen: list[str] = []
        for _ in range(3):  # the agent goes on renewing meanwhile
            replaced = serials(running)[:-1] if seen else []
            await acked(running, 1 + len(running.events("acked", names="default")) if seen else 1)
            seen.append(await visitor.request(port))
            assert seen[-1] in serials(running)
            assert seen[-1] not in replaced
        assert len(set(seen)) == 3
        assert running.events("nacked") == []


class Traffic:
    """Requests, one after another, each over a new handshake."""

    def __init__(self) -> None:
        self.serials: list[str] = []
        self.failures: list[str] = []
        self.over = False
        self._more = anyio.Event()

    async def run(self, visitor: Client, port: int) -> None:
        """Send requests until it is over."""
        while not self.over:
            try:
                self.serials.append(await visitor.request(port))
            except (OSError, ssl.SSLError, anyio.BrokenResourceError, anyio.EndOfStream) as error:
                self.failures.append(repr(error))
            self._more.set()
            self._more = anyio.Event()

    async def sees(self, running: Agent) -> None:
        """Wait until a request was answered with a certificate of that agent's, whichever: it goes on renewing."""
        with anyio.fail_after(60):  # Envoy waits up to 30 s before it connects again to an agent that was away
            while not set(self.serials).intersection(serials(running)):
                await self._more.wait()


@asynccontextmanager
async def traffic(visitor: Client, port: int) -> AsyncIterator[Traffic]:
    """Requests all the time, inside this context."""
    async with anyio.create_task_group() as tasks:
        flow = Traffic()
        tasks.start_soon(flow.run, visitor, port)
        try:
            yield flow
        finally:
            flow.over = True


@BOTH
async def test_agent_is_killed_and_started_again_under_traffic_and_no_request_fails(
    tmp_path: Path, api_type: str
) -> None:
    config = write_config(tmp_path, default="60s", client="1h")
    config.write_text(json.dumps({**json.loads(config.read_text()), "renewal": {"fraction": 0.2}}))
    async with agent(config) as first, envoy(first.socket, tmp_path, api_type=api_type) as proxy:
        await proxy.ready()
        visitor, port = await client(first.socket, tmp_path), await proxy.port()
        async with traffic(visitor, port) as flow:
            await flow.sees(first)
            await first.program.stop(signal.SIGKILL)
            async with agent(config) as second:
                await second.event("restored", workload="default")
                await second.event("renewed", workload="default")
                await flow.sees(second)
        assert flow.failures == []


@BOTH
async def test_envoy_that_starts_before_the_agent_gets_its_secret_when_the_agent_comes(
    tmp_path: Path, api_type: str
) -> None:
    config = write_config(tmp_path, default="1h", client="1h")
    async with envoy(tmp_path / "sds.sock", tmp_path, api_type=api_type) as proxy:
        await proxy.program.line("loading")
        async with agent(config) as running:
            await proxy.ready()
            visitor = await client(running.socket, tmp_path)
            assert await visitor.request(await proxy.port()) == await newest_serial(running)


async def test_envoys_log_says_which_name_is_wrong_and_what_there_is(tmp_path: Path) -> None:
    config = write_config(tmp_path, default="1h")
    async with agent(config) as running, envoy(running.socket, tmp_path, name="defualt") as proxy:
        line = await proxy.program.line("StreamSecrets gRPC config stream to sds-agent closed: 5")
        assert "no secret named 'defualt'; this agent serves 'default'" in line
        await proxy.program.line("closed: 5", count=3)
        assert len(running.events("refused")) == 1, "an Envoy asks for ever; the agent's log says it once"


async def test_envoy_that_pings_every_second_is_not_sent_away(tmp_path: Path) -> None:
    config = write_config(tmp_path, default="14s", client="1h")  # long enough between answers for a good many pings
    pings = {"connection_keepalive": {"interval": "1s", "timeout": "2s"}}
    async with agent(config) as running, envoy(running.socket, tmp_path, http2=pings) as proxy:
        await proxy.ready()
        await acked(running, 2)
        streams = {event["stream"] for event in running.events("acked", node="envoy-under-test")}
        assert len(streams) == 2, "the streams of the first moment are the ones of the last"


@BOTH
async def test_envoy_that_repeats_its_whole_node_is_served(tmp_path: Path, api_type: str) -> None:
    """Without set_node_on_first_message_only each request has 60 KB."""
    config = write_config(tmp_path, default="6s", client="1h")
    async with (
        agent(config) as running,
        envoy(running.socket, tmp_path, api_type=api_type, node_always=True) as proxy,
    ):
        await proxy.ready()
        await acked(running, 2)
        visitor = await client(running.socket, tmp_path)
        assert await visitor.request(await proxy.port()) in serials(running)[1:]


@BOTH
async def test_agent_that_stops_leaves_envoy_as_it_is(tmp_path: Path, api_type: str) -> None:
    config = write_config(tmp_path, default="1h", client="1h")
    async with agent(config) as running, envoy(running.socket, tmp_path, api_type=api_type) as proxy:
        await proxy.ready()
        visitor, port = await client(running.socket, tmp_path), await proxy.port()
        before = await visitor.request(port)
        assert await running.program.stop() == 0
        assert not running.socket.exists()
        assert await visitor.request(port) == before
        assert not [line for line in proxy.program.lines if "[warning]" in line and "closed" in line]


async def test_envoys_admin_shows_what_the_agent_says_it_pushed(tmp_path: Path) -> None:
    config = write_config(tmp_path, default="1h", client="1h")
    async with agent(config) as running, envoy(running.socket, tmp_path) as proxy:
        await proxy.ready()
        certificates = await loaded_serials(proxy)
        assert await newest_serial(running) in certificates


async def loaded_serials(proxy: Envoy) -> set[str]:
    """The serials of the certificates that Envoy has loaded, in hexadecimal without leading zeros."""
    certificates = (await proxy.admin("/certs"))["certificates"]
    return {chain["serial_number"].lstrip("0") for entry in certificates for chain in entry.get("cert_chain", [])}
