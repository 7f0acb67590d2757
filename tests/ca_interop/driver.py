"""What the tests with real CA servers share: a server's program that is started and stopped, and the agent.

    async with server(Server(place / "ca.log", [program("step-ca"), ...], port=port)) as ca:
        async with agent(place, {"type": "step-ca", ...}, ttl="20s") as running:
            first = await running.first()
            newest = await running.renewed(3)
            await ca.stop()
            await running.event("retrying")

The agent runs in this process, on the machine's clock, from a configuration file as a user has it. The programs are
built by `scripts/ca-interop`, which names their directory in the variable SDS_AGENT_CA_SERVERS.
"""

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
from cryptography import x509
from fakes.events import Event, Events, recorded
from fakes.istio_parts import free_port

from sds_agent import app
from sds_agent.clock import SystemClock
from sds_agent.config.loading import load
from sds_agent.issuance.status import WorkloadStatus
from sds_agent.live.agent import Agent
from sds_agent.pki.certificates import read_pem
from sds_agent.secrets.model import BundleSecret, CertificateSecret
from sds_agent.secrets.readiness import complete

__all__ = ["TRUST_DOMAIN", "URI", "Running", "Server", "agent", "free_port", "program", "server"]

TRUST_DOMAIN = "demo.example"
URI = f"spiffe://{TRUST_DOMAIN}/web"
TIMEOUT = 60.0
"""Seconds for what a test waits for, unless it says otherwise."""


def program(name: str) -> str:
    """The path of a server's program, such as `step-ca`. It is there when `scripts/ca-interop` runs the tests."""
    directory = os.environ.get("SDS_AGENT_CA_SERVERS")
    assert directory, "scripts/ca-interop runs these tests: it says in SDS_AGENT_CA_SERVERS where the programs are"
    path = Path(directory, name)
    assert path.exists(), f"there is no {name} in {directory}: scripts/ca-interop builds it"
    return str(path)


class Server:
    """A server's program, which has started when `port` on loopback accepts connections or `says` is in its output.

    `command`, `environment` and `directory` may be changed before the next `start`. All that the program writes is in
    the file `log`.
    """

    def __init__(
        self,
        log: Path,
        command: Sequence[str],
        *,
        port: int | None = None,
        says: str | None = None,
        environment: Mapping[str, str] | None = None,
        directory: Path | None = None,
    ) -> None:
        self.log = log
        self.command = command
        self.port = port
        self.says = says
        self.environment = environment or {}
        self.directory = directory
        self._process: asyncio.subprocess.Process | None = None
        self._since = 0

    @property
    def output(self) -> str:
        """All that it has written so far, over all starts."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    @property
    def pid(self) -> int:
        """The process that runs."""
        assert self._process is not None, f"{self.command[0]} does not run"
        return self._process.pid

    async def start(self) -> None:
        """Start it and wait until it is ready."""
        assert self._process is None, f"{self.command[0]} runs already"
        self._since = len(self.output)
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self.command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self.environment},
                cwd=self.directory,
            )
        with anyio.move_on_after(TIMEOUT) as limit:
            while not await self._ready():
                assert self._process.returncode is None, f"{self.command[0]} ended:\n{self.output[-4000:]}"
                await anyio.sleep(0.05)
        assert not limit.cancelled_caught, f"{self.command[0]} is not ready:\n{self.output[-4000:]}"

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> None:
        """End it, by force if it has not ended after 10 s, and wait for that; nothing if it does not run."""
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None:
            process.send_signal(number)
        try:
            async with asyncio.timeout(10):
                await process.wait()
        except TimeoutError:
            process.kill()
            await process.wait()

    async def restart(self) -> None:
        """Stop it and start it again."""
        await self.stop()
        await self.start()

    async def _ready(self) -> bool:
        if self.says is not None and self.says not in self.output[self._since :]:
            return False
        if self.port is None:
            return True
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", self.port)
        except OSError:
            return False
        writer.close()
        return True


@asynccontextmanager
async def server(run: Server) -> AsyncIterator[Server]:
    """The server, started, inside this context; at its end it is stopped."""
    try:
        await run.start()
        yield run
    finally:
        with anyio.CancelScope(shield=True):
            await run.stop()


class Running:
    """The agent that runs, its events, and what it serves."""

    def __init__(self, parts: Agent, events: Events, socket: Path) -> None:
        self.parts = parts
        self.events = events
        self.socket = socket

    async def event(self, name: str, *, count: int = 1, within: float = TIMEOUT, **fields: object) -> Event:
        """Wait for the count-th event of that name with these fields, and return it."""
        return await self.events.wait(name, count=count, within=within, **fields)

    async def first(self, workload: str = "default", *, within: float = TIMEOUT) -> x509.Certificate:
        """Wait for the first certificate from the CA and for the bundle, and return the leaf that is served."""
        await self.event("issued", workload=workload, within=within)
        with anyio.fail_after(within):
            await complete(self.parts.store)
        return self.chain(workload)[0]

    async def renewed(self, count: int = 1, workload: str = "default", *, within: float = TIMEOUT) -> x509.Certificate:
        """Wait for so many renewals since the agent's start, and return the leaf that is served."""
        await self.event("renewed", workload=workload, count=count, within=within)
        return self.chain(workload)[0]

    async def more(self, count: int = 1, workload: str = "default", *, within: float = TIMEOUT) -> x509.Certificate:
        """Wait for so many renewals from now on, and return the leaf that is served."""
        done = len(self.events.named("renewed", workload=workload))
        return await self.renewed(done + count, workload, within=within)

    def secret(self, workload: str = "default") -> CertificateSecret:
        """The certificate that is served, with its key."""
        served = self.parts.store.snapshot[workload]
        assert isinstance(served, CertificateSecret), f"{workload} has no certificate: {self.events.seen[-5:]}"
        return served

    def chain(self, workload: str = "default") -> tuple[x509.Certificate, ...]:
        """The chain that is served, the leaf first."""
        return read_pem(self.secret(workload).chain_pem)

    @property
    def bundle(self) -> tuple[x509.Certificate, ...]:
        """The trust anchors that are served; none before there are any."""
        served = self.parts.store.snapshot["ROOTCA"]
        return read_pem(served.anchors_pem) if isinstance(served, BundleSecret) else ()

    async def bundle_with(self, *anchors: x509.Certificate, within: float = TIMEOUT) -> None:
        """Wait until exactly these anchors are served."""
        wanted, changed = set(anchors), asyncio.Event()
        with anyio.move_on_after(within), self.parts.store.watching(lambda _names: changed.set()):
            while set(self.bundle) != wanted:
                changed.clear()
                await changed.wait()
        served = [each.subject.rfc4514_string() for each in self.bundle]
        assert set(self.bundle) == wanted, f"the bundle has {served}: {self.events.seen[-5:]}"

    def status(self, workload: str = "default") -> WorkloadStatus:
        """The workload's certificates and the attempts at its CA."""
        return next(each for each in self.parts.workloads if each.name == workload)


@asynccontextmanager
async def agent(
    place: Path,
    authority: Mapping[str, object],
    *,
    ttl: str = "20s",
    spiffe_id: str = URI,
    fraction: float = 0.3,
    **more: object,
) -> AsyncIterator[Running]:
    """The agent inside this context, with one authority named `upstream` and one workload named `default`.

    Its files are in `place`, which has a short path: a second agent there continues the first one's. A certificate is
    renewed after `fraction` of its life. `more` are further keys of the configuration file, or others for these.
    """
    config = {
        "trust_domain": TRUST_DOMAIN,
        "state_dir": str(place / "state"),
        "sds": {"socket": str(place / "sds.sock")},
        "authorities": {"upstream": authority},
        "workloads": [{"name": "default", "spiffe_id": spiffe_id, "ttl": ttl}],
        "renewal": {"fraction": fraction, "jitter": 0},
        **more,
    }
    file = place / "sds-agent.yaml"
    file.write_text(json.dumps(config, default=str))  # JSON is YAML
    settings, clock = load(file, {}).settings, SystemClock()
    with recorded() as events:
        async with app.authorities(settings, clock) as cas, app.agent(settings, cas, clock) as parts:
            yield Running(parts, events, settings.sds.socket)
