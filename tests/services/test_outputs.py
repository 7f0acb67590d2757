"""Certificates as files: every renewal one whole set, and no fault of a disk reaches issuance."""

import asyncio
import errno
import os
import shutil
import signal
import stat
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from fakes.clocks import HAND_LOOP, HandClock
from fakes.disks import DeadDisk
from fakes.events import Events, recorded
from fakes.hierarchy import NOW

from sds_agent.config.settings import OutputLayout
from sds_agent.outputs.directory import File, write_set
from sds_agent.outputs.hooks import HookCommands, Hooks
from sds_agent.outputs.layout import LAYOUTS, OutputContents
from sds_agent.outputs.writer import FIRST_RETRY, LONGEST_RETRY, Output, write_changes
from sds_agent.secrets.model import BundleSecret, CertificateSecret
from sds_agent.secrets.store import SecretStore, Snapshot
from sds_agent.tasks import DISK_TIMEOUT, background_tasks

NAMES = ("cert-chain.pem", "key.pem", "root-cert.pem")
PLANTED = b"PLANTED PRIVATE KEY"


def certificate(number: int) -> CertificateSecret:
    return CertificateSecret(f"chain {number}".encode(), PLANTED + str(number).encode(), NOW + timedelta(hours=1))


def bundle(number: int) -> BundleSecret:
    return BundleSecret(f"roots {number}".encode())


def output(target: Path, **options: Any) -> Output:
    return Output(target, OutputContents("default", {"demo.example": "ROOTCA"}), **options)


def contents(target: Path) -> tuple[str, ...]:
    return tuple((target / name).read_text() for name in NAMES)


def files(number: int) -> dict[str, File]:
    return {
        "cert-chain.pem": File(f"chain {number}".encode()),
        "key.pem": File(f"key {number}".encode(), private=True),
        "root-cert.pem": File(f"roots {number}".encode()),
    }


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def sets(target: Path) -> list[Path]:
    return [path for path in target.iterdir() if path.is_dir() and not path.is_symlink()]


def put_in_the_way(target: Path) -> None:
    target.write_text("not a directory")


def clear(target: Path) -> None:
    target.unlink()


def open_to_all(target: Path) -> None:
    target.mkdir()
    target.chmod(0o777)


def open_to_its_group(target: Path) -> None:
    target.mkdir()
    target.chmod(0o770)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "certs"


@pytest.fixture
def events() -> Iterator[Events]:
    with recorded() as seen:
        yield seen


# The directory


def test_the_files_are_there_under_istios_names(target: Path) -> None:
    write_set(target, files(1), NOW)
    assert contents(target) == ("chain 1", "key 1", "roots 1")


@pytest.mark.parametrize("umask", [0o077, 0o000])
def test_the_key_is_its_owners_alone_whatever_the_umask(target: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        write_set(target, files(1), NOW)
    finally:
        os.umask(before)
    assert [mode(target / name) for name in NAMES] == [0o644, 0o600, 0o644]
    assert mode(target / "..data") == 0o755, "or a program of another user could not reach the certificates"


def test_at_no_moment_is_the_key_another_users_to_open(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is opened before its mode is set can be read to its end afterwards."""
    before, chmod = os.umask(0), os.fchmod
    seen = []

    def look(descriptor: int, wanted: int) -> None:
        seen.append(stat.S_IMODE(os.fstat(descriptor).st_mode))
        chmod(descriptor, wanted)

    monkeypatch.setattr(os, "fchmod", look)
    try:
        write_set(target, files(1), NOW)
    finally:
        os.umask(before)
    assert seen == [0o600] * 3


def test_a_set_is_on_the_disk_before_it_counts(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or else a machine that loses its power comes back with an empty key where a good one was."""
    steps: list[str] = []
    sync, replace = os.fsync, Path.replace

    def synced(descriptor: int) -> None:
        sync(descriptor)
        steps.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)

    def replaced(path: Path, to: Path) -> Path:
        steps.append(f"to {to.name}")
        return replace(path, to)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", replaced)
    write_set(target, files(1), NOW)
    made = (target / "..data").resolve().name
    at = steps.index("to ..data")
    assert {*NAMES, made, target.name} <= set(steps[:at])
    assert steps[-1] == target.name, "and the links after it"


def test_a_renewal_is_one_step(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between any two steps a reader of ..data finds the old set whole or the new set whole."""
    write_set(target, files(1), NOW)
    seen = []
    replace = Path.replace

    def look(path: Path, to: Path) -> Path:
        seen.append(contents(target))
        done = replace(path, to)
        seen.append(contents(target))
        return done

    monkeypatch.setattr(Path, "replace", look)
    write_set(target, files(2), NOW)
    assert seen == [("chain 1", "key 1", "roots 1"), ("chain 2", "key 2", "roots 2")]


def test_who_holds_the_old_set_open_can_finish_reading_it(target: Path) -> None:
    for number in (1, 2, 3):
        write_set(target, files(number), NOW + timedelta(seconds=number))
    old = (target / "..data").resolve()
    write_set(target, files(4), NOW + timedelta(seconds=4))
    assert (old / "key.pem").read_text() == "key 3"


def test_old_sets_do_not_pile_up_and_foreign_files_stay(target: Path) -> None:
    target.mkdir()
    (target / "..notes").mkdir()
    (target / "mine.txt").write_text("mine")
    for number in range(5):
        write_set(target, files(number), NOW + timedelta(seconds=number))
    assert len(sets(target)) == 3
    assert (target / "..notes").is_dir()
    assert (target / "mine.txt").read_text() == "mine"
    assert contents(target) == ("chain 4", "key 4", "roots 4")


def test_names_that_a_set_has_no_more_are_not_left_without_a_file(target: Path) -> None:
    """As of a trust domain that is federated no longer: programs read every bundle that they find."""
    write_set(target, files(1) | {"other.example.pem": File(b"other roots")}, NOW)
    (target / "link").symlink_to("..data/key.pem")
    write_set(target, files(2), NOW)
    assert contents(target) == ("chain 2", "key 2", "roots 2")
    assert {path.name for path in target.iterdir() if not path.name.startswith("..")} == {*NAMES, "link"}


def test_a_clock_that_is_set_back_takes_no_set_from_who_reads_it_and_leaves_none_for_ever(target: Path) -> None:
    for number in (1, 2):
        write_set(target, files(number), NOW + timedelta(days=30, seconds=number))
    for number in (3, 4, 5):
        old = (target / "..data").resolve()
        write_set(target, files(number), NOW + timedelta(seconds=number))
        assert (old / "key.pem").read_text() == f"key {number - 1}"
    assert len(sets(target)) == 2


def test_what_an_agent_left_that_was_killed_goes_with_the_next_set(target: Path) -> None:
    write_set(target, files(1), NOW)
    (target / "..20991231-235959-0a1b2c3d").mkdir()
    (target / "..20991231-235959-0a1b2c3d/key.pem").write_text("half a")
    (target / "..tmp-0a1b2c3d").symlink_to("..data/key.pem")
    write_set(target, files(2), NOW + timedelta(seconds=1))
    assert {path.name for path in target.iterdir()} == {*NAMES, "..data", *(path.name for path in sets(target))}
    assert len(sets(target)) == 2


def test_files_that_pilot_agent_left_are_replaced(target: Path) -> None:
    target.mkdir()
    for name in NAMES:
        (target / name).write_text("old")
    write_set(target, files(1), NOW)
    assert contents(target) == ("chain 1", "key 1", "roots 1")


def test_a_set_that_cannot_be_finished_leaves_the_old_one_and_nothing_behind(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_set(target, files(1), NOW)

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            write_set(target, files(2), NOW)
    assert contents(target) == ("chain 1", "key 1", "roots 1")
    assert len(sets(target)) == 1


def test_something_in_the_way_of_a_file_is_reported_and_nothing_piles_up(target: Path) -> None:
    (target / "key.pem").mkdir(parents=True)
    for number in range(4):
        with pytest.raises(IsADirectoryError):
            write_set(target, files(number), NOW + timedelta(seconds=number))
    assert len(sets(target)) == 3
    assert not list(target.glob("..tmp-*"))


# The loop


@asynccontextmanager
async def stored(target: Path, clock: HandClock, check_every: float = 60) -> AsyncIterator[SecretStore]:
    store = SecretStore(("default", "ROOTCA"))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(write_changes, output(target), store, clock, check_every)
        yield store
        tasks.cancel_scope.cancel()


async def test_every_renewal_is_written(target: Path, events: Events) -> None:
    async with stored(target, HandClock()) as store:
        for number in (1, 2, 3):
            store.publish({"default": certificate(number), "ROOTCA": bundle(number)})
            await events.wait("output_written", count=number)
            assert contents(target) == (f"chain {number}", f"{PLANTED.decode()}{number}", f"roots {number}")
            assert [mode(target / name) for name in NAMES] == [0o644, 0o600, 0o644]


async def test_a_new_root_is_written_at_once(target: Path, events: Events) -> None:
    async with stored(target, HandClock()) as store:
        store.publish({"default": certificate(1), "ROOTCA": bundle(1)})
        await events.wait("output_written")
        store.publish({"ROOTCA": bundle(2)})
        await events.wait("output_written", count=2)
        assert contents(target)[2] == "roots 2"


@pytest.mark.parametrize("first", ["ROOTCA", "default"])
async def test_half_a_set_is_not_written_and_an_expired_one_stays(target: Path, events: Events, first: str) -> None:
    whole: dict[str, CertificateSecret | BundleSecret] = {"ROOTCA": bundle(1), "default": certificate(1)}
    async with stored(target, HandClock()) as store:
        store.publish({first: whole.pop(first)})
        await anyio.wait_all_tasks_blocked()
        assert events.named("output_written") == events.named("output_not_written") == []
        store.publish(whole)
        await events.wait("output_written")
        store.withhold(["default"])
        await anyio.wait_all_tasks_blocked()
        assert contents(target)[0] == "chain 1"


async def test_a_failure_is_reported_and_tried_again_while_issuance_goes_on(target: Path, events: Events) -> None:
    put_in_the_way(target)
    clock = HandClock()
    async with stored(target, clock) as store:
        store.publish({"default": certificate(1), "ROOTCA": bundle(1)})
        reported = await events.wait("output_not_written")
        assert str(target) in str(reported["cause"])
        await clock.asleep()
        store.publish({"default": certificate(2)})
        clock.elapse(FIRST_RETRY)
        await events.wait("output_not_written", count=2)
        await clock.asleep()
        clear(target)
        clock.elapse(LONGEST_RETRY)
        await events.wait("output_written")
        assert contents(target)[0] == "chain 2"


@pytest.mark.parametrize("name", ["..data", "key.pem"])
async def test_a_directory_where_a_file_goes_is_reported_by_its_name(target: Path, events: Events, name: str) -> None:
    (target / name).mkdir(parents=True)
    async with stored(target, HandClock()) as store:
        store.publish({"default": certificate(1), "ROOTCA": bundle(1)})
        reported = await events.wait("output_not_written")
    assert str(reported["cause"]).startswith(f"cannot write to {target / name}: Is a directory; ")


async def test_a_disk_that_stays_full_is_asked_less_and_less_often_and_named(
    target: Path, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    clock = HandClock()
    async with stored(target, clock) as store:
        for number in (1, 2):  # the second time it begins anew
            with monkeypatch.context() as patched:
                patched.setattr(os, "fsync", full)
                store.publish({"default": certificate(number), "ROOTCA": bundle(number)})
                for count in range(1, 9):
                    reported = await events.wait("output_not_written", count=8 * (number - 1) + count)
                    delay = min(FIRST_RETRY * 2 ** (count - 1), LONGEST_RETRY)
                    assert reported["in_seconds"] == delay.total_seconds()
                    assert str(target) in str(reported["cause"])
                    await clock.asleep()
                    if count < 8:
                        clock.elapse(delay)
            clock.elapse(LONGEST_RETRY)
            await events.wait("output_written", count=number)


@pytest.mark.parametrize("anyio_backend", [HAND_LOOP])
async def test_a_disk_that_does_not_answer_is_given_up_reported_and_written_once_it_is_back(
    target: Path, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one of the network that is gone: the end of the agent waits for every write that is under way."""
    clock, disk = HandClock(), DeadDisk(monkeypatch)
    try:
        async with stored(target, clock) as store:
            store.publish({"default": certificate(1), "ROOTCA": bundle(1)})
            await anyio.wait_all_tasks_blocked()
            clock.elapse(timedelta(seconds=DISK_TIMEOUT))
            reported = [await events.wait("output_not_written")]
            await clock.asleep()
            store.publish({"default": certificate(2), "ROOTCA": bundle(2)})
            clock.elapse(FIRST_RETRY)
            reported.append(await events.wait("output_not_written", count=2))
            await clock.asleep()
            words = ("no answer within 5 s", "an earlier attempt has not come back yet")
            for each, cause in zip(reported, words, strict=True):
                assert str(each["cause"]).startswith(f"cannot write to {target}: {cause}; ")
            disk.revive()
            for late in [each for each in threading.enumerate() if each.name.startswith("in_thread")]:
                await anyio.to_thread.run_sync(late.join, 10)
            clock.elapse(LONGEST_RETRY)
            await events.wait("output_written")
            assert contents(target)[0] == "chain 2"
    finally:
        disk.revive()


@pytest.mark.parametrize("anyio_backend", [HAND_LOOP])
async def test_a_disk_that_stops_answering_takes_no_files_for_lost(
    target: Path, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look that comes to nothing says nothing of the files, and must end no agent."""
    clock, hangs, asked = HandClock(), threading.Event(), threading.Event()
    exists = os.path.exists

    def hanging(path: Path) -> bool:
        asked.set()
        hangs.wait()
        return exists(path)

    try:
        async with stored(target, clock, check_every=0.01) as store:
            store.publish({"default": certificate(1), "ROOTCA": bundle(1)})
            await events.wait("output_written")
            monkeypatch.setattr(os.path, "exists", hanging)
            with anyio.fail_after(10):
                await anyio.to_thread.run_sync(asked.wait)
            clock.elapse(timedelta(seconds=DISK_TIMEOUT))
            store.publish({"default": certificate(2)})
            reported = await events.wait("output_not_written")
            assert "an earlier attempt has not come back yet" in str(reported["cause"])
            assert events.named("output_lost") == []
    finally:
        hangs.set()


async def test_the_end_of_the_agent_cuts_no_write_short(
    target: Path, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or else the lock would be given up while the disk is still written to, and a part of a set would lie there."""
    disk, store = DeadDisk(monkeypatch), SecretStore(("default", "ROOTCA"))
    store.publish({"default": certificate(1), "ROOTCA": bundle(1)})
    try:
        writing = asyncio.ensure_future(write_changes(output(target), store, HandClock()))
        await anyio.wait_all_tasks_blocked()
        writing.cancel()
        await anyio.wait_all_tasks_blocked()
        assert not writing.done()
    finally:
        disk.revive()
    with pytest.raises(asyncio.CancelledError):
        await writing
    assert contents(target)[0] == "chain 1"
    assert events.named("output_not_written") == []


async def test_a_directory_that_others_may_write_to_is_refused(target: Path, events: Events) -> None:
    open_to_all(target)
    async with stored(target, HandClock()) as store:
        store.publish({"default": certificate(1), "ROOTCA": bundle(1)})
        reported = await events.wait("output_not_written")
        assert "every user may write to" in str(reported["cause"])
    assert sets(target) == []


async def test_two_agents_do_not_write_to_one_directory(target: Path, events: Events) -> None:
    """Each would take the other's unfinished set for one of a killed agent and remove it, the key that counts too."""
    clock = HandClock()
    async with stored(target, HandClock()) as first, stored(target, clock) as second:
        first.publish({"default": certificate(1), "ROOTCA": bundle(1)})
        await events.wait("output_written")
        unfinished = target / "..20991231-235959-0a1b2c3d"
        unfinished.mkdir()
        second.publish({"default": certificate(2), "ROOTCA": bundle(2)})
        reported = await events.wait("output_not_written")
        assert str(reported["cause"]).startswith("another sds-agent, or another workload of this one, writes to")
        assert unfinished.exists()
        assert contents(target)[0] == "chain 1"
        await clock.asleep()
    assert len(events.named("output_written")) == 1


async def test_a_group_that_may_write_there_is_reported_once_and_the_directory_stays_locked(
    target: Path, events: Events
) -> None:
    """To give it up for a moment at each write would let another agent in."""
    open_to_its_group(target)
    async with stored(target, HandClock()) as store:
        for number in (1, 2):
            store.publish({"default": certificate(number), "ROOTCA": bundle(number)})
            await events.wait("output_written", count=number)
    assert len(events.named("directory_shared")) == 1


async def test_the_second_agent_takes_over_when_the_first_has_gone(target: Path, events: Events) -> None:
    clock = HandClock()
    async with stored(target, clock) as second:
        async with stored(target, HandClock()) as first:
            first.publish({"default": certificate(1), "ROOTCA": bundle(1)})
            await events.wait("output_written")
            second.publish({"default": certificate(2), "ROOTCA": bundle(2)})
            await events.wait("output_not_written")
            await clock.asleep()
        clock.elapse(FIRST_RETRY)
        await events.wait("output_written", count=2)
        assert contents(target)[0] == "chain 2"


@pytest.mark.parametrize("lost", [".", "..data", "key.pem", "..lock"])
async def test_what_is_removed_comes_back(target: Path, events: Events, lost: str) -> None:
    """Else a program that starts later finds nothing until the next renewal."""
    async with stored(target, HandClock(), check_every=0.01) as store:
        store.publish({"default": certificate(1), "ROOTCA": bundle(1)})
        await events.wait("output_written")
        shutil.rmtree(target) if lost == "." else (target / lost).unlink()
        await events.wait("output_lost", level="warning")
        await events.wait("output_written", count=2)
        assert contents(target) == ("chain 1", f"{PLANTED.decode()}1", "roots 1")


async def test_a_directory_below_one_of_everybody_is_refused(target: Path, events: Events) -> None:
    """As in an emptyDir of Kubernetes: every container that mounts it could put another directory in its place."""
    open_to_all(target)
    async with stored(target / "sub", HandClock()) as store:
        store.publish({"default": certificate(1), "ROOTCA": bundle(1)})
        reported = await events.wait("output_not_written")
        assert "every user may write to" in str(reported["cause"])
    assert sets(target) == []


async def test_the_key_is_in_no_log_and_no_repr(target: Path, events: Events) -> None:
    async with stored(target, HandClock()) as store:
        store.publish({"default": certificate(1), "ROOTCA": bundle(1)})
        await events.wait("output_written")
        shown = repr(output(target).files(store.snapshot))
    assert PLANTED.decode() not in shown + repr(events.seen)


# Layouts, access and hooks


@pytest.mark.parametrize(
    ("layout", "names"),
    [
        ("istio", {"cert-chain.pem", "key.pem", "root-cert.pem"}),
        ("kubernetes", {"tls.crt", "tls.key", "ca.crt"}),
        ("spiffe-helper", {"svid.pem", "svid_key.pem", "svid_bundle.pem"}),
        (
            "spiffe",
            {
                "credential-bundle.private-key.pem",
                "demo.example.spiffe-trust-bundle.pem",
                "other.example.spiffe-trust-bundle.pem",
            },
        ),
    ],
)
def test_each_layout_has_the_names_that_its_programs_expect(layout: str, names: set[str]) -> None:
    bundles = {"demo.example": "ROOTCA", "other.example": "spiffe://other.example"}
    snapshot: Snapshot = {"default": certificate(1), "ROOTCA": bundle(1), "spiffe://other.example": bundle(2)}
    files = OutputContents("default", bundles).files(LAYOUTS[layout], snapshot)
    assert set(files) == names
    for name, file in files.items():
        assert file.private == (PLANTED in file.content), name


def test_every_layout_that_a_configuration_may_name_is_there() -> None:
    assert set(LAYOUTS) == {each.value for each in OutputLayout}


def test_the_spiffe_layout_has_the_key_before_the_chain() -> None:
    snapshot: Snapshot = {"default": certificate(1), "ROOTCA": bundle(1)}
    files = OutputContents("default", {"demo.example": "ROOTCA"}).files(LAYOUTS["spiffe"], snapshot)
    assert files["credential-bundle.private-key.pem"].content == PLANTED + b"1" + b"chain 1"


async def test_the_files_get_the_owner_the_group_and_the_mode_that_are_asked_for(target: Path, events: Events) -> None:
    user, group = os.geteuid(), os.getegid()
    if user == 0:  # root may give them to any user
        user, group = 4711, 4712
    wanted = output(target, owner=str(user), group=str(group), key_mode=0o440)
    async with following(wanted) as store:
        store.publish({"default": certificate(1), "ROOTCA": bundle(1)})
        await events.wait("output_written")
    found = {name: (target / name).stat() for name in NAMES}
    assert {(each.st_uid, each.st_gid) for each in found.values()} == {(user, group)}
    assert [mode(target / name) for name in NAMES] == [0o644, 0o440, 0o644]


async def test_an_owner_that_the_machine_does_not_know_is_named(target: Path, events: Events) -> None:
    async with following(output(target, owner="no-such-user")) as store:
        store.publish({"default": certificate(1), "ROOTCA": bundle(1)})
        said = await events.wait("output_not_written", level="error")
    assert said["cause"].startswith("output.owner: there is no user 'no-such-user' on this machine")


@asynccontextmanager
async def following(wanted: Output) -> AsyncIterator[SecretStore]:
    store = SecretStore(("default", "ROOTCA"))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(write_changes, wanted, store, HandClock())
        tasks.start_soon(wanted.hooks.run)
        yield store
        tasks.cancel_scope.cancel()


LIMIT = 20
"""Seconds that a hook has: a program needs a part of a second to start, and on a busy machine many times that."""


def hooks(*renewed: str, failed: tuple[str, ...] | None = None, seconds: float = LIMIT) -> Hooks:
    return Hooks(HookCommands("web", "/run/certs", renewed or None, failed, timedelta(seconds=seconds)))


def time_is_up() -> None:
    """Let the time of a hook that runs on a HandLoop pass."""
    HandClock().elapse(timedelta(seconds=LIMIT))


def script(folder: Path, text: str) -> str:
    """A program that does what the text says."""
    path = folder / "hook"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


async def test_a_program_runs_once_the_new_files_are_in_place(
    tmp_path: Path, target: Path, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VAULT_TOKEN", "s.hunter2")
    program = script(tmp_path, f'cat "$1/cert-chain.pem" >> {tmp_path}/seen; env >> {tmp_path}/seen')
    async with following(output(target, hooks=hooks(program, str(target)))) as store:
        store.publish({"default": certificate(1), "ROOTCA": bundle(1)})
        ran = await events.wait("hook_succeeded", hook="on_renewed", workload="web", program=program)
        store.publish({"default": certificate(2)})
        await events.wait("hook_succeeded", count=2)
    seen = (tmp_path / "seen").read_text()
    assert ran["level"] == "info"
    assert seen.startswith("chain 1")
    assert "chain 2" in seen
    assert "SDS_AGENT_EVENT=renewed" in seen
    assert "SDS_AGENT_OUTPUT=/run/certs" in seen
    assert "hunter2" not in seen + repr(events.seen)
    assert PLANTED.decode() not in seen + repr(events.seen)


async def test_no_shell_reads_a_hook(tmp_path: Path, target: Path, events: Events) -> None:
    program = script(tmp_path, f'printf "%s" "$1" > {tmp_path}/seen')
    async with following(output(target, hooks=hooks(program, "$(id); `id` *"))) as store:
        store.publish({"default": certificate(1), "ROOTCA": bundle(1)})
        await events.wait("hook_succeeded")
    assert (tmp_path / "seen").read_text() == "$(id); `id` *"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("echo no such unit; exit 5", "it ended with the code 5 (no such unit)"),
        ("kill -9 $$", "it was ended by the signal SIGKILL"),
        ("kill -35 $$", "it was ended by the signal 35"),
        ("yes | head -c 1000000; exit 1", "it ended with the code 1 (y y y"),
        (
            "sleep 1000 & exit 0",
            "it ended with the code 0, but what it started kept its output open for 3 s and was ended",
        ),
    ],
)
async def test_a_hook_that_fails_is_logged_with_its_own_words(
    tmp_path: Path, events: Events, text: str, said: str
) -> None:
    failing = hooks(script(tmp_path, text), seconds=3 if "sleep" in text else LIMIT)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(failing.run)
        failing.renewed()
        found = await events.wait("hook_failed", level="error")
        tasks.cancel_scope.cancel()
    assert said in found["cause"]
    assert len(found["cause"]) < 500


async def test_a_hook_that_is_not_there_is_named(tmp_path: Path, events: Events) -> None:
    missing = hooks(str(tmp_path / "nothing"))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(missing.run)
        missing.renewed()
        found = await events.wait("hook_failed")
        tasks.cancel_scope.cancel()
    assert found["cause"] == "it cannot be started: No such file or directory"


@pytest.mark.parametrize("anyio_backend", [HAND_LOOP])
async def test_a_hook_that_hangs_is_ended_with_what_it_started_and_holds_up_no_renewal(
    tmp_path: Path, target: Path, events: Events
) -> None:
    fifo = tmp_path / "alive"
    os.mkfifo(fifo)
    # a child that ignores SIGTERM holds the pipe open until it is killed
    program = script(tmp_path, f"(trap '' TERM; exec 3>{fifo}; echo >&3; sleep 1000) & wait")
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    try:
        async with following(output(target, hooks=hooks(program))) as store:
            store.publish({"default": certificate(1), "ROOTCA": bundle(1)})
            await events.wait("output_written")
            store.publish({"default": certificate(2)})
            await events.wait("output_written", count=2)
            assert await next_of(reader) == b"\n"
            time_is_up()
            said = await events.wait("hook_failed")
        assert await next_of(reader) == b"", "the child has ended"
    finally:
        os.close(reader)
    assert f"it did not end within {LIMIT} s, and was ended" in said["cause"]


async def next_of(reader: int) -> bytes:
    """The next byte from a pipe; nothing at its end."""
    with anyio.fail_after(30):
        await anyio.wait_readable(reader)
    return os.read(reader, 1)


async def test_what_a_hook_started_has_the_time_to_end_in_order(
    tmp_path: Path, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its shell ends at once, at the signal or before, and the program that does the work may have a lock to remove."""
    monkeypatch.setattr("sds_agent.outputs.hooks.GRACE", 30.0)
    ready, tidy = tmp_path / "ready", tmp_path / "tidy"
    works = f"(trap 'sleep 0.1; touch {tidy}' TERM; touch {ready}; sleep 1000 & wait) &"
    slow = hooks(script(tmp_path, f"{works} while ! test -e {ready}; do sleep 0.01; done"), seconds=3)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(slow.run)
        slow.renewed()
        await events.wait("hook_failed")
        tasks.cancel_scope.cancel()
    assert tidy.exists()


@pytest.mark.parametrize("beside", ["", "sleep 1000 &"], ids=["alone", "with another"])
async def test_what_has_left_the_session_of_a_hook_is_reported_as_going_on(
    beside: str, tmp_path: Path, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sds_agent.outputs.hooks.GRACE", 1.0)
    number = tmp_path / "number"
    daemon = f"setsid sh -c 'echo $$ > {number}; exec sleep 1000' &"
    leaving = hooks(script(tmp_path, f"{beside} {daemon} while ! test -s {number}; do sleep 0.01; done"), seconds=3)
    try:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(leaving.run)
            leaving.renewed()
            found = await events.wait("hook_failed")
            tasks.cancel_scope.cancel()
        os.kill(int(number.read_text()), 0)
    finally:
        os.kill(int(number.read_text()), signal.SIGKILL)
    assert found["cause"].startswith(
        "it ended with the code 0, but what it started kept its output open for 3 s and goes"
    )


ANOTHER_USERS, HELD = "goes on, as it is another user's now", "goes on, as the system does not end it"


@asynccontextmanager
async def lasting_programs(monkeypatch: pytest.MonkeyPatch, why: str) -> AsyncIterator[list[int]]:
    """A stand-in for hooks that became another user's, as by sudo, or that the kernel does not end, by what killpg(2)
    says of them; yields whom it was asked to end. They end with this context.
    """
    killpg, asked = os.killpg, list[int]()

    def end(group: int, _signal: int) -> None:
        asked.append(group)
        if why == ANOTHER_USERS:
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "killpg", end)
    monkeypatch.setattr("sds_agent.outputs.hooks.GRACE", 0.1)
    try:
        yield asked
    finally:
        for program in set(asked):
            ended = os.pidfd_open(program)
            killpg(program, signal.SIGKILL)
            await anyio.wait_readable(ended)
            os.close(ended)
        # asyncio waits for each in a thread, or by the event loop (Python 3.12), and takes some turns to note the end
        for thread in threading.enumerate():
            if "waitpid-" in thread.name:  # early releases of Python 3.11 do not name asyncio there
                await anyio.to_thread.run_sync(thread.join)
        for _ in range(5):
            await anyio.lowlevel.checkpoint()


@pytest.mark.parametrize("anyio_backend", [HAND_LOOP])
async def test_a_hook_that_the_system_does_not_end_is_reported_and_the_next_one_waits_for_it(
    tmp_path: Path, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would wait for the same disk, and with each renewal there would be one more."""
    killpg, begun = os.killpg, tmp_path / "begun"
    os.mkfifo(begun)
    once = f"test $(wc -l < {tmp_path}/runs) -gt 1 && exit 0; echo > {begun}; exec sleep 1000"
    stubborn = hooks(script(tmp_path, f"echo >> {tmp_path}/runs; {once}"))
    async with lasting_programs(monkeypatch, HELD) as asked, anyio.create_task_group() as tasks:
        tasks.start_soon(stubborn.run)
        stubborn.renewed()
        await anyio.to_thread.run_sync(begun.read_text)
        time_is_up()
        said = await events.wait("hook_failed")
        stubborn.renewed()
        stubborn.renewed()
        await anyio.wait_all_tasks_blocked()
        assert (tmp_path / "runs").read_text() == "\n"
        killpg(asked[0], signal.SIGKILL)
        asked.clear()
        await events.wait("hook_succeeded")
        tasks.cancel_scope.cancel()
    assert said["cause"].startswith(f"it did not end within {LIMIT} s, and {HELD}")
    assert (tmp_path / "runs").read_text() == "\n\n"


async def test_a_hook_that_waits_for_one_that_does_not_end_holds_up_no_end_of_the_agent(
    tmp_path: Path, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    stubborn = hooks(script(tmp_path, "exec sleep 1000"), seconds=0.5)
    async with lasting_programs(monkeypatch, HELD) as asked:
        with anyio.fail_after(10):
            async with background_tasks() as start:
                start(stubborn.run())
                stubborn.renewed()
                await events.wait("hook_failed")
                stubborn.renewed()
                await anyio.wait_all_tasks_blocked()
        assert len(asked) == 2, "it was asked to end, and then left alone"


@pytest.mark.parametrize("anyio_backend", [HAND_LOOP])
async def test_a_hook_that_is_another_users_now_is_reported_and_the_next_one_runs(
    tmp_path: Path, events: Events, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, begun = tmp_path / "seen", tmp_path / "begun"
    os.mkfifo(begun)
    stubborn = hooks(script(tmp_path, f"test -e {seen} && exit 0; touch {seen}; echo > {begun}; exec sleep 1000"))
    async with lasting_programs(monkeypatch, ANOTHER_USERS), anyio.create_task_group() as tasks:
        tasks.start_soon(stubborn.run)
        stubborn.renewed()
        await anyio.to_thread.run_sync(begun.read_text)
        time_is_up()
        said = await events.wait("hook_failed")
        stubborn.renewed()
        await events.wait("hook_succeeded")
        tasks.cancel_scope.cancel()
    assert said["cause"].startswith(f"it did not end within {LIMIT} s, and {ANOTHER_USERS}")


@pytest.mark.parametrize(("why", "signals"), [(ANOTHER_USERS, 1), (HELD, 2)])
async def test_a_hook_that_cannot_be_ended_holds_up_no_end_of_the_agent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str, signals: int
) -> None:
    """Nor a reload, which ends it too: until that has come the workloads that it changes are not renewed."""
    fifo = tmp_path / "runs"
    os.mkfifo(fifo)
    running = hooks(script(tmp_path, f"echo > {fifo}; exec sleep 1000"))
    async with lasting_programs(monkeypatch, why) as asked:
        with anyio.fail_after(10):
            async with background_tasks() as start:
                start(running.run())
                running.renewed()
                await anyio.to_thread.run_sync(fifo.read_text)
                await anyio.wait_all_tasks_blocked()
        assert len(asked) == signals


async def test_hooks_that_come_due_while_one_runs_are_run_once(tmp_path: Path, events: Events) -> None:
    """And a failure that a renewal has overtaken is no longer reported."""
    go = tmp_path / "go"
    os.mkfifo(go)
    program = script(tmp_path, f"read line < {go}; echo $SDS_AGENT_EVENT >> {tmp_path}/seen")
    both = hooks(program, failed=(program,))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(both.run)
        both.renewed()
        await anyio.wait_all_tasks_blocked()
        for _ in range(5):
            both.failed()
            both.renewed()
        for count in (1, 2):
            await anyio.to_thread.run_sync(go.write_text, "on\n")
            await events.wait("hook_succeeded", count=count)
        both.failed()
        await anyio.to_thread.run_sync(go.write_text, "on\n")
        await events.wait("hook_succeeded", hook="on_failed")
        tasks.cancel_scope.cancel()
    assert (tmp_path / "seen").read_text().split() == ["renewed", "renewed", "failed"]
