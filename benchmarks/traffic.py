"""Requests between two real Envoys, each over a new mTLS handshake, with renewals of both certificates and without.

    python benchmarks/traffic.py [--rounds 3] [--renewals 30] [--rate 300] [--json FILE]

wrk sends requests to Envoy A, which opens a new mTLS connection to Envoy B for each one; B answers by itself. Key,
certificate and roots of both come from one agent with its embedded CA. In turn the agent issues certificates of a day,
which is the floor, and of 6 s, each of which it renews after about 3: a round takes as long as so many renewals of the
two together. Every round has both, as a machine may drift.

wrk has no fixed rate. Each of its 16 connections waits a random time before each request, so that together they send
about `--rate` a second, well below what the Envoys can do; a request that has to wait holds up the next of its own
connection alone. `--rate 0` sends without a pause, which measures the queue and no longer what a renewal costs. Times
are from the first byte sent to the last received; at 300 a second and 30 renewals, 14,000 requests, the 99.9th
percentile is the 14th slowest. Failed are requests without an answer and those with a status of 400 or more.

On a machine that does other things, those decide the 99.9th percentile. As root, run it before them:

    chrt --rr 5 python benchmarks/traffic.py
"""

import contextlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import anyio
import httpx
import msgspec
from bench import processes, program
from bench.figures import FLOOR, Figure, Row
from bench.program import MissingError
from msgspec import Struct

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from demo_app import files
from demo_app.children import DemoError
from demo_app.play import _envoy, _listener_port

CONNECTIONS = 16
WRK = "Debian: apt install wrk"
TTL = 6
"""Seconds that a certificate lives, as few as the agent takes."""
HALF, SMALL_FRACTION = 0.5, 0.2
"""After which part of that the agent renews it, and for a run that nobody measures with."""
DAY = 86_400
WITHIN = 30.0
"""Seconds in which both Envoys have to have the certificates of an agent that was started."""
SCRIPT = """
local pause = %f
function delay() return math.floor(2 * pause * math.random() + 0.5) end
function setup(thread) thread:set("seed", os.time()) end
function init(args) math.randomseed(seed) end
function done(summary, latency, requests)
  local e = summary.errors
  io.stderr:write(string.format(
    '{"requests": %%d, "microseconds": %%d, "p50": %%d, "p99": %%d, "p999": %%d, "most": %%d, "failed": %%d}\\n',
    summary.requests, summary.duration, latency:percentile(50), latency:percentile(99), latency:percentile(99.9),
    latency.max, e.connect + e.read + e.write + e.status + e.timeout))
end
"""
FIGURES = {
    "rate": "requests/s",
    "median": "ms",
    "99th percentile": "ms",
    "99.9th percentile": "ms",
    "slowest": "ms",
    "failed requests": "",
    "renewals": "",
    "TLS contexts made by the Envoys": "",
    "agent's processor time": "ms",
}


class Seen(Struct, frozen=True):
    """What wrk counted in one run."""

    requests: int
    microseconds: int
    p50: int
    p99: int
    p999: int
    most: int
    failed: int


class Envoy(Struct, frozen=True):
    """A running Envoy: the port of its listener, and where its admin interface is."""

    port: int
    admin: Path

    def contexts(self) -> int:
        """How often it has made a TLS context of what the agent sent."""
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(self.admin)), base_url="http://admin") as http:
            stats = http.get("/stats", params={"filter": "ssl_context_update_by_sds"}).text
        return sum(int(each) for each in re.findall(r": (\d+)$", stats, re.MULTILINE))


@contextlib.contextmanager
def envoy(places: files.Places, node: str, configuration: Path) -> Iterator[Envoy]:
    """One of the two, ready, for the length of the block."""
    command = [_envoy(), "-c", str(configuration), "--concurrency", "1", "-l", "error", "--disable-hot-restart"]
    with processes.started(command, places.admin(node)):
        yield Envoy(anyio.run(_port, places.admin(node)), places.admin(node))


async def _port(admin: Path) -> int:
    with anyio.fail_after(WITHIN):
        return await _listener_port(admin)


def answering(configuration: Path) -> Path:
    """Envoy B's configuration, changed so that it answers by itself: a server behind it would be measured too."""
    text = configuration.read_text()
    forwards = "route: {cluster: server}"
    if forwards not in text:
        raise MissingError(f"envoy/server.yaml no longer has {forwards!r}, which this replaces: put it back")
    configuration.write_text(text.replace(forwards, "direct_response: {status: 200, body: {inline_string: good}}"))
    return configuration


def agent_file(places: files.Places, ttl: int, fraction: float = HALF) -> Path:
    """The agent's configuration. What lives for a day is not renewed meanwhile: without jitter, at noon."""
    identities = {"web": files.WEB, "backend": files.BACKEND}
    content: dict[str, object] = {
        "trust_domain": "demo.example",
        "state_dir": str(places.directory / "state"),
        "keep_certificates": False,
        "sds": {"socket": str(places.socket)},
        "workloads": [{"name": name, "spiffe_id": uri, "ttl": f"{ttl}s"} for name, uri in identities.items()],
    }
    content["renewal"] = {"jitter": 0} if ttl == DAY else {"fraction": fraction}
    file = places.directory / f"agent-{ttl}.yaml"
    file.write_text(json.dumps(content))
    return file


class Pair:
    """The two Envoys and what it takes to send requests through them."""

    def __init__(self, places: files.Places, envoys: list[Envoy], chosen: Namespace) -> None:
        self.places = places
        self.envoys = envoys
        self.fraction = SMALL_FRACTION if chosen.small else HALF
        between = TTL * self.fraction
        self.seconds = math.ceil(chosen.renewals * between / 2 + between)  # two workloads, and what the jitter takes
        self.wrk = program.tool("wrk", WRK)
        self.script = places.directory / "wrk.lua"
        self.script.write_text(SCRIPT % (1000 * CONNECTIONS / chosen.rate if chosen.rate else 0))

    def round(self, ttl: int) -> dict[str, float]:
        """One run with an agent that issues such certificates; the figures by their names."""
        log = self.places.directory / "log"
        log.unlink(missing_ok=True)
        before = self._contexts()
        command = [*processes.agent_command(agent_file(self.places, ttl, self.fraction)), "--log-format", "json"]
        with processes.started(command, self.places.socket, log=log) as agent:
            self._wait(before)
            begin = (_renewals(log), sum(self._contexts()), processes.processor_ms(agent))
            seen = self._requests()
            end = (_renewals(log), sum(self._contexts()), processes.processor_ms(agent))
        rate = seen.requests / seen.microseconds * 1e6
        times = (each / 1000 for each in (seen.p50, seen.p99, seen.p999, seen.most))
        made = (after - before for before, after in zip(begin, end, strict=True))
        return dict(zip(FIGURES, (rate, *times, seen.failed, *made), strict=True))

    def _contexts(self) -> list[int]:
        return [each.contexts() for each in self.envoys]

    def _wait(self, before: list[int]) -> None:
        """Until both Envoys have the certificates of the agent that was just started."""
        deadline = time.monotonic() + WITHIN
        while not all(now > count for now, count in zip(self._contexts(), before, strict=True)):
            if time.monotonic() > deadline:
                raise SystemExit(f"traffic: an Envoy has got no certificate within {WITHIN:.0f} s")
            time.sleep(0.05)
        time.sleep(0.5)  # the bundle comes beside the certificate

    def _requests(self) -> Seen:
        options = ["-t1", f"-c{CONNECTIONS}", f"-d{self.seconds}s", "-s", str(self.script)]
        url = f"http://127.0.0.1:{self.envoys[0].port}/"
        done = subprocess.run([self.wrk, *options, url], capture_output=True, check=True, timeout=self.seconds + 30)
        return msgspec.json.decode(done.stderr.splitlines()[-1], type=Seen)


def _renewals(log: Path) -> int:
    return sum(1 for line in log.read_text().splitlines() if '"renewed"' in line)


def _envoy_there() -> None:
    try:
        found = Path(_envoy())
    except DemoError as missing:
        raise MissingError(f"it needs two Envoys. {missing}") from missing
    if not os.access(found, os.X_OK):
        raise MissingError(f"it needs an Envoy, and {found} is no program: set ENVOY_BINARY to another, or not at all")


def measure(chosen: Namespace) -> Iterator[Row]:
    """Both, in turn."""
    program.tool("wrk", WRK)
    _envoy_there()
    with contextlib.ExitStack() as stack:
        places = files.Places(Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="t"))))
        # Envoy B listens once it has its certificates, so the first agent is there before
        with processes.started(processes.agent_command(agent_file(places, DAY)), places.socket):
            behind = stack.enter_context(envoy(places, "envoy-b", answering(files.server(places, 9))))
            front = stack.enter_context(envoy(places, "envoy-a", files.client(places, behind.port)))
        pair = Pair(places, [front, behind], chosen)
        rounds = [(pair.round(DAY), pair.round(TTL)) for _ in range(chosen.rounds)]
    case: dict[str, str | int] = {"rate": chosen.rate or "no limit", "connections": CONNECTIONS}
    for name, found in zip((FLOOR, "with renewals"), zip(*rounds, strict=True), strict=True):
        yield Row(
            name, case, tuple(Figure(each, unit, tuple(of[each] for of in found)) for each, unit in FIGURES.items())
        )


def main() -> None:
    parser = program.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--renewals", type=int, default=30, help="in each round, of both certificates together")
    parser.add_argument("--rate", type=int, default=300, help="requests a second, about; 0: as many as it gets")
    chosen = parser.parse_args()
    if chosen.small:
        chosen.rounds, chosen.renewals = 1, 1
    program.main(__doc__, chosen, lambda: measure(chosen))


if __name__ == "__main__":
    main()
