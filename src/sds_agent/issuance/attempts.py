"""An attempt at a CA that has ended, for those who watch."""

from datetime import datetime

from msgspec import Struct

MOST_ATTEMPTS = 1000
"""Attempts that wait for a reader; then the oldest are dropped."""


class AttemptRecord(Struct, frozen=True):
    """For which workload, at which authority, when, and its result: `issued`, `renewed`, or the kind of the failure.

    Lines of the log that belong to it have its `attempt_id`. At a source that makes certificates by itself, an attempt
    has no duration.
    """

    workload: str
    authority: str
    began: datetime
    ended: datetime
    result: str
    attempt_id: str = ""

    @property
    def failed(self) -> bool:
        """Whether it gave no certificate."""
        return self.result not in {"issued", "renewed"}
