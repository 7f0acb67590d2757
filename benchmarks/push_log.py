"""What a push to many streams costs the agent: processor time, and lines in its log.

    python benchmarks/push_log.py [STREAMS [PUSHES]] [--beside CHECKOUT]

A client in a process of its own holds STREAMS streams (500 unless given), each on a connection of its own with a small
node, and acknowledges each answer. The agent, on its embedded CA with certificates of six seconds, pushes PUSHES of
them (5 unless given). Printed are, for each push, the seconds of processor time between the answers to the
subscriptions and the last ACK, and the lines that the agent wrote. With --beside the agent of another checkout does the
same, in turn.
"""

import argparse
import asyncio
import os
import statistics
import subprocess
import sys
import tempfile
import time
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc.aio
from sds_agent_proto import sds_pb2

METHOD = "/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets"
CONFIG = """
trust_domain: demo.example
state_dir: {0}/state
sds: {{socket: {0}/agent.sock}}
workloads: [{{name: default, spiffe_id: spiffe://demo.example/default, ttl: 6s}}]
"""
LONGEST = 120.0


class Cost(NamedTuple):
    """Seconds of the processor, and lines, for a push."""

    seconds: float
    lines: float


def clients(path: Path, streams: int, pushes: int, link: Connection) -> None:
    asyncio.run(asyncio.wait_for(_clients(path, streams, pushes, link), LONGEST))


async def _clients(path: Path, streams: int, pushes: int, link: Connection) -> None:
    """Tell the link when every stream has had its first answer, and when each has had so many more."""
    first, rest = _Countdown(streams), _Countdown(streams)
    tasks = [asyncio.create_task(_stream(path, number, pushes, first, rest)) for number in range(streams)]
    await first.over.wait()
    link.send("served")
    await rest.over.wait()
    link.send("pushed")
    for task in tasks:
        task.cancel()


class _Countdown:
    def __init__(self, left: int) -> None:
        self.left = left
        self.over = asyncio.Event()

    def one(self) -> None:
        self.left -= 1
        if not self.left:
            self.over.set()


async def _stream(path: Path, number: int, pushes: int, first: _Countdown, rest: _Countdown) -> None:
    async with grpc.aio.insecure_channel(f"unix:{path}", options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        call: grpc.aio.StreamStreamCall[bytes, bytes] = channel.stream_stream(METHOD)()
        question = sds_pb2.DiscoveryRequest(node=sds_pb2.Node(id=f"envoy-{number}"), resource_names=["default"])
        await call.write(question.SerializeToString())
        for received in range(pushes + 1):
            answer = sds_pb2.DiscoveryResponse.FromString(await call.read())  # type: ignore[arg-type]  # no EOF comes
            acked = sds_pb2.DiscoveryRequest(resource_names=["default"], response_nonce=answer.nonce)
            await call.write(acked.SerializeToString())
            if received == 0:
                first.one()
        rest.one()
        await asyncio.sleep(LONGEST)


def processor(pid: int) -> float:
    """Seconds of user and system time so far (proc(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measured(checkout: Path, streams: int, pushes: int) -> Cost:
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "agent.yaml").write_text(CONFIG.format(folder))
        path, written = folder / "agent.sock", folder / "log"
        environment = os.environ | {"PYTHONPATH": f"{checkout / 'src'}:{checkout / 'proto_gen'}"}
        command = [sys.executable, "-m", "sds_agent", "run", str(folder / "agent.yaml"), "--log-format", "json"]
        with written.open("wb") as log, subprocess.Popen(command, env=environment, stderr=log) as agent:
            try:
                while not path.exists():
                    time.sleep(0.01)
                ours, theirs = get_context("spawn").Pipe()
                peers = get_context("spawn").Process(target=clients, args=(path, streams, pushes, theirs), daemon=True)
                peers.start()
                ours.recv()
                time.sleep(0.5)  # the ACKs of the first answers
                before, lines = processor(agent.pid), len(written.read_bytes().splitlines())
                ours.recv()
                time.sleep(0.5)
                took = processor(agent.pid) - before
                wrote = len(written.read_bytes().splitlines()) - lines
                peers.kill()
            finally:
                agent.terminate()
        return Cost(took / pushes, wrote / pushes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("streams", nargs="?", type=int, default=500)
    parser.add_argument("pushes", nargs="?", type=int, default=5)
    parser.add_argument("--beside", type=Path, metavar="CHECKOUT")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    checkouts = [Path(__file__).parents[1], *([] if arguments.beside is None else [arguments.beside.resolve()])]
    costs: dict[Path, list[Cost]] = {each: [] for each in checkouts}
    for _ in range(arguments.rounds):
        for checkout in checkouts:
            costs[checkout].append(measured(checkout, arguments.streams, arguments.pushes))
    for checkout, found in costs.items():
        seconds = statistics.median(each.seconds for each in found)
        lines = statistics.median(each.lines for each in found)
        name = "this checkout" if checkout == checkouts[0] else "the other one"
        print(
            f"{name}: {seconds * 1000:.0f} ms of the processor and {lines:.1f} lines for a push to {arguments.streams}"
        )


if __name__ == "__main__":
    main()
