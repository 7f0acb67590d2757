"""One worker as its parent has it, from the start of the process to its end."""

import asyncio
import os
import signal
import socket
import subprocess
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeAlias

from sds_agent.ca.workers.channel import Channel
from sds_agent.ca.workers.messages import AreYouThere, Drain, ToParent, ToWorker, to_parent
from sds_agent.ca.workers.silence import MOST_UNANSWERED, Silence
from sds_agent.clock import Beginning
from sds_agent.errors import SdsAgentError
from sds_agent.text import name_of_signal

Command: TypeAlias = Callable[[int], Sequence[str]]
"""What runs `worker.main` with a descriptor."""


class WorkerError(SdsAgentError):
    """A worker could not be started."""


class Worker:
    """The process, and what the parent keeps for it: the names of its connections, and its requests in work.

    `places` has the place in the ledger of each question that asked for one. `ready` is done once it answers calls.
    `silence` is for the answers to `check`.
    """

    def __init__(
        self,
        number: int,
        process: asyncio.subprocess.Process,
        connection: socket.socket,
        beginning: Beginning,
        receive: Callable[["Worker", ToParent], None],
    ) -> None:
        self.number = number
        self.process = process
        self.beginning = beginning
        self.ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.connections = set[str]()
        self.places: dict[int, int] = {}
        self.silence = Silence()
        self._hangs = False
        self._draining = False
        self._channel = Channel[ToParent](connection, to_parent, lambda message, _: receive(self, message), self._lost)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self.process.pid

    def send(self, message: ToWorker, descriptor: int | None = None) -> None:
        """Send it, with a copy of the descriptor, if the worker is still there. Raises OSError without room for it."""
        self._channel.send(message, descriptor)

    def check(self, passed: float) -> None:
        """Ask whether it is alive, so many seconds after the question before; end it if it answers no more."""
        if self.silence.ask(passed):
            self._hangs = True
            self.kill()
        else:
            self.send(AreYouThere())

    def drain(self) -> None:
        """Have it answer what it has, and end."""
        self._draining = True
        self.send(Drain())

    def kill(self) -> None:
        """End it at once."""
        if self.process.returncode is None:
            with suppress(ProcessLookupError):
                # not by way of `process`, which would take the exit status away from who waits for it
                os.kill(self.pid, signal.SIGKILL)

    def end(self) -> str:
        """How it ended, in words that follow its name."""
        if self._hangs:
            return f"hung, with {MOST_UNANSWERED} questions of the server unanswered, and was killed"
        return end_of(self.process.returncode)

    def _lost(self) -> None:
        """Its socket is closed: without it a worker ends by itself, unless it hangs. One that drains has its time."""
        if not self._draining:
            self.kill()

    def close(self) -> None:
        """Hear what it said last, and nothing any more."""
        self._channel.exhaust()
        self._channel.close()


async def started(
    number: int, command: Command, beginning: Beginning, receive: Callable[[Worker, ToParent], None]
) -> Worker:
    """Start a worker, in a session of its own. Raises WorkerError."""
    ours, theirs = socket.socketpair()
    with theirs:
        try:
            process = await asyncio.create_subprocess_exec(
                *command(theirs.fileno()),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # the parent's may be the audit log
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
            )
        except (OSError, RuntimeError) as error:  # no process or no thread could be had
            ours.close()
            raise WorkerError(f"worker {number} of the CA server cannot be started: {error}") from error
        except BaseException:
            ours.close()
            raise
    return Worker(number, process, ours, beginning, receive)


def end_of(code: int | None) -> str:
    """How a process ended, in words that follow its name."""
    if code is None or code >= 0:
        return f"ended with the exit code {code}"
    return f"was ended by {name_of_signal(-code) or f'the signal {-code}'}"
