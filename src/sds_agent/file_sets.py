"""Files that another program replaces while they are read: what to take for one set, and how long to wait for it.

No writer replaces several files at once, and few replace them by one step. A set that does not go together is first
taken for one that is being written: what was read before stays in use, and a person hears of it only when it stays so.
"""

from collections.abc import Callable
from datetime import datetime, timedelta
from typing import TypeVar

from msgspec import Struct

T = TypeVar("T")

CHECK_EVERY = 5.0
"""Seconds between two readings of a set that goes together, where the kernel tells of no change."""
RETRY_EVERY = 0.5
"""The same, of a set that does not."""
PATIENCE = timedelta(seconds=2.5)
"""How long a set may be in the middle of being written. The first of several authorities has a little longer to answer:
it should say what is wrong with its files, and not merely be silent."""
MOST_READINGS = 5
"""How often files are read until two readings agree."""
LARGEST_FILE = 1 << 20
"""Bytes of one file."""


def settled(read: Callable[[], T]) -> T | None:
    """What two readings in a row give; None where they go on to differ.

    Equal readings of several files prove that there was a moment when all of them were so: the one between the two.
    """
    before = read()
    for _ in range(MOST_READINGS):
        after = read()
        if after == before:
            return after
        before = after
    return None


class Doubt(Struct, frozen=True):
    """A set that cannot be used, for `cause`; the files have been without a usable one since then."""

    cause: str
    since: datetime

    def overdue(self, now: datetime) -> bool:
        """Whether it is time to say so. A clock that was set back does not put that off."""
        return not timedelta(0) <= now - self.since < PATIENCE

    def pause(self, now: datetime) -> float:
        """Seconds until the next reading."""
        return CHECK_EVERY if self.overdue(now) else RETRY_EVERY


def doubted(before: Doubt | None, cause: str, now: datetime) -> Doubt:
    """The doubt after one more reading that cannot be used, for this cause."""
    return Doubt(cause, now if before is None else before.since)
