"""From exec to the first secret: the agent on its embedded CA, beside a bare grpc.aio server.

    python benchmarks/cold.py [--runs RUNS] [--peer-command COMMAND --peer-socket NAME=SOCKET]

The agent is the installed command, as a service manager would start it. They are started in turn, so that a machine
whose speed drifts slows all alike; the ratio is taken run by run. A warm client dials until it is served. The bare
server (floor.py) makes one P-256 key and a self-signed certificate and gives those bytes to every client: it is the
least that a Python program on gRPC needs to serve a secret. The agent is started from four states: its certificate
kept; a root kept, and the certificate to be issued; nothing kept, the root to be made; and kept, without a
configuration file, where it reads no YAML. One run of each comes first and is not counted: it writes Python's compiled
files, and what is kept. A peer is started in the same turn by its command line, which must make SOCKET and serve the
name `default`.

Seconds are those of the wall clock. Processor time (user and kernel, all threads) until the first secret is less noisy
on a machine that does other things. The resident memory is that a second after the first secret; the user time is that
of the whole process until then.
"""

import argparse
import shlex
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from bench import program
from bench.figures import FLOOR, Figure, Row
from bench.processes import agent_command, floor_command
from bench.starts import CONFIG, Program, Start, start

PEER = "peer"
"""What a peer without a name is called."""

SETTLED = 1.0
"""Seconds after the first secret after which the memory is read."""


def arguments() -> argparse.Namespace:
    """What the benchmark is called with."""
    parser = program.parser(__doc__)
    parser.add_argument("--runs", type=int, default=15, help="starts of each (15)")
    parser.add_argument("--peer-command", metavar="COMMAND", help="the command line that starts another server")
    parser.add_argument(
        "--peer-socket",
        type=program.label,
        metavar="NAME=SOCKET",
        help="what its rows are called; the socket that it makes",
    )
    given = parser.parse_args()
    if (given.peer_command is None) != (given.peer_socket is None):
        parser.error("--peer-command and --peer-socket go together")
    return given


def agents(directory: Path) -> dict[str, Program]:
    """An agent in a directory of its own for each state."""
    found = {}
    for name, keeps in {"kept": True, "root kept": False, "nothing kept": True, "kept, no file": True}.items():
        own = directory / name.replace(" ", "-").replace(",", "")
        own.mkdir()
        config = own / "sds-agent.yaml"
        socket, state = own / "agent.sock", own / "state"
        if name == "kept, no file":
            extra = {"SDS_AGENT__SDS__SOCKET": str(socket), "SDS_AGENT__STATE_DIR": str(state)}
            found[name] = Program(agent_command(config)[:-1], socket, extra)
            continue
        config.write_text(CONFIG.format(own, "true" if keeps else "false"))
        found[name] = Program(agent_command(config), socket, forgets=state if name == "nothing kept" else None)
    return found


def measure(given: argparse.Namespace) -> Iterable[Row]:
    """The rows: the floor's stands in every case, for the ratios."""
    runs = 1 if given.small else given.runs
    with tempfile.TemporaryDirectory() as made:
        directory = Path(made)
        servers = {FLOOR: Program(floor_command(directory / "floor.sock"), directory / "floor.sock")}
        cases = agents(directory)
        servers |= cases
        if given.peer_command is not None:
            servers[PEER] = Program(shlex.split(given.peer_command), Path(given.peer_socket[1]))
        starts: dict[str, list[Start]] = {name: [] for name in servers}
        for number in range(runs + 1):
            for name, each in servers.items():
                done = start(each, 0.0 if number == 0 or given.small else SETTLED)
                if number:
                    starts[name].append(done)
    return list(rows(starts, cases, given.peer_socket))


def rows(starts: Mapping[str, Sequence[Start]], cases: Iterable[str], peer: tuple[str, str] | None) -> Iterable[Row]:
    """A row of the floor's, one of the agent's and one of the peer's for each state of the agent's."""
    for state in cases:
        yield Row(FLOOR, {"state": state}, figures(starts[FLOOR]))
        yield Row("agent", {"state": state}, figures(starts[state]))
        if peer is not None:
            yield Row(peer[0] or PEER, {"state": state}, figures(starts[PEER]))


def figures(starts: Sequence[Start]) -> tuple[Figure, ...]:
    """What the starts of one program took."""
    return (
        Figure("exec to first secret", "ms", tuple(each.seconds * 1000 for each in starts)),
        Figure("processor time until then", "ms", tuple(each.processor_ms for each in starts)),
        Figure("resident memory", "MB", tuple(each.resident_mb for each in starts)),
        Figure("user time in all", "ms", tuple(each.user_ms for each in starts)),
    )


if __name__ == "__main__":
    given = arguments()
    program.main(__doc__, given, lambda: measure(given))
