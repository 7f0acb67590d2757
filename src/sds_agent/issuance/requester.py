"""One attempt at a workload's CA: the key and the CSR, the call, and the check of the answer. Where something else
makes the keys too, the attempt is to wait for what it gives next.

Every way in which an attempt can fail, an adapter's bug included, becomes an AuthorityError; `schedule` decides from
its kind when to ask again.
"""

import asyncio
import os
from datetime import datetime, timedelta

from sds_agent.authority.protocol import (
    Authority,
    AuthorityError,
    CertifiesKeys,
    CurrentIdentity,
    ErrorKind,
    Issuance,
    IssueRequest,
    Supplied,
    Supplier,
)
from sds_agent.clock import Clock
from sds_agent.identity.spiffe import SpiffeId
from sds_agent.issuance.acceptance import Accepted, NotYetValidError, accept
from sds_agent.issuance.adapter_calls import failures_of
from sds_agent.issuance.trust import Trust
from sds_agent.issuance.workload import Workload
from sds_agent.pki.keyfile import KeyFileError, read_private_key
from sds_agent.pki.keys import PrivateKey, generate
from sds_agent.pki.strength import IN_SECRETS
from sds_agent.pki.validation.rules import Chain
from sds_agent.tasks import NoThreadError, giving, in_thread
from sds_agent.values import Sensitive

CA_TIMEOUT = 10.0
"""Seconds that a CA may take to answer."""


class PendingRequest(Sensitive, frozen=True):
    """A request that is repeated until the CA answers: one that waits for an approval has to see the same CSR again.

    There is the key alone for a CA in this process (`CertifiesKeys`).
    """

    key: PrivateKey
    csr_pem: bytes = b""
    request_id: str = ""


class Obtained(Sensitive, frozen=True):
    """An accepted certificate with its key. The CA answered at `issued_at`, and `took` so long."""

    accepted: Accepted
    key: PrivateKey
    issued_at: datetime
    took: timedelta


class Requester:
    """Asks one CA of a workload, by its `name`, one attempt at a time. It has `timeout` seconds to answer.

    `certifying` is the CA where it signs without a CSR.
    """

    def __init__(
        self,
        workload: Workload,
        name: str,
        authority: Authority,
        trust: Trust,
        clock: Clock,
        *,
        certifying: CertifiesKeys | None = None,
        timeout: float = CA_TIMEOUT,
    ) -> None:
        self._workload = workload
        self._name = name
        self._authority = authority
        self._certifying = certifying
        self._timeout = timeout
        self._trust = trust
        self._clock = clock
        self._pending: PendingRequest | None = None

    @property
    def pending(self) -> tuple[PendingRequest | None, tuple[object, ...]]:
        """The request that waits for its answer, and what it was made for."""
        workload = self._workload
        return self._pending, (self._authority, workload.identity, workload.key_type, workload.ttl)

    def take_over(self, before: "Requester") -> None:
        """Go on with the request of a requester that has ended, where it was made for the same."""
        request, made_for = before.pending
        if made_for == self.pending[1]:
            self._pending = request

    def forget(self) -> None:
        """Repeat the request no more."""
        self._pending = None

    async def ask(self, current: CurrentIdentity | None) -> Obtained:
        """Ask the CA once. `current` authenticates the request where the CA renews over mTLS. Raises AuthorityError."""
        began = self._clock.passed()
        try:
            pending = await self._request()
            answer = await self._call(pending, current)
            accepted = _accept(
                answer, pending.key, self._workload.identity, _known(self._trust, self._name), self._clock.now()
            )
        except AuthorityError as error:
            if error.kind.ends_request:
                self._pending = self._pending_for_key() if isinstance(error, NotYetValidError) else None
            raise
        self._pending = None
        return Obtained(accepted, pending.key, self._clock.now(), timedelta(seconds=self._clock.passed() - began))

    async def _request(self) -> PendingRequest:
        if self._pending is None:
            try:
                kind = self._workload.key_type
                key = await in_thread(generate, kind) if kind.slow else generate(kind)
            except NoThreadError as error:
                raise AuthorityError(ErrorKind.TRANSIENT, f"the private key cannot be made: {error}") from error
            if self._certifying is not None:
                self._pending = PendingRequest(key)
            else:
                self._pending = PendingRequest(key, self._csr(key), os.urandom(16).hex())
        return self._pending

    def _pending_for_key(self) -> PendingRequest | None:
        """Another request for the key of this one, which a CA must not answer by what it gave before."""
        before = self._pending
        return before and PendingRequest(before.key, before.csr_pem, os.urandom(16).hex())

    def _csr(self, key: PrivateKey) -> bytes:
        from sds_agent.pki.csr import make_csr  # noqa: PLC0415 - not for a CA in this process

        return make_csr(key, str(self._workload.identity))

    async def _call(self, pending: PendingRequest, current: CurrentIdentity | None) -> Issuance:
        with failures_of(self._name, self._timeout), giving(self._timeout):
            async with asyncio.timeout(self._timeout):
                return await self._asked(pending, current)

    async def _asked(self, pending: PendingRequest, current: CurrentIdentity | None) -> Issuance:
        workload = self._workload
        if self._certifying is not None:
            return await self._certifying.certify(workload.identity, pending.key.public_key(), workload.ttl)
        request = IssueRequest(workload.identity, pending.csr_pem, workload.ttl, pending.request_id, current)
        return await self._authority.issue(request)


class Receiver:
    """Waits for one workload's certificates from a source, by its `name`, that makes their keys too."""

    def __init__(self, workload: Workload, name: str, supplier: Supplier, trust: Trust, clock: Clock) -> None:
        self._workload = workload
        self._name = name
        self._supplier = supplier
        self._trust = trust
        self._clock = clock
        self._held: bytes | None = None

    async def ask(self, _current: CurrentIdentity | None) -> Obtained:
        """Wait, for however long, until the source gives another certificate than the last. Raises AuthorityError.

        After an error the source gives what it has: that may be the same as before, or good by now.
        """
        began, held, self._held = self._clock.passed(), self._held, None
        with failures_of(self._name, CA_TIMEOUT):
            supplied = await self._supplier.supply(self._workload.identity, held)
        key, now = _supplied_key(supplied), self._clock.now()
        accepted = _accept(supplied.issuance, key, self._workload.identity, _known(self._trust, self._name), now)
        self._held = supplied.issuance.chain_pem
        return Obtained(accepted, key, now, timedelta(seconds=self._clock.passed() - began))


def _supplied_key(supplied: Supplied) -> PrivateKey:
    try:
        key = read_private_key(supplied.private_key_pem)
    except KeyFileError as error:
        message = f"the private key that came with the certificate {error}"
        raise AuthorityError(ErrorKind.INVALID, message) from error
    if fault := IN_SECRETS.fault(key):
        message = (
            f"the private key that came with the certificate is {fault.found}, by which Envoys do not accept each "
            f"other; let its source make {fault.wanted}"
        )
        raise AuthorityError(ErrorKind.MISMATCH, message)
    return key


def _accept(
    answer: Issuance, key: PrivateKey, identity: SpiffeId, known: tuple[Chain, Chain], now: datetime
) -> Accepted:
    """Check the answer; `known` are the anchors of this authority, and those of the others."""
    anchors, beside = known
    return accept(answer, identity=identity, public_key=key.public_key(), anchors=anchors, beside=beside, now=now)


def _known(trust: Trust, authority: str) -> tuple[Chain, Chain]:
    return trust.anchors_of(authority), trust.anchors_beside(authority)
