"""How often one caller may ask: a bucket for each that holds a minute's worth of requests and fills evenly."""

from datetime import datetime

import msgspec
from msgspec import Struct

MOST_CALLERS = 100_000
"""Buckets kept. Beyond it the oldest is forgotten, which at worst lets its caller ask a minute's worth again."""


class _Bucket(Struct):
    left: float
    seen: datetime


class Quota(Struct):
    """`per_minute` requests for each caller, all of them at once if it likes."""

    per_minute: int
    _buckets: dict[str, _Bucket] = msgspec.field(default_factory=dict)

    def take(self, caller: str, now: datetime) -> bool:
        """Count a request of that caller; whether it is within its quota."""
        bucket = self._buckets.pop(caller, None) or _Bucket(float(self.per_minute), now)
        elapsed = max(0.0, (now - bucket.seen).total_seconds())  # a clock that is set back gives nothing
        bucket.left = min(float(self.per_minute), bucket.left + elapsed * self.per_minute / 60)
        bucket.seen = now
        granted = bucket.left >= 1
        bucket.left -= granted
        self._buckets[caller] = bucket  # at the end: the first is always the one not seen for longest
        if len(self._buckets) > MOST_CALLERS:
            del self._buckets[next(iter(self._buckets))]
        return granted
