"""The programs that the demonstration starts: it reads their logs, and ends them when it ends, even if it is killed."""

import os
import shutil
import signal
import subprocess
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import anyio
from anyio.abc import ByteReceiveStream, Process
from anyio.streams.buffered import BufferedByteReceiveStream

GRACE = 3.0
"""Seconds that a program has to end after SIGTERM."""
LONGEST_LINE = 1 << 20


class DemoError(Exception):
    """The demonstration cannot go on; the text says why."""


@dataclass(slots=True)
class Child:
    """A program that was started. `log` is the end of what it wrote on standard error."""

    name: str
    process: Process
    log: deque[str] = field(default_factory=lambda: deque(maxlen=25))

    def error(self, what: str) -> DemoError:
        """The error that says `what` happened to this program, with the end of its log."""
        return DemoError("\n".join([f"{self.name} {what}; the end of its log:", *(f"  {line}" for line in self.log)]))


@asynccontextmanager
async def running(name: str, command: list[str], on_line: Callable[[str], None]) -> AsyncIterator[Child]:
    """Run a program for the length of the block, giving each line of its log to `on_line`.

    Raises DemoError (in an exception group) if it ends before the block does.
    """
    child = Child(name, await _start(command))
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_watch, child, on_line)
            yield child
            tasks.cancel_scope.cancel()
    finally:
        with anyio.CancelScope(shield=True):
            await _stop(child.process)


async def _start(command: list[str]) -> Process:
    # variables of the user's shell that configure an agent are meant for another one
    environment = {name: value for name, value in os.environ.items() if not name.upper().startswith("SDS_AGENT__")}
    # the kernel ends the program if this one is killed before it can clean up
    setpriv = shutil.which("setpriv")
    if setpriv is None:
        raise DemoError("There is no setpriv on PATH: install the package util-linux.")
    # a session of its own keeps the terminal's Ctrl-C for this program, which then ends the others in order
    return await anyio.open_process(
        [setpriv, "--pdeathsig", "KILL", "--", *command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
        env=environment,
    )


async def _watch(child: Child, on_line: Callable[[str], None]) -> None:
    assert child.process.stderr is not None
    await _read(child.process.stderr, child, on_line)
    raise child.error(f"ended by itself ({_ending(await child.process.wait())})")


async def _read(stream: ByteReceiveStream, child: Child, on_line: Callable[[str], None]) -> None:
    lines = BufferedByteReceiveStream(stream)
    while True:
        try:
            line = (await lines.receive_until(b"\n", LONGEST_LINE)).decode(errors="replace")
        except (anyio.IncompleteRead, anyio.EndOfStream):
            return
        child.log.append(line)
        on_line(line)


def _ending(status: int) -> str:
    return f"exit code {status}" if status >= 0 else f"killed by {signal.Signals(-status).name}"


async def _stop(process: Process) -> None:
    if process.returncode is None:
        process.terminate()
        with anyio.move_on_after(GRACE) as timeout:
            await process.wait()
        if timeout.cancelled_caught:
            process.kill()
    await process.aclose()
