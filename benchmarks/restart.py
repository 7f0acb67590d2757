"""How many connections a restart of the agent refuses, with and without a socket of systemd's.

    python benchmarks/restart.py [STREAMS [RESTARTS]]

Clients in a process of their own stand for Envoys: STREAMS (500 unless given) each have a connection with a stream to
the agent, and when it ends they connect again, every 20 ms until they are accepted. The agent is stopped by SIGTERM
and started again RESTARTS times (3 unless given): first on a socket of its own, which is gone in between, then on one
that this program listens on and hands over, as systemd does for a .socket unit. Printed are the connections that were
refused, and the longest time from the end of a stream to its next answer.
"""

import asyncio
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc.aio
from bench.program import numbers
from sds_agent_proto import sds_pb2

QUESTION = sds_pb2.DiscoveryRequest(resource_names=["default"]).SerializeToString()
METHOD = "/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets"
AGAIN = 0.02
LONGEST = 300.0
TAKE = 'exec 3<&"$1"; shift; export LISTEN_PID=$$ LISTEN_FDS=1; exec "$@"'


class Figures(NamedTuple):
    """What the clients saw of all restarts."""

    refused: int
    longest: float


class Clients:
    """Keeps the streams open, and counts."""

    def __init__(self, path: Path, streams: int, link: Connection) -> None:
        self._path = path
        self._streams = streams
        self._link = link
        self._served = 0
        self._refused = 0
        self._longest = 0.0

    async def run(self) -> None:
        """Until the link says to end."""
        tasks = [asyncio.create_task(self._keep()) for _ in range(self._streams)]
        loop = asyncio.get_running_loop()
        loop.add_reader(self._link.fileno(), self._answer, loop.create_future())
        await asyncio.wait(tasks, timeout=LONGEST)

    def _answer(self, _unused: object) -> None:
        if self._link.recv() == "figures":
            self._link.send((self._served, Figures(self._refused, self._longest)))
        else:
            os._exit(0)

    async def _keep(self) -> None:
        ended = time.monotonic()
        while True:
            while not self._accepted():
                self._refused += 1
                await asyncio.sleep(AGAIN)
            options = (("grpc.use_local_subchannel_pool", 1), ("grpc.initial_reconnect_backoff_ms", 20))
            async with grpc.aio.insecure_channel(f"unix:{self._path}", options=options) as channel:
                call: grpc.aio.StreamStreamCall[bytes, bytes] = channel.stream_stream(METHOD)()
                try:
                    await call.write(QUESTION)
                    if isinstance(await call.read(), bytes):
                        self._longest = max(self._longest, time.monotonic() - ended)
                        self._served += 1
                        await call.read()
                        self._served -= 1
                        ended = time.monotonic()
                except grpc.aio.AioRpcError:
                    await asyncio.sleep(AGAIN)

    def _accepted(self) -> bool:
        """Whether a connection is accepted now, into the listener's queue at least: gRPC would hide a refusal."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as attempt:
            try:
                attempt.connect(str(self._path))
            except OSError:
                return False
        return True


def clients(path: Path, streams: int, link: Connection) -> None:
    asyncio.run(Clients(path, streams, link).run())


@contextmanager
def agent(file: Path, listening: socket.socket | None) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "sds_agent", "run", str(file), "--log-level", "error"]
    if listening is not None:
        command = [shutil.which("bash") or "bash", "-c", TAKE, "-", str(listening.fileno()), *command]
    descriptors = [] if listening is None else [listening.fileno()]
    with subprocess.Popen(command, pass_fds=descriptors) as process:
        try:
            yield process
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


def all_served(link: Connection, streams: int) -> Figures:
    """Wait until every stream has its answer."""
    deadline = time.monotonic() + LONGEST
    while time.monotonic() < deadline:
        link.send("figures")
        served, figures = link.recv()
        if served == streams:
            return Figures(*figures)
        time.sleep(0.05)
    raise SystemExit("not every stream was served again")


def measured(streams: int, restarts: int, *, handed_over: bool) -> Figures:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        path = folder / "sds.sock"
        workload = {"name": "default", "spiffe_id": "spiffe://demo.example/web"}
        settings = {"trust_domain": "demo.example", "state_dir": "state", "sds": {"socket": str(path)}}
        file = folder / "sds-agent.yaml"
        file.write_text(json.dumps({**settings, "workloads": [workload]}))
        listening = None
        if handed_over:
            listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listening.bind(str(path))
            path.chmod(0o660)
            listening.listen(4096)
        ours, theirs = multiprocessing.get_context("spawn").Pipe()
        peers = multiprocessing.get_context("spawn").Process(target=clients, args=(path, streams, theirs), daemon=True)
        figures = Figures(0, 0.0)
        for number in range(restarts + 1):
            with agent(file, listening):
                if number == 0:
                    while not path.exists():
                        time.sleep(0.05)
                    time.sleep(1)
                    peers.start()
                figures = all_served(ours, streams)
        ours.send("end")
        peers.join(10)
        return figures


def main() -> None:
    streams, restarts = numbers(__doc__, streams=(500, 1), restarts=(3, 1))
    print(f"{streams} streams, {restarts} restarts      refused    longest time without the agent")
    for name, handed_over in (("a socket of its own", False), ("one handed over", True)):
        figures = measured(streams, restarts, handed_over=handed_over)
        print(f"{name:33} {figures.refused:8}    {figures.longest:.2f} s")


if __name__ == "__main__":
    main()
