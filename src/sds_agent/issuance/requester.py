"""One attempt at a workload's CA: the key and the CSR, the call, and the check of the answer.

Every way in which an attempt can fail, an adapter's bug included, becomes an AuthorityError; `schedule` decides from
its kind when to ask again.
"""

import asyncio
import logging
import secrets
from datetime import datetime

from sds_agent import log
from sds_agent.authority.protocol import (
    Authority,
    AuthorityError,
    CurrentIdentity,
    ErrorKind,
    Issuance,
    IssueRequest,
)
from sds_agent.clock import Clock
from sds_agent.issuance.acceptance import Accepted, accept
from sds_agent.issuance.trust import Trust
from sds_agent.issuance.workload import Workload
from sds_agent.pki.csr import make_csr
from sds_agent.pki.keys import PrivateKey, generate
from sds_agent.tasks import NoThreadError, in_thread
from sds_agent.values import Sensitive

LOG = logging.getLogger(__name__)

CA_TIMEOUT = 10.0
"""Seconds that a CA may take to answer."""


class PendingRequest(Sensitive, frozen=True):
    """A request that is repeated until the CA answers: one that waits for an approval has to see the same CSR again."""

    key: PrivateKey
    csr_pem: bytes
    request_id: str


class Obtained(Sensitive, frozen=True):
    """An accepted certificate with its key. The CA was asked at `asked_at` and answered at `issued_at`."""

    accepted: Accepted
    key: PrivateKey
    asked_at: datetime
    issued_at: datetime


class Requester:
    """Asks one workload's CA, one attempt at a time."""

    def __init__(self, workload: Workload, authority: Authority, trust: Trust, clock: Clock) -> None:
        self._workload = workload
        self._authority = authority
        self._trust = trust
        self._clock = clock
        self._pending: PendingRequest | None = None

    async def ask(self, current: CurrentIdentity | None) -> Obtained:
        """Ask the CA once. `current` authenticates the request where the CA renews over mTLS. Raises AuthorityError."""
        asked_at = self._clock.now()
        try:
            pending = await self._request()
            answer = await self._call(pending, current)
            accepted = self._accept(answer, pending)
        except AuthorityError as error:
            if error.kind.refused:
                self._pending = None
            raise
        self._pending = None
        return Obtained(accepted, pending.key, asked_at, self._clock.now())

    async def _request(self) -> PendingRequest:
        if self._pending is None:
            try:
                kind = self._workload.key_type
                key = await in_thread(generate, kind) if kind.slow else generate(kind)
            except NoThreadError as error:
                raise AuthorityError(ErrorKind.TRANSIENT, f"the private key cannot be made: {error}") from error
            csr = make_csr(key, str(self._workload.identity))
            self._pending = PendingRequest(key, csr, secrets.token_hex(16))
        return self._pending

    async def _call(self, pending: PendingRequest, current: CurrentIdentity | None) -> Issuance:
        workload = self._workload
        request = IssueRequest(workload.identity, pending.csr_pem, workload.ttl, pending.request_id, current)
        try:
            async with asyncio.timeout(CA_TIMEOUT):
                return await self._authority.issue(request)
        except TimeoutError as error:
            raise AuthorityError(ErrorKind.TRANSIENT, f"the CA did not answer within {CA_TIMEOUT:.0f} s") from error
        except AuthorityError:
            raise
        except NoThreadError as error:
            raise AuthorityError(ErrorKind.TRANSIENT, str(error)) from error
        except (Exception, asyncio.CancelledError) as error:
            if _cancelled():
                raise
            log.fault(LOG, f"authority {workload.authority}", error)
            message = (
                f"the adapter of authority {workload.authority!r} failed with {type(error).__name__}; please report "
                "the event fault in the log"
            )
            raise AuthorityError(ErrorKind.INVALID, message) from error

    def _accept(self, answer: Issuance, pending: PendingRequest) -> Accepted:
        workload = self._workload
        return accept(
            answer,
            identity=workload.identity,
            public_key=pending.key.public_key(),
            anchors=self._trust.anchors_of(workload.authority),
            beside=self._trust.anchors_beside(workload.authority),
            now=self._clock.now(),
        )


def _cancelled() -> bool:
    """Whether this attempt is being cancelled: an adapter may raise CancelledError because of a task of its own."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0
