"""The wall clock, and how to wait for a time on it.

Certificates live by the wall clock, but an event loop sleeps by the monotonic one, which stands still while a machine
is suspended and does not notice when the wall clock is set. So no code here sleeps for long: who waits for a time
(`Clock.until`) has the wall clock read again every few seconds. And how long something took is no difference of two
times of the wall clock (`Clock.passed`).

Thousands of tasks may wait for a time. They share one timer of the loop (`Alarms`): each with its own would wake every
few seconds for nothing.
"""

import asyncio
import heapq
import itertools
import time
from collections.abc import Callable, Coroutine
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Protocol

LONGEST_SLEEP = 5.0
"""Seconds. A certificate that a suspended machine slept through is renewed at most this long after it wakes."""

SET = timedelta(seconds=1)
"""A difference between what the wall clock says has passed and what has passed that shows that the clock was set."""

MOST_WOKEN = 8
"""Sleepers that wake in one turn of the event loop."""


class Waker:
    """Ends one wait sooner (`Clock.until`)."""

    __slots__ = ("end",)

    def __init__(self) -> None:
        self.end: Callable[[], None] | None = None
        """What ends the wait, while there is one."""

    def wake(self) -> None:
        """End the wait, if there is one."""
        if self.end is not None:
            self.end()


class Clock(Protocol):
    """What the loops need of time; the tests have one that they move by hand."""

    def now(self) -> datetime:
        """The wall clock, in UTC."""
        ...

    def passed(self) -> float:
        """The seconds since a moment before the start of this process, suspended or not. Nobody can set them."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Sleep on the monotonic clock."""
        ...

    def until(self, when: datetime, waker: Waker | None = None) -> Coroutine[Any, Any, None]:
        """Return once the wall clock has passed `when`, however it got there, or when the waker says so.

        It also returns when the wall clock is found to have gone backwards: what was decided before the step has to be
        decided again.
        """
        ...


class Timer(Protocol):
    """A call that is due at a time."""

    def cancel(self) -> None:
        """Forget it."""
        ...


class Timers(Protocol):
    """What of an event loop tells the time, in seconds on its own clock, and calls at a time."""

    def time(self) -> float:
        """The time now."""
        ...

    def call_at(self, when: float, callback: Callable[[], None]) -> Timer:
        """Call at that time."""
        ...


class Alarms:
    """Wakes those who wait for a time of a wall clock, at most `longest` seconds late, and all when it goes back.

    The seconds are those of `timers`, which is asked for at each wait.
    """

    def __init__(
        self,
        now: Callable[[], datetime],
        longest: float = LONGEST_SLEEP,
        timers: Callable[[], Timers] = asyncio.get_running_loop,
    ) -> None:
        self._now = now
        self._longest = longest
        self._timers = timers
        self._numbers = itertools.count()
        self._waiting: list[tuple[datetime, int, asyncio.Future[None]]] = []  # a heap; some have been cancelled
        self._cancelled = 0
        self._seen = datetime.min.replace(tzinfo=UTC)
        self._timer: Timer | None = None
        self._rings_at = 0.0
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def sleepers(self) -> int:
        """How many wait."""
        return len(self._waiting) - self._cancelled

    async def wait(self, when: datetime, waker: Waker | None = None) -> None:
        """Return once the clock has passed `when`, is found to have gone back, or when woken."""
        loop, now = asyncio.get_running_loop(), self._now()
        if when <= now:
            return
        if loop is not self._loop:
            # those of a loop that has ended wait no more
            self._loop, self._waiting, self._cancelled, self._timer = loop, [], 0, None
        if not self._waiting:
            self._seen = now
        future: asyncio.Future[None] = loop.create_future()
        heapq.heappush(self._waiting, (when, next(self._numbers), future))
        self._set(min((when - now).total_seconds(), self._longest))
        if waker is not None:
            waker.end = partial(self._wake, future)
        try:
            await future
        finally:
            if waker is not None:
                waker.end = None
            if future.cancelled():
                self._drop()

    def _wake(self, future: "asyncio.Future[None]") -> None:
        if not future.done():
            future.set_result(None)
            self._drop()

    def _drop(self) -> None:
        """One that is in the heap waits no more."""
        self._cancelled += 1
        if 2 * self._cancelled > len(self._waiting):
            self._waiting = [each for each in self._waiting if not each[2].done()]
            heapq.heapify(self._waiting)
            self._cancelled = 0
        if not self._waiting and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _set(self, seconds: float) -> None:
        """Have the timer ring in so many seconds, if it does not ring sooner."""
        timers = self._timers()
        at = timers.time() + seconds
        if self._timer is not None:
            if self._rings_at <= at:
                return
            self._timer.cancel()
        self._timer, self._rings_at = timers.call_at(at, self._ring), at

    def _ring(self) -> None:
        """Wake those whose time has come, some in each turn of the loop: others wait for it too."""
        self._timer, now = None, self._now()
        went_back, self._seen = now < self._seen, now
        if went_back:
            self._waiting = [(now, number, future) for _, number, future in self._waiting]
        woken = 0
        while self._waiting and self._waiting[0][0] <= now and woken < MOST_WOKEN:
            _, _, future = heapq.heappop(self._waiting)
            if future.done():
                self._cancelled -= 1
                continue
            future.set_result(None)
            woken += 1
        if self._waiting:
            self._set(min(max((self._waiting[0][0] - now).total_seconds(), 0.0), self._longest))


class SystemClock:
    """The machine's clocks."""

    def __init__(self) -> None:
        self._alarms = Alarms(self.now)

    def now(self) -> datetime:
        """The wall clock, in UTC."""
        return datetime.now(UTC)

    def passed(self) -> float:
        """See `Clock.passed`."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    async def sleep(self, seconds: float) -> None:
        """Sleep on the monotonic clock."""
        await asyncio.sleep(seconds)

    def until(self, when: datetime, waker: Waker | None = None) -> Coroutine[Any, Any, None]:
        """See `Clock.until`."""
        return self._alarms.wait(when, waker)  # in no frame of its own: thousands wait


class Beginning:
    """The moment at which something began, which was when this was made. The wall clock may have been wrong then, as at
    a boot, and be set later.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._at, self._before = clock.now(), clock.passed()

    @property
    def passed(self) -> float:
        """The seconds since then."""
        return self._clock.passed() - self._before

    @property
    def at(self) -> datetime:
        """When it was, as the wall clock has it now.

        It stays the same until that clock is set: computed anew each time, it would move by microseconds, and who
        compares it would see something begin again.
        """
        at = self._clock.now() - timedelta(seconds=self.passed)
        if abs(at - self._at) >= SET:
            self._at = at
        return self._at
