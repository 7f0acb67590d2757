"""The wall clock, and how to wait for a time on it.

Certificates live by the wall clock, but an event loop sleeps by the monotonic one, which stands still while a machine
is suspended and does not notice when the wall clock is set. So no code here sleeps for long: `until` wakes every few
seconds, reads the wall clock again and goes back to sleep if it is still too early.
"""

import asyncio
from datetime import UTC, datetime
from typing import Protocol

LONGEST_SLEEP = 5.0
"""Seconds. A certificate that a suspended machine slept through is renewed at most this long after it wakes."""


class Clock(Protocol):
    """What the loops need of time; the tests have one that they move by hand."""

    def now(self) -> datetime:
        """The wall clock, in UTC."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Sleep on the monotonic clock."""
        ...


class SystemClock:
    """The machine's clocks."""

    def now(self) -> datetime:
        """The wall clock, in UTC."""
        return datetime.now(UTC)

    async def sleep(self, seconds: float) -> None:
        """Sleep on the monotonic clock."""
        await asyncio.sleep(seconds)


async def until(clock: Clock, when: datetime) -> None:
    """Return once the wall clock has passed `when`, however it got there.

    It also returns when the wall clock is found to have gone backwards: what was decided before the step has to be
    decided again.
    """
    seen = clock.now()
    while (left := (when - seen).total_seconds()) > 0:
        await clock.sleep(min(left, LONGEST_SLEEP))
        now = clock.now()
        if now < seen:
            return
        seen = now
