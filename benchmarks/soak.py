"""Whether a server grows under streams that come and go and pushes that never end.

    python benchmarks/soak.py [--minutes 5] [--streams 200] [--variant sotw] [--node first] [--beside CHECKOUT]
                              [--peer NAME=SOCKET:PID]

All servers run at one time, each with so many streams, a connection each. Every half second a twentieth of them leave,
and as many come; in between there is a push: the agent renews certificates of six seconds, the bare server pushes every
three seconds. Memory, descriptors and threads are read before each change; given are the medians of the four quarters
of the time, and what the last has over the first. asyncio's tasks cannot be counted from outside; those of a stream
that has left would keep its descriptors or its memory. It begins to count once every stream has been replaced twice.
"""

import argparse
import os
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from itertools import pairwise

from bench import program
from bench.figures import Figure, Row
from bench.processes import open_files, precise_ms, resident_mb, threads
from bench.program import FailedError
from bench.requests import NodeUse, Subscription, Variant, subscription
from bench.servers import Running, Server, add_server_arguments, servers
from bench.subscribers import Subscribers, subscribed
from msgspec import Struct

TURN = 0.5
SMALL_TURN = 0.05
"""Seconds that a turn takes."""
HALF, SMALL_FRACTION = 0.5, 0.25
"""After which part of its life the agent renews a certificate, and for a run that nobody measures with."""
SHARE = 20
"""One of so many streams is replaced in a turn."""
TURNS_A_PUSH = 6
TURNS_BEFORE = 2 * SHARE
SERVED_WITHIN = 30.0
READINGS: dict[str, tuple[str, Callable[[int], float]]] = {
    "resident": ("MB", resident_mb),
    "descriptors": ("", open_files),
    "threads": ("", threads),
}


class Soaked(Struct):
    """One server, its streams, and what was read of it turn by turn."""

    server: Server
    running: Running
    streams: Subscribers
    samples: dict[str, list[float]]
    pushed: int = 0
    came: int = 0
    processor: float = 0

    def turn(self, number: int, seconds: float) -> None:
        """Read, replace a share of the streams, and answer for that time. Raises LostError."""
        share = max(1, len(self.streams) // SHARE)
        if number == TURNS_BEFORE:
            self.processor = precise_ms(self.running.pid)
        if number >= TURNS_BEFORE:
            for name, (_, read) in READINGS.items():
                self.samples[name].append(read(self.running.pid))
        if self.server.pushes_on_signal and number % TURNS_A_PUSH == 0:
            os.kill(self.running.pid, signal.SIGUSR1)
            self.pushed += 1
        self.streams.leave(share)
        self.streams.join(share)
        self.came += share
        self.streams.run(seconds)

    def figures(self, seconds: float) -> Iterator[Figure]:
        """What became of it in so many seconds."""
        for name, (unit, _) in READINGS.items():
            medians = quarters(self.samples[name])
            yield Figure(name, unit, medians)
            yield Figure(f"{name}, last quarter over first", "%", ((medians[-1] / medians[0] - 1) * 100,))
        yield Figure("processor", "ms/s", ((precise_ms(self.running.pid) - self.processor) / seconds,))
        yield Figure("streams that came", "", (self.came,))
        if not self.server.is_peer:
            yield Figure("pushes", "", (self.pushed or len(self.running.events("pushed")),))


def quarters(samples: Sequence[float]) -> tuple[float, ...]:
    """The medians of its quarters. Raises FailedError if one would be empty."""
    if len(samples) < 4:
        raise FailedError(f"{len(samples)} turns are too few: give it more minutes")
    ends = [len(samples) * quarter // 4 for quarter in range(5)]
    return tuple(statistics.median(samples[begin:end]) for begin, end in pairwise(ends))


def measure(arguments: argparse.Namespace, asked: Subscription) -> Iterator[Row]:
    """A row for each server. Raises MissingError and FailedError."""
    chosen = servers(arguments, ttl="6s", fraction=SMALL_FRACTION if arguments.small else HALF)
    program.descriptors(4 * arguments.streams * len(chosen) + 200)
    with ExitStack() as stack:
        soaked = list[Soaked]()
        for server in chosen:
            running = stack.enter_context(server.running())
            streams = stack.enter_context(subscribed(running.socket, asked))
            streams.join(arguments.streams)
            streams.each_has(1, SERVED_WITHIN)
            soaked.append(Soaked(server, running, streams, {name: [] for name in READINGS}))
        counted = turns(soaked, SMALL_TURN if arguments.small else TURN, arguments.minutes * 60)
        for each in soaked:
            each.streams.each_has(1, SERVED_WITHIN)
            case: dict[str, str | int] = {
                "streams": arguments.streams,
                "variant": arguments.variant,
                "node": arguments.node,
            }
            yield Row(each.server.name, case, tuple(each.figures(counted)))


def turns(soaked: Sequence[Soaked], turn: float, seconds: float) -> float:
    """Turns of all servers, of so many seconds each, until that time is over, after those that do not count; returns
    the seconds it took.
    """
    number, began = 0, time.monotonic()
    while number <= TURNS_BEFORE or time.monotonic() - began < seconds:
        if number == TURNS_BEFORE:
            began = time.monotonic()
        for each in soaked:
            try:
                each.turn(number, turn / len(soaked))
            except FailedError as failed:
                raise FailedError(f"{each.server.name}, turn {number}: {failed}") from failed
        number += 1
    return time.monotonic() - began


def main() -> None:
    """Measure and print."""
    parser = program.parser(__doc__)
    add_server_arguments(parser)
    parser.add_argument("--minutes", type=float, help="by default 5")
    parser.add_argument("--streams", type=int, help="of each server; by default 200")
    parser.add_argument("--variant", type=Variant, choices=list(Variant), default=Variant.SOTW)
    parser.add_argument("--node", type=NodeUse, choices=list(NodeUse), default=NodeUse.FIRST)
    arguments = parser.parse_args()
    arguments.minutes = arguments.minutes or (0.02 if arguments.small else 5)
    arguments.streams = arguments.streams or (20 if arguments.small else 200)
    asked = subscription(arguments.variant, arguments.node)
    program.main(__doc__, arguments, lambda: measure(arguments, asked))


if __name__ == "__main__":
    main()
