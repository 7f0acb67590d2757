"""How often one caller may ask: a bucket for each that holds a minute's worth of requests and fills evenly."""

from datetime import datetime

from sds_agent.budget import Buckets, Rate

MOST_CALLERS = 100_000
"""Buckets kept. Beyond it the oldest is forgotten, which at worst lets its caller ask a minute's worth again."""


class Quota:
    """`per_minute` requests for each caller, all of them at once if it likes."""

    def __init__(self, per_minute: int) -> None:
        self._callers = Buckets(Rate(per_minute, per_minute / 60), MOST_CALLERS)

    def take(self, caller: str, now: datetime) -> bool:
        """Count a request of that caller; whether it is within its quota."""
        return self._callers.take(caller, now.timestamp())
