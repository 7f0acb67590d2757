"""The audit log: one JSON line for each certificate and for each refusal.

The CA gives no certificate out whose line it could not write. It waits only briefly for a reader of standard output
that stands still, such as a log collector: else the whole server would wait, and would not see SIGTERM either.

Each peer can cause refusals, so their lines must not use up the CA's disk. Refusals without a proof, and those of a
caller beyond its quota, have a budget for each origin and one for all; the callers' quotas bound the others. A line of
its own says how many were left out. On a full disk, a reserve has room for the lines of certificates alone.
"""

import errno
import logging
import os
import stat
import sys
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from msgspec import Struct

from sds_agent import log
from sds_agent.budget import Budget, Rate
from sds_agent.ca.callers import Caller
from sds_agent.ca.places import origin_of
from sds_agent.ca.refusal import Reason
from sds_agent.ca.reserve import Reserve
from sds_agent.ca.status import AuditStatus
from sds_agent.clock import Clock
from sds_agent.errors import ConfigurationError
from sds_agent.files import FULL, fix_of
from sds_agent.identity.spiffe import LONGEST_ID
from sds_agent.pipes import never_waiting, write_some
from sds_agent.text import ascii_json, cut

EACH_ORIGIN = Rate(burst=30, per_second=0.2)
ALL_ORIGINS = Rate(burst=300, per_second=2)
"""Lines of refusals. In the long run these are some 50 MB a day."""
MOST_ORIGINS = 10_000
SETTLE = 60.0
"""Seconds from one line that counts what was left out to the next."""
TIMEOUT = 0.5
"""Seconds to wait for a reader that stands still. Until it reads on, further lines do not wait."""

LOG = logging.getLogger(__name__)


class Entry(Struct, frozen=True):
    """What happened to one request. The line leaves out what is None.

    `serial` (hexadecimal) and `not_after` are the certificate's; `outcome` is "issued" or the kind of the refusal, and
    `reason` the refusal's. `spiffe_id` is the identity in the certificate, or the one that was asked for.
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
        "spiffe_id": _bounded(entry.spiffe_id) if entry.spiffe_id is not None else None,
        "caller": str(caller.identity) if caller else None,
        "proof": caller.proof.value if caller else None,
        "proof_detail": caller.detail if caller else None,
        "not_after": log.timestamp(entry.not_after) if entry.not_after else None,
        "address": entry.address,
        "reason": cut(entry.reason, log.LONGEST_VALUE, count=True) if entry.reason is not None else None,
    }
    return _line({key: value for key, value in fields.items() if value is not None})


def _line(fields: Mapping[str, str | int]) -> bytes:
    return ascii_json(fields).encode() + b"\n"


def _bounded(asked: str) -> str:
    """An identity in full: two that differ must not look alike. Text that is too long to be one is cut, with a mark."""
    return asked if len(asked) <= LONGEST_ID else cut(asked, log.LONGEST_VALUE, count=True)


def _origin(entry: Entry) -> str:
    """The key of the budget that a refusal takes from: the caller, or its host."""
    if entry.caller is not None:
        return str(entry.caller.identity)
    host = entry.address.rpartition(":")[0].removeprefix("[").removesuffix("]")
    return origin_of(host or entry.address)


class AuditLog:
    """Appends to a file, which other programs may move away at any time, or writes to standard output."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._reserve: Reserve | None = None
        self._reserve_used = log.LogOnChange(LOG, "audit_reserve_used")
        self._budget = Budget(EACH_ORIGIN, ALL_ORIGINS, most_keys=MOST_ORIGINS)
        self._left_out = 0
        self._since: datetime | None = None  # the first of them
        self._torn = False  # our last line was written in part
        self._left = (0, 0)  # the file's inode and size after it
        self._stalled = False
        self._standard_output: int | None = None

    def check(self) -> None:
        """Take the reserve. Raises ConfigurationError when the file cannot be written to."""
        try:
            self._append(b"")
        except OSError as error:
            raise ConfigurationError(
                f"audit: cannot write to {self._path or 'standard output'}: {error.strerror}; "
                f"{fix_of(error, 'name a file that the user that runs this may write to')}"
            ) from error
        if self._path is not None and self._path.is_file():
            self._take_reserve(Reserve(self._path))

    def _take_reserve(self, reserve: Reserve) -> None:
        try:
            reserve.fill()
        except OSError as error:
            if error.errno in FULL:  # a part may be there, and `settle` adds the rest once there is room
                self._reserve, effect = reserve, "refusals are only counted until there is room for it"
            else:
                effect = "no certificate is given out while the disk is full"
            log.event(LOG, "audit_reserve_missing", level=logging.WARNING, cause=error.strerror, effect=effect)
        else:
            self._reserve = reserve

    @property
    def status(self) -> AuditStatus:
        """What it left out and has not counted yet."""
        return AuditStatus(left_out=self._left_out, since=self._since)

    def write(self, entry: Entry, now: datetime) -> None:
        """Write the line of a certificate. Raises OSError."""
        content = line(entry, now)
        while True:
            try:
                self._append(content)
            except OSError as error:
                if error.errno not in FULL or self._reserve is None or not self._reserve.give():
                    raise
                effect = "refusals are only counted until there is room again, and when it is used up nothing is signed"
                self._reserve_used.report(f"{error.strerror}", effect=effect)
            else:
                return

    def refuse(self, entry: Entry, now: datetime) -> None:
        """Write the line of a refusal, or count it where its budget is used up or the disk is full. Raises OSError."""
        within_quota = entry.caller is not None and entry.outcome != Reason.EXHAUSTED.value
        if not within_quota and not self._budget.take(_origin(entry), now.timestamp()):
            self._leave_out(now)
            return
        if self._reserve is not None and not self._reserve.whole:  # the room that it gave is for certificates
            self._leave_out(now)
            return
        try:
            self._append(line(entry, now))
        except OSError:
            self._leave_out(now)
            raise

    def settle(self, now: datetime) -> None:
        """Fill the reserve again if there is room, and write how many refusals were left out."""
        if self._reserve is not None:
            with suppress(OSError):
                self._reserve.fill()
                self._reserve_used.resolved()
        if self._left_out and self._since is not None:
            fields: dict[str, str | int] = {
                "time": log.timestamp(now),
                "event": "refusals_left_out",
                "count": self._left_out,
                "since": log.timestamp(self._since),
            }
            with suppress(OSError):  # the count goes into a later line
                self._append(_line(fields))
                self._left_out, self._since = 0, None

    async def follow(self, clock: Clock) -> None:
        """Settle every SETTLE seconds, until cancelled."""
        while True:
            await clock.sleep(SETTLE)
            self.settle(clock.now())

    def _leave_out(self, now: datetime) -> None:
        self._left_out += 1
        self._since = self._since or now

    def _append(self, content: bytes) -> None:
        if self._path is None:
            if sys.stdout is None:  # it was closed when the program started
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            if self._standard_output is None:
                self._standard_output = never_waiting(sys.stdout.fileno())
            self._write(self._standard_output, content)
            return
        # a pipe without a reader is an error, not a reason to wait
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
                taken = os.write(descriptor, left) if is_file else self._write_stream(descriptor, left)
                left = left[taken:]
        finally:
            if written := content[: len(content) - len(left)]:
                self._torn = not written.endswith(b"\n")
                self._left = (found.st_ino, found.st_size + len(written))

    def _is_torn(self, descriptor: int, found: os.stat_result) -> bool:
        """Whether the file ends within a line: a full disk cut it off, for us, a server before us or one beside us."""
        size = found.st_size
        if (found.st_ino, size) == self._left:  # no other process has written since, so there is nothing to read
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

    def _write_stream(self, descriptor: int, content: bytes) -> int:
        """Write some of it; how many bytes. Raises OSError when there is no room for too long."""
        taken = write_some(descriptor, content, 0 if self._stalled else TIMEOUT)
        self._stalled = not taken
        if self._stalled:
            raise OSError(errno.EAGAIN, "its reader stands still")
        return taken
