"""Where the audit log goes: what becomes of its lines when there is no room for them."""

import json
import os
import pty
import select
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import pytest
from fakes.disks import full_disk

from sds_agent.ca.audit import AuditLog, Entry
from sds_agent.errors import ConfigurationError

ENTRY = Entry("issued", "127.0.0.1:1", serial="0123456789abcdef")
LONG = Entry("invalid", "127.0.0.1:1", spiffe_id="\u2028" * 600, reason="\u2028" * 600)


def write(audit: AuditLog, entry: Entry = ENTRY) -> None:
    audit.write(entry, datetime(2026, 1, 1, tzinfo=UTC))


def fill(audit: AuditLog, entry: Entry) -> None:
    """Write until that cannot be."""
    while True:
        write(audit, entry)


@pytest.mark.parametrize("by", ["the same server", "another one", "standard output"])
def test_a_line_that_did_not_fit_spoils_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    """The certificate after it is given out, so its line must be one that can be read."""
    path = tmp_path / "audit.log"
    first = AuditLog(path)
    write(first)
    with full_disk(path.stat().st_size + 20), pytest.raises(OSError, match="too large"):
        write(first)
    with path.open("a") as standard_output:
        monkeypatch.setattr(sys, "stdout", standard_output)
        audit = {"another one": AuditLog(path), "standard output": AuditLog(None)}.get(by, first)
        write(audit)
        write(audit)
    good, torn, *rest = path.read_text().splitlines()
    assert len(torn) == 20
    assert [json.loads(line)["serial"] for line in (good, *rest)] == [ENTRY.serial] * 3


def test_a_file_that_was_moved_away_takes_its_torn_line_along(tmp_path: Path) -> None:
    path = tmp_path / "audit.log"
    audit = AuditLog(path)
    with full_disk(20), pytest.raises(OSError, match="too large"):
        write(audit)
    path.rename(tmp_path / "audit.log.1")
    write(audit)
    assert [json.loads(line)["serial"] for line in path.read_text().splitlines()] == [ENTRY.serial]


@pytest.mark.parametrize("entry", [ENTRY, LONG], ids=["short", "longer than what a pipe takes at once"])
@pytest.mark.parametrize("kind", [os.pipe, pty.openpty], ids=["pipe", "terminal"])
def test_a_reader_that_stands_still_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch, kind: Callable[[], tuple[int, int]], entry: Entry
) -> None:
    """The CA would stand still with its log collector: deaf to callers, to health checks and to SIGTERM."""
    reading, writing = kind()
    with os.fdopen(reading, "rb", buffering=0) as reader, os.fdopen(writing, "w") as standard_output:
        monkeypatch.setattr(sys, "stdout", standard_output)
        audit = AuditLog(None)
        audit.check()
        for _ in range(2):
            with pytest.raises(BlockingIOError):
                fill(audit, entry)
        told, room = b"", select.poll()
        room.register(writing, select.POLLOUT)
        while not room.poll(0):
            told += reader.read(1 << 16)
        write(audit, Entry("issued", "the last"))
        while b"the last" not in told or not told.endswith(b"\n"):
            told += reader.read(1 << 16)
    *lines, last = told.decode().splitlines()
    assert json.loads(last)["address"] == "the last"
    assert all(json.loads(line)["address"] for line in lines[:-1])


def test_standard_output_that_is_closed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)  # as Python has it then
    with pytest.raises(ConfigurationError, match="audit: cannot write to standard output"):
        AuditLog(None).check()


def test_a_pipe_that_nobody_reads_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigurationError, match="audit: cannot write"):
        AuditLog(tmp_path / "pipe").check()
