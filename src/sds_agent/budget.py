"""How often something may be done for those who ask for it: token buckets, filled evenly, as pure objects.

Time is a number of seconds on any one clock, given with each question. A clock that is set back fills nothing.
"""

from collections.abc import Hashable

from msgspec import Struct

COUNT_EVERY = 60.0
"""Seconds from one count of what was left out to the next."""


class Rate(Struct, frozen=True):
    """At most `burst` at one moment, and `per_second` in the long run. A burst below 1 allows nothing."""

    burst: float
    per_second: float


class Bucket:
    """One bucket, full at first."""

    __slots__ = ("_left", "_rate", "_seen")

    def __init__(self, rate: Rate, now: float) -> None:
        self._rate = rate
        self._left = rate.burst
        self._seen = now

    def holds(self, now: float, cost: float = 1) -> bool:
        """Fill it up to this moment; whether so much can be taken."""
        filled = self._left + max(0.0, now - self._seen) * self._rate.per_second
        self._left = min(self._rate.burst, filled)
        self._seen = now
        return self._left >= cost

    def draw(self, cost: float = 1) -> None:
        """Take from it what it was just found to hold."""
        self._left -= cost

    def overdraw(self, now: float, cost: float) -> float:
        """Take so much, whether it is there or not; the seconds until it will have been."""
        self.holds(now)
        self.draw(cost)
        return max(0.0, -self._left / self._rate.per_second)


class Buckets:
    """A bucket for each key.

    Beyond `most` keys the one not asked for longest is forgotten; if it comes back it has a full bucket again.
    """

    def __init__(self, rate: Rate, most: int) -> None:
        self._rate = rate
        self._most = most
        self._buckets: dict[Hashable, Bucket] = {}  # by when they were asked for last

    def __len__(self) -> int:
        return len(self._buckets)

    def of(self, key: Hashable, now: float) -> Bucket:
        """The bucket of this key."""
        bucket = self._buckets.pop(key, None) or Bucket(self._rate, now)
        self._buckets[key] = bucket
        if len(self._buckets) > self._most:
            del self._buckets[next(iter(self._buckets))]
        return bucket

    def forget(self, key: Hashable) -> None:
        """The key will not be asked for again."""
        self._buckets.pop(key, None)

    def take(self, key: Hashable, now: float) -> bool:
        """Take from the key's bucket; whether there was something to take."""
        bucket = self.of(key, now)
        granted = bucket.holds(now)
        if granted:
            bucket.draw()
        return granted


class Budget:
    """A bucket for each key and one for all keys together, and a count of what both did not allow.

    A key whose own bucket is empty takes nothing from the common one, so one that asks all the time costs the others
    no more than its own rate.
    """

    def __init__(self, each: Rate, together: Rate, *, most_keys: int, count_every: float = COUNT_EVERY) -> None:
        self._each = Buckets(each, most_keys)
        self._together = Bucket(together, 0.0)
        self._left_out = 0
        self._count_every = count_every
        self._counted_at: float | None = None

    def take(self, key: Hashable, now: float, cost: float = 1) -> bool:
        """Whether it may be done for this key at this moment. If not, it is counted as left out."""
        own = self._each.of(key, now)
        granted = own.holds(now, cost) and self._together.holds(now, cost)
        if granted:
            own.draw(cost)
            self._together.draw(cost)
        else:
            self._left_out += 1
        return granted

    def forget(self, key: Hashable) -> None:
        """The key will not be asked for again."""
        self._each.forget(key)

    def left_out(self, now: float, *, at_the_end: bool = False) -> int:
        """How many were left out since the last count; 0 if that was less than `count_every` seconds ago.

        The first is counted at once. Call it after each refusal, and again `count_every` seconds after the last count;
        with `at_the_end` it returns the rest at once.
        """
        due = self._counted_at is None or at_the_end or not 0 <= now - self._counted_at < self._count_every
        if not self._left_out or not due:
            return 0
        count, self._left_out = self._left_out, 0
        self._counted_at = now
        return count
