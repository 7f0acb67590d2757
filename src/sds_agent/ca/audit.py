"""The audit log: one JSON line for each certificate and for each refusal.

A certificate that could not be written down is not given out. Nobody waits for long where lines are not taken, as by a
collector behind standard output that stands still: the whole server would wait, and not even end when it is told to.
"""

import errno
import os
import select
import stat
import sys
from datetime import datetime
from pathlib import Path

from msgspec import Struct

from sds_agent import log
from sds_agent.ca.callers import Caller
from sds_agent.errors import ConfigurationError

LONGEST_VALUE = 600
PATIENCE = 0.5
"""Seconds that a reader may stand still. The next lines do not wait again until it goes on."""


class Entry(Struct, frozen=True):
    """What happened to one request. What is not known is None and left out of the line.

    `serial` (hexadecimal) and `not_after` are the certificate's; `outcome` is "issued", or the kind of the refusal,
    whose reason is `reason`. `spiffe_id` is the identity in the certificate, or that was asked for.
    """

    outcome: str
    address: str
    caller: Caller | None = None
    spiffe_id: str | None = None
    serial: str | None = None
    not_after: datetime | None = None
    reason: str | None = None


def line(entry: Entry, now: datetime) -> bytes:
    """The entry as one line of JSON in ASCII, so that nothing in it can begin a line of its own."""
    caller = entry.caller
    fields = {
        "time": log.timestamp(now),
        "event": "certificate_issued" if entry.outcome == "issued" else "certificate_refused",
        "outcome": entry.outcome,
        "serial": entry.serial,
        "spiffe_id": entry.spiffe_id,
        "caller": str(caller.identity) if caller else None,
        "proof": caller.proof.value if caller else None,
        "proof_detail": caller.detail if caller else None,
        "not_after": log.timestamp(entry.not_after) if entry.not_after else None,
        "address": entry.address,
        "reason": entry.reason,
    }
    told = {key: value[:LONGEST_VALUE] for key, value in fields.items() if value is not None}
    return log.ascii_json(told).encode() + b"\n"


class AuditLog:
    """Appends to a file, which may be moved away at any time, or writes to standard output."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._torn = False  # our last line was written in part
        self._left = (0, 0)  # the file's inode and size after it
        self._stalled = False
        self._standard_output: int | None = None

    def check(self) -> None:
        """Raises ConfigurationError when the file cannot be written to."""
        try:
            self._append(b"")
        except OSError as error:
            raise ConfigurationError(
                f"audit: cannot write to {self._path or 'standard output'}: {error.strerror}; "
                "name a file that the user that runs this may write to"
            ) from error

    def write(self, entry: Entry, now: datetime) -> None:
        """Write the entry's line. Raises OSError."""
        self._append(line(entry, now))

    def _append(self, content: bytes) -> None:
        if self._path is None:
            if sys.stdout is None:  # it was closed when the program started
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            if self._standard_output is None:
                self._standard_output = log.never_waiting(sys.stdout.fileno())
            self._write(self._standard_output, content)
            return
        # a pipe that nobody reads is an error, not a reason to wait
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK
        descriptor = os.open(self._path, flags, 0o600)
        try:
            self._write(descriptor, content)
        finally:
            os.close(descriptor)

    def _write(self, descriptor: int, content: bytes) -> None:
        """All of it, on a line of its own."""
        found = os.fstat(descriptor)
        is_file = stat.S_ISREG(found.st_mode)
        if content and (self._is_torn(descriptor, found) if is_file else self._torn):
            content = b"\n" + content
        left = content
        try:
            while left:
                if not is_file:
                    self._wait_for_room(descriptor)
                left = left[os.write(descriptor, left if is_file else left[: select.PIPE_BUF]) :]
        finally:
            if written := content[: len(content) - len(left)]:
                self._torn = not written.endswith(b"\n")
                self._left = (found.st_ino, found.st_size + len(written))

    def _is_torn(self, descriptor: int, found: os.stat_result) -> bool:
        """Whether the file ends within a line: a full disk cut it off, for us, a server before us or one beside us."""
        size = found.st_size
        if (found.st_ino, size) == self._left:  # nobody has written since, so there is nothing to read
            return self._torn
        if size == 0:
            return False
        try:
            with Path(f"/proc/self/fd/{descriptor}").open("rb", buffering=0) as file:
                while os.pread(file.fileno(), 1, size - 1) != b"\n":
                    before, size = size, os.fstat(descriptor).st_size
                    if size == before:
                        return True
                return False  # what was seen first was another server in the middle of a line
        except OSError:  # it can be written but not read
            return self._torn

    def _wait_for_room(self, descriptor: int) -> None:
        """Return once PIPE_BUF bytes can be written without waiting. Raises OSError when that takes too long."""
        poll = select.poll()
        poll.register(descriptor, select.POLLOUT)
        self._stalled = not poll.poll(0 if self._stalled else PATIENCE * 1000)
        if self._stalled:
            raise OSError(errno.EAGAIN, "nobody reads it")
