"""When a changed configuration file is judged: a value, with the time as an argument.

A file is replaced in many ways, and for a moment it may be missing, empty, or half of what it is to be. Half a file can
be a good configuration with fewer workloads, whose streams would end. So a new content is judged once it has stayed the
same for a while (QUIET), and a person hears of a bad one when it stays bad (`file_sets.PATIENCE`). A person who asks
for it by a signal says that the file is whole: then it is judged at once.
"""

from datetime import datetime, timedelta
from typing import Self

from msgspec import Struct

from sds_agent.file_sets import CHECK_EVERY, PATIENCE, RETRY_EVERY

QUIET = timedelta(seconds=0.5)
"""How long a file has to stay the same."""


class FileTurn(Struct, frozen=True):
    """What a file holds (a hash, empty where it gives nothing), since when, and whether that was judged for good.

    What was `tried` has been refused for a reason that may pass.
    """

    digest: bytes
    since: datetime
    judged: bool = False
    tried: bool = False

    def read(self, digest: bytes, now: datetime) -> Self:
        """After one more reading."""
        return self if digest == self.digest else type(self)(digest, now)

    def due(self, now: datetime, *, asked: bool) -> bool:
        """Whether to judge it now."""
        return asked or (not self.judged and not timedelta(0) <= now - self.since < QUIET)

    def reports(self, now: datetime, *, asked: bool) -> bool:
        """Whether a person is to hear that it is bad. A clock that was set back does not put that off."""
        return asked or not timedelta(0) <= now - self.since < PATIENCE

    @property
    def pause(self) -> float:
        """Seconds until the next reading, where the kernel reports no change."""
        return CHECK_EVERY if self.judged or self.tried else RETRY_EVERY
