"""The servers of secrets that the benchmarks of streams compare, each started anew for a round: the agent, the bare
server in two forms, and programs that run already.
"""

import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from msgspec import Struct

from bench.figures import FLOOR
from bench.processes import agent_command, floor_command, precise_ms, started
from bench.program import Peer
from bench.subscribers import Subscribers

AGENT = "agent"
LEAN_FLOOR = "floor lean"

CONFIG = """
trust_domain: demo.example
state_dir: {directory}/state
sds: {{socket: {socket}}}
workloads: [{{name: default, spiffe_id: spiffe://demo.example/default, ttl: {ttl}}}]
"""


class Running(Struct, frozen=True):
    """A server that listens. `log` is what it writes to standard error; None for what was not started here."""

    socket: Path
    pid: int
    log: Path | None = None

    def settled(self, streams: Subscribers, within: float = 10.0) -> None:
        """Go on with the streams until the server has taken less than a millisecond of the processor in a tenth of a
        second, or time is up: it has dealt with their ACKs.
        """
        deadline, before = time.monotonic() + within, precise_ms(self.pid) - 1
        while (now := precise_ms(self.pid)) - before >= 1 and time.monotonic() < deadline:
            before = now
            streams.run(0.1)


class Server(Struct, frozen=True):
    """One that is measured; `running` is a context in which it serves. Entering it raises MissingError."""

    name: str
    running: Callable[[], AbstractContextManager[Running]]
    is_peer: bool = False


def servers(peers: Iterable[Peer], *, ttl: str = "24h") -> list[Server]:
    """All: the agent on its embedded CA, with certificates that live so long, has one identity and a JSON log."""
    chosen = [
        Server(FLOOR, _floor),
        Server(LEAN_FLOOR, lambda: _floor("--lean")),
        Server(AGENT, lambda: _agent(ttl)),
    ]
    return [*chosen, *(Server(f"peer {each.pid}", lambda each=each: _peer(each), is_peer=True) for each in peers)]  # type: ignore[misc]


@contextmanager
def _floor(*options: str) -> Iterator[Running]:
    with tempfile.TemporaryDirectory() as directory:
        socket, log = Path(directory, "floor.sock"), Path(directory, "log")
        with started(floor_command(socket, *options), socket, log=log) as pid:
            yield Running(socket, pid, log)


@contextmanager
def _agent(ttl: str) -> Iterator[Running]:
    with tempfile.TemporaryDirectory() as directory:
        socket, log, config = (Path(directory, name) for name in ("agent.sock", "log", "sds-agent.yaml"))
        config.write_text(CONFIG.format(directory=directory, socket=socket, ttl=ttl))
        with started([*agent_command(config), "--log-format", "json"], socket, log=log) as pid:
            yield Running(socket, pid, log)


@contextmanager
def _peer(peer: Peer) -> Iterator[Running]:
    yield Running(peer.socket, peer.pid)
