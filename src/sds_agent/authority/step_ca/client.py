"""The client of step-ca: certificates by a provisioner's token, renewals over mTLS with a new key.

Every request has a connection of its own. `/1.0/sign` gets a new token each time and never sees a certificate: an
expired or foreign one would break the connection in spite of a good token. `/1.0/rekey` sees nothing but the current
certificate; where step-ca does not take it, a token asks for the next one within the same attempt.
"""

import asyncio
import logging
from datetime import datetime, timedelta

from sds_agent import log
from sds_agent.authority.answers import Questions
from sds_agent.authority.credentials import Token, leaf_of
from sds_agent.authority.http_client import CertificateRefusedError, HttpAnswer, HttpsRequest, send
from sds_agent.authority.kind import Context
from sds_agent.authority.operator_files import OperatorFiles
from sds_agent.authority.protocol import (
    AdvertisedLists,
    AuthorityError,
    CurrentIdentity,
    Issuance,
    IssueRequest,
)
from sds_agent.authority.step_ca.proof import StepCaProofs, new_token
from sds_agent.authority.step_ca.roots import StepCaServerRoots
from sds_agent.authority.step_ca.settings import StepCaSettings
from sds_agent.authority.step_ca.wire import (
    BACKDATE,
    CRL,
    FEDERATION,
    INTERMEDIATES,
    PROVISIONERS,
    REKEY,
    ROOTS,
    SIGN,
    SUCCESS,
    ProvisionersPage,
    StepCaProof,
    StepCaProvisioner,
    audience_host,
    checks_of_401,
    clock_difference,
    lists_refusal,
    provisioner_fault,
    read_answer,
    read_certificates,
    read_chain,
    refusal,
    rekey_body,
    rekey_fault,
    sign_body,
    span,
    template_error,
    vouched,
    words_of,
)
from sds_agent.pki.certificates import CertificateError, ParsedBundle, read_pem, unique, write_beside, write_pem
from sds_agent.pki.validation.rules import Chain

LOG = logging.getLogger(__name__)

MOST_PAGES = 5
"""Pages of provisioners that are read to find the cause of a 401."""
PAGE = 100
"""Provisioners on one of them."""
_REFUSED = frozenset({400, 401, 403, 404, 405})
"""The answers to `/1.0/rekey` after which a token may still succeed: a proxy that ends TLS hides the certificate (400),
renewal is disabled or the certificate revoked (401), names or lifetime are allowed no more (403).
"""


class StepCaAuthority:
    """Asks one step-ca."""

    def __init__(self, settings: StepCaSettings, context: Context) -> None:
        self.refresh_every = settings.refresh_every
        self.revocation_lists = settings.revocation_lists
        self._settings = settings
        self._clock = context.clock
        self._what = f"step-ca at {settings.url}"
        self._host = audience_host(settings.url, settings.server_name)
        self._roots = StepCaServerRoots(settings, context.directory, self._what, context.clock)
        self.put_back = self._roots.put_back
        self._proofs = StepCaProofs(settings)
        self._operator = OperatorFiles()
        self._anchors: Chain = ()
        self._unread: tuple[bytes, ...] = ()  # what step-ca told beside them and cannot be read
        self._first_anchors = asyncio.Lock()
        self._questions = Questions()  # for the roots
        self._backdate = BACKDATE
        self._not_taken = ""

    async def issue(self, request: IssueRequest) -> Issuance:
        """A certificate by `/1.0/rekey` where the current one can be renewed, and else by `/1.0/sign`.

        Raises AuthorityError.
        """
        now = self._clock.now()
        async with self._first_anchors:  # many workloads may ask at once
            if not self._anchors:
                await self.anchors()  # before a token is spent: without anchors the certificate proves nothing
        chain = await self._rekeyed(request, now)
        if chain is None:
            chain = await self._signed(request, now)
        if not vouched(chain, self._anchors):
            await self.anchors()
        return Issuance(chain, write_beside(self._anchors, self._unread))

    async def anchors(self) -> bytes:
        """step-ca's own roots, and by default those in its federatedRoots, in PEM. Raises AuthorityError."""
        number = self._questions.ask()
        own = await self._certificates(ROOTS)
        if self._questions.counts(number):  # else the later answer may have a new root
            await self._roots.announced(own.certificates)
        others = await self._certificates(FEDERATION) if self._settings.federation else ParsedBundle(())
        if self._questions.is_known(number) or not self._anchors:
            self._anchors = unique((*own.certificates, *others.certificates))
            self._unread = (*own.unread.values(), *others.unread.values())
        return write_beside(self._anchors, self._unread)

    async def lists(self) -> AdvertisedLists:
        """The list of the CA that signs now; step-ca has one alone. Raises AuthorityError."""
        answer = await self._send("GET", CRL)
        if answer.status not in SUCCESS:
            delay = answer.retry_after(self._clock.now())
            raise lists_refusal(answer.status, words_of(answer.body), self._what, retry_after=delay)
        named = await self._send("GET", INTERMEDIATES)
        # an older step-ca does not name them; its certificates come with the one that signed
        issuers = read_certificates(named.body, self._what).certificates if named.status in SUCCESS else ()
        return AdvertisedLists((answer.body,), write_pem(issuers))

    async def _rekeyed(self, request: IssueRequest, now: datetime) -> bytes | None:
        """The renewed chain; None where a token has to ask for it. Raises AuthorityError where that would not help."""
        current = request.current
        if current is None or not self._settings.rekey:
            return None
        if rekey_fault(leaf_of(current), request.identity, request.ttl, self._backdate, now):
            return None
        try:
            answer = await self._send("POST", REKEY, rekey_body(request), current)
        except CertificateRefusedError as error:
            self._report_not_taken(str(error))
            return None
        if answer.status in SUCCESS:
            self._not_taken = ""
            return read_chain(answer.body, self._what)
        refused = refusal(answer.status, words_of(answer.body), self._what, retry_after=answer.retry_after(now))
        if answer.status not in _REFUSED:
            raise refused
        self._report_not_taken(str(refused))
        return None

    def _report_not_taken(self, cause: str) -> None:
        """Log it when it begins and when its cause changes: behind some proxies it is so for every renewal."""
        if cause != self._not_taken:
            log.event(LOG, "certificate_not_taken", level=logging.WARNING, address=self._settings.url, cause=cause)
        self._not_taken = cause

    async def _signed(self, request: IssueRequest, now: datetime) -> bytes:
        proof = await self._operator.read("the provisioner's key", self._proofs.read, now)
        token = new_token(request, proof, provisioner=self._settings.provisioner, host=self._host, now=now)
        answer = await self._send("POST", SIGN, sign_body(request, token.text))
        if answer.status not in SUCCESS:
            raise await self._refusal(answer, proof, token, now)
        chain = read_chain(answer.body, self._what)
        if spoilt := template_error(chain, request.identity, self._what):
            raise spoilt
        self._learn_backdate(chain, request.ttl)
        return chain

    def _learn_backdate(self, chain: bytes, ttl: timedelta) -> None:
        try:
            self._backdate = span(read_pem(chain)[0]) - ttl
        except (CertificateError, IndexError):
            return  # the answer is checked elsewhere

    async def _refusal(self, answer: HttpAnswer, proof: StepCaProof, token: Token, now: datetime) -> AuthorityError:
        checks = ""
        if answer.status == 401:
            clock = clock_difference(answer.headers.get("date", ""), now)
            found = None if clock else await self._provisioner_fault(proof)
            checks = checks_of_401(proof, self._settings.provisioner, self._host, found, clock)
        words = words_of(answer.body, token)
        return refusal(answer.status, words, self._what, retry_after=answer.retry_after(now), checks=checks)

    async def _provisioner_fault(self, proof: StepCaProof) -> str | None:
        """What step-ca's list of provisioners, which is public, shows to be wrong with ours."""
        found, cursor = list[StepCaProvisioner](), ""
        try:
            for _ in range(MOST_PAGES):
                answer = await self._send("GET", f"{PROVISIONERS}?limit={PAGE}&cursor={cursor}")
                page = read_answer(answer.body, ProvisionersPage, self._what)
                found += page.provisioners[:PAGE]
                cursor = page.next_cursor
                if not cursor.isalnum():
                    return provisioner_fault(found, self._settings.provisioner, proof)
        except AuthorityError:
            return None  # the 401 is what matters
        return None

    async def _certificates(self, path: str) -> ParsedBundle:
        answer = await self._send("GET", path)
        if answer.status not in SUCCESS:
            delay = answer.retry_after(self._clock.now())
            raise refusal(answer.status, words_of(answer.body), self._what, retry_after=delay)
        return read_certificates(answer.body, self._what)

    async def _send(
        self, method: str, path: str, body: bytes = b"", certificate: CurrentIdentity | None = None
    ) -> HttpAnswer:
        request = HttpsRequest(
            method,
            f"{self._settings.url}{path}",
            await self._roots.current(),
            body,
            {"content-type": "application/json"} if body else {},
            self._settings.server_name,
            certificate,
            roots_from=self._roots.described,
        )
        return await send(request, self._what)
