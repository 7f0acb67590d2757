"""What a push to all Envoys of a node costs: from the first stream's receipt to the last one's, and processor time.

    python benchmarks/push.py [--streams N...] [--variants sotw delta] [--nodes first every] [--rounds 2] [--pushes 4]
                              [--beside CHECKOUT] [--peer NAME=SOCKET:PID]

N clients hold a stream each, on a connection of its own, and acknowledge each response at once. Their Node, 61 KB as a
real Envoy 1.40 sends it, is on the first request alone (`first`: the lean case), on every ACK too (`every`), or without
its extensions (`nowhere`). "first to last" is the time between the receipts of the first and of the last stream; the
clients themselves take 0.02 ms for each. "processor" is what the server took for the push and its ACKs, with the issue
of the certificate and the wait for it: certificates live for seconds, because an agent renews by itself alone. What it
took up to the first receipt stands beside it. "change to last" is the time to the last receipt from the signal that has
the bare server push, and from the change of the secret in the agent by its log, to a millisecond. "log" are the lines
that the agent wrote. A peer pushes by itself, too, and is waited for a minute for each push.
"""

import argparse
import itertools
import os
import signal
import time
from collections.abc import Iterator, Mapping
from datetime import datetime

from bench import program
from bench.figures import Row
from bench.processes import precise_ms, resident_mb
from bench.program import FailedError
from bench.requests import NodeUse, Subscription, Variant, subscription
from bench.servers import STREAMS, Found, Running, Server, add_arguments, each_round, servers
from bench.subscribers import Subscribers, subscribed

SERVED_WITHIN = 60.0
PUSHED_WITHIN = 60.0


FRACTION = 0.35
"""Of the life of a certificate, after which it is renewed."""


def lifetime(streams: int) -> str:
    """Of the certificates: when one is renewed, the push of the one before has to be over."""
    return "6s" if streams <= 1000 else "10s"


def changed(pushed: Mapping[str, object]) -> float:
    """When the secret changed, in seconds of `time.perf_counter`, to a millisecond: the event is written at the last
    ACK.
    """
    written = datetime.fromisoformat(str(pushed["time"])).timestamp() - time.time() + time.perf_counter()
    return written - float(str(pushed["last_ack_ms"])) / 1000


def pushes(running: Running, server: Server, streams: Subscribers, count: int, found: Found) -> None:
    """So many pushes to the streams, which are served. Raises FailedError."""
    streams.start_over()  # those that joined before a renewal have had one response more than others
    for number in range(1, count + 1):
        processor, lines, began = precise_ms(running.pid), running.lines(), time.perf_counter()
        events = running.events("pushed")
        if server.pushes_on_signal:
            os.kill(running.pid, signal.SIGUSR1)
        if not streams.any_has(number, PUSHED_WITHIN):
            raise FailedError(f"it pushed nothing in {PUSHED_WITHIN:g} s")
        before = precise_ms(running.pid) - processor
        received = streams.each_has(number, PUSHED_WITHIN)
        running.settled(streams)
        told = running.events("pushed")
        if streams.any_has(number + 1, 0):
            raise FailedError(
                f"a push to {len(streams)} streams was not over when the next began: give it a longer --ttl"
            )
        found["first to last", "ms"].append((max(received) - min(received)) * 1000)
        found["processor", "ms"].append(precise_ms(running.pid) - processor)
        found["of it before the first receipt", "ms"].append(before)
        if not server.pushes_on_signal and running.log is not None:
            if len(told) == len(events):
                raise FailedError(f"its log does not say that the push to {len(streams)} streams is over")
            began = changed(told[-1])
            found["log", "lines"].append(running.lines() - lines)
        if not server.is_peer:
            found["change to last", "ms"].append((max(received) - began) * 1000)
    found["resident at the end", "MB"].append(resident_mb(running.pid))


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    """A row for each server, number of streams, variant and use of the Node. Raises MissingError and FailedError."""
    program.descriptors(4 * max(arguments.streams) + 200)
    for count, variant, node in itertools.product(arguments.streams, arguments.variants, arguments.nodes):
        if arguments.small and (variant is Variant.SOTW) != (node is NodeUse.FIRST):
            continue  # nothing runs there that does not run in the two others
        asked = subscription(variant, node)

        def measured(server: Server, found: Found, count: int = count, asked: Subscription = asked) -> None:
            with server.running() as running, subscribed(running.socket, asked) as streams:
                streams.join(count)
                streams.each_has(1, SERVED_WITHIN)
                running.settled(streams)
                pushes(running, server, streams, arguments.pushes, found)

        chosen = servers(arguments, ttl=arguments.ttl or lifetime(count), fraction=FRACTION)
        case: dict[str, str | int] = {"streams": count, "variant": variant, "node": node}
        for server, figures in each_round(chosen, arguments.rounds, measured):
            yield Row(server.name, case, figures)


def main() -> None:
    """Measure and print."""
    parser = program.parser(__doc__)
    add_arguments(parser, rounds=2)
    parser.add_argument("--variants", type=Variant, choices=list(Variant), nargs="+", default=list(Variant))
    parser.add_argument(
        "--nodes", type=NodeUse, choices=list(NodeUse), nargs="+", default=[NodeUse.FIRST, NodeUse.EVERY]
    )
    parser.add_argument("--ttl", help="of the agent's certificates, 6s at least; by default more for more streams")
    parser.add_argument("--pushes", type=int, help="of each round; by default 4")
    arguments = parser.parse_args()
    arguments.streams = arguments.streams or ((20,) if arguments.small else STREAMS)
    arguments.rounds = arguments.rounds or (1 if arguments.small else 2)
    arguments.pushes = arguments.pushes or (1 if arguments.small else 4)
    program.main(__doc__, arguments, lambda: measure(arguments))


if __name__ == "__main__":
    main()
