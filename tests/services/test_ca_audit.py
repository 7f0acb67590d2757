"""The audit log: what its lines hold, where they go, and what becomes of them when there is no room."""

import errno
import json
import os
import pty
import select
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import grpc
import grpc.aio
import pytest
from fakes.ca_servers import TRUST_DOMAIN, WEB, Served, ask, served
from fakes.deadlines import promptly
from fakes.disks import SmallDisk, full_disk
from fakes.events import recorded

from sds_agent.ca.acceptor import address_text
from sds_agent.ca.audit import ALL_ORIGINS, EACH_ORIGIN, AuditLog, Entry
from sds_agent.ca.callers import Caller, Proof
from sds_agent.ca.reserve import SIZE
from sds_agent.errors import ConfigurationError
from sds_agent.identity.spiffe import LONGEST_ID, SpiffeId
from sds_agent.pki.certificates import serial_hex

NOW = datetime(2026, 1, 1, tzinfo=UTC)
ENTRY = Entry("issued", "127.0.0.1:1", serial="0123456789abcdef")
LONG = Entry("invalid", "127.0.0.1:1", spiffe_id="\u2028" * 600, reason="\u2028" * 600)


def write(audit: AuditLog, entry: Entry = ENTRY) -> None:
    audit.write(entry, NOW)


def until_it_fails(put: Callable[[Entry, datetime], None], entry: Entry) -> None:
    """Write until that cannot be."""
    while True:
        put(entry, NOW)


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

        def write_all() -> None:
            for _ in range(500):  # half a second for each would be four minutes
                with pytest.raises(BlockingIOError):
                    until_it_fails(audit.write, entry)

        promptly(write_all)
        reported, room = b"", select.poll()
        room.register(writing, select.POLLOUT)
        while not room.poll(0):
            reported += reader.read(1 << 16)
        write(audit, Entry("issued", "the last"))
        while b"the last" not in reported or not reported.endswith(b"\n"):
            reported += reader.read(1 << 16)
    *lines, last = reported.decode().splitlines()
    assert json.loads(last)["address"] == "the last"
    assert all(json.loads(line)["address"] for line in lines[:-1])


def test_standard_output_that_is_closed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", None)  # as Python has it then
    with pytest.raises(ConfigurationError, match="audit: cannot write to standard output"):
        AuditLog(None).check()


def test_a_pipe_without_a_reader_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ConfigurationError, match="audit: cannot write"):
        AuditLog(tmp_path / "pipe").check()


def test_a_disk_without_room_for_the_file_is_to_be_emptied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(ConfigurationError, match=r"audit\.log: No space left on device; make room on its disk$"):
        AuditLog(tmp_path / "audit.log").check()


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
    """Or else a caller could fill the disk, and then the CA signs nothing."""
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
    """An operator who searches a firewall's log for a caller needs its address and its port."""
    assert address_text(address) == text


@pytest.mark.parametrize("outcome", ["issued", "denied"])
def test_no_two_identities_look_alike_in_the_audit_log(tmp_path: Path, outcome: str) -> None:
    """They may be as long as an ID can be, and differ at their ends alone."""
    audit = AuditLog(tmp_path / "audit.log")
    long = f"{WEB}/{'x' * (LONGEST_ID - len(WEB) - 2)}"
    identities = [SpiffeId.parse(long + end) for end in "ab"]
    for each in identities:
        caller = Caller(each, Proof.JWT, "issuer " + "i" * 1000)
        (audit.write if outcome == "issued" else audit.refuse)(
            Entry(outcome, "127.0.0.1:1", caller=caller, spiffe_id=str(each)), NOW
        )
    reported = lines(tmp_path)
    assert (
        [line["spiffe_id"] for line in reported]
        == [line["caller"] for line in reported]
        == [str(each) for each in identities]
    )
    assert {line["proof_detail"] for line in reported} == {"issuer " + "i" * 1000}


def test_what_is_too_long_to_be_an_identity_is_cut_with_a_mark(tmp_path: Path) -> None:
    audit = AuditLog(tmp_path / "audit.log")
    audit.refuse(Entry("invalid", "127.0.0.1:1", spiffe_id="x" * 5000, reason="r" * 5000), NOW)
    (reported,) = lines(tmp_path)
    assert reported["spiffe_id"].endswith("x… (5000 characters)")
    assert reported["reason"].endswith("r… (5000 characters)")


def lines(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "audit.log").read_text().splitlines()]


PROVEN = Caller(SpiffeId.parse(WEB), Proof.JWT, "issuer i")


def test_one_that_causes_refusals_without_end_fills_no_disk_and_hides_no_other(tmp_path: Path) -> None:
    """392 of them a second were 76 kB; all are counted, and a caller that proved who it is has its own line."""
    audit = AuditLog(tmp_path / "audit.log")
    for number in range(5000):
        audit.refuse(Entry("unauthenticated", f"10.0.0.1:{number}"), NOW)
    audit.refuse(Entry("unauthenticated", "10.0.0.2:1"), NOW)
    audit.refuse(Entry("denied", "10.0.0.1:1", caller=PROVEN), NOW)
    for _ in range(100):
        audit.refuse(Entry("exhausted", "10.0.0.3:1", caller=PROVEN), NOW)
    audit.settle(NOW + timedelta(seconds=60))
    *reported, count = lines(tmp_path)
    shown = Counter(line["address"].split(":")[0] for line in reported)
    assert shown == {"10.0.0.1": EACH_ORIGIN.burst + 1, "10.0.0.2": 1, "10.0.0.3": EACH_ORIGIN.burst}
    assert (count["event"], count["since"]) == ("refusals_left_out", "2026-01-01T00:00:00.000Z")
    assert len(reported) + count["count"] == 5102
    audit.settle(NOW + timedelta(seconds=120))
    assert len(lines(tmp_path)) == len(reported) + 1, "nothing was left out since"


def test_many_origins_together_have_a_budget_too(tmp_path: Path) -> None:
    audit = AuditLog(tmp_path / "audit.log")
    for number in range(3000):
        audit.refuse(Entry("unauthenticated", f"10.0.{number // 200}.{number % 200}:1"), NOW)
    assert len(lines(tmp_path)) == ALL_ORIGINS.burst
    audit.refuse(Entry("unauthenticated", "10.1.0.0:1"), NOW + timedelta(seconds=10))
    assert len(lines(tmp_path)) == ALL_ORIGINS.burst + 1


def test_a_machine_with_a_network_of_its_own_is_one_origin(tmp_path: Path) -> None:
    audit = AuditLog(tmp_path / "audit.log")
    for number in range(100):
        audit.refuse(Entry("unauthenticated", f"[2001:db8::{number:x}]:1"), NOW)
        audit.refuse(Entry("unauthenticated", f"[::ffff:10.0.0.{number}]:1"), NOW)
    shown = Counter(line["address"].startswith("[2001") for line in lines(tmp_path))
    assert shown == {True: EACH_ORIGIN.burst, False: 100}


def test_on_a_full_disk_certificates_go_on_and_refusals_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a peer that fills the disk, by refusals or by something else, would keep every caller from renewing."""
    disk = SmallDisk(monkeypatch, tmp_path, SIZE + 5000)
    audit = AuditLog(tmp_path / "audit.log")
    audit.check()
    refusal = Entry("denied", "127.0.0.1:1", caller=PROVEN, reason="r")
    with pytest.raises(OSError, match="No space"):
        until_it_fails(audit.refuse, refusal)
    with recorded() as events:
        for number in range(2000):
            audit.write(Entry("issued", "127.0.0.1:1", serial=f"{number:x}"), NOW)
            audit.refuse(refusal, NOW)
        assert len(events.named("audit_reserve_used", level="error")) == 1
    serials = [line["serial"] for line in whole_lines(tmp_path) if line["outcome"] == "issued"]
    assert serials == [f"{number:x}" for number in range(2000)]
    disk.room += SIZE
    audit.settle(NOW)
    assert whole_lines(tmp_path)[-1]["count"] == 2001
    assert disk.free < SIZE, "the reserve is whole again"
    audit.refuse(refusal, NOW)
    assert whole_lines(tmp_path)[-1]["outcome"] == "denied"


def whole_lines(directory: Path) -> list[dict[str, Any]]:
    """Without those that a full disk cut off."""
    written = (directory / "audit.log").read_text().splitlines()
    return [json.loads(line) for line in written if line.endswith("}")]


def test_a_reserve_that_is_used_up_signs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = SmallDisk(monkeypatch, tmp_path, SIZE + 5000)
    audit = AuditLog(tmp_path / "audit.log")
    audit.check()
    (tmp_path / "something else").write_bytes(bytes(disk.free))
    entry = Entry("issued", "127.0.0.1:1", caller=PROVEN, reason="r" * 600)
    with pytest.raises(OSError, match="No space"):
        until_it_fails(audit.write, entry)
    assert disk.free == 0
    issued = [line for line in whole_lines(tmp_path) if line["outcome"] == "issued"]
    assert len(issued) > SIZE // 1000


def test_the_reserve_is_on_the_disk_to_which_a_link_leads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room on the link's own disk is of no use when the other one is full."""
    there = tmp_path / "there"
    there.mkdir()
    disk = SmallDisk(monkeypatch, there, SIZE + 5000)
    (tmp_path / "audit.log").symlink_to(there / "audit.log")
    audit = AuditLog(tmp_path / "audit.log")
    audit.check()
    (there / "something else").write_bytes(bytes(disk.free))
    for number in range(100):
        audit.write(Entry("issued", "127.0.0.1:1", serial=f"{number:x}"), NOW)
    assert len(lines(tmp_path)) == 100


@pytest.mark.parametrize("way", ["a full disk", "a place that is taken"])
def test_a_ca_without_a_reserve_says_so_and_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    if way == "a full disk":
        SmallDisk(monkeypatch, tmp_path, SIZE - 1)
    else:
        (tmp_path / ".audit.log.reserve").mkdir()
    audit = AuditLog(tmp_path / "audit.log")
    with recorded() as events:
        audit.check()
        assert events.named("audit_reserve_missing", level="warning")
    audit.write(Entry("issued", "127.0.0.1:1"), NOW)
    audit.refuse(Entry("denied", "127.0.0.1:1", caller=PROVEN), NOW)
    assert [line["outcome"] for line in lines(tmp_path)] == ["issued", *["denied"] * (way != "a full disk")]


def test_the_audit_log_leaves_no_file_open(tmp_path: Path) -> None:
    """It is opened for every line, and a process may have no more than some thousand open."""
    log = AuditLog(tmp_path / "audit.log")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        log.write(Entry("issued", "127.0.0.1:1"), datetime.now(UTC))
    assert len(list(Path("/proc/self/fd").iterdir())) <= before
    assert len((tmp_path / "audit.log").read_text().splitlines()) == 5


async def test_a_refusal_has_its_address_though_its_connection_has_ended(ca: Served) -> None:
    """A peer that sends more calls than one may without a proof is cut off, and would be nameless in the log."""

    async def attempt(channel: grpc.aio.Channel) -> None:
        with suppress(grpc.aio.AioRpcError):
            await ask(channel)

    async with ca.connected() as channel, anyio.create_task_group() as tasks:
        for _ in range(400):
            tasks.start_soon(attempt, channel)
    assert {line["address"].partition(":")[0] for line in ca.audit} == {"127.0.0.1"}


async def test_the_audit_log_goes_to_standard_output_by_default(
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
