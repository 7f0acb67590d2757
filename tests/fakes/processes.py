"""A program started for a test; its standard error is read line by line as it comes."""

import os
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
from anyio.abc import ByteReceiveStream, Process
from anyio.streams.text import TextReceiveStream

TIMEOUT = 30.0
"""Seconds after which a missing line fails the test; the failure shows the last lines."""


_LIMITED = """
import os, resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (int(sys.argv[1]), int(sys.argv[2])))
os.execv(sys.executable, [sys.executable, *sys.argv[3:]])
"""


def with_descriptors(soft: int, hard: int) -> list[str]:
    """Arguments for Python, before a program's own, that give the program these limits on file descriptors."""
    return ["-c", _LIMITED, str(soft), str(hard)]


DAC_OVERRIDE = 1
"""CAP_DAC_OVERRIDE (linux/capability.h): to write where the modes of files do not let one."""
FOWNER = 3
"""CAP_FOWNER: to change the mode of another user's file."""
_INCAPABLE = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(24, int(sys.argv[1]), 0, 0, 0)  # PR_CAPBSET_DROP, which root alone may, and needs
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


def without_capability(number: int) -> list[str]:
    """Arguments for Python, before a program's own, that take this capability from the program."""
    return ["-c", _INCAPABLE, str(number)]


_OLD_FILTER = """
import ctypes, os, struct, sys
steps = (0x20, 0, 0, 0), (0x15, 0, 1, 439), (0x06, 0, 0, 0x50001), (0x06, 0, 0, 0x7FFF0000)
code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *each) for each in steps))
program = ctypes.create_string_buffer(struct.pack("@HP", len(steps), ctypes.addressof(code)))
prctl = ctypes.CDLL(None).prctl
if prctl(38, 1, 0, 0, 0) or prctl(22, 2, program, 0, 0):  # PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP
    sys.exit("no filter can be had")
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def in_an_old_docker() -> list[str]:
    """Arguments for Python, before a program's own, that deny it faccessat2(2), as Docker before 20.10 does."""
    return ["-c", _OLD_FILTER]


class Program:
    """A running program and the lines that it wrote to standard error."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.lines: list[str] = []
        self.ended = False
        self._more = anyio.Event()

    async def read(self, stream: ByteReceiveStream) -> None:
        """Collect lines until the program closes its standard error."""
        rest = ""
        async for text in TextReceiveStream(stream, errors="replace"):
            *lines, rest = (rest + text).split("\n")
            self.lines += lines
            self._wake()
        self.ended = True
        self._wake()

    def _wake(self) -> None:
        self._more.set()
        self._more = anyio.Event()

    async def until(self, seen: Callable[[], bool]) -> None:
        """Wait until the lines so far make `seen` true."""
        with anyio.move_on_after(TIMEOUT):
            while not seen():
                assert not self.ended, "\n".join(["the program ended:", *self.lines[-40:]])
                await self._more.wait()
        assert seen(), "\n".join([f"not seen within {TIMEOUT} s:", *self.lines[-40:]])

    async def line(self, text: str, count: int = 1) -> str:
        """The count-th line that contains `text`."""
        await self.until(lambda: len([line for line in self.lines if text in line]) >= count)
        return [line for line in self.lines if text in line][count - 1]

    async def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End the program with that signal and return its exit status."""
        self.process.send_signal(number)
        with anyio.fail_after(TIMEOUT):
            return await self.process.wait()


@asynccontextmanager
async def started(
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    directory: Path | None = None,
    *,
    pass_fds: Sequence[int] = (),
) -> AsyncIterator[Program]:
    """Run a program inside this context, in `directory` if given; at the end it is killed if it still runs. It inherits
    the descriptors in `pass_fds`.
    """
    env = {**os.environ, **(environment or {})}
    async with await anyio.open_process(
        command, stdout=subprocess.DEVNULL, env=env, cwd=directory, pass_fds=pass_fds
    ) as process:
        program = Program(process)
        assert process.stderr is not None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(program.read, process.stderr)
            try:
                yield program
            finally:
                if process.returncode is None:
                    process.kill()
                with anyio.CancelScope(shield=True):
                    await process.wait()
                tasks.cancel_scope.cancel()
