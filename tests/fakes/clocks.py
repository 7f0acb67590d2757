"""A stand-in for the machine's clocks: a wall clock and a monotonic one, moved by hand.

Time stands still until a test moves it. A sleeper does not sleep in real time: it wakes when the test has moved the
monotonic clock far enough.
"""

import asyncio
from datetime import datetime, timedelta
from typing import Any

import anyio
from fakes.hierarchy import NOW


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


class HandClock:
    """A `sds_agent.clock.Clock`."""

    def __init__(self, start: datetime = NOW) -> None:
        self._wall = start
        self._monotonic = 0.0
        self._sleepers: dict[anyio.Event, float] = {}
        self._lain_down = anyio.Event()

    def now(self) -> datetime:
        """The wall clock."""
        return self._wall

    async def sleep(self, seconds: float) -> None:
        """Sleep until a test has moved the monotonic clock by so many seconds."""
        wake = anyio.Event()
        self._sleepers[wake] = self._monotonic + seconds
        self._lain_down.set()
        self._lain_down = anyio.Event()
        try:
            await wake.wait()
        finally:
            self._sleepers.pop(wake, None)

    def elapse(self, time: timedelta) -> None:
        """Let time pass: it moves both clocks, and the deadlines of a HandLoop."""
        self._wall += time
        self._monotonic += time.total_seconds()
        loop = asyncio.get_running_loop()
        if isinstance(loop, HandLoop):
            loop.move(time.total_seconds())
        due = [wake for wake, when in self._sleepers.items() if when <= self._monotonic]
        for wake in due:
            del self._sleepers[wake]
            wake.set()

    def set_wall(self, by: timedelta) -> None:
        """Move the wall clock alone, as when a user sets it, or the machine was suspended for that long."""
        self._wall += by

    async def asleep(self, count: int = 1) -> None:
        """Wait until so many tasks sleep, which is when they have done their work."""
        with anyio.fail_after(10):
            while len(self._sleepers) < count:
                await self._lain_down.wait()

    @property
    def sleepers(self) -> int:
        """How many sleep now."""
        return len(self._sleepers)

    @property
    def next_wake(self) -> timedelta:
        """The time until the first sleeper wakes."""
        return timedelta(seconds=min(self._sleepers.values()) - self._monotonic)
