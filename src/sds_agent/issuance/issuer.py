"""The loop that keeps one workload's certificate fresh: it does what `schedule` decides, and nothing else.

An attempt at the CA is a task beside the loop. The loop waits for its end or for the moment that `decide` names,
whichever comes first: a CA that hangs delays neither the publication nor the end of a certificate. The task only
returns its outcome; the loop changes the state, so that it changes in one place.
"""

import asyncio
import logging
import os
import random
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import UTC, datetime, timedelta
from itertools import product
from typing import Any

from msgspec import structs

from sds_agent import log
from sds_agent.authority.protocol import AuthorityError
from sds_agent.clock import Clock, Waker
from sds_agent.issuance.acceptance import Accepted
from sds_agent.issuance.attempts import AttemptRecord
from sds_agent.issuance.cache import WorkloadCache
from sds_agent.issuance.counts import IssuanceCounts
from sds_agent.issuance.failover import DEFAULT_POLICY, Failover, FailoverPolicy, Turn
from sds_agent.issuance.publication import Publication, PublicationTarget
from sds_agent.issuance.queue import Priority
from sds_agent.issuance.requester import Obtained
from sds_agent.issuance.schedule import (
    Ask,
    CurrentLeaf,
    Failure,
    IssuanceState,
    OfferAgain,
    Publish,
    Release,
    Succession,
    Wait,
    Withhold,
    decide,
    due_at,
    failed,
)
from sds_agent.issuance.source import Attempt, IssuanceSource, RunningAttempt, Upstream
from sds_agent.issuance.standing import authority_statuses, failure_status
from sds_agent.issuance.status import AttemptStage, CertificateEnd, WorkloadStatus
from sds_agent.issuance.workload import Certificate, Workload, certificate_of, secret_of
from sds_agent.secrets.model import CertificateSecret
from sds_agent.secrets.readiness import acknowledged

LOG = logging.getLogger(__name__)
_BEFORE_ALL = datetime.min.replace(tzinfo=UTC)


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
        fallbacks: Sequence[Upstream] = (),
        policy: FailoverPolicy = DEFAULT_POLICY,
        counts: IssuanceCounts | None = None,
    ) -> None:
        self._workload = workload
        self._store = target.store
        self._trust = target.trust
        self._clock = clock
        self._cache = cache
        self._randomness = randomness
        self._sources = tuple(
            IssuanceSource(workload, name, each, target.trust, clock)
            for name, each in zip(workload.authorities, (upstream, *fallbacks), strict=True)
        )
        self._failover = Failover.over(len(self._sources), policy, randomness())
        self._counts = counts or IssuanceCounts()
        self._attempt_watchers: list[Callable[[AttemptRecord], None]] = []
        # the authority of the attempt under way, or of the last, and when that began
        self._asked, self._began, self._passed = 0, clock.now(), clock.passed()
        self._publication = Publication(
            workload, target, clock, tuple(each.name for each in self._sources if each.supplied)
        )
        self._failure: Failure | None = None
        self._error: AuthorityError | None = None
        self._attempt: RunningAttempt | None = None
        self._waker = Waker()
        self._stage: AttemptStage = "queued"
        self._attempt_id = ""
        self._has_begun = False

    @property
    def status(self) -> WorkloadStatus:
        """What can be seen of the workload now."""
        return structs.replace(
            self._publication.status,
            authority=self._sources[self._failover.in_use].name,
            attempt=None if self._attempt is None else self._stage,
            failure=None if self._failure is None else failure_status(self._failure, self._error),
            authorities=authority_statuses(
                {each.name: each.error for each in self._sources}, self._failover, self._clock.now()
            ),
        )

    def valid(self, now: datetime) -> bool:
        """Whether Envoys take at `now` what was published last, as `LeafStatus.valid` has it."""
        served = self._publication.certificates.served
        return served is not None and self._publication.leaf(served).valid(now)

    @property
    def renew_at(self) -> datetime | None:
        """When the next certificate is due, as `WorkloadStatus.renew_at` has it."""
        return self._publication.renew_at

    @property
    def serial(self) -> str | None:
        """The serial number of the leaf that Envoys are given now, in hexadecimal; None while they are given none."""
        given = self._publication.given
        return None if given is None else given.serial

    @property
    def ends(self) -> tuple[CurrentLeaf, tuple[CertificateEnd, ...]] | None:
        """The times of that leaf, and its intermediates; None while Envoys are given none."""
        given = self._publication.given
        return None if given is None else self._publication.ends(given)

    @property
    def secret(self) -> CertificateSecret | None:
        """What is served now."""
        given = self._publication.given
        return None if given is None else given.secret

    @property
    def certificates(self) -> Succession[Certificate]:
        """What it has obtained: for the one that takes over."""
        return self._publication.certificates

    @property
    def sources(self) -> tuple[IssuanceSource, ...]:
        """Its authorities, in order: for the one that takes over."""
        return self._sources

    def take_over(self, before: "Issuer", cas: Mapping[str, str]) -> None:
        """Go on with what an issuer for the same identity had, which has ended. `cas` are its CAs, as `Workload.cas`.

        To be called before `run`, which then restores nothing. A request without an answer is repeated: it may have
        been approved, or be what a token of one use was spent on.
        """
        for each, other in product(self._sources, before.sources):
            each.take_over(other)
        self._publication.take_over(before.certificates, cas)
        before.forget()
        ours = self._publication.certificates
        newest = ours.coming[-1] if ours.coming else ours.served
        if newest is not None:
            index = self._workload.authorities.index(newest.authority)
            self._failover = self._failover.issued(index, self._clock.now())
        self._has_begun = True

    @property
    def has_begun(self) -> bool:
        """Whether it has looked for a cached certificate, or taken over what another one had."""
        return self._has_begun

    def leave(self) -> None:
        """Its workload is not configured any more, and it has ended: what was served is trusted until it ends."""
        self._publication.leave()
        self.forget()

    def forget(self) -> None:
        """It has ended, and keeps no key any more. One that was there at the start stays in memory when nobody knows
        it: Python looks for no cycles there (`app`).
        """
        self._cache = self._attempt = None
        self._publication.forget()
        for each in self._sources:
            each.forget()

    @property
    def last_error(self) -> AuthorityError | None:
        """Why the last attempt failed, with the CA's own words; None if none has."""
        return self._error

    def watch_attempts(self, watcher: Callable[[AttemptRecord], None]) -> None:
        """Call `watcher` after each attempt at a CA that gave a certificate or failed. It must not wait or raise."""
        self._attempt_watchers.append(watcher)

    async def run(self) -> None:
        """Run until cancelled; a certificate that is being cached is written first, unless the disk is late."""
        async with asyncio.TaskGroup() as tasks:
            self._restore()
            try:
                while True:
                    self._apply_outcome(tasks)
                    if (time := self._act(tasks)) is not None:
                        await self._wait(time, tasks)
            finally:
                await self._end(tasks)

    def _act(self, tasks: asyncio.TaskGroup) -> datetime | None:
        """Take the one action that is due; returns until when to wait where none is."""
        now = self._clock.now()
        state, turn = self._state(now)
        match decide(now, state, self._workload.renewal):
            case Ask():
                self._begin(turn.index, state, tasks)
            case Publish(index=index):
                self._publish(index, tasks)
            case Withhold():
                self._publication.withhold()
            case OfferAgain():
                self._publication.offer_again()
            case Release(index=index):
                self._publication.release(index)
            case Wait(until=time):
                return time
        return None

    def _state(self, now: datetime) -> tuple[IssuanceState, Turn]:
        """What `decide` needs, about the authority whose turn it is."""
        state = self._publication.state
        # which of several authorities is asked depends on when the certificate is due
        due = now if len(self._sources) == 1 else due_at(now, state, self._workload.renewal)
        turn = self._failover.turn(now, due, _served(state))
        source = self._sources[turn.index]
        attempts = structs.replace(
            state,
            failure=turn.failure,
            asking=self._attempt is not None,
            supplied=source.supplied,
            answered_at=source.answered_at,
            ask_at=turn.ask_at,
            choose_at=turn.until,
        )
        return attempts, turn

    def _begin(self, index: int, state: IssuanceState, tasks: asyncio.TaskGroup) -> None:
        source, served = self._sources[index], _served(state)
        self._asked, self._began, self._passed = index, self._clock.now(), self._clock.passed()
        if self._failover.tried[index].failure is not None:
            self._counts.retries.add(source.name)
        self._stage = "waiting" if source.supplied else "queued"
        self._attempt_id = os.urandom(4).hex()
        attempt = Attempt(
            self._publication.identity(source.name),
            self._priority,
            self._store,
            self._workload.names,
            self._asking,
            self._failover.patience(index, self._began, served, waits=source.supplied),
            None if served is None or index == self._failover.in_use else served.not_after,
        )
        with self._lines():
            log.event(LOG, "asking", level=logging.DEBUG, workload=self._workload.name, authority=source.name)
            self._attempt = source.begin(attempt, tasks, self._wake)

    def _lines(self) -> AbstractContextManager[None]:
        """Every line of the log in this context is one of the attempt under way, or of the last."""
        return log.each_with(attempt_id=self._attempt_id)

    def _asking(self) -> None:
        self._stage = "asking"

    def _wait(self, time: datetime, tasks: asyncio.TaskGroup) -> Coroutine[Any, Any, None]:
        """Return at that time, or when the wall clock is found set back, or when the attempt under way ends, or when
        Envoys have acknowledged the bundle that a certificate waits for.
        """
        if self._attempt is None and not self._publication.holding:
            return self._clock.until(time)
        return self._wait_for_end(time, tasks)

    async def _wait_for_end(self, time: datetime, tasks: asyncio.TaskGroup) -> None:
        await asyncio.sleep(0)  # a CA in this process may answer in the next turn of the loop
        if self._attempt is not None and self._attempt.done:
            return
        acknowledged = tasks.create_task(self._acknowledged()) if self._publication.holding else None
        try:
            await self._clock.until(time, self._waker)
        finally:
            if acknowledged is not None:
                acknowledged.cancel()
        if acknowledged is not None:
            await asyncio.wait([acknowledged])

    def _wake(self) -> None:
        """Something has ended that `_wait` waits for."""
        self._waker.wake()

    async def _acknowledged(self) -> None:
        await acknowledged(self._store, self._trust.names)
        self._publication.acknowledged()
        self._wake()

    async def _end(self, tasks: asyncio.TaskGroup) -> None:
        """Cancel the attempt under way. A certificate that it has just obtained is cached, and so is what was begun."""
        if self._attempt is not None and not self._attempt.cancel():
            self._apply_outcome(tasks)
        if self._cache is not None:
            await self._cache.saved()

    def _priority(self) -> Priority:
        served = self._publication.certificates.served
        expiry = _BEFORE_ALL if served is None else self._publication.leaf(served).not_after
        awaited, hung = self._store.awaited(self._workload.names), self._sources[self._asked].hung
        return (not awaited) + 2 * hung, expiry

    def _apply_outcome(self, tasks: asyncio.TaskGroup) -> None:
        """Apply the outcome of the attempt if it has ended. A bug in it ends the task group, and with it this loop."""
        attempt = self._attempt
        if attempt is None or (outcome := attempt.result) is None:
            return
        self._attempt = None
        with self._lines():
            match outcome:
                case AuthorityError() as error:
                    self._fail(error)
                case obtained:
                    self._receive(obtained, tasks)

    def _receive(self, obtained: Obtained, tasks: asyncio.TaskGroup) -> None:
        source = self._sources[self._asked]
        self._log_change(source)
        self._failure = None
        self._failover = self._failover.issued(self._asked, self._clock.now())
        if source.supplied and (confirmed := self._publication.confirm(source.name, obtained.accepted)) is not None:
            self._save(confirmed, tasks)  # its anchors may be others
            return
        certificate = certificate_of(
            "issued" if self._publication.certificates.served is None else "renewed",
            obtained.accepted,
            secret_of(obtained.accepted, obtained.key),
            issued_at=obtained.issued_at,
            took=obtained.took,
            authority=source.name,
            held_until=self._publication.hold_until(obtained.accepted),
            attempt_id=self._attempt_id,
        )
        if not source.supplied:
            certificate = self._publication.placed(certificate)
        took = None if source.supplied else certificate.took
        self._counts.succeeded(source.name, "issued" if certificate.origin == "issued" else "renewed", took)
        self._tell(source, certificate.origin)
        publish_at = self._add(certificate, obtained.accepted)
        if publish_at is None or not self._publication.serving:
            # even one that has to wait: it may have cost a join token, and there is no other to cache
            self._save(certificate, tasks)

    def _log_change(self, source: IssuanceSource) -> None:
        """Log that this authority has issued, where another one was in use."""
        before = self._sources[self._failover.in_use]
        if before is source:
            return
        why = f"{source.name} issues again"
        if (failure := self._failover.tried[self._failover.in_use].failure) is not None:
            attempts = "the last attempt" if failure.count == 1 else f"{failure.count} attempts in a row"
            why = f"{attempts} at {before.name} failed ({failure.kind.value}): {before.error}"
        change = {"from": before.name, "to": source.name, "why": why}
        back = self._asked < self._failover.in_use
        level = logging.INFO if back else logging.WARNING
        log.event(LOG, "authority_changed", level=level, workload=self._workload.name, **change)

    def _restore(self) -> None:
        """Begin with the certificate that an earlier process cached."""
        has_begun, self._has_begun = self._has_begun, True
        if self._cache is None or has_begun:
            return
        if (restored := self._cache.restore(self._clock.now())) is not None:
            certificate, accepted = restored
            index = self._workload.authorities.index(certificate.authority)
            self._failover = self._failover.issued(index, self._clock.now())
            self._add(certificate, accepted)

    def _add(self, certificate: Certificate, accepted: Accepted) -> datetime | None:
        """Add it to what is to be published; returns when, or None if that is now."""
        self._publication.add(certificate, accepted)
        for warning in accepted.warnings:
            log.event(LOG, "ca_warning", level=logging.WARNING, workload=self._workload.name, warning=warning)
        if (publish_at := self._publish_at) is None:
            return None
        ahead = accepted.not_before > self._clock.now()
        new_anchor = certificate.held_until is not None and not ahead
        log.event(
            LOG,
            "held_back",
            level=logging.WARNING if ahead else logging.INFO,
            workload=self._workload.name,
            cause="Envoys load its new trust anchor first" if new_anchor else "peers' clocks may be behind",
            serial=certificate.serial,
            not_before=accepted.not_before,
            publish_at=publish_at,
            serving="the certificate before it" if self._publication.serving else "nothing",
        )
        return publish_at

    @property
    def _publish_at(self) -> datetime | None:
        """When the newest certificate is to be published; None if that is now."""
        now, state = self._clock.now(), self._publication.state
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
        supplied = self._sources[workload.authorities.index(certificate.authority)].supplied
        log.event(
            LOG,
            certificate.origin,
            workload=workload.name,
            spiffe_id=str(workload.identity),
            authority=None if certificate.foreign else certificate.authority,
            serial=leaf.serial,
            not_after=leaf.not_after,
            renew_at=None if supplied else leaf.renew_at(workload.renewal),
            took_ms=round(certificate.took.total_seconds() * 1000, 1) if new and not supplied else None,
            attempt_id=certificate.attempt_id or None,
        )

    def _fail(self, error: AuthorityError) -> None:
        self._error = error
        now, served = self._clock.now(), self._publication.state.served
        source = self._sources[self._asked]
        self._counts.failed(source.name, error.kind)
        self._failure = failed(
            now,
            error.kind,
            before=self._failover.tried[self._asked].failure,
            served=served,
            ttl=self._workload.ttl,
            retry_after=error.retry_after,
            randomness=self._randomness(),
            supplied=source.supplied,
        )
        self._failover = self._failover.failed(self._asked, self._failure, self._began)
        urgent = error.kind.refused or served is None or served.alarming(now)
        log.event(
            LOG,
            "retrying",
            level=logging.ERROR if urgent else logging.WARNING,
            workload=self._workload.name,
            authority=source.name,
            kind=error.kind.value,
            cause=str(error),
            attempt=self._failure.count,
            in_seconds=self._failure.delay,
            serving="nothing" if served is None or served.expired(now) else "the current certificate",
            expires=served.not_after if served else None,
        )
        self._tell(source, error.kind.value)

    def _tell(self, source: IssuanceSource, result: str) -> None:
        """Tell those who watch how the attempt ended."""
        now, took = self._clock.now(), timedelta(seconds=self._clock.passed() - self._passed)
        began = now if source.supplied else now - took
        for watcher in self._attempt_watchers:
            watcher(AttemptRecord(self._workload.name, source.name, began, now, result, self._attempt_id))


def _served(state: IssuanceState) -> CurrentLeaf | None:
    return None if state.withheld else state.served
