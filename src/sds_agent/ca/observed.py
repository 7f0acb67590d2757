"""A running CA server as its views see it: its parts, and the status that they make up."""

import os
from collections.abc import Callable
from datetime import datetime
from typing import Protocol

from msgspec import Struct

from sds_agent import __version__
from sds_agent.ca.counts import CaCounts
from sds_agent.ca.status import AuditStatus, CaStatus, WorkerStatus, certificates, counted, lacks
from sds_agent.clock import Beginning
from sds_agent.signing.signing_set import SigningSet

NO_WORKER = "no worker runs at present: the server's log says why"


class Working(Protocol):
    """What is kept of the requests."""

    @property
    def in_work(self) -> int:
        """Requests that are being answered."""
        ...

    @property
    def counts(self) -> CaCounts:
        """What it answered."""
        ...


class Audited(Protocol):
    """The audit log."""

    @property
    def status(self) -> AuditStatus:
        """How far it is behind."""
        ...


class Connected(Protocol):
    """The acceptor."""

    @property
    def connections(self) -> int:
        """How many are open."""
        ...


class RunningCa(Struct, frozen=True, kw_only=True):
    """The CA server's parts."""

    beginning: Beginning
    trust_domain: str
    address: str
    current: Callable[[], SigningSet]
    ledger: Working
    audit: Audited
    acceptor: Connected
    workers: Callable[[], tuple[WorkerStatus, ...]] | None = None

    def status(self, now: datetime) -> CaStatus:
        """Everything that can be seen at `now`."""
        signing = self.current()
        workers = None if self.workers is None else self.workers()
        missing = (*lacks(signing, now), *(() if workers is None or workers else (NO_WORKER,)))
        return CaStatus(
            at=now,
            version=__version__,
            pid=os.getpid(),
            started_at=self.beginning.at,
            uptime_seconds=round(self.beginning.passed, 3),
            trust_domain=self.trust_domain,
            address=self.address,
            ready=not missing,
            lacks=missing,
            signing=certificates(signing),
            audit=self.audit.status,
            connections=self.acceptor.connections,
            in_work=self.ledger.in_work,
            counts=counted(self.ledger.counts),
            workers=workers or (),
        )
