"""What the admin server costs: exec to the first secret and memory, with it and without it.

    python benchmarks/admin.py [RUNS]

The agents are started in turn (15 times unless RUNS says otherwise), each from the certificate that it stored: one with
the admin server on its socket and an address, one with `admin.enabled: false`. Printed are the seconds to the first
secret with the median of the differences within a round, the agent's processor time until then, which a busy machine
changes less, the memory (VmRSS) 2 s later, and that of the first one once `/status` and `/metrics` were asked for,
which imports what they need. Meanwhile another client fetches secrets one after the other: printed is the longest that
it waited, beside the longest in as many fetches before. One run of each comes first and is not counted.
"""

import http.client
import socket
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Self

import grpc
from bench.program import numbers
from bench.starts import QUESTION, seconds_to_first_secret

CONFIG = """
trust_domain: demo.example
state_dir: {0}/state
sds: {{socket: {0}/agent.sock}}
admin: {1}
workloads: [{{name: default, spiffe_id: spiffe://demo.example/default}}]
"""
SETTLED = 2.0
"""Seconds after which the memory is read."""
FETCH = "/envoy.service.secret.v3.SecretDiscoveryService/FetchSecrets"


class Unix(http.client.HTTPConnection):
    """HTTP on a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost")
        self._path = path

    def connect(self) -> None:
        """As the standard library's, to the socket."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(str(self._path))


def memory(pid: int) -> float:
    """The resident memory in MB."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


def processor_time(pid: int) -> float:
    """The milliseconds that its threads have run (schedstat, the first field)."""
    threads = Path(f"/proc/{pid}/task").glob("*/schedstat")
    return sum(int(each.read_text().split()[0]) for each in threads) / 1e6


class Fetching:
    """A client that fetches a secret again and again, and the milliseconds that each took."""

    def __init__(self, path: Path) -> None:
        self.waits: list[float] = []
        self._path = path
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        with grpc.insecure_channel(f"unix:{self._path}", options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
            fetch: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(FETCH)
            while not self._ended.is_set():
                began = time.perf_counter()
                fetch(QUESTION, wait_for_ready=True, timeout=10)
                self.waits.append((time.perf_counter() - began) * 1000)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def longest_waits(folder: Path) -> tuple[float, float]:
    """The longest fetch while the first requests come in, and that of as many fetches before."""
    with Fetching(folder / "agent.sock") as fetching:
        time.sleep(SETTLED)
        before = len(fetching.waits)
        ask(folder / "agent.admin.sock")
    during = fetching.waits[before:]
    return max(during), max(fetching.waits[before - len(during) : before])


def ask(path: Path) -> None:
    for each in ("/status", "/metrics"):
        connection = Unix(path)
        connection.request("GET", each)
        if connection.getresponse().status != 200:
            sys.exit(f"{each} is not answered")
        connection.close()


def main() -> None:
    (runs,) = numbers(__doc__, runs=(15, 1))
    taken: dict[str, list[float]] = {"with": [], "without": []}
    used: dict[str, list[float]] = {"with": [], "without": [], "asked": []}
    ran: dict[str, list[float]] = {"with": [], "without": []}
    waits: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as made:
        command = [str(Path(sys.executable).with_name("sds-agent")), "run"]
        for name, section in (("with", "{address: '127.0.0.1:0'}"), ("without", "{enabled: false}")):
            folder = Path(made, name)
            folder.mkdir()
            (folder / "agent.yaml").write_text(CONFIG.format(folder, section))
        for _ in range(runs + 1):
            for name, times in taken.items():
                folder = Path(made, name)

                def then(pid: int, name: str = name, folder: Path = folder) -> None:
                    ran[name].append(processor_time(pid))
                    time.sleep(SETTLED)
                    used[name].append(memory(pid))
                    if name == "with":
                        waits.append(longest_waits(folder))
                        used["asked"].append(memory(pid))

                times.append(
                    seconds_to_first_secret([*command, str(folder / "agent.yaml")], folder / "agent.sock", then)
                )
    for name, times in taken.items():
        low, middle, high = min(times[1:]), statistics.median(times[1:]), max(times[1:])
        seconds = f"first secret min {low:.3f} s  median {middle:.3f} s  max {high:.3f} s"
        busy = statistics.median(ran[name][1:])
        cost = f"{busy:.0f} ms of processor; {statistics.median(used[name][1:]):.1f} MB"
        print(f"{name:8} the admin server: {seconds};  {cost}")
    difference = statistics.median(a - b for a, b in zip(taken["with"][1:], taken["without"][1:], strict=True))
    busier = statistics.median(a - b for a, b in zip(ran["with"][1:], ran["without"][1:], strict=True))
    asked = statistics.median(used["asked"][1:])
    print(f"with - without, run by run: {difference * 1000:+.1f} ms, {busier:+.1f} ms of processor")
    during, before = (statistics.median(each) for each in zip(*waits[1:], strict=True))
    print(
        f"once it was asked: {asked:.1f} MB; an Envoy waits {during:.1f} ms at most meanwhile, {before:.1f} ms before"
    )


if __name__ == "__main__":
    main()
