"""The operator's programs that run after a renewal, or after an attempt that failed.

A hook is an argument list, which no shell reads. It runs beside everything else and delays nothing: renewals go on, and
of what happens while it runs only the newest is left to be done. It gets little of the agent's environment, in which
secrets may be, and no key.
"""

import logging
import os
import signal
from collections.abc import Mapping
from contextlib import suppress
from datetime import timedelta
from subprocess import DEVNULL, STDOUT
from typing import Literal, Protocol

import anyio
import anyio.abc
from msgspec import Struct

from sds_agent import log
from sds_agent.text import name_of_signal, one_line

LOG = logging.getLogger(__name__)

Occasion = Literal["renewed", "failed"]

MOST_OUTPUT = 4096
"""Bytes of a hook's output that are kept; the rest is dropped."""
READ_AT_ONCE = 65_536
LONGEST_WORDS = 300
"""Characters of it in the log."""
GRACE = 2.0
"""Seconds between SIGTERM and SIGKILL for a hook that takes too long, or that the agent's end cuts off, and for what it
started, as far as that has the hook's output open. After the second, too, it has so long.
"""
FOREIGN = "goes on, as it is another user's now, whose programs the agent cannot end"
HELD = (
    "goes on, as the system does not end it: it may wait for a disk, or be held by a debugger; until it has ended the "
    "agent runs no other for this workload"
)
ELSEWHERE = "goes on, as it has left the hook's session"
_PASSED_ON = ("PATH", "HOME", "LANG", "TZ")
"""The variables of the agent's environment that a hook gets."""


class HookCommands(Struct, frozen=True):
    """What to run for a workload on each occasion, and how long one may take. `directory` is that of its output."""

    workload: str
    directory: str
    on_renewed: tuple[str, ...] | None
    on_failed: tuple[str, ...] | None
    timeout: timedelta

    def command(self, occasion: Occasion) -> tuple[str, ...] | None:
        """The program and its arguments; None where there is nothing to run."""
        return self.on_renewed if occasion == "renewed" else self.on_failed

    def environment(self, occasion: Occasion) -> Mapping[str, str]:
        """The hook's whole environment."""
        own = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        return {
            **own,
            "SDS_AGENT_EVENT": occasion,
            "SDS_AGENT_WORKLOAD": self.workload,
            "SDS_AGENT_OUTPUT": self.directory,
        }


class Attempted(Protocol):
    """An attempt to get a certificate, which has ended."""

    @property
    def failed(self) -> bool:
        """Whether it gave none."""
        ...


class Hooks:
    """The hooks of one workload: what has to be run, and the loop that runs it."""

    def __init__(self, commands: HookCommands | None) -> None:
        self._commands = commands
        self._due: dict[Occasion, None] = {}
        self._more: anyio.Event | None = None

    def renewed(self) -> None:
        """New files are in place. Returns at once."""
        self._due.pop("failed", None)  # it is over
        self._note("renewed")

    def attempted(self, attempt: Attempted) -> None:
        """An attempt to get a certificate has ended; the program for failures is due if it failed. Returns at once."""
        if attempt.failed:
            self.failed()

    def failed(self) -> None:
        """An attempt to get a certificate has failed. Returns at once."""
        self._note("failed")

    def _note(self, occasion: Occasion) -> None:
        if self._commands is None or self._commands.command(occasion) is None:
            return
        self._due[occasion] = None
        if self._more is not None:
            self._more.set()

    async def run(self) -> None:
        """Run what is due, one after another, until cancelled; a hook that runs then is ended."""
        while self._commands is not None:
            self._more = anyio.Event()
            while self._due:
                occasion = next(iter(self._due))
                del self._due[occasion]
                if (held := await _run(self._commands, occasion)) is not None:
                    await held.wait()  # the next one would meet the same, and there would be more and more of them
            await self._more.wait()


NO_HOOKS = Hooks(None)


class _Outcome(Struct, frozen=True):
    """What is wrong with how a program ended, in words; None where it succeeded. `held` is one that goes on, as the
    system does not end it.
    """

    fault: str | None
    held: anyio.abc.Process | None = None


async def _run(commands: HookCommands, occasion: Occasion) -> anyio.abc.Process | None:
    """Run a hook to its end, and log what came of it (`hook_succeeded`, `hook_failed`). Returns one that is held."""
    command, begun = commands.command(occasion) or (), anyio.current_time()
    named: dict[str, log.Value] = {
        "workload": commands.workload,
        "hook": f"on_{occasion}",
        "program": command[0],
    }
    try:
        outcome = await _outcome(commands, occasion, command)
    except OSError as error:
        outcome = _Outcome(f"it cannot be started: {error.strerror}")
    except RuntimeError as error:  # where a thread waits for its end (Python 3.11), none could be had
        outcome = _Outcome(f"it cannot be started: {error}")
    named["took_seconds"] = round(anyio.current_time() - begun, 3)
    if outcome.fault is None:
        log.event(LOG, "hook_succeeded", level=logging.INFO, **named)
    else:
        log.event(LOG, "hook_failed", level=logging.ERROR, **named, cause=outcome.fault)
    return outcome.held


async def _outcome(commands: HookCommands, occasion: Occasion, command: tuple[str, ...]) -> _Outcome:
    """Run the program. Raises OSError and RuntimeError."""
    reader, writer = os.pipe()
    try:
        try:
            process = await anyio.open_process(
                command,
                stdin=DEVNULL,
                stdout=writer,
                stderr=STDOUT,
                env=commands.environment(occasion),
                start_new_session=True,  # so that what it starts ends with it
            )
        finally:
            os.close(writer)
        return await _end_of(process, reader, commands.timeout.total_seconds())
    finally:
        os.close(reader)


async def _end_of(process: anyio.abc.Process, reader: int, seconds: float) -> _Outcome:
    """Wait for the end of a program that runs; what it says comes out of the pipe. It has so many seconds."""
    output, ended, lasting, code = bytearray(), False, "", None
    try:
        with anyio.move_on_after(seconds) as limit:
            await _silent_end(process, reader, output)
            ended = True
    finally:
        if not ended:
            code = process.returncode
            with anyio.CancelScope(shield=True):
                lasting = await _end(process, reader, output)
    said = one_line(output.decode(errors="replace").strip(), LONGEST_WORDS)
    words = f" ({said})" if said else ""
    if limit.cancelled_caught:
        fault = f"{_late(code, seconds, lasting or 'was ended')}{words}"
        return _Outcome(fault, process if lasting is HELD else None)
    code = process.returncode or 0
    return _Outcome(f"{_ending(code)}{words}" if code else None)


def _late(code: int | None, seconds: float, became: str) -> str:
    """What did not end in time, and what became of it: the program, or what it started where it ended with a code."""
    if code is None:
        return f"it did not end within {seconds:g} s, and {became}"
    return (
        f"{_ending(code)}, but what it started kept its output open for {seconds:g} s and {became}; let what is to go "
        "on write elsewhere, such as to /dev/null"
    )


def _ending(code: int) -> str:
    if code < 0:
        return f"it was ended by the signal {name_of_signal(-code) or -code}"
    return f"it ended with the code {code}"


async def _silent_end(process: anyio.abc.Process, reader: int, output: bytearray) -> None:
    """Return once the program has ended and nothing has its output open; that is read, so that none waits for it."""
    while True:
        await anyio.wait_readable(reader)
        if not (chunk := os.read(reader, READ_AT_ONCE)):
            break
        output += chunk[: MOST_OUTPUT - len(output)]
    await process.wait()


async def _end(process: anyio.abc.Process, reader: int, output: bytearray) -> str:
    """End the program, if it still runs or something that it started has its output open, with all that it started.

    Returns why it goes on, ELSEWHERE, FOREIGN or HELD, where it does. It is not waited for here: a reload and the
    agent's end are to come, and until a reload has come the workloads that it changes are not renewed.
    """
    had_ended = process.returncode is not None
    try:
        os.killpg(process.pid, signal.SIGTERM)
        with anyio.move_on_after(GRACE):
            await _silent_end(process, reader, output)
        with suppress(ProcessLookupError):  # all of it has ended
            os.killpg(process.pid, signal.SIGKILL)  # the program may be gone, and what it started may ignore the first
    except ProcessLookupError:
        if had_ended:
            return ELSEWHERE
    except PermissionError:  # as by sudo
        return FOREIGN
    with anyio.move_on_after(GRACE) as limit:
        await (_silent_end(process, reader, output) if had_ended else process.wait())
    if had_ended and limit.cancelled_caught:
        return ELSEWHERE
    return HELD if process.returncode is None else ""
