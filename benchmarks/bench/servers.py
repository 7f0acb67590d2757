"""The servers of secrets that the benchmarks of streams compare, each started anew for a round: the agent, the bare
server in two forms, and programs that run already.
"""

import argparse
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path

import msgspec
from msgspec import Struct

from bench.figures import FLOOR, Figure
from bench.processes import agent_command, floor_command, precise_ms, started
from bench.program import PEER_EXAMPLE, AppendPeer, FailedError, Peer
from bench.subscribers import Subscribers
from sds_agent.rpc.core import SETTINGS

AGENT = "agent"
LEAN_FLOOR = "floor lean"
CORE_FLOOR = "floor core"
STREAMS = (1, 100, 220, 500, 1000, 2000)

Found = defaultdict[tuple[str, str], list[float]]
"""Values by the name and the unit of their figure."""

CONFIG = """
trust_domain: demo.example
state_dir: {directory}/state
sds: {{socket: {socket}}}
workloads: [{{name: default, spiffe_id: spiffe://demo.example/default, ttl: {ttl}}}]
renewal: {{fraction: {fraction}}}
"""


class Running(Struct, frozen=True):
    """A server that listens. `log` is what it writes to standard error; None for what was not started here."""

    socket: Path
    pid: int
    log: Path | None = None

    def lines(self) -> int:
        """How many lines it has written."""
        return 0 if self.log is None else self.log.read_bytes().count(b"\n")

    def events(self, name: str) -> list[Mapping[str, object]]:
        """The events of that name in its log, in order."""
        lines = [] if self.log is None else self.log.read_bytes().splitlines()
        events = (msgspec.json.decode(line, type=dict[str, object]) for line in lines)
        return [each for each in events if each.get("event") == name]

    def settled(self, streams: Subscribers, within: float = 20.0, tenths: int = 3) -> None:
        """Go on with the streams until the server has taken less than a millisecond of the processor in each of so many
        tenths of a second, or time is up: it has dealt with their ACKs.
        """
        deadline, before, quiet = time.monotonic() + within, precise_ms(self.pid), 0
        while quiet < tenths and time.monotonic() < deadline:
            streams.run(0.1)
            now = precise_ms(self.pid)
            quiet = quiet + 1 if now - before < 1 else 0
            before = now


class Server(Struct, frozen=True):
    """One that is measured; `running` is a context in which it serves. Entering it raises MissingError."""

    name: str
    running: Callable[[], AbstractContextManager[Running]]
    pushes_on_signal: bool = False
    """Whether SIGUSR1 has it push; others push what they renew."""
    is_peer: bool = False


def add_arguments(parser: argparse.ArgumentParser, rounds: int) -> None:
    """What the benchmarks of streams take: --streams, --rounds, --core, --beside and --peer."""
    parser.add_argument("--streams", type=int, nargs="+", metavar="N", help=f"by default {' '.join(map(str, STREAMS))}")
    parser.add_argument("--rounds", type=int, help=f"each starts all servers anew; by default {rounds}")
    add_server_arguments(parser)


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """What `servers` reads: --core, --beside and --peer."""
    parser.add_argument("--core", action="store_true", help="a bare server without grpc.aio too, as a prototype")
    parser.add_argument("--beside", type=Path, metavar="CHECKOUT", help="the agent of another checkout too")
    parser.add_argument(
        "--peer",
        type=Peer.parse,
        action=AppendPeer,
        default=[],
        metavar="NAME=SOCKET:PID",
        help=f"a server that runs already, and what its figures are called: {PEER_EXAMPLE!r}",
    )


def servers(arguments: argparse.Namespace, *, ttl: str = "24h", fraction: float = 0.5) -> list[Server]:
    """All, as the arguments say: the agent on its embedded CA, with certificates that live so long and are renewed
    after that part of it, has one identity and a JSON log.
    """
    chosen = [
        Server(FLOOR, _floor, pushes_on_signal=True),
        Server(LEAN_FLOOR, partial(_floor, "--lean"), pushes_on_signal=True),
        Server(AGENT, partial(_agent, ttl, fraction)),
    ]
    if arguments.core:
        chosen.insert(2, Server(CORE_FLOOR, partial(_floor, "--core", extra=SETTINGS), pushes_on_signal=True))
    if arguments.beside is not None:
        chosen.append(Server("agent beside", partial(_agent, ttl, fraction, arguments.beside.resolve())))
    return [*chosen, *(Server(each.name, partial(_peer, each), is_peer=True) for each in arguments.peer)]


def each_round(
    chosen: Sequence[Server], rounds: int, measured: Callable[[Server, Found], None]
) -> Iterator[tuple[Server, tuple[Figure, ...]]]:
    """The figures of each server, of so many rounds in which each is measured in turn.

    A peer that does not do what it is there for is left out, with words. Raises FailedError where ours does not.
    """
    found = {server.name: Found(list) for server in chosen}
    left = list(chosen)
    for _ in range(rounds):
        for server in tuple(left):
            try:
                measured(server, found[server.name])
            except FailedError as failed:
                if not server.is_peer:
                    raise FailedError(f"{server.name}: {failed}") from failed
                print(f"{server.name} is left out: {failed}", file=sys.stderr)
                left.remove(server)
    for server in left:
        yield server, tuple(Figure(name, unit, tuple(values)) for (name, unit), values in found[server.name].items())


@contextmanager
def _floor(*options: str, extra: Mapping[str, str] | None = None) -> Iterator[Running]:
    with tempfile.TemporaryDirectory() as directory:
        socket, log = Path(directory, "floor.sock"), Path(directory, "log")
        with started(floor_command(socket, *options), socket, extra=extra, log=log) as pid:
            yield Running(socket, pid, log)


@contextmanager
def _agent(ttl: str, fraction: float, checkout: Path | None = None) -> Iterator[Running]:
    with tempfile.TemporaryDirectory() as directory:
        socket, log, config = (Path(directory, name) for name in ("agent.sock", "log", "sds-agent.yaml"))
        config.write_text(CONFIG.format(directory=directory, socket=socket, ttl=ttl, fraction=fraction))
        command, extra = agent_command(config), dict[str, str]()
        if checkout is not None:
            command = [sys.executable, "-m", "sds_agent", "run", str(config)]
            extra["PYTHONPATH"] = os.pathsep.join(str(checkout / each) for each in ("src", "proto_gen"))
        with started([*command, "--log-format", "json"], socket, extra=extra, log=log) as pid:
            yield Running(socket, pid, log)


@contextmanager
def _peer(peer: Peer) -> Iterator[Running]:
    yield Running(peer.socket, peer.pid)
