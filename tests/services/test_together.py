"""Work that is done for several at once: who is served by which run, and what a disk that does not answer costs."""

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import anyio.lowlevel
import pytest

from sds_agent.ca.together import Together

WITHIN = 10


class Disk:
    """Answers once it may, and keeps what each run was given. What is "bad" fails."""

    def __init__(self) -> None:
        self.runs = list[list[str]]()
        self.threads = set[threading.Thread]()
        self.begun = asyncio.Event()
        self.may = threading.Event()
        self._loop = asyncio.get_running_loop()

    def work(self, items: Sequence[str]) -> list[str | Exception]:
        self.runs.append(list(items))
        self.threads.add(threading.current_thread())
        self._loop.call_soon_threadsafe(self.begun.set)
        self.may.wait(WITHIN)
        return [OSError(each) if each == "bad" else each.upper() for each in items]

    def together(self, seconds: float = WITHIN, most: int = 64) -> Together[str, str]:
        return Together(self.work, seconds, most)


@asynccontextmanager
async def under_way(disk: Disk, together: Together[str, str], *later: str) -> AsyncIterator[list[asyncio.Task[str]]]:
    """A run that has begun with "first", and calls that came afterwards."""
    calls = [asyncio.create_task(together.call("first"))]
    async with asyncio.timeout(WITHIN):
        await disk.begun.wait()
    calls += [asyncio.create_task(together.call(each)) for each in later]
    await asyncio.sleep(0)
    try:
        yield calls
    finally:
        disk.may.set()
        await asyncio.gather(*calls, return_exceptions=True)


async def test_what_comes_while_the_disk_is_busy_is_done_in_one_run() -> None:
    """Each for itself would begin a thread and wait for the disk."""
    disk = Disk()
    async with under_way(disk, disk.together(), "a", "b", "c") as calls:
        disk.may.set()
        assert await asyncio.gather(*calls) == ["FIRST", "A", "B", "C"]
    assert disk.runs == [["first"], ["a", "b", "c"]]


async def test_what_comes_in_one_turn_of_the_event_loop_is_done_in_one_run() -> None:
    disk = Disk()
    disk.may.set()
    together = disk.together()
    assert await asyncio.gather(*map(together.call, "abc")) == ["A", "B", "C"]
    assert disk.runs == [["a", "b", "c"]]


async def test_a_run_takes_no_more_than_it_may() -> None:
    """The first of them would wait for all."""
    disk = Disk()
    disk.may.set()
    together = disk.together(most=2)
    assert await asyncio.gather(*map(together.call, "abcde")) == ["A", "B", "C", "D", "E"]
    assert disk.runs == [["a", "b"], ["c", "d"], ["e"]]


async def test_a_failure_is_its_callers_alone() -> None:
    disk = Disk()
    disk.may.set()
    together = disk.together()
    found = await asyncio.gather(*map(together.call, ("a", "bad", "c")), return_exceptions=True)
    assert (found[0], str(found[1]), found[2]) == ("A", "bad", "C")


async def test_a_caller_that_leaves_takes_what_it_asked_for_back_and_harms_no_other() -> None:
    disk = Disk()
    async with under_way(disk, disk.together(), "gone", "b") as calls:
        calls[1].cancel()
        await asyncio.wait([calls[1]])
        disk.may.set()
        assert [await calls[0], await calls[2]] == ["FIRST", "B"]
    assert disk.runs == [["first"], ["b"]]


async def test_others_are_served_though_the_caller_that_began_their_run_has_left() -> None:
    disk = Disk()
    together = disk.together()
    calls = [asyncio.create_task(together.call(each)) for each in "abc"]
    async with asyncio.timeout(WITHIN):
        await disk.begun.wait()
    calls[0].cancel()
    disk.may.set()
    assert await asyncio.gather(*calls[1:]) == ["B", "C"]
    with pytest.raises(asyncio.CancelledError):
        await calls[0]


async def test_a_disk_that_does_not_answer_holds_one_thread_and_no_caller_for_long() -> None:
    """Every peer can ask: the process would fill with threads, and the callers would never hear."""
    disk = Disk()
    together = disk.together(seconds=0.05)
    calls = [together.call(str(number)) for number in range(9)]
    found = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(each) for each in found] == [TimeoutError] * 9
    async with asyncio.timeout(WITHIN):
        await disk.begun.wait()
    with pytest.raises(TimeoutError, match="earlier attempt"):
        await together.call("a")
    assert len(disk.runs) == 1
    assert len(threads(disk)) == 1
    disk.may.set()
    async with asyncio.timeout(WITHIN):
        while await together_again(together) != "A":
            await anyio.lowlevel.checkpoint()
    assert len(threads(disk)) == 1


async def together_again(together: Together[str, str]) -> str:
    """What comes of another call: empty while the earlier one has not come back."""
    try:
        return await together.call("a")
    except TimeoutError:
        return ""


def threads(disk: Disk) -> list[threading.Thread]:
    """Those that did its work and have not ended."""
    return [each for each in disk.threads if each.is_alive()]


async def test_one_thread_does_all_runs_and_ends_with_its_owner() -> None:
    disk = Disk()
    disk.may.set()
    together = disk.together()
    for _ in range(5):
        assert await together.call("a") == "A"
    (own,) = threads(disk)
    del together
    gc.collect()
    await asyncio.to_thread(own.join, WITHIN)
    assert not own.is_alive(), "it ends with its owner"


async def test_a_fault_of_the_work_reaches_every_caller_and_ends_no_thread() -> None:
    """Or else they would wait for ever."""
    broken = [True]

    def work(items: Sequence[str]) -> list[str | Exception]:
        if broken:
            raise RuntimeError("a fault")
        return list(items)

    together = Together(work, WITHIN, 64)
    found = await asyncio.gather(*map(together.call, "ab"), return_exceptions=True)
    assert [str(each) for each in found] == ["a fault", "a fault"]
    broken.clear()
    assert await together.call("a") == "a"
