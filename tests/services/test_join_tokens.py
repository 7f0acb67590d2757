"""The directory of join tokens: what is damaged or gone is reported, and what has long expired is removed."""

import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import anyio
import anyio.lowlevel
import grpc
import grpc.aio
import pytest
from fakes.ca_servers import WEB, served
from fakes.disks import forgetful_directories
from fakes.events import recorded

from sds_agent.ca.refusal import Reason, RefusalError
from sds_agent.ca.tokens import LARGEST_RECORD, PREFIX, JoinTokens
from sds_agent.errors import ConfigurationError
from sds_agent.pki.keys import KeyType, generate


def files(directory: Path) -> list[str]:
    return sorted(path.suffix for path in directory.iterdir())


def test_a_token_is_forgotten_a_day_after_its_end_and_stays_spent_until_then(tmp_path: Path) -> None:
    tokens, now, key = JoinTokens(tmp_path), datetime.now(UTC), generate(KeyType.EC_P256).public_key()
    old = tokens.make(WEB, now - timedelta(hours=25))
    late = tokens.make(WEB, now - timedelta(hours=23))
    for token in (old, late):
        tokens.spend(tokens.find(token), key)
    long_ago = time.time() - 48 * 3600
    for mark in tmp_path.glob("*.spent"):
        os.utime(mark, (long_ago, long_ago), follow_symlinks=False)
    tokens.tidy()
    assert files(tmp_path) == [".spent", ".token"]
    with pytest.raises(RefusalError, match="expired long ago"):
        tokens.find(old)
    with pytest.raises(RefusalError, match="already used by another key"):
        tokens.spend(tokens.find(late), generate(KeyType.EC_P256).public_key())


def test_a_clock_that_is_far_ahead_takes_no_token_away(tmp_path: Path) -> None:
    """By such a clock every token expired long ago, and once it was set right its machine could not join any more."""
    tokens, now = JoinTokens(tmp_path), datetime.now(UTC)
    old = tokens.make(WEB, now - timedelta(days=400))
    (record,) = tmp_path.iterdir()
    made = time.time() - 401 * 24 * 3600
    os.utime(record, (made, made))
    tokens.tidy()
    assert tokens.find(old).spiffe_id == WEB
    tokens.make(WEB, now + timedelta(hours=1))
    tokens.tidy()
    with pytest.raises(RefusalError, match="expired long ago"):
        tokens.find(old)


def test_a_file_with_a_time_that_cannot_be_ends_nothing() -> None:
    """Some file systems take any number for one, and a server that meets it as it starts would not start again."""
    with TemporaryDirectory(dir="/dev/shm") as directory:
        tokens, now = JoinTokens(Path(directory)), datetime.now(UTC)
        token = tokens.make(WEB, now + timedelta(hours=1))
        (record,) = Path(directory).iterdir()
        os.utime(record, (10**12, 10**12))
        tokens.tidy()
        assert [each.spiffe_id for each in tokens.listed()] == [WEB]
        assert tokens.find(token).spiffe_id == WEB


def test_a_token_is_listed_for_a_day_after_its_end(tmp_path: Path) -> None:
    """Its record stays until younger tokens are made, which may be months later."""
    tokens, now = JoinTokens(tmp_path), datetime.now(UTC)
    tokens.make(f"{WEB}/old", now - timedelta(hours=25))
    tokens.make(f"{WEB}/late", now - timedelta(hours=23))
    assert [each.spiffe_id for each in tokens.listed()] == [f"{WEB}/late"]


KILLED = """
import os, signal, sys
from datetime import UTC, datetime, timedelta
from pathlib import Path
from sds_agent.ca.tokens import JoinTokens
os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
JoinTokens(Path(sys.argv[1])).make("spiffe://demo.example/web", datetime.now(UTC) + timedelta(hours=1))
"""


def test_what_a_killed_process_had_begun_is_forgotten_and_nothing_else(tmp_path: Path) -> None:
    """What is young may be another process's that still writes it."""
    for _ in range(2):
        killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
        assert killed.returncode == -signal.SIGKILL
    old, new = sorted(tmp_path.iterdir())
    (tmp_path / ".gitignore").touch()
    long_ago = time.time() - 25 * 3600
    for path in (old, tmp_path / ".gitignore"):
        os.utime(path, (long_ago, long_ago))
    JoinTokens(tmp_path).tidy()
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / ".gitignore", new])


@contextmanager
def unprivileged() -> Iterator[None]:
    """Root may write anywhere, so as root a test of what may not be written has to be another user for a while."""
    before = os.geteuid()
    if before == 0:
        os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(before)


def test_a_directory_that_the_ca_may_not_write_to_is_reported_at_the_start() -> None:
    """Such as one that root made by `ca token`, for a CA that runs as another user: each token would be refused."""
    with TemporaryDirectory() as directory:
        for mode in (0o500, 0o555):
            Path(directory).chmod(mode)
            with unprivileged(), pytest.raises(ConfigurationError, match="may write to"):
                JoinTokens(Path(directory)).prepare()
        Path(directory).chmod(0o700)


def test_a_directory_on_a_read_only_disk_is_reported_as_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its operator would look at modes and owners in vain. What the system's calls say there is a stand-in's."""
    there = os.statvfs(tmp_path)
    read_only = os.statvfs_result((*there[:8], os.ST_RDONLY, *there[9:]))
    monkeypatch.setattr(os, "access", lambda _, mode, **__: not mode & os.W_OK)
    monkeypatch.setattr(os, "statvfs", lambda _: read_only)
    with pytest.raises(ConfigurationError, match="Read-only file system; give the CA a directory"):
        JoinTokens(tmp_path).prepare()


def test_a_full_disk_is_reported_as_that(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its operator would give the CA another directory, on the same disk."""

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "mkdir", fail)
    with pytest.raises(ConfigurationError, match="No space left on device; make room on its disk"):
        JoinTokens(tmp_path / "tokens").prepare()


def test_a_token_cannot_be_guessed_and_its_record_is_its_owners_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        tokens = JoinTokens(tmp_path / "tokens")
        tokens.prepare()
        made = {tokens.make(WEB, datetime.now(UTC) + timedelta(hours=1)) for _ in range(20)}
    finally:
        os.umask(before)
    assert len(made) == 20
    assert all(len(token.removeprefix(PREFIX)) >= 43 for token in made), "256 bits take 43 characters"
    assert stat.S_IMODE((tmp_path / "tokens").stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "tokens").iterdir()} == {0o600}


def test_of_two_servers_on_one_directory_only_one_can_bind_a_token(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one comes between the look at the record and the mark that it is spent."""
    here, there = JoinTokens(tmp_path), JoinTokens(tmp_path)
    token = here.make(WEB, datetime.now(UTC) + timedelta(hours=1))
    mine, other = (generate(KeyType.EC_P256).public_key() for _ in range(2))
    link = os.symlink

    def overtaken(*arguments: Any) -> None:
        monkeypatch.setattr(os, "symlink", link)
        there.spend(there.find(token), other)
        link(*arguments)

    monkeypatch.setattr(os, "symlink", overtaken)
    with pytest.raises(RefusalError, match="already used by another key") as caught:
        here.spend(here.find(token), mine)
    assert caught.value.reason is Reason.UNAUTHENTICATED
    here.spend(here.find(token), other)


@pytest.mark.parametrize("spent", [False, True], ids=["unused", "spent"])
def test_a_token_that_is_withdrawn_between_its_proof_and_its_use_serves_no_key(tmp_path: Path, *, spent: bool) -> None:
    """A caller may hold back its request for seconds. The mark of a spent token is removed with the token."""
    tokens = JoinTokens(tmp_path)
    record = tokens.find(tokens.make(WEB, datetime.now(UTC) + timedelta(hours=1)))
    if spent:
        tokens.spend(record, generate(KeyType.EC_P256).public_key())
    assert JoinTokens(tmp_path).withdraw(WEB) == 1
    with pytest.raises(RefusalError, match="was withdrawn") as caught:
        tokens.spend(record, generate(KeyType.EC_P256).public_key())
    assert caught.value.reason is Reason.UNAUTHENTICATED
    assert list(tmp_path.iterdir()) == []


def test_a_withdrawal_that_is_cut_off_frees_no_spent_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its two files one goes first. If that were the mark, the token would be good for another key."""
    tokens = JoinTokens(tmp_path)
    token = tokens.make(WEB, datetime.now(UTC) + timedelta(hours=1))
    tokens.spend(tokens.find(token), generate(KeyType.EC_P256).public_key())
    unlink, removed = os.unlink, list[object]()

    def once(path: object, **options: Any) -> None:
        if removed:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        removed.append(path)
        unlink(path, **options)  # type: ignore[arg-type]  # whatever it was given

    with monkeypatch.context() as broken:
        broken.setattr(os, "unlink", once)
        with pytest.raises(OSError, match="Input/output error"):
            tokens.withdraw(WEB)
    with pytest.raises(RefusalError, match="it was withdrawn"):
        tokens.spend(tokens.find(token), generate(KeyType.EC_P256).public_key())
    assert files(tmp_path) == [".spent"]
    (mark,) = tmp_path.iterdir()
    tokens.tidy()
    assert list(tmp_path.iterdir()) == [mark], "it may be another process's that removes it now"
    long_ago = time.time() - 25 * 3600
    os.utime(mark, (long_ago, long_ago), follow_symlinks=False)
    tokens.tidy()
    assert list(tmp_path.iterdir()) == []


def test_what_a_power_cut_may_undo_is_not_said_to_be_done(tmp_path: Path) -> None:
    """A token that was taken back would join a machine, and one that was handed out would not."""
    tokens, end = JoinTokens(tmp_path), datetime.now(UTC) + timedelta(hours=1)
    tokens.make(WEB, end)
    with forgetful_directories():
        for act in (lambda: tokens.make(WEB, end), lambda: tokens.withdraw(WEB)):
            with pytest.raises(OSError, match="Input/output error"):
                act()


def test_a_spent_token_is_spent_on_the_disk_before_anything_is_signed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or else it is good for another key once the machine has lost its power."""
    tokens = JoinTokens(tmp_path)
    record = tokens.find(tokens.make(WEB, datetime.now(UTC) + timedelta(hours=1)))
    seen: list[tuple[bool, list[str]]] = []
    sync = os.fsync

    def look(descriptor: int) -> None:
        sync(descriptor)
        seen.append((stat.S_ISDIR(os.fstat(descriptor).st_mode), files(tmp_path)))

    monkeypatch.setattr(os, "fsync", look)
    tokens.spend(record, generate(KeyType.EC_P256).public_key())
    assert seen == [(True, [".spent", ".token"])], "the directory, with the mark in it"


def test_a_mark_that_another_process_has_just_made_is_on_the_disk_before_its_key_is_served_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one may still wait for the disk. Without power, the token would be good for another key as well."""
    here, there, key = JoinTokens(tmp_path), JoinTokens(tmp_path), generate(KeyType.EC_P256).public_key()
    record = here.find(here.make(WEB, datetime.now(UTC) + timedelta(hours=1)))
    synchronized, sync = list[int](), os.fsync

    def again(descriptor: int) -> None:
        synchronized.append(1)
        if len(synchronized) == 1:
            there.spend(record, key)
            assert len(synchronized) == 2, "before it says so"
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", again)
    here.spend(record, key)


def test_tokens_that_come_together_wait_for_the_disk_once_and_each_serves_its_own_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wait for each was most of what a machine's first certificate cost the CA."""
    tokens, now = JoinTokens(tmp_path), datetime.now(UTC)
    records = [tokens.find(tokens.make(WEB, now + timedelta(hours=1))) for _ in range(5)]
    keys = [generate(KeyType.EC_P256).public_key() for _ in range(6)]
    synchronized, sync = list[int](), os.fsync

    def count(descriptor: int) -> None:
        synchronized.append(descriptor)
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", count)
    refusals = tokens.spend_all([*zip(records, keys, strict=False), (records[0], keys[5])])
    assert refusals[:5] == [None] * 5
    assert "already used by another key" in str(refusals[5])
    assert len(synchronized) == 1
    assert tokens.spend_all([(record, keys[5]) for record in records]).count(None) == 0
    assert len(synchronized) == 1, "to refuse writes nothing"


def test_a_disk_that_fails_at_the_end_serves_none_of_those_that_wait_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their marks may not be there after a restart. The same keys can ask again once the disk is well."""
    tokens, now, key = JoinTokens(tmp_path), datetime.now(UTC), generate(KeyType.EC_P256).public_key()
    records = [tokens.find(tokens.make(WEB, now + timedelta(hours=1))) for _ in range(2)]

    def fail(_: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", fail)
        refusals = tokens.spend_all([(record, key) for record in records])
    assert [each and each.reason for each in refusals] == [Reason.INTERNAL] * 2
    assert tokens.spend_all([(record, key) for record in records]) == [None, None]


@pytest.mark.parametrize("links", [False, True], ids=["no symbolic links", "a mark of an earlier version"])
def test_a_token_is_spent_once_where_its_mark_is_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, links: bool
) -> None:
    """A mark made so stays in force whatever the file system or a later version can do."""
    tokens = JoinTokens(tmp_path)
    record = tokens.find(tokens.make(WEB, datetime.now(UTC) + timedelta(hours=1)))
    mine, other = (generate(KeyType.EC_P256).public_key() for _ in range(2))

    def refuse(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    with monkeypatch.context() as without:
        without.setattr(os, "symlink", refuse)
        tokens.spend(record, mine)
        if not links:
            with pytest.raises(RefusalError, match="already used by another key"):
                tokens.spend(record, other)
            tokens.spend(record, mine)
    (mark,) = tmp_path.glob("*.spent")
    assert stat.S_ISREG(mark.lstat().st_mode)
    with pytest.raises(RefusalError, match="already used by another key"):
        tokens.spend(record, other)
    tokens.spend(record, mine)


def test_a_token_that_root_makes_can_be_read_by_the_user_of_the_ca(tmp_path: Path) -> None:
    """Only root can give a directory away; another user's stays its own."""
    owner = (4711, 4712) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    tmp_path.chmod(0o755)
    os.chown(tmp_path, *owner)
    JoinTokens(tmp_path).make(WEB, datetime.now(UTC) + timedelta(hours=1))
    (record,) = tmp_path.iterdir()
    assert (record.stat().st_uid, record.stat().st_gid) == owner


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"spiffe_id": "x", "expires": 1e400}', "\0", "[" * 10_000])
def test_a_damaged_record_serves_no_machine(tmp_path: Path, content: str) -> None:
    tokens = JoinTokens(tmp_path)
    token = tokens.make(WEB, datetime.now(UTC) + timedelta(hours=1))
    (record,) = tmp_path.iterdir()
    record.write_text(content)
    with pytest.raises(RefusalError, match="is damaged: make a new one") as caught:
        tokens.find(token)
    assert caught.value.reason is Reason.UNAUTHENTICATED
    tokens.tidy()
    assert files(tmp_path) == [".token"]


@pytest.mark.parametrize(("ending", "words"), [(".token", "is damaged"), (".spent", "already used by another key")])
def test_a_pipe_in_the_place_of_a_tokens_file_is_not_waited_for(tmp_path: Path, ending: str, words: str) -> None:
    """Each call with that token would hold a thread for ever, and the end of the process with it."""
    tokens, key = JoinTokens(tmp_path), generate(KeyType.EC_P256).public_key()
    token = tokens.make(WEB, datetime.now(UTC) + timedelta(hours=1))
    tokens.spend(tokens.find(token), key)
    (file,) = tmp_path.glob(f"*{ending}")
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(RefusalError, match=words):
        tokens.spend(tokens.find(token), key)
    tokens.tidy()


def plant(path: Path, elsewhere: Path) -> None:
    """Make the file one that another user put there; only root can give it away, others put a link."""
    if os.geteuid() == 0:
        os.chown(path, 4711, -1, follow_symlinks=False)
    else:
        path.rename(elsewhere)
        path.symlink_to(elsewhere)


def test_a_record_that_another_user_put_there_serves_no_machine(tmp_path: Path) -> None:
    """Where a group may write to the directory, each of its members could make a token for any identity."""
    directory = tmp_path / "tokens"
    directory.mkdir()
    tokens = JoinTokens(directory)
    token = tokens.make(WEB, datetime.now(UTC) + timedelta(hours=1))
    (record,) = directory.iterdir()
    plant(record, tmp_path / "record")
    with pytest.raises(RefusalError, match="record of the join token is damaged"):
        tokens.find(token)


def test_a_renamed_record_serves_no_machine(tmp_path: Path) -> None:
    """Else a member of that group makes a token of its own stand for the identity of another."""
    tokens, now = JoinTokens(tmp_path), datetime.now(UTC)
    token = tokens.make(WEB, now + timedelta(hours=1))
    (own,) = tmp_path.iterdir()
    tokens.make(f"{WEB}/admin", now + timedelta(hours=1))
    (other,) = set(tmp_path.iterdir()) - {own}
    other.replace(own)
    with pytest.raises(RefusalError, match="record of the join token is damaged"):
        tokens.find(token)


def test_a_mark_that_another_user_put_there_frees_no_spent_token(tmp_path: Path) -> None:
    directory, key = tmp_path / "tokens", generate(KeyType.EC_P256).public_key()
    directory.mkdir()
    tokens = JoinTokens(directory)
    record = tokens.find(tokens.make(WEB, datetime.now(UTC) + timedelta(hours=1)))
    tokens.spend(record, key)
    (mark,) = directory.glob("*.spent")
    plant(mark, tmp_path / "mark")
    with pytest.raises(RefusalError, match="already used by another key"):
        tokens.spend(record, key)


def test_a_record_that_is_larger_than_any_is_damaged(tmp_path: Path) -> None:
    tokens = JoinTokens(tmp_path)
    token = tokens.make(WEB, datetime.now(UTC) + timedelta(hours=1))
    (record,) = tmp_path.iterdir()
    record.write_bytes(record.read_bytes() + b" " * LARGEST_RECORD)
    with pytest.raises(RefusalError, match="is damaged"):
        tokens.find(token)


def test_a_place_for_tokens_that_cannot_be_used_is_reported_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match=r"callers\.join_tokens: cannot use"):
        JoinTokens(tmp_path / "file").prepare()
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(ConfigurationError, match="every user may write"):
        JoinTokens(tmp_path / "open").prepare()


@pytest.mark.parametrize("something", [False, True], ids=["nothing there", "something else there"])
async def test_a_directory_of_tokens_that_is_gone_is_the_operators_to_fix(tmp_path: Path, *, something: bool) -> None:
    """The CA asks the caller to come again, and signs once the directory is back: the token is not lost."""
    async with served(tmp_path) as ca:
        token = ca.join_token()
        shutil.move(tmp_path / "tokens", tmp_path / "away")
        if something:
            (tmp_path / "tokens").touch()
        with recorded() as events:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await ca.ask(token)
            assert caught.value.code() is grpc.StatusCode.INTERNAL
            assert events.named("join_tokens_unusable")
            assert token not in str(events.seen) + str(ca.audit)
        (tmp_path / "tokens").unlink(missing_ok=True)
        shutil.move(tmp_path / "away", tmp_path / "tokens")
        await ca.ask(token)


async def test_a_directory_that_keeps_no_mark_is_logged_once_and_not_for_each_call(tmp_path: Path) -> None:
    """It can still be read, as on a disk that is full: that does not mean that the error is over."""
    async with served(tmp_path) as ca:
        with recorded() as events:
            for count in (1, 2):
                tokens = [ca.join_token() for _ in range(3)]
                with forgetful_directories():
                    for token in tokens:
                        with pytest.raises(grpc.aio.AioRpcError) as caught:
                            await ca.ask(token)
                        assert caught.value.code() is grpc.StatusCode.INTERNAL
                assert len(events.named("join_tokens_unusable")) == count
                await ca.ask(ca.join_token())


async def test_a_disk_that_is_slow_to_give_thousands_of_tokens_holds_up_no_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that have long expired are removed once it has."""
    made, now = JoinTokens(tmp_path / "tokens"), datetime.now(UTC)
    made.prepare()
    made.make(WEB, now - timedelta(days=2))
    (record,) = (tmp_path / "tokens").iterdir()
    given, opening = threading.Event(), os.open

    def slow(path: Any, *arguments: Any, **options: Any) -> int:
        if str(path) == str(record):
            given.wait(60)
        return opening(path, *arguments, **options)

    monkeypatch.setattr(os, "open", slow)
    async with served(tmp_path):
        assert record.exists()
        given.set()
        with anyio.fail_after(10):
            while record.exists():
                await anyio.lowlevel.checkpoint()
