"""Two Envoys that speak mTLS on one agent, a handshake for every request, while what signs their certificates changes:
no request fails.
"""

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import anyio
import httpx
from fakes.agents import COMMAND, PATHS, Agent, agent, made
from fakes.envoys import Envoy, envoy, envoy_client
from fakes.ports import reserved_port
from fakes.processes import Program, started

WEB = "spiffe://demo.example/web"
TTL = "20s"
RENEWAL = {"fraction": 0.25, "jitter": 0}
PAUSE = 0.02
"""Seconds between two requests: without it they fill both cores for as long as certificates take to be renewed."""


def written(folder: Path, authorities: dict[str, Any], *more: tuple[str, Any]) -> Path:
    """The configuration of an agent with one workload, whose authorities these are, in order."""
    file = folder / "sds-agent.yaml"
    workload = {"name": "default", "spiffe_id": WEB, "ttl": TTL, "authority": list(authorities)}
    config = {
        "trust_domain": "demo.example",
        "state_dir": str(folder / "state"),
        "sds": {"socket": str(folder / "sds.sock")},
        "renewal": RENEWAL,
        "authorities": authorities,
        "workloads": [workload],
        **dict(more),
    }
    file.write_text(json.dumps(config))
    return file


class Traffic:
    """Requests of one Envoy to the other, one after another."""

    def __init__(self, behind: Envoy) -> None:
        self.answers: list[int] = []
        self.over = anyio.Event()
        self._behind = behind
        self._more = anyio.Event()

    async def run(self, port: int) -> None:
        """Send requests until it is over."""
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            while not self.over.is_set():
                self.answers.append((await client.get("/")).status_code)
                self._more.set()
                self._more = anyio.Event()
                with anyio.move_on_after(PAUSE):
                    await self.over.wait()

    async def goes_on(self) -> None:
        """Return when some requests have been answered that began after this was called."""
        count = len(self.answers) + 5
        with anyio.fail_after(20):
            while len(self.answers) < count:
                await self._more.wait()

    async def handshakes(self) -> int:
        """How many the listener has completed."""
        stats = (await self._behind.admin("/stats?format=json&filter=^listener.*ssl.handshake$"))["stats"]
        return sum(int(each["value"]) for each in stats)


@asynccontextmanager
async def traffic(running: Agent, folder: Path) -> AsyncIterator[Traffic]:
    """Requests all the time, inside this context. At its end each of them had a handshake and was answered."""
    async with envoy(running.socket, folder) as behind:
        await behind.ready()
        async with envoy_client(running.socket, folder, await behind.port()) as front:
            await front.ready()
            flow = Traffic(behind)
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(flow.run, await front.port())
                await flow.goes_on()
                yield flow
                await flow.goes_on()
                flow.over.set()
            assert set(flow.answers) == {200}, flow.answers
            assert await flow.handshakes() >= len(flow.answers), "else requests shared a connection, and show nothing"
    assert running.events("nacked") == []


def place(running: Agent, name: str, **fields: object) -> int:
    """Where in the log the first such event stands."""
    return running.program.lines.index(json.dumps(running.events(name, **fields)[0], separators=(",", ":")))


async def both_roots_came_first(running: Agent, leaf: dict[str, Any]) -> None:
    """Both Envoys had acknowledged a bundle with both roots before this certificate was served."""
    both = running.events("trust_changed", anchors=2)[0]
    pushes = running.events("sent", version=both["version"])
    assert len({push["stream"] for push in pushes}) >= 2, pushes
    changed = place(running, leaf["event"], serial=leaf["serial"])
    assert all(place(running, "acked", nonce=push["nonce"]) < changed for push in pushes)


class Ca:
    """`sds-agent ca serve` with a root of its own; it listens on one port whenever it runs."""

    def __init__(self, folder: Path, port: int) -> None:
        folder.mkdir()
        self.file = folder / "ca.yaml"
        self.address = f"127.0.0.1:{port}"
        made("ca", "root", str(folder / "root"), "--trust-domain", "demo.example")
        made("ca", "intermediate", str(folder / "ca"), "--root", str(folder / "root"), "--name", folder.name)
        config = {
            "trust_domain": "demo.example",
            "listen": self.address,
            "server_names": ["localhost"],
            "signer": {"cacerts": str(folder / "ca")},
            "callers": {"mtls": True, "join_tokens": str(folder / "tokens")},
            "audit": str(folder / "audit.jsonl"),
        }
        self.file.write_text(json.dumps(config))
        made("ca", "token", str(self.file), WEB, "--output", str(folder / "token"))
        self.settings = {
            "type": "istio",
            "address": self.address,
            "server_name": "localhost",
            "ca_file": str(folder / "ca" / "root-cert.pem"),
            "token_file": str(folder / "token"),
        }

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[Program]:
        """Run inside this context."""
        async with started([*COMMAND, "ca", "serve", str(self.file)], PATHS) as program:
            await program.line('"listening"')
            yield program


async def test_no_request_fails_when_the_agent_changes_to_a_ca_of_another_root_and_back(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        first, second = [Ca(tmp_path / name, stack.enter_context(reserved_port())) for name in ("a", "b")]
        config = written(tmp_path, {"a": first.settings, "b": second.settings}, ("failover", {"failures": 1}))
        program = await stack.enter_async_context(first.serving())
        running = await stack.enter_async_context(agent(config))
        await running.event("issued", authority="a")  # the second does not run yet, or might be the first to answer
        async with second.serving(), traffic(running, tmp_path) as flow:
            assert await program.stop() == 0
            leaf = await running.event("renewed", authority="b")
            assert running.events("held_back", serial=leaf["serial"]), "this CA tells its root with the certificate"
            await both_roots_came_first(running, leaf)
            await flow.goes_on()
            async with first.serving():
                await running.event("authority_changed", to="a")
                await running.event("renewed", count=1 + len(running.events("renewed")))
                assert running.events("renewed")[-1]["authority"] == "a"


async def test_no_request_fails_when_the_root_of_the_ca_in_the_agent_is_replaced(tmp_path: Path) -> None:
    made("ca", "root", str(tmp_path / "root"), "--trust-domain", "demo.example")
    made("ca", "root", str(tmp_path / "new-root"), "--trust-domain", "demo.example")
    for name, root in (("ca", "root"), ("new-ca", "new-root")):
        made("ca", "intermediate", str(tmp_path / name), "--root", str(tmp_path / root), "--name", name)
    config = written(tmp_path, {"plugged": {"type": "cacerts", "directory": str(tmp_path / "ca")}})
    async with agent(config) as running:
        await running.event("ready")
        async with traffic(running, tmp_path):
            (tmp_path / "ca").rename(tmp_path / "old-ca")
            (tmp_path / "new-ca").rename(tmp_path / "ca")
            await running.event("ca_read")
            renewed = len(running.events("renewed"))
            while not running.events("ca_signs"):  # for half a minute the old one signs, while peers load the new root
                renewed += 1
                await running.event("renewed", count=renewed)
            await both_roots_came_first(running, await running.event("renewed", count=renewed + 1))
