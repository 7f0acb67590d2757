"""How many streams a stop tears: a server that stops again and again, under peers that open their streams anew.

    python benchmarks/stops.py [STOPS [BUSY]]

Some gRPC clients in a process of their own stand for Envoys: each has a few streams on one connection, and when one
ends, it opens that one again at once on the same connection. The server serves them all and stops, STOPS times (200
unless given), beside BUSY processes that only compute (4 unless given; they end by themselves). Envoy logs at debug
level a stream that ends with OK or finds no server; a stream that ends otherwise is counted as torn.
"""

import asyncio
import collections
import logging
import multiprocessing
import os
import tempfile
import time
from datetime import UTC, datetime
from multiprocessing.synchronize import Event
from pathlib import Path

os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc
import grpc.aio
from bench.program import numbers
from sds_agent_proto import sds_pb2

from sds_agent.sds.endpoint import SocketFile
from sds_agent.sds.server import Limits, serving
from sds_agent.sds.service import SERVICE, SecretDiscoveryService
from sds_agent.secrets.model import CertificateSecret
from sds_agent.secrets.store import SecretStore

ENVOYS, STREAMS = 4, 5
QUESTION = sds_pb2.DiscoveryRequest(resource_names=["default"]).SerializeToString()
OPTIONS = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_reconnect_backoff_ms", 100))
HARMLESS = {grpc.StatusCode.OK, grpc.StatusCode.UNAVAILABLE}
LONGEST = 3600.0
"""Seconds after which every process of this benchmark has ended, also where another one failed."""

Ends = collections.Counter[tuple[str, str]]


class Pushed(logging.Handler):
    """Counts the answers by their log events."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self._left = ENVOYS * STREAMS
        self._all = asyncio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        """Count one."""
        self._left -= record.getMessage() == "sent"
        if not self._left:
            self._all.set()

    async def to_all(self) -> None:
        """Wait until every stream has its answer; then begin anew."""
        await self._all.wait()
        self._left = ENVOYS * STREAMS
        self._all = asyncio.Event()


def compute(over: Event) -> None:
    """Keep a processor busy."""
    begin = time.monotonic()
    while not over.is_set() and time.monotonic() - begin < LONGEST:
        sum(range(100_000))


def envoys(socket: str, over: Event, reported: "multiprocessing.Queue[Ends]") -> None:
    """Open streams until it is over, and report how they ended."""
    ends: Ends = collections.Counter()
    begin = time.monotonic()

    async def one(channel: grpc.aio.Channel) -> None:
        ask: grpc.aio.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(f"/{SERVICE}/StreamSecrets")
        while not over.is_set() and time.monotonic() - begin < LONGEST:
            call = ask(timeout=30)
            try:
                await call.write(QUESTION)
                while await call.read() is not grpc.aio.EOF:
                    pass
            except grpc.aio.AioRpcError:
                pass
            code = await call.code()
            ends[code.name, "" if code in HARMLESS else await call.details()] += 1
            if code is not grpc.StatusCode.OK:
                await asyncio.sleep(0.01)

    async def all_of_them() -> None:
        channels = [grpc.aio.insecure_channel(f"unix:{socket}", options=OPTIONS) for _ in range(ENVOYS)]
        await asyncio.gather(*(one(channel) for channel in channels for _ in range(STREAMS)))

    asyncio.run(all_of_them())
    reported.put(ends)


async def stop_again_and_again(socket: Path, stops: int) -> float:
    """Serve, and stop when all streams are there; returns the seconds that the slowest stop took."""
    store, slowest, pushed = SecretStore(["default"]), 0.0, Pushed()
    logging.getLogger("sds_agent").addHandler(pushed)
    logging.getLogger("sds_agent").setLevel(logging.DEBUG)
    store.publish({"default": CertificateSecret(b"chain", b"key", datetime(2036, 1, 1, tzinfo=UTC))})
    for _ in range(stops):
        service = SecretDiscoveryService(store)
        async with serving(service, SocketFile(socket), Limits()):
            await pushed.to_all()
            begin = time.monotonic()
        slowest = max(slowest, time.monotonic() - begin)
    return slowest


def main() -> None:
    """Measure and print."""
    stops, busy = numbers(__doc__, stops=(200, 1), busy=(4, 0))
    context = multiprocessing.get_context("spawn")
    over, reported = context.Event(), context.Queue()
    with tempfile.TemporaryDirectory() as directory:
        socket = Path(directory) / "sds.sock"
        others = [context.Process(target=compute, args=(over,)) for _ in range(busy)]
        others.append(context.Process(target=envoys, args=(str(socket), over, reported)))
        for other in others:
            other.start()
        try:
            slowest = asyncio.run(stop_again_and_again(socket, stops))
        finally:
            over.set()
        ends = reported.get(timeout=60)
        for other in others:
            other.join()
    print(f"{stops} stops beside {busy} busy processes, the slowest in {slowest:.2f} s")
    for (code, details), count in ends.most_common():
        print(f"{count:8}  {code} {details}")
    torn = sum(count for (code, _), count in ends.items() if grpc.StatusCode[code] not in HARMLESS)
    print(f"{torn:8}  torn")


if __name__ == "__main__":
    main()
