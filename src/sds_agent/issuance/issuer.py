"""The loop that keeps one workload's certificate fresh: it does what `schedule` decides, and nothing else.

An attempt at the CA is a task beside the loop. The loop waits for its end or for the moment that `decide` names,
whichever comes first: a CA that hangs delays neither the publication nor the end of a certificate. The task only
returns its outcome; the loop changes the state, so that it changes in one place.
"""

import asyncio
import logging
import random
from collections.abc import Callable
from datetime import UTC, datetime

from msgspec import Struct

from sds_agent import log
from sds_agent.authority.protocol import Authority, AuthorityError, Supplier
from sds_agent.clock import Clock, until
from sds_agent.issuance.cache import WorkloadCache
from sds_agent.issuance.publication import Publication, PublicationTarget
from sds_agent.issuance.queue import IssuanceQueue, Priority
from sds_agent.issuance.requester import Obtained, Receiver, Requester
from sds_agent.issuance.schedule import (
    Ask,
    Failure,
    IssuanceState,
    OfferAgain,
    Publish,
    Release,
    Wait,
    Withhold,
    decide,
    failed,
)
from sds_agent.issuance.status import AttemptStage, WorkloadStatus
from sds_agent.issuance.workload import Certificate, Workload, secret_of

LOG = logging.getLogger(__name__)


class Upstream(Struct, frozen=True):
    """A CA and the queue for it. Each CA has a queue of its own, so that one that hangs delays no other."""

    authority: Authority | Supplier
    queue: IssuanceQueue


class Issuer:
    """Obtains, serves and renews one workload's certificate. `randomness` returns a float uniform in [0, 1)."""

    def __init__(
        self,
        workload: Workload,
        upstream: Upstream,
        target: PublicationTarget,
        *,
        clock: Clock,
        cache: WorkloadCache | None = None,
        randomness: Callable[[], float] = random.random,
    ) -> None:
        self._workload = workload
        self._queue = upstream.queue
        self._store = target.store
        self._trust = target.trust
        self._clock = clock
        self._cache = cache
        self._randomness = randomness
        self._supplied = isinstance(upstream.authority, Supplier)
        self._answered_at: datetime | None = None
        self._requester: Requester | Receiver = (
            Receiver(workload, upstream.authority, target.trust, clock)
            if isinstance(upstream.authority, Supplier)
            else Requester(workload, upstream.authority, target.trust, clock)
        )
        self._publication = Publication(workload, target, clock)
        self._failure: Failure | None = None
        self._attempt: asyncio.Task[Obtained | AuthorityError] | None = None
        self._stage: AttemptStage = "queued"

    @property
    def status(self) -> WorkloadStatus:
        """What can be seen of the workload now."""
        attempt = None if self._attempt is None else self._stage
        return self._publication.status(self._failure, attempt, supplied=self._supplied)

    async def run(self) -> None:
        """Run until cancelled; a certificate that is being cached is written first, for at most the disk's timeout."""
        async with asyncio.TaskGroup() as tasks:
            self._restore()
            try:
                while True:
                    self._apply_outcome(tasks)
                    await self._act(tasks)
            finally:
                await self._end(tasks)

    async def _act(self, tasks: asyncio.TaskGroup) -> None:
        """Take the one action that is due, or wait for the next."""
        match decide(self._clock.now(), self._state, self._workload.renewal):
            case Ask():
                self._begin(tasks)
            case Publish(index=index):
                self._publish(index, tasks)
            case Withhold():
                self._publication.withhold()
            case OfferAgain():
                self._publication.offer_again()
            case Release(index=index):
                self._publication.release(index)
            case Wait(until=time):
                await self._wait(time, tasks)

    @property
    def _state(self) -> IssuanceState:
        return self._publication.state(
            self._failure,
            asking=self._attempt is not None,
            supplied=self._supplied,
            answered_at=self._answered_at,
        )

    def _begin(self, tasks: asyncio.TaskGroup) -> None:
        self._stage = "waiting" if self._supplied else "queued"
        self._attempt = tasks.create_task(self._outcome() if self._supplied else self._ask())

    async def _wait(self, time: datetime, tasks: asyncio.TaskGroup) -> None:
        """Return at that time, or when the wall clock is found set back, or when the attempt under way ends."""
        if self._attempt is None:
            await until(self._clock, time)
            return
        sleep = tasks.create_task(until(self._clock, time))
        await asyncio.wait([sleep, self._attempt], return_when=asyncio.FIRST_COMPLETED)
        sleep.cancel()
        await asyncio.wait([sleep])

    async def _end(self, tasks: asyncio.TaskGroup) -> None:
        """Cancel the attempt under way. A certificate that it has just obtained is cached, and so is what was begun."""
        if self._attempt is not None and not self._attempt.cancel():
            self._apply_outcome(tasks)
        if self._cache is not None:
            await self._cache.saved()

    async def _ask(self) -> Obtained | AuthorityError:
        async with self._queue.slot(self._priority):
            self._stage = "asking"
            return await self._outcome()

    async def _outcome(self) -> Obtained | AuthorityError:
        try:
            return await self._requester.ask(self._publication.identity)
        except AuthorityError as error:
            return error

    def _priority(self) -> Priority:
        served = self._publication.certificates.served
        expiry = datetime.min.replace(tzinfo=UTC) if served is None else self._publication.leaf(served).not_after
        return (not self._store.awaited(self._workload.names), expiry)

    def _apply_outcome(self, tasks: asyncio.TaskGroup) -> None:
        """Apply the outcome of the attempt if it has ended. A bug in it ends the task group, and with it this loop."""
        attempt = self._attempt
        if attempt is None or not attempt.done() or attempt.cancelled() or attempt.exception() is not None:
            return
        self._attempt = None
        match attempt.result():
            case AuthorityError() as error:
                self._fail(error)
            case obtained:
                self._receive(obtained, tasks)

    def _receive(self, obtained: Obtained, tasks: asyncio.TaskGroup) -> None:
        self._answered_at = obtained.issued_at
        if self._supplied and (confirmed := self._publication.confirm(obtained.accepted)) is not None:
            self._failure = None
            self._save(confirmed, tasks)  # its anchors may be others
            return
        certificate = Certificate(
            "issued" if self._publication.certificates.served is None else "renewed",
            obtained.accepted,
            secret_of(obtained.accepted, obtained.key),
            obtained.asked_at,
            obtained.issued_at,
        )
        self._add(certificate)
        if self._publish_at is None or not self._publication.serving:
            # even one that has to wait: it may have cost a join token, and there is no other to cache
            self._save(certificate, tasks)

    def _restore(self) -> None:
        """Begin with the certificate that an earlier process cached."""
        if self._cache is None:
            return
        anchors = self._trust.anchors_of(self._workload.authority)
        if (certificate := self._cache.restore(anchors, self._clock.now())) is not None:
            self._add(certificate)

    def _add(self, certificate: Certificate) -> None:
        self._failure = None
        self._publication.add(certificate)
        for warning in certificate.accepted.warnings:
            log.event(LOG, "ca_warning", level=logging.WARNING, workload=self._workload.name, warning=warning)
        if (publish_at := self._publish_at) is None:
            return
        log.event(
            LOG,
            "held_back",
            level=logging.WARNING if certificate.accepted.not_before > self._clock.now() else logging.INFO,
            workload=self._workload.name,
            serial=certificate.serial,
            not_before=certificate.accepted.not_before,
            publish_at=publish_at,
            serving="the certificate before it" if self._publication.serving else "nothing",
        )

    @property
    def _publish_at(self) -> datetime | None:
        """When the newest certificate is to be published; None if that is now."""
        now, state = self._clock.now(), self._state
        publish_at = state.publish_at(now).get(len(state.coming) - 1, now)
        return publish_at if publish_at > now else None

    def _publish(self, index: int, tasks: asyncio.TaskGroup) -> None:
        certificate = self._publication.publish(index)
        self._report(certificate)
        self._save(certificate, tasks)

    def _save(self, certificate: Certificate, tasks: asyncio.TaskGroup) -> None:
        if self._cache is not None:
            self._cache.save(certificate, tasks)

    def _report(self, certificate: Certificate) -> None:
        workload, leaf = self._workload, self._publication.leaf(certificate)
        new = certificate.origin != "restored"
        took = certificate.issued_at - certificate.asked_at
        log.event(
            LOG,
            certificate.origin,
            workload=workload.name,
            spiffe_id=str(workload.identity) if new else None,
            authority=workload.authority if new else None,
            serial=leaf.serial,
            not_after=leaf.not_after,
            renew_at=None if self._supplied else leaf.renew_at(workload.renewal),
            took_ms=round(took.total_seconds() * 1000, 1) if new and not self._supplied else None,
        )

    def _fail(self, error: AuthorityError) -> None:
        now, served = self._clock.now(), self._state.served
        self._failure = failed(
            now,
            error.kind,
            before=self._failure,
            served=served,
            ttl=self._workload.ttl,
            retry_after=error.retry_after,
            randomness=self._randomness(),
            supplied=self._supplied,
        )
        urgent = error.kind.refused or served is None or served.alarming(now)
        log.event(
            LOG,
            "retrying",
            level=logging.ERROR if urgent else logging.WARNING,
            workload=self._workload.name,
            authority=self._workload.authority,
            kind=error.kind.value,
            cause=str(error),
            attempt=self._failure.count,
            in_seconds=self._failure.delay,
            serving="nothing" if served is None or served.expired(now) else "the current certificate",
            expires=served.not_after if served else None,
        )
