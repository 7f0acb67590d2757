"""What the kernel reports of changes: whatever a program does to a file or to what leads there, again and again."""

import asyncio
import errno
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import anyio
import pytest
from fakes.clocks import HandClock
from fakes.events import recorded
from fakes.replacing import WAYS, Replace

from sds_agent import path_watch
from sds_agent.path_watch import PathWatch

TIMES = 3
MOST_QUEUED = int(Path("/proc/sys/fs/inotify/max_queued_events").read_text())


@contextmanager
def watching(*paths: Path) -> Iterator[PathWatch]:
    watch = PathWatch()
    watch.arm(paths)
    try:
        yield watch
    finally:
        watch.close()


async def reported(watch: PathWatch) -> None:
    """Wait for the kernel's report; the clock of the other way to return stands still."""
    with anyio.fail_after(10):
        await watch.changed(HandClock(), 5)


@asynccontextmanager
async def nothing_reported(watch: PathWatch) -> AsyncIterator[None]:
    """Nothing is reported of what happens in this context. By its end the kernel has queued the events."""
    waiting = asyncio.create_task(watch.changed(clock := HandClock(), 5))
    await clock.asleep()
    yield
    for _ in range(5):
        await asyncio.sleep(0)
    assert not watch.has_changed
    waiting.cancel()
    await asyncio.wait([waiting])


@pytest.mark.parametrize("way", WAYS)
async def test_every_replacement_has_changed_however_it_is_made(way: object, tmp_path: Path) -> None:
    assert callable(way)
    directory, replace = way(tmp_path)
    await _reported_each_time(directory, replace)


async def _reported_each_time(directory: Path, replace: Replace) -> None:
    file = directory / "tls.crt"
    with watching(file) as watch:
        for content in (b"first", *(b"%d" % n for n in range(TIMES))):
            replace({"tls.crt": content, "tls.key": b"key"})
            await reported(watch)
            watch.arm([file])
            assert file.read_bytes() == content
            while watch.has_changed:  # by what the same replacement did after its first report
                await reported(watch)


async def test_a_path_that_is_made_step_by_step_has_changed_at_each(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b" / "file"
    with watching(file) as watch:
        for make in (file.parent.parent.mkdir, file.parent.mkdir, file.touch):
            make()
            await reported(watch)
            watch.arm([file])
        file.write_bytes(b"content")
        await reported(watch)


async def test_a_change_between_arming_and_waiting_is_not_lost(tmp_path: Path) -> None:
    file = tmp_path / "file"
    with watching(file) as watch:
        file.touch()
        await reported(watch)


async def test_what_happens_to_other_files_wakes_nothing(tmp_path: Path) -> None:
    """Else a busy directory above the files, such as /tmp, would have them read all the time."""
    file = tmp_path / "file"
    file.touch()
    with watching(file) as watch:
        async with nothing_reported(watch):
            (tmp_path / "other").write_bytes(b"x")
            (tmp_path / "other").rename(tmp_path / "another")
            (tmp_path / "another").unlink()


async def test_a_path_that_is_watched_no_longer_wakes_nothing(tmp_path: Path) -> None:
    file, other = tmp_path / "file", tmp_path / "other"
    for each in (file, other):
        each.touch()
    with watching(file, other) as watch:
        watch.arm([file])
        async with nothing_reported(watch):
            other.write_bytes(b"x")


async def test_lost_events_count_as_a_change(tmp_path: Path) -> None:
    """More came at once than the kernel's queue holds: some of them may have been ours."""
    file = tmp_path / "file"
    file.touch()
    with watching(file) as watch:
        other = tmp_path / "other"
        for _ in range(MOST_QUEUED // 2 + 2):
            descriptor = os.open(other, os.O_CREAT | os.O_WRONLY)
            os.close(descriptor)
            other.unlink()
        await reported(watch)


async def test_links_in_a_circle_end(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with watching(tmp_path / "a" / "file") as watch:
        (tmp_path / "b").unlink()
        await reported(watch)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EMFILE, errno.ENOMEM])
async def test_without_the_kernels_watches_time_alone_says_when_to_read(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the kernel is asked again at each reading: what used the watches up may be gone."""
    file = tmp_path / "file"
    file.touch()

    def refused(_descriptor: int | None, _path: str, _mask: int) -> int:
        raise OSError(code, os.strerror(code))

    with recorded() as events, monkeypatch.context() as patched:
        patched.setattr(path_watch, "_inotify_add", refused)
        patched.setitem(path_watch._FIXES, errno.ENOMEM, "out of memory")
        with watching(file) as watch:
            waiting = asyncio.create_task(watch.changed(clock := HandClock(), 5))
            await clock.asleep()
            file.write_bytes(b"x")
            clock.elapse(clock.next_wake)
            with anyio.fail_after(10):
                await waiting
            assert "the kernel does not watch all files" in events.named("watched_by_time")[0]["cause"]
            patched.undo()
            watch.arm([file])
            file.write_bytes(b"y")
            await reported(watch)
    assert len(events.named("watched_by_time")) == 1


async def test_a_watch_that_was_closed_leaves_no_descriptor(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - for their number
    with watching(tmp_path / "file"):
        assert len(os.listdir("/proc/self/fd")) == before + 1  # noqa: PTH208 - likewise
    assert len(os.listdir("/proc/self/fd")) == before  # noqa: PTH208 - likewise


async def test_a_watch_that_is_closed_while_a_thread_arms_it_is_closed_by_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The thread may hang on a disk: the descriptor must not be another file's when it returns."""
    watch = PathWatch()
    watch.arm([tmp_path / "file"])
    descriptor = watch._descriptor
    assert descriptor is not None
    add = path_watch._inotify_add

    open_meanwhile = []

    def slow(into: int | None, path: str, mask: int) -> int:
        watch.close()
        open_meanwhile.append(Path(f"/proc/self/fd/{descriptor}").is_symlink())
        return add(into, path, mask)

    monkeypatch.setattr(path_watch, "_inotify_add", slow)
    watch.arm([tmp_path / "file"])
    assert set(open_meanwhile) == {True}
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
