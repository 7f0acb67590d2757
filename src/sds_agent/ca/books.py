"""What the CA keeps of all its callers together: their quotas, the requests in work, the counts, and the audit log.

The certificate service asks a `Books` at each step. There is one `Ledger`; where several processes answer calls, one of
them has it, and the others ask that one (`workers`). So each limit is one limit, and each line one line, whatever
process a caller reaches.
"""

import logging
from datetime import datetime
from typing import Protocol

from sds_agent import log
from sds_agent.ca.audit import AuditLog, Entry
from sds_agent.ca.callers import Proof
from sds_agent.ca.counts import CaCounts
from sds_agent.ca.policy import Quota

LOG = logging.getLogger(__name__)


class Books(Protocol):
    """What the certificate service asks before it acts, and tells afterwards."""

    async def admit(self, caller: str, now: datetime) -> bool:
        """Count a request of that caller; whether it is within its quota."""
        ...

    async def begin(self) -> int | None:
        """Count a request as work; returns its place, which `end` gives back, or None where there is none."""
        ...

    def end(self, place: int) -> None:
        """The request is no work any more."""
        ...

    async def issued(self, entry: Entry, now: datetime, seconds: float) -> None:
        """Write down a certificate, which took so long, before it is given out. Raises OSError."""
        ...

    def refused(self, entry: Entry, now: datetime) -> None:
        """Write down a refusal."""
        ...


class Ledger:
    """What is kept, in this process: at most `at_once` requests in work, and `per_caller` of one caller in a minute."""

    def __init__(self, audit: AuditLog, *, at_once: int, per_caller: int) -> None:
        self._audit = audit
        self._at_once = at_once
        self._quota = Quota(per_caller)
        self._places = set[int]()
        self._next = 0
        self._unwritten = log.LogOnChange(LOG, "audit_not_written")
        self.counts = CaCounts()

    @property
    def in_work(self) -> int:
        """Requests that are being answered."""
        return len(self._places)

    def admit(self, caller: str, now: datetime) -> bool:
        """Count a request of that caller; whether it is within its quota."""
        return self._quota.take(caller, now)

    def begin(self) -> int | None:
        """Count a request as work; returns its place, which `end` gives back, or None where there is none."""
        if len(self._places) >= self._at_once:
            return None
        self._next += 1
        self._places.add(self._next)
        return self._next

    def end(self, place: int) -> None:
        """The request is no work any more. A place that was given back changes nothing."""
        self._places.discard(place)

    def issued(self, entry: Entry, now: datetime, seconds: float) -> None:
        """Write down a certificate, which took so long, before it is given out. Raises OSError."""
        try:
            self._audit.write(entry, now)
        except OSError as error:
            self._not_written(error)
            raise
        self._unwritten.resolved()
        if entry.caller is not None:
            self.counts.issued(entry.caller.proof, seconds)

    def refused(self, entry: Entry, now: datetime) -> None:
        """Write down a refusal."""
        self.counts.refused(entry.outcome, _proof(entry))
        try:
            self._audit.refuse(entry, now)
        except OSError as error:
            self._not_written(error)

    def _not_written(self, error: OSError) -> None:
        self.counts.unwritten.add()
        self._unwritten.report(str(error.strerror))


class OwnBooks:
    """The ledger of this process, as the service asks it."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.end = ledger.end
        self.refused = ledger.refused

    async def admit(self, caller: str, now: datetime) -> bool:
        """As the ledger's."""
        return self._ledger.admit(caller, now)

    async def begin(self) -> int | None:
        """As the ledger's."""
        return self._ledger.begin()

    async def issued(self, entry: Entry, now: datetime, seconds: float) -> None:
        """As the ledger's. Raises OSError."""
        self._ledger.issued(entry, now, seconds)


def _proof(entry: Entry) -> Proof | None:
    return None if entry.caller is None else entry.caller.proof
