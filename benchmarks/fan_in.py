"""What it costs a server that all Envoys of a node connect at once, and what stays when they have come ten times.

    python benchmarks/fan_in.py [--streams N ...] [--rounds 3] [--waves 10] [--node first] [--peer SOCKET:PID ...]

N clients come at once, each with one stream of StreamSecrets on a connection of its own and the first request of a real
Envoy 1.40, and acknowledge what they get. Then all leave, and as many come again. "all served" is the time from the
first connect to the last stream's response, "processor" what the server took until it had dealt with all ACKs, both of
each wave; "resident" is its memory while all streams of that wave are there. A server is started anew for each N and
each round; a peer runs already, and its memory has a history.
"""

import argparse
import sys
import time
from collections import defaultdict
from collections.abc import Iterator

from bench import program
from bench.figures import Figure, Row
from bench.processes import open_files, precise_ms, resident_mb
from bench.program import Peer
from bench.requests import NodeUse, Variant, subscription
from bench.servers import Running, Server, servers
from bench.subscribers import LostError, Subscribers, subscribed

STREAMS = (1, 100, 220, 500, 1000, 2000)
SERVED_WITHIN = 60.0
LEFT_WITHIN = 20.0
"""Seconds in which a server has to close the connections that its clients have closed."""
SPARE_FILES = 8

Found = defaultdict[tuple[str, str], list[float]]
"""Values by the name and the unit of their figure."""


def waves(server: Running, streams: Subscribers, count: int, most: int, found: Found) -> None:
    """So many waves of `count` streams. Raises LostError."""
    files = open_files(server.pid)
    found["idle", "MB"].append(resident_mb(server.pid))
    for wave in range(1, most + 1):
        began, processor = time.perf_counter(), precise_ms(server.pid)
        streams.join(count)
        found["all served", "s"].append(max(streams.each_has(1, SERVED_WITHIN)) - began)
        server.settled(streams)
        found["processor", "ms"].append(precise_ms(server.pid) - processor)
        if wave in {1, 2, most}:
            found[f"resident, wave {wave}", "MB"].append(resident_mb(server.pid))
        streams.leave()
        deadline = time.monotonic() + LEFT_WITHIN
        while open_files(server.pid) > files + SPARE_FILES:
            if time.monotonic() > deadline:
                raise LostError(f"connections of {count} clients that left are still open after {LEFT_WITHIN:g} s")
            time.sleep(0.01)
    first, last = (found[f"resident, wave {wave}", "MB"][-1] for wave in (min(2, most), most))
    found["growth from wave 2", "%"].append((last / first - 1) * 100)


def measured(server: Server, arguments: argparse.Namespace, count: int, found: Found) -> None:
    """One round of one server."""
    asked = subscription(Variant.SOTW, arguments.node)
    with server.running() as running, subscribed(running.socket, asked) as streams:
        try:
            waves(running, streams, count, arguments.waves, found)
        except LostError as lost:
            raise LostError(f"{server.name}, {count} streams: {lost}") from lost


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    """A row for each server and number of streams. Raises MissingError, and LostError of a server of ours."""
    program.descriptors(4 * max(arguments.streams) + 200)
    for count in arguments.streams:
        chosen = servers(arguments.peer)
        found = {server.name: Found(list) for server in chosen}
        for _ in range(arguments.rounds):
            for server in tuple(chosen):
                try:
                    measured(server, arguments, count, found[server.name])
                except LostError as lost:
                    if not server.is_peer:
                        raise
                    print(f"fan_in: {lost}", file=sys.stderr)
                    chosen.remove(server)
        for server in chosen:
            figures = (Figure(name, unit, tuple(values)) for (name, unit), values in found[server.name].items())
            yield Row(server.name, {"streams": count}, tuple(figures))


def main() -> None:
    """Measure and print."""
    parser = program.parser(__doc__)
    parser.add_argument("--streams", type=int, nargs="+", metavar="N", help="by default 1 100 220 500 1000 2000")
    parser.add_argument("--rounds", type=int, help="3")
    parser.add_argument("--waves", type=int, help="10")
    parser.add_argument("--node", type=NodeUse, choices=list(NodeUse), default=NodeUse.FIRST, help="first")
    parser.add_argument("--peer", type=Peer.parse, action="append", default=[], metavar="SOCKET:PID")
    arguments = parser.parse_args()
    arguments.streams = arguments.streams or ((1, 20) if arguments.small else STREAMS)
    arguments.rounds = arguments.rounds or (1 if arguments.small else 3)
    arguments.waves = arguments.waves or (3 if arguments.small else 10)
    program.main(__doc__, arguments, lambda: measure(arguments))


if __name__ == "__main__":
    main()
