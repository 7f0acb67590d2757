"""Calls that wait at a server of ours: which gives way when there are too many, and how each ends."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import anyio
import pytest

from sds_agent.rpc.waiting import GaveWayError, Waiting


class Waiter:
    """A call that waits until it is let go."""

    def __init__(self, waiting: Waiting, holder: str) -> None:
        self._place = waiting.place(holder)
        self.here = anyio.Event()
        self.let_go = anyio.Event()
        self.ended = anyio.Event()
        self.how = "is waiting"

    async def wait(self) -> None:
        try:
            async with self._place:
                self.here.set()
                await self.let_go.wait()
            self.how = "got it"
        except (GaveWayError, TimeoutError) as error:
            self.how = type(error).__name__
        self.ended.set()


@asynccontextmanager
async def waiters(waiting: Waiting, holders: str) -> AsyncIterator[list[Waiter]]:
    """One for each letter, which names its holder, in this order."""
    all_of_them = [Waiter(waiting, holder) for holder in holders]
    async with anyio.create_task_group() as tasks:
        for each in all_of_them:
            tasks.start_soon(each.wait)
            with anyio.fail_after(10):
                await each.here.wait()
        yield all_of_them
        for each in all_of_them:
            each.let_go.set()


async def test_the_oldest_of_one_holder_gives_way_to_its_newest() -> None:
    async with waiters(Waiting(10, 2, 60), "baaa") as found:
        with anyio.fail_after(10):
            await found[1].ended.wait()
    assert [each.how for each in found] == ["got it", "GaveWayError", "got it", "got it"]


async def test_the_oldest_of_who_has_most_gives_way_to_others() -> None:
    async with waiters(Waiting(4, 3, 60), "gaaabc") as found:
        with anyio.fail_after(10):
            await found[1].ended.wait()
            await found[2].ended.wait()
    assert [each.how for each in found] == ["got it", "GaveWayError", "GaveWayError", *["got it"] * 3]


async def test_a_call_that_is_only_about_to_be_read_pushes_nobody_out() -> None:
    """An agent that asks for all its workloads at once would lose some of its own requests to the others."""
    async with waiters(Waiting(1, 1, 120, 60), "aaab") as found:
        assert [each.how for each in found] == ["is waiting"] * 4
    assert [each.how for each in found] == ["got it"] * 4


async def test_a_call_that_has_waited_counts_though_it_did_not_at_first() -> None:
    async with waiters(Waiting(10, 1, 60, 0.01), "aa") as found:
        with anyio.fail_after(10):
            await found[0].ended.wait()
    assert [each.how for each in found] == ["GaveWayError", "got it"]


async def test_what_does_not_come_in_time_has_its_place_no_longer() -> None:
    waiting = Waiting(1, 1, 0.01)
    async with waiters(waiting, "ab") as found:
        with anyio.fail_after(10):
            await found[1].ended.wait()
    assert found[1].how == "TimeoutError"


async def test_an_error_of_the_call_itself_is_passed_on() -> None:
    waiting = Waiting(1, 1, 60)
    with pytest.raises(TimeoutError):
        async with waiting.place("a"):
            raise TimeoutError
    with pytest.raises(asyncio.CancelledError):
        async with waiting.place("a"):
            raise asyncio.CancelledError
    async with waiting.place("a"):
        pass
