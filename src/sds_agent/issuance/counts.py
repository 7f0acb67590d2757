"""What came of the attempts at CAs since the start, counted for views."""

from datetime import timedelta
from typing import Literal

from sds_agent.authority.protocol import ErrorKind
from sds_agent.tally import Counter, Histogram

Result = Literal["issued", "renewed"] | ErrorKind

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""The upper ends of the buckets for the time that a CA takes; an attempt ends after ten seconds."""


class IssuanceCounts:
    """Of all workloads together. A source that makes certificates by itself has no time that it takes."""

    def __init__(self) -> None:
        self.attempts = Counter("authority", "result")
        """Attempts that ended: `issued` for the first certificate that a workload is served, `renewed` for a later one,
        and for one that failed the kind of its error.
        """
        self.retries = Counter("authority")
        """Attempts that followed a failed one at the same authority."""
        self.seconds = Histogram(SECONDS, "authority")
        """From the request to the accepted certificate."""

    def succeeded(self, authority: str, result: Literal["issued", "renewed"], took: timedelta | None) -> None:
        """An attempt gave a certificate, in that time."""
        self.attempts.add(authority, result)
        if took is not None:
            self.seconds.observe(took.total_seconds(), authority)

    def failed(self, authority: str, kind: ErrorKind) -> None:
        """An attempt failed."""
        self.attempts.add(authority, kind.value)
