"""A program for tests: the SDS server in a process of its own, which publishes on command and counts what that took.

    python counting_server.py SOCKET

It reads one command a line and answers each with a line of JSON. `count` says what the process holds now. `push`
publishes the next certificate, waits until as many streams as follow the word have acknowledged it, and says what that
took. Only what the package offers to everybody is used, and Python's own means of counting: nothing in it is replaced.
"""

import asyncio
import ctypes
import gc
import json
import logging
import sys
import tracemalloc
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import Self

import sds_agent
from sds_agent.sds.endpoint import SocketFile
from sds_agent.sds.relay import _Direction
from sds_agent.sds.server import Limits, serving
from sds_agent.sds.service import SecretDiscoveryService
from sds_agent.secrets.model import BundleSecret, CertificateSecret
from sds_agent.secrets.store import SecretStore

OURS = str(Path(sds_agent.__file__).parent)
RELAYING = tuple(f"{OURS}/{each}.py" for each in ("sds/relay", "sds/acceptor", "rpc/frames"))
"""What runs for each piece that a relay reads. In how many pieces a message comes depends on the moment."""
TURNS = 20
"""Turns of the event loop in which what is due is done, such as what the last ACK causes."""


class Calls:
    """Counts, of this thread: calls of the package's functions, those of what relays apart from the others, the pieces
    that it read, and messages with secrets that are written as bytes.
    """

    def __init__(self) -> None:
        self.functions = 0
        self.relaying = 0
        self.pieces = 0
        self.encoded = 0
        self.serialized = 0

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        """What `sys.setprofile` calls."""
        if event == "call" and frame.f_code.co_filename in RELAYING:
            self.relaying += 1
            self.pieces += frame.f_code is _Direction._read.__code__
        elif event == "call" and frame.f_code.co_filename.startswith(OURS):
            self.functions += 1
        elif event == "c_call" and getattr(argument, "__name__", "") == "SerializeToString":
            self.serialized += 1
            message = argument.__self__  # type: ignore[attr-defined]  # a method that is bound to it
            self.encoded += bool(getattr(message, "resources", ()))


class Lines(logging.Handler):
    """Counts the lines of the log."""

    lines = 0

    @classmethod
    def recording(cls) -> Self:
        """One that counts the package's lines from now on, as many as it writes by default."""
        made, logger = cls(), logging.getLogger("sds_agent")
        logger.setLevel(logging.INFO)
        logger.addHandler(made)
        return made

    def emit(self, record: logging.LogRecord) -> None:  # noqa: ARG002 - the handler's signature
        """Count one."""
        self.lines += 1


class Agent:
    """The server, its secrets and its counts."""

    def __init__(self) -> None:
        self.store = SecretStore(("default", "ROOTCA"))
        self.service = SecretDiscoveryService(self.store)
        self._lines = Lines.recording()
        self._number = 0
        self.store.publish({"ROOTCA": BundleSecret(b"roots" * 200)})
        self.publish()

    def publish(self) -> None:
        """A certificate and a key of the usual size."""
        self._number += 1
        chain = f"{self._number:08}".encode() * 150
        self.store.publish({"default": CertificateSecret(chain, b"key" * 80, datetime.now(UTC) + timedelta(days=1))})

    @property
    def acks(self) -> int:
        """Secrets that were acknowledged so far."""
        return sum(self.service.counts.acks.counts.values())

    async def acked(self, count: int) -> None:
        """Wait until so many were, and for what the last one causes."""
        enough = asyncio.Event()
        with self.service.watching(lambda: enough.set() if self.acks >= count else None):
            if self.acks < count:
                await enough.wait()
        await settled()

    async def push(self, streams: int) -> dict[str, int]:
        """Publish, and count until that many ACKs have come."""
        calls, lines, wanted = Calls(), self._lines.lines, self.acks + streams
        sys.setprofile(calls)
        try:
            self.publish()
            await self.acked(wanted)
        finally:
            sys.setprofile(None)
        return {
            "functions": calls.functions,
            "relaying": calls.relaying,
            "pieces": calls.pieces,
            "encoded": calls.encoded,
            "serialized": calls.serialized,
            "lines": self._lines.lines - lines,
        }

    def count(self) -> dict[str, int]:
        """What this process holds."""
        gc.collect()
        return {
            "streams": len(self.service.streams),
            "tasks": len(asyncio.all_tasks()),
            "bytes": tracemalloc.get_traced_memory()[0],
            "allocated": allocated(),
            "objects": len(gc.get_objects()),
            "threads": entries("task"),
            "descriptors": entries("fd"),
        }


async def settled() -> None:
    """Let the event loop do what is due."""
    for _ in range(TURNS):
        await asyncio.sleep(0)


class Allocated(ctypes.Structure):
    """glibc's struct mallinfo2 (mallinfo(3))."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        )
    )


def allocated() -> int:
    """Bytes in use of those that the C library gives out: gRPC's, and the large objects of Python's."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = Allocated
    found = mallinfo2()
    return int(found.uordblks + found.hblkhd)


def entries(what: str) -> int:
    """How many of these the kernel lists of this process."""
    return len(list(Path("/proc/self", what).iterdir()))


async def main(path: Path) -> None:
    """Serve until standard input ends."""
    agent, commands = Agent(), asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    async with serving(agent.service, SocketFile(path), Limits()):
        print(json.dumps({"serving": str(path)}), flush=True)
        while command := (await commands.readline()).decode().split():
            match command:
                case ["count"]:
                    answer = agent.count()
                case ["acked", number]:
                    await agent.acked(int(number))
                    answer = {"acks": agent.acks}
                case ["push", number]:
                    answer = await agent.push(int(number))
                case _:
                    raise ValueError(command)
            print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    tracemalloc.start()
    asyncio.run(main(Path(sys.argv[1])))
