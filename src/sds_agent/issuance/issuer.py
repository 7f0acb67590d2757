"""The loop that keeps one workload's certificate fresh. What to do is decided in `schedule`, what to accept in
`acceptance`; `offer` has what is in hand.
"""

import asyncio
import logging
import random
import secrets
from collections.abc import Callable
from datetime import UTC, datetime

from msgspec import structs

from sds_agent import log
from sds_agent.authority.protocol import Authority, AuthorityError, ErrorKind, IssueRequest
from sds_agent.clock import Clock, until
from sds_agent.issuance.acceptance import Accepted, accept
from sds_agent.issuance.cache import CachedCertificate, CacheError, CertificateCache
from sds_agent.issuance.offer import Certificate, How, Offer, Workload, secret_of
from sds_agent.issuance.queue import IssuanceQueue, Priority
from sds_agent.issuance.schedule import Ask, Failure, Publish, Renewal, Wait, decide, failed
from sds_agent.issuance.standing import Standing
from sds_agent.issuance.trust import Trust
from sds_agent.pki.certificates import unique, write_pem
from sds_agent.pki.csr import make_csr
from sds_agent.pki.keys import PrivateKey, new_key
from sds_agent.secrets.store import SecretStore
from sds_agent.tasks import DISK_TIMEOUT, NoThreadError, TimeLimit, uninterrupted
from sds_agent.values import Sensitive

LOG = logging.getLogger(__name__)

DEADLINE = 10.0
"""Seconds that an attempt may take before it counts as failed."""


class PendingRequest(Sensitive, frozen=True):
    """A request under way: kept for retries, since a CA that wants an approval must see the same CSR again."""

    key: PrivateKey
    csr_pem: bytes
    request_id: str


class Issuer:
    """Obtains, serves and renews one workload's certificate until it is cancelled."""

    def __init__(
        self,
        workload: Workload,
        authority: Authority,
        *,
        store: SecretStore,
        trust: Trust,
        queue: IssuanceQueue,
        clock: Clock,
        renewal: Renewal | None = None,
        cache: CertificateCache | None = None,
        disk_timeout: float = DISK_TIMEOUT,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._workload = workload
        self._authority = authority
        self._store = store
        self._trust = trust
        self._queue = queue
        self._clock = clock
        self._renewal = renewal or Renewal()
        self._cache = cache
        self._disk = TimeLimit(disk_timeout)  # one that does not answer must not hold up the next renewal
        self._chance = chance
        self._offer = Offer(workload, store=store, trust=trust, clock=clock)
        self._kept: Certificate | None = None
        self._failure: Failure | None = None
        self._draft: PendingRequest | None = None

    @property
    def standing(self) -> Standing:
        """Where the workload stands."""
        return Standing(self._workload.name, self._offer.holdings, self._failure)

    async def run(self) -> None:
        """Keep the certificate fresh for ever."""
        async with asyncio.TaskGroup() as tasks:
            self._restore()
            while True:
                match decide(self._clock.now(), self._offer.holdings, self._failure, self._renewal):
                    case Ask():
                        await self._attempt()
                    case Publish(index=index):
                        await self._publish(index, tasks)
                    case Wait(until=time):
                        await until(self._clock, time)

    async def _attempt(self) -> None:
        async with self._queue.slot(self._priority):
            asked_at = self._clock.now()
            try:
                draft = await self._drafted()
                accepted = await self._ask(draft)
            except AuthorityError as error:
                self._fail(error)
                return
        how: How = "issued" if self._offer.holdings.served is None else "renewed"
        certificate = Certificate(how, accepted, secret_of(accepted, draft.key), asked_at, self._clock.now())
        self._take(certificate)
        if self._waits and not self._serving:
            # it may have cost a token that serves once, and until it is valid nothing else is worth keeping
            await self._save(certificate)

    def _take(self, certificate: Certificate) -> None:
        self._draft = self._failure = None
        self._offer.take(certificate)
        for warning in certificate.accepted.warnings:
            log.event(LOG, "ca_warning", level=logging.WARNING, workload=self._workload.name, warning=warning)
        if (publish_at := self._waits) is None:
            return
        log.event(
            LOG,
            "held_back",
            level=logging.WARNING if certificate.accepted.not_before > self._clock.now() else logging.INFO,
            workload=self._workload.name,
            serial=certificate.serial,
            not_before=certificate.accepted.not_before,
            publish_at=publish_at,
            serving="the certificate before it" if self._serving else "nothing",
        )

    @property
    def _waits(self) -> datetime | None:
        """Until when the newest certificate has to wait before it is published; None if it does not."""
        now, holdings = self._clock.now(), self._offer.holdings
        publish_at = holdings.publish_at(now).get(len(holdings.coming) - 1, now)
        return publish_at if publish_at > now else None

    async def _publish(self, index: int, tasks: asyncio.TaskGroup) -> None:
        certificate = self._offer.publish(index)
        self._report(certificate)
        tasks.create_task(self._offer.follow(certificate))
        await self._save(certificate)

    def _restore(self) -> None:
        """Take what an agent before this one kept, if it is still as good as on the day it came."""
        workload = self._workload
        if self._cache is None:
            return
        try:
            restored = self._cache.restore(workload.identity, self._clock.now())
        except CacheError as error:
            log.event(LOG, "not_restored", level=logging.WARNING, workload=workload.name, cause=str(error))
            return
        if restored is None:
            return
        # another workload's may have come later and with newer anchors: each needs its own until the CA is asked
        anchors = unique((*self._trust.of(workload.authority), *restored.accepted.anchors))
        accepted, at = structs.replace(restored.accepted, anchors=anchors), restored.issued_at
        # nothing is known of the CA of a file that an older version of the agent wrote
        foreign = restored.authority not in {"", workload.ca}
        self._kept = Certificate("restored", accepted, secret_of(accepted, restored.key), at, at, foreign)
        self._take(self._kept)

    async def _save(self, certificate: Certificate) -> None:
        if self._cache is None or certificate is self._kept:
            return
        kept = CachedCertificate(
            str(self._workload.identity),
            certificate.issued_at.timestamp(),
            certificate.secret.chain_pem.decode(),
            write_pem(certificate.accepted.anchors).decode(),
            certificate.secret.private_key_pem.decode(),
            self._workload.ca,
        )
        try:
            # to its end also when the agent stops: a write that is cut off would have to be cleared away
            await uninterrupted(self._disk.call(self._cache.save, kept))
        except (CacheError, NoThreadError, TimeoutError) as error:
            cause = f"the disk of the state directory: {error.strerror}" if isinstance(error, OSError) else str(error)
            log.event(LOG, "not_kept", level=logging.ERROR, workload=self._workload.name, cause=cause)
        else:
            self._kept = certificate

    @property
    def _serving(self) -> bool:
        """Whether an Envoy that asks is given a certificate."""
        return all(self._store.snapshot.get(name) is not None for name in self._workload.names)

    def _priority(self) -> Priority:
        served = self._offer.holdings.served
        expiry = datetime.min.replace(tzinfo=UTC) if served is None else served.not_after
        return (not self._store.awaited(self._workload.names), expiry)

    async def _drafted(self) -> PendingRequest:
        if self._draft is None:
            try:
                key = await new_key(self._workload.key_type)
            except NoThreadError as error:
                raise AuthorityError(ErrorKind.TRANSIENT, f"the private key cannot be made: {error}") from error
            csr = make_csr(key, str(self._workload.identity))
            self._draft = PendingRequest(key, csr, secrets.token_hex(16))
        return self._draft

    async def _ask(self, draft: PendingRequest) -> Accepted:
        workload = self._workload
        request = IssueRequest(workload.identity, draft.csr_pem, workload.ttl, draft.request_id, self._offer.current)
        try:
            async with asyncio.timeout(DEADLINE):
                answer = await self._authority.issue(request)
        except TimeoutError as error:
            raise AuthorityError(ErrorKind.TRANSIENT, f"the CA did not answer within {DEADLINE:.0f} s") from error
        except AuthorityError:
            raise
        except NoThreadError as error:
            raise AuthorityError(ErrorKind.TRANSIENT, str(error)) from error
        except Exception as error:
            log.fault(LOG, f"authority {workload.authority}", error)
            message = (
                f"the adapter of authority {workload.authority!r} failed with {type(error).__name__}; please report "
                "the event fault in the log"
            )
            raise AuthorityError(ErrorKind.INVALID, message) from error
        return accept(
            answer,
            identity=workload.identity,
            public_key=draft.key.public_key(),
            anchors=self._trust.of(workload.authority),
            beside=self._trust.beside(workload.authority),
            now=self._clock.now(),
        )

    def _report(self, certificate: Certificate) -> None:
        workload, held = self._workload, self._offer.held(certificate)
        new = certificate.how != "restored"
        took = certificate.issued_at - certificate.asked_at
        log.event(
            LOG,
            certificate.how,
            workload=workload.name,
            spiffe_id=str(workload.identity) if new else None,
            authority=workload.authority if new else None,
            serial=held.serial,
            not_after=held.not_after,
            renew_at=held.renew_at(self._renewal),
            took_ms=round(took.total_seconds() * 1000, 1) if new else None,
        )

    def _fail(self, error: AuthorityError) -> None:
        now, served = self._clock.now(), self._offer.holdings.served
        self._failure = failed(
            now,
            error.kind,
            before=self._failure,
            served=served,
            ttl=self._workload.ttl,
            retry_after=error.retry_after,
            chance=self._chance(),
        )
        if error.kind.refused:
            self._draft = None
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
            serving="nothing" if served is None or served.expired(now) else "the certificate held",
            expires=served.not_after if served else None,
        )
