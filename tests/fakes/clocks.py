"""A stand-in for the machine's clocks: a wall clock and a monotonic one, moved by hand.

Time stands still until a test moves it. A sleeper does not sleep in real time: it wakes when the test has moved the
monotonic clock far enough.
"""

import asyncio
from collections.abc import Callable
from datetime import datetime, timedelta
from typing import Any

import anyio
from fakes.hierarchy import NOW

from sds_agent.clock import Alarms, Waker


class HandLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock, which its deadlines use, can be moved ahead. The clock also runs by itself."""

    def __init__(self) -> None:
        self._ahead = 0.0
        super().__init__()

    def time(self) -> float:
        """The loop's clock."""
        return super().time() + self._ahead

    def move(self, seconds: float) -> None:
        """Let so many seconds pass for every deadline."""
        self._ahead += seconds


HAND_LOOP: tuple[str, dict[str, Any]] = ("asyncio", {"loop_factory": HandLoop})
"""What a module's `anyio_backend` fixture returns to run its tests on a HandLoop."""


class HandTimer:
    """A call that is due when a test has moved the monotonic clock so far."""

    def __init__(self, when: float, callback: Callable[[], None]) -> None:
        self.when = when
        self.callback = callback
        self.is_cancelled = False

    def cancel(self) -> None:
        """Forget it."""
        self.is_cancelled = True


class HandTimers:
    """A `sds_agent.clock.Timers`: its time is the monotonic clock of a HandClock."""

    def __init__(self) -> None:
        self._time = 0.0
        self._timers = list[HandTimer]()

    def time(self) -> float:
        """The monotonic clock."""
        return self._time

    def call_at(self, when: float, callback: Callable[[], None]) -> HandTimer:
        """Call once the clock was moved to that time."""
        timer = HandTimer(when, callback)
        self._timers.append(timer)
        return timer

    def elapse(self, seconds: float) -> None:
        """Move the clock, and make the calls that are due, with those that they have made due."""
        self._time += seconds
        while due := [each for each in self.waiting if each.when <= self._time]:
            first = min(due, key=lambda each: each.when)
            first.is_cancelled = True  # it is called once
            first.callback()

    @property
    def waiting(self) -> list[HandTimer]:
        """Those that are still to be called."""
        self._timers = [each for each in self._timers if not each.is_cancelled]
        return self._timers


class HandClock:
    """A `sds_agent.clock.Clock`. Those who wait for a time of its wall clock have the alarms of the real one."""

    def __init__(self, start: datetime = NOW) -> None:
        self._wall = start
        self._timers = HandTimers()
        self._alarms = Alarms(self.now, timers=lambda: self._timers)
        self._sleeping = set[anyio.Event]()
        self._lain_down = anyio.Event()

    def now(self) -> datetime:
        """The wall clock."""
        return self._wall

    def passed(self) -> float:
        """See `sds_agent.clock.Clock.passed`."""
        return self._timers.time()

    async def sleep(self, seconds: float) -> None:
        """Sleep until a test has moved the monotonic clock by so many seconds."""
        wake = anyio.Event()
        timer = self._timers.call_at(self._timers.time() + seconds, lambda: self._wake(wake))
        self._sleeping.add(wake)
        self._somebody_lies_down()
        try:
            await wake.wait()
        finally:
            timer.cancel()
            self._sleeping.discard(wake)

    async def until(self, when: datetime, waker: Waker | None = None) -> None:
        """See `sds_agent.clock.Clock.until`."""
        asyncio.get_running_loop().call_soon(self._somebody_lies_down)  # after the first step of the wait
        await self._alarms.wait(when, waker)

    def elapse(self, time: timedelta) -> None:
        """Let time pass: it moves both clocks, and the deadlines of a HandLoop."""
        self._wall += time
        loop = asyncio.get_running_loop()
        if isinstance(loop, HandLoop):
            loop.move(time.total_seconds())
        self._timers.elapse(time.total_seconds())

    def set_wall(self, by: timedelta) -> None:
        """Move the wall clock alone, as when a user sets it, or the machine was suspended for that long."""
        self._wall += by

    async def asleep(self, count: int = 1) -> None:
        """Wait until so many tasks sleep, which is when they have done their work."""
        with anyio.fail_after(10):
            while self.sleepers < count:
                await self._lain_down.wait()

    @property
    def sleepers(self) -> int:
        """How many sleep now."""
        return len(self._sleeping) + self._alarms.sleepers

    @property
    def next_wake(self) -> timedelta:
        """The time until the first sleeper wakes."""
        return timedelta(seconds=min(each.when for each in self._timers.waiting) - self._timers.time())

    def _wake(self, sleeper: anyio.Event) -> None:
        self._sleeping.discard(sleeper)  # from now on it does not sleep, though its task has not run yet
        sleeper.set()

    def _somebody_lies_down(self) -> None:
        self._lain_down.set()
        self._lain_down = anyio.Event()
