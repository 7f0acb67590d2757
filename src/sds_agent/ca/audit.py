"""The audit log: one JSON line for each certificate and for each refusal.

A certificate that could not be written down is not given out.
"""

import os
import sys
from datetime import datetime
from pathlib import Path

from msgspec import Struct

from sds_agent import log
from sds_agent.ca.callers import Caller
from sds_agent.errors import ConfigurationError

LONGEST_VALUE = 600


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
            _write_all(sys.stdout.fileno(), content)
            return
        descriptor = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            _write_all(descriptor, content)
        finally:
            os.close(descriptor)


def _write_all(descriptor: int, content: bytes) -> None:
    while content:
        content = content[os.write(descriptor, content) :]
