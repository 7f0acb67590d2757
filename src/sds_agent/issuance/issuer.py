"""The loop that keeps one workload's certificate fresh. What to do is decided in `schedule`, what to accept in
`acceptance`.
"""

import asyncio
import logging
import random
import secrets
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from msgspec import Struct, structs

from sds_agent import log
from sds_agent.authority.keymaking import new_key
from sds_agent.authority.protocol import Authority, AuthorityError, CurrentIdentity, ErrorKind, IssueRequest
from sds_agent.clock import LONGEST_SLEEP, Clock, until
from sds_agent.identity.spiffe import SpiffeId
from sds_agent.issuance.acceptance import Accepted, accept
from sds_agent.issuance.gate import Gate, Rank
from sds_agent.issuance.kept import Keeper, KeepError, KeptCertificate
from sds_agent.issuance.schedule import Ask, Failure, Held, Renewal, decide, failed
from sds_agent.issuance.trust import Trust
from sds_agent.pki.certificates import serial_hex, unique, write_pem
from sds_agent.pki.csr import make_csr
from sds_agent.pki.keys import KeyType, PrivateKey, to_pkcs8_pem
from sds_agent.secrets.model import CertificateSecret
from sds_agent.secrets.store import SecretStore
from sds_agent.values import Sensitive

LOG = logging.getLogger(__name__)

DEADLINE = 10.0
"""Seconds that an attempt may take before it counts as failed."""


class Workload(Struct, frozen=True):
    """An identity to keep: `names` are the resource names it is served under, `authority` the name of its CA."""

    name: str
    identity: SpiffeId
    key_type: KeyType
    ttl: timedelta
    authority: str
    names: tuple[str, ...]


class _Draft(Sensitive, frozen=True):
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
        gate: Gate,
        clock: Clock,
        renewal: Renewal | None = None,
        keeper: Keeper | None = None,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._workload = workload
        self._authority = authority
        self._store = store
        self._trust = trust
        self._gate = gate
        self._clock = clock
        self._renewal = renewal or Renewal()
        self._keeper = keeper
        self._chance = chance
        self._held: Held | None = None
        self._current: CurrentIdentity | None = None
        self._failure: Failure | None = None
        self._draft: _Draft | None = None

    async def run(self) -> None:
        """Keep the certificate fresh for ever."""
        async with asyncio.TaskGroup() as tasks:
            self._restore(tasks)
            while True:
                decision = decide(self._clock.now(), self._held, self._failure, self._renewal)
                if isinstance(decision, Ask):
                    await self._attempt(tasks)
                else:
                    await until(self._clock, decision.until)

    async def _attempt(self, tasks: asyncio.TaskGroup) -> None:
        async with self._gate.place(self._rank):
            started = self._clock.now()
            try:
                draft = await self._drafted()
                accepted = await self._ask(draft)
            except AuthorityError as error:
                self._fail(error)
                return
        event = "issued" if self._held is None else "renewed"
        held, secret = self._serve(draft.key, accepted, self._clock.now())
        self._report(event, accepted, held, started)
        tasks.create_task(self._offer_while_valid(held, secret))
        await self._keep(accepted, held, secret)

    def _restore(self, tasks: asyncio.TaskGroup) -> None:
        """Serve what an agent before this one kept, if it is still as good as on the day it came."""
        workload = self._workload
        try:
            kept = self._keeper.load(workload.identity) if self._keeper else None
            if kept is None:
                return
            key = kept.key
            accepted = accept(
                kept.issuance,
                identity=workload.identity,
                public_key=key.public_key(),
                anchors=(),
                now=self._clock.now(),
            )
        except (KeepError, AuthorityError) as error:
            log.event(LOG, "not_restored", level=logging.WARNING, workload=workload.name, cause=str(error))
            return
        # another workload's may have come later and with newer anchors: each needs its own until the CA is asked
        anchors = unique((*self._trust.of(workload.authority), *accepted.anchors))
        held, secret = self._serve(key, structs.replace(accepted, anchors=anchors), kept.issued)
        renew_at = held.renew_at(self._renewal)
        log.event(
            LOG, "restored", workload=workload.name, serial=held.serial, not_after=held.not_after, renew_at=renew_at
        )
        tasks.create_task(self._offer_while_valid(held, secret))

    async def _keep(self, accepted: Accepted, held: Held, secret: CertificateSecret) -> None:
        if self._keeper is None:
            return
        from anyio import to_thread  # noqa: PLC0415 - only where certificates are kept

        kept = KeptCertificate(
            str(self._workload.identity),
            held.issued_at.timestamp(),
            secret.chain_pem.decode(),
            write_pem(accepted.anchors).decode(),
            secret.private_key_pem.decode(),
        )
        try:
            await to_thread.run_sync(self._keeper.save, kept)
        except KeepError as error:
            log.event(LOG, "not_kept", level=logging.ERROR, workload=self._workload.name, cause=str(error))

    def _rank(self) -> Rank:
        expiry = datetime.min.replace(tzinfo=UTC) if self._held is None else self._held.not_after
        return (not self._store.awaited(self._workload.names), expiry)

    async def _drafted(self) -> _Draft:
        if self._draft is None:
            key = await new_key(self._workload.key_type)
            csr = make_csr(key, str(self._workload.identity))
            self._draft = _Draft(key, csr, secrets.token_hex(16))
        return self._draft

    async def _ask(self, draft: _Draft) -> Accepted:
        workload = self._workload
        request = IssueRequest(workload.identity, draft.csr_pem, workload.ttl, draft.request_id, self._current)
        try:
            async with asyncio.timeout(DEADLINE):
                answer = await self._authority.issue(request)
        except TimeoutError as error:
            raise AuthorityError(ErrorKind.TRANSIENT, f"the CA did not answer within {DEADLINE:.0f} s") from error
        except AuthorityError:
            raise
        except Exception as error:
            LOG.exception("adapter_fault")
            message = (
                f"the adapter of authority {workload.authority!r} failed with {type(error).__name__}; please report it"
            )
            raise AuthorityError(ErrorKind.INVALID, message) from error
        return accept(
            answer,
            identity=workload.identity,
            public_key=draft.key.public_key(),
            anchors=self._trust.of(workload.authority),
            now=self._clock.now(),
        )

    def _serve(self, key: PrivateKey, accepted: Accepted, issued_at: datetime) -> tuple[Held, CertificateSecret]:
        leaf = accepted.leaf
        held = self._held = Held(issued_at, leaf.not_valid_before_utc, accepted.not_after, serial_hex(leaf))
        secret = CertificateSecret(write_pem(accepted.chain), to_pkcs8_pem(key), accepted.not_after)
        self._current = CurrentIdentity(secret.chain_pem, secret.private_key_pem)
        self._draft = self._failure = None
        self._trust.update(self._workload.authority, accepted.anchors)
        self._trust.rely(self._workload.authority, secret)
        # after the bundle: whoever is handed the new leaf has been handed what it chains to
        self._store.publish(dict.fromkeys(self._workload.names, secret))
        return held, secret

    def _report(self, event: str, accepted: Accepted, held: Held, started: datetime) -> None:
        for warning in accepted.warnings:
            log.event(LOG, "ca_warning", level=logging.WARNING, workload=self._workload.name, warning=warning)
        log.event(
            LOG,
            event,
            workload=self._workload.name,
            spiffe_id=str(self._workload.identity),
            authority=self._workload.authority,
            serial=held.serial,
            not_after=held.not_after,
            renew_at=held.renew_at(self._renewal),
            took_ms=round((held.issued_at - started).total_seconds() * 1000, 1),
        )

    def _fail(self, error: AuthorityError) -> None:
        now = self._clock.now()
        self._failure = failed(
            now,
            error.kind,
            before=self._failure,
            held=self._held,
            retry_after=error.retry_after,
            chance=self._chance(),
        )
        if error.kind.refused:
            self._draft = None
        held = self._held
        urgent = error.kind.refused or held is None or held.alarming(now)
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
            serving="nothing" if held is None or held.expired(now) else "the certificate held",
            expires=held.not_after if held else None,
        )

    async def _offer_while_valid(self, held: Held, secret: CertificateSecret) -> None:
        """Withhold the secret once it has expired, and offer it again if the clock that said so is set back.

        What it chains to is trusted until then, renewed or not: others may have it in use for a while yet.
        """
        name, names, authority = self._workload.name, self._workload.names, self._workload.authority
        while self._held is held:
            now = self._clock.now()
            if not held.expired(now):
                if self._store.publish(dict.fromkeys(names, secret)):
                    log.event(LOG, "valid_again", level=logging.WARNING, workload=name, not_after=held.not_after)
                await until(self._clock, held.not_after)
            else:
                self._trust.release(authority, secret)
                if self._store.withhold(names):
                    log.event(LOG, "expired", level=logging.ERROR, workload=name, not_after=held.not_after)
                await until(self._clock, now + timedelta(seconds=LONGEST_SLEEP))
        while not held.expired(self._clock.now()):
            await until(self._clock, held.not_after)
        self._trust.release(authority, secret)
