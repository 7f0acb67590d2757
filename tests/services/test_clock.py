"""Waiting for a time on the wall: not late after a suspend, and not wrong after the clock is set."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta

import anyio
import pytest
from anyio.lowlevel import checkpoint
from fakes.clocks import HandClock
from fakes.hierarchy import DAY, HOUR, NOW

from sds_agent.clock import LONGEST_SLEEP, SET, Alarms, Beginning, SystemClock

SECOND = timedelta(seconds=1)


class Sleeper:
    """One who waits until a time."""

    def __init__(self) -> None:
        self.woken = anyio.Event()

    async def sleep(self, clock: HandClock, when: datetime) -> None:
        await clock.until(when)
        self.woken.set()

    async def wakes(self) -> None:
        with anyio.fail_after(10):
            await self.woken.wait()


@asynccontextmanager
async def sleeping(clock: HandClock, when: datetime) -> AsyncIterator[Sleeper]:
    sleeper = Sleeper()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(sleeper.sleep, clock, when)
        await clock.asleep()
        yield sleeper
        tasks.cancel_scope.cancel()


async def test_it_returns_at_that_time_and_not_before() -> None:
    clock = HandClock()
    async with sleeping(clock, NOW + HOUR) as sleeper:
        clock.elapse(HOUR - SECOND)
        await clock.asleep()
        assert clock.next_wake == SECOND
        assert not sleeper.woken.is_set()
        clock.elapse(SECOND)
        await sleeper.wakes()


@pytest.mark.parametrize("late", [timedelta(0), SECOND, DAY])
async def test_a_time_that_has_passed_is_not_waited_for(late: timedelta) -> None:
    with anyio.fail_after(10):
        await HandClock().until(NOW - late)


async def test_no_task_sleeps_longer_than_a_suspend_may_cost() -> None:
    clock = HandClock()
    async with sleeping(clock, NOW + DAY):
        assert clock.next_wake.total_seconds() == LONGEST_SLEEP


@pytest.mark.parametrize("step", [HOUR, DAY])
async def test_a_wall_clock_that_jumps_ahead_wakes_within_seconds(step: timedelta) -> None:
    """Suspended for that long, or set: the monotonic clock knows of neither."""
    clock = HandClock()
    async with sleeping(clock, NOW + HOUR) as sleeper:
        clock.elapse(2 * SECOND)
        clock.set_wall(step)
        clock.elapse(timedelta(seconds=LONGEST_SLEEP) - 2 * SECOND)
        await sleeper.wakes()


async def test_a_wall_clock_that_is_set_back_makes_the_sleeper_decide_again() -> None:
    """It would sleep a day too long."""
    clock = HandClock()
    async with sleeping(clock, NOW + HOUR) as sleeper:
        clock.set_wall(-DAY)
        clock.elapse(timedelta(seconds=LONGEST_SLEEP))
        await sleeper.wakes()


async def test_a_wall_clock_that_is_set_back_a_little_is_waited_for() -> None:
    """As NTP corrects it: nothing was decided wrongly."""
    clock = HandClock()
    async with sleeping(clock, NOW + HOUR) as sleeper:
        clock.set_wall(-SECOND)
        clock.elapse(timedelta(seconds=LONGEST_SLEEP))
        await clock.asleep()
        assert not sleeper.woken.is_set()
        clock.elapse(HOUR)
        await sleeper.wakes()


async def test_the_system_clock_gives_utc_and_sleeps() -> None:
    clock = SystemClock()
    before = datetime.now(UTC)
    await clock.sleep(0)
    assert before <= clock.now() <= datetime.now(UTC)
    assert clock.now().tzinfo is UTC


class WallClock:
    """A wall clock that a test sets, and how often it was read."""

    def __init__(self) -> None:
        self.time = NOW
        self.readings = 0

    def now(self) -> datetime:
        self.readings += 1
        return self.time

    async def read(self, times: int) -> None:
        """Wait until it was read so many times more."""
        wanted = self.readings + times
        with anyio.fail_after(10):
            while self.readings < wanted:
                await checkpoint()


async def test_those_who_wait_for_a_time_are_woken_when_it_has_come_and_no_others() -> None:
    wall, woken = WallClock(), list[int]()
    alarms = Alarms(wall.now, longest=0.001)

    async def wait(hours: int) -> None:
        await alarms.wait(NOW + hours * HOUR)
        woken.append(hours)

    async with anyio.create_task_group() as tasks:
        for hours in (3, 1, 2, 0):
            tasks.start_soon(wait, hours)
        await wall.read(8)
        assert woken == [0]
        wall.time = NOW + 2 * HOUR
        await wall.read(3)
        assert woken == [0, 1, 2]
        tasks.cancel_scope.cancel()
    assert alarms.sleepers == 0


def test_those_of_a_loop_that_has_ended_are_not_counted() -> None:
    alarms = Alarms(lambda: NOW)

    async def wait(*, cancelled: int) -> int:
        tasks = [asyncio.ensure_future(alarms.wait(NOW + DAY)) for _ in range(4)]
        await asyncio.sleep(0)
        for each in tasks[:cancelled]:
            each.cancel()
        await asyncio.sleep(0)
        waiting = alarms.sleepers
        if not cancelled:
            for each in tasks:
                each.cancel()
            await asyncio.wait(tasks)
        return waiting

    first = asyncio.new_event_loop()
    assert first.run_until_complete(wait(cancelled=2)) == 2
    left = asyncio.all_tasks(first)
    assert asyncio.run(wait(cancelled=0)) == 4
    for each in left:
        each.cancel()
    first.run_until_complete(asyncio.wait(left))
    first.close()


async def test_all_decide_again_when_the_wall_clock_is_set_back() -> None:
    """They would sleep too long by as much."""
    wall = WallClock()
    alarms = Alarms(wall.now, longest=0.001)
    async with anyio.create_task_group() as tasks:
        for hours in range(1, 100):
            tasks.start_soon(alarms.wait, NOW + hours * HOUR)
        await wall.read(100)
        wall.time = NOW - DAY
        with anyio.fail_after(10):
            while alarms.sleepers:
                await checkpoint()


async def test_the_wall_clock_is_read_as_often_for_one_as_for_thousands() -> None:
    """Ten thousand identities that sleep would else wake two thousand times a second."""
    wall = WallClock()
    alarms = Alarms(wall.now, longest=0.001)
    async with anyio.create_task_group() as tasks:
        for number in range(1000):
            tasks.start_soon(alarms.wait, NOW + DAY + number * SECOND)
        await anyio.wait_all_tasks_blocked()
        before = wall.readings
        for _ in range(5):
            await asyncio.sleep(0.001)  # as long as the longest sleep: one reading or two
        assert wall.readings - before < 50
        tasks.cancel_scope.cancel()


def test_what_began_while_the_clock_was_wrong_began_then_by_the_clock_that_is_right() -> None:
    clock = HandClock()
    began = Beginning(clock)
    assert (began.at, began.passed) == (NOW, 0)
    for by in (-DAY, HOUR):
        clock.set_wall(by)
        assert (began.at, began.passed) == (clock.now(), 0)


def test_what_began_does_not_begin_again_because_two_clocks_are_read_one_after_the_other() -> None:
    clock = HandClock()
    began = Beginning(clock)
    for by in (SET / 2, -SET / 2, SET * 0.9):
        clock.set_wall(by)
        assert began.at == NOW
