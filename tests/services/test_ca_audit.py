"""The audit log: what its lines hold, where they go, and what becomes of them when there is no room."""

import json
import os
import pty
import select
import sys
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime
from pathlib import Path

import grpc
import grpc.aio
import pytest
from fakes.ca_servers import TRUST_DOMAIN, WEB, Served, served
from fakes.disks import full_disk

from sds_agent.ca.acceptor import written
from sds_agent.ca.audit import AuditLog, Entry
from sds_agent.errors import ConfigurationError
from sds_agent.pki.certificates import serial_hex

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


@pytest.fixture
async def ca(tmp_path: Path) -> AsyncIterator[Served]:
    async with served(tmp_path) as it:
        yield it


async def test_nothing_that_a_caller_asks_for_can_begin_an_audit_line(ca: Served) -> None:
    """What is not ASCII may be the end of a line to whatever reads the log."""
    wanted = f'{WEB}\u2028\n\r\x85{{"outcome": "issued"}}'
    with pytest.raises(grpc.aio.AioRpcError):
        await ca.ask(
            ca.issuer.token(sub="system:serviceaccount:kube-system:node"), metadata={"ImpersonatedIdentity": wanted}
        )
    assert ca.audit[0]["spiffe_id"] == wanted
    text = (ca.directory / "audit.log").read_text()
    assert text.isascii()
    assert len(text.splitlines()) == 1


async def test_an_audit_line_has_an_end_whatever_a_caller_asks_for(ca: Served) -> None:
    """Or else a caller could fill the disk, and then nothing is signed for anybody."""
    node = ca.issuer.token(sub="system:serviceaccount:kube-system:node")
    with pytest.raises(grpc.aio.AioRpcError):
        await ca.ask(node, metadata={"ImpersonatedIdentity": f"spiffe://{TRUST_DOMAIN}/{'x' * 1_000_000}"})
    assert len(ca.audit) == 1
    assert (ca.directory / "audit.log").stat().st_size < 5000


@pytest.mark.parametrize(
    ("address", "text"),
    [
        (("10.0.0.7", 51234), "10.0.0.7:51234"),
        (("::1", 51234, 0, 0), "[::1]:51234"),
        (("fe80::1%eth0", 1, 0, 2), "[fe80::1%eth0]:1"),
        ("@a-unix-socket", "@a-unix-socket"),
    ],
)
def test_an_address_can_be_taken_apart_again(address: object, text: str) -> None:
    """Whoever looks for a caller in a firewall's log needs its address and its port."""
    assert written(address) == text


def test_the_audit_log_leaves_no_file_open(tmp_path: Path) -> None:
    """It is opened for every line, and a process may have no more than some thousand open."""
    log = AuditLog(tmp_path / "audit.log")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        log.write(Entry("issued", "127.0.0.1:1"), datetime.now(UTC))
    assert len(list(Path("/proc/self/fd").iterdir())) <= before
    assert len((tmp_path / "audit.log").read_text().splitlines()) == 5


async def test_the_audit_log_goes_to_standard_output_unless_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async with served(tmp_path, audit="") as ca:
        got = await ca.ask(ca.issuer.token())
        with pytest.raises(grpc.aio.AioRpcError):
            await ca.ask()
    issued, denied = (json.loads(line) for line in capfd.readouterr().out.splitlines())
    assert (issued["serial"], issued["outcome"]) == (serial_hex(got.leaf), "issued")
    assert denied["outcome"] == "unauthenticated"


async def test_the_audit_log_can_be_moved_away_while_the_ca_runs(ca: Served) -> None:
    """As logrotate does it."""
    await ca.ask(ca.issuer.token())
    (ca.directory / "audit.log").rename(ca.directory / "audit.log.1")
    await ca.ask(ca.issuer.token())
    assert len(ca.audit) == 1
    assert (ca.directory / "audit.log").stat().st_mode & 0o777 == 0o600


async def test_nothing_is_signed_that_cannot_be_audited(ca: Served) -> None:
    (ca.directory / "audit.log").unlink()
    (ca.directory / "audit.log").mkdir()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ca.ask(ca.issuer.token())
    assert caught.value.code() is grpc.StatusCode.INTERNAL
