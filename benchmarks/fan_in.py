"""What it costs a server that all Envoys of a node connect at once, and what stays when they have come ten times.

    python benchmarks/fan_in.py [--streams N...] [--rounds 2] [--waves 10] [--rest 3] [--node first]
                               [--beside CHECKOUT] [--peer NAME=SOCKET:PID]

N clients come at once, each with one stream of StreamSecrets on a connection of its own and the first request of a real
Envoy 1.40, and acknowledge what they get. Then all leave, and as many come again. "all served" is the time from the
first connect to the last stream's response, "processor" what the server took until it had dealt with all ACKs, both of
each wave; "resident" is its memory while all streams of that wave are there, after some seconds of rest, as a node is
at rest nearly all the time. A server is started anew for each N and each round; a peer runs already, and its memory has
a history.
"""

import argparse
import time
from collections.abc import Iterator

from bench import program
from bench.figures import Row
from bench.processes import open_files, precise_ms, resident_mb
from bench.requests import NodeUse, Variant, subscription
from bench.servers import STREAMS, Found, Running, Server, add_arguments, each_round, servers
from bench.subscribers import LostError, Subscribers, subscribed

SERVED_WITHIN = 60.0
LEFT_WITHIN = 20.0
"""Seconds in which a server has to close the connections that its clients have closed."""
SPARE_FILES = 8


def waves(server: Running, streams: Subscribers, count: int, arguments: argparse.Namespace, found: Found) -> None:
    """The waves of `count` streams. Raises LostError."""
    most = arguments.waves
    files = open_files(server.pid)
    found["idle", "MB"].append(resident_mb(server.pid))
    for wave in range(1, most + 1):
        began, processor = time.perf_counter(), precise_ms(server.pid)
        streams.join(count)
        found["all served", "s"].append(max(streams.each_has(1, SERVED_WITHIN)) - began)
        server.settled(streams, tenths=1 if arguments.small else 3)
        found["processor", "ms"].append(precise_ms(server.pid) - processor)
        if wave in {1, 2, most}:
            streams.run(arguments.rest)
            found[f"resident, wave {wave}", "MB"].append(resident_mb(server.pid))
        streams.leave()
        deadline = time.monotonic() + LEFT_WITHIN
        while open_files(server.pid) > files + SPARE_FILES:
            if time.monotonic() > deadline:
                raise LostError(f"connections of {count} clients that left are still open after {LEFT_WITHIN:g} s")
            time.sleep(0.01)
    first, last = (found[f"resident, wave {wave}", "MB"][-1] for wave in (min(2, most), most))
    found["growth from wave 2", "%"].append((last / first - 1) * 100)


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    """A row for each server and number of streams. Raises MissingError and FailedError."""
    program.descriptors(4 * max(arguments.streams) + 200)
    asked = subscription(Variant.SOTW, arguments.node)
    for count in arguments.streams:

        def measured(server: Server, found: Found, count: int = count) -> None:
            with server.running() as running, subscribed(running.socket, asked) as streams:
                waves(running, streams, count, arguments, found)

        for server, figures in each_round(servers(arguments), arguments.rounds, measured):
            yield Row(server.name, {"streams": count}, figures)


def main() -> None:
    """Measure and print."""
    parser = program.parser(__doc__)
    add_arguments(parser, rounds=2)
    parser.add_argument("--waves", type=int, help="by default 10")
    parser.add_argument("--rest", type=float, help="seconds before memory is read; by default 3")
    parser.add_argument(
        "--node", type=NodeUse, choices=list(NodeUse), default=NodeUse.FIRST, help="where the whole Node is; first"
    )
    arguments = parser.parse_args()
    arguments.streams = arguments.streams or ((20,) if arguments.small else STREAMS)
    arguments.rounds = arguments.rounds or (1 if arguments.small else 2)
    arguments.waves = arguments.waves or (3 if arguments.small else 10)
    if arguments.rest is None:
        arguments.rest = 0.0 if arguments.small else 3.0
    program.main(__doc__, arguments, lambda: measure(arguments))


if __name__ == "__main__":
    main()
