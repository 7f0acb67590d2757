"""The client of a CA that speaks EST.

The first certificate takes a password or a client certificate (simpleenroll). The next ones take the current
certificate, over mTLS (simplereenroll); where the server refuses that, the agent enrolls anew in the same attempt. The
server answers with the certificate alone: its chain and the roots come from cacerts, which is read first.
"""

import asyncio
from datetime import timedelta
from functools import partial

from sds_agent.authority.answers import keeping_request
from sds_agent.authority.credentials import is_valid
from sds_agent.authority.est import wire
from sds_agent.authority.est.files import EstFiles, files_of
from sds_agent.authority.est.settings import EstSettings
from sds_agent.authority.http_client import (
    CertificateRefusedError,
    HttpAnswer,
    HttpsRequest,
    send,
)
from sds_agent.authority.operator_files import OperatorFiles
from sds_agent.authority.protocol import AuthorityError, CurrentIdentity, ErrorKind, Issuance, IssueRequest
from sds_agent.clock import Clock
from sds_agent.tasks import time_at_least

PASSWORD_TIMEOUT = 30.0
"""Seconds at least for the answer to a request with the password, which outlives the attempt that sent it."""
ANSWER_KEPT = 30.0
"""Seconds after those in which its answer is forgotten, if no attempt takes it."""
_NO_RENEWAL = frozenset({401, 403, 404, 501})
"""The answers to simplereenroll after which the agent enrolls anew."""


class _NotRenewedError(AuthorityError):
    """The server does not renew with this certificate: the agent enrolls anew."""


class EstAuthority:
    """Asks one EST server."""

    def __init__(self, settings: EstSettings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._what = f"the EST server at {settings.url}"
        self._operator = OperatorFiles()
        self.refresh_every: timedelta = settings.refresh_every
        self._answers: dict[tuple[str, bytes], asyncio.Task[HttpAnswer]] = {}
        self._pending: dict[str, bytes] = {}  # the CSR that waits for an approval, by its identity

    async def issue(self, request: IssueRequest) -> Issuance:
        """Ask once. Raises AuthorityError; PENDING while the request waits for an approval."""
        files = await self._files()
        try:
            above = await self._cacerts(files)
            anchors = self._anchors(files, above)
        except AuthorityError as error:
            if self._pending.get(str(request.identity)) == request.csr_pem:
                raise keeping_request(error) from error
            raise
        try:
            issuance = await self._issued(request, files, above, anchors)
        except AuthorityError as error:
            self._note(request, error.kind)
            raise
        self._note(request, None)
        return issuance

    def _note(self, request: IssueRequest, failure: ErrorKind | None) -> None:
        """Note whether the request waits for an approval, after an attempt."""
        if failure is ErrorKind.PENDING:
            self._pending[str(request.identity)] = request.csr_pem
        elif failure is None or failure.ends_request:
            self._pending.pop(str(request.identity), None)

    async def _issued(
        self, request: IssueRequest, files: EstFiles, above: wire.EstCaCertificates, anchors: bytes
    ) -> Issuance:
        body, current = wire.enroll_body(request.csr_pem), request.current
        not_renewed = ""
        if self._settings.reenroll and current is not None and is_valid(current, self._clock.now()):
            try:
                answer = await self._reenroll(files, body, current)
                return Issuance(wire.read_certificates(answer.body, wire.REENROLL) + above.others, anchors)
            except _NotRenewedError as error:
                not_renewed = str(error)
        answer = await self._enroll(wire.ENROLL, files, body, files.basic, files.certificate)
        if answer.status != 200:
            raise wire.after_renewal(self._refused(answer, wire.ENROLL, files.basic), not_renewed)
        warnings = (f"the agent enrolled anew, as it could not renew: {not_renewed}",) if not_renewed else ()
        return Issuance(wire.read_certificates(answer.body, wire.ENROLL) + above.others, anchors, warnings)

    async def anchors(self) -> bytes:
        """The trust domain's roots at present. Raises AuthorityError."""
        files = await self._files()
        return files.anchors or self._anchors(files, await self._cacerts(files))

    async def end(self) -> None:
        """End the requests that have outlived their attempts."""
        running = [each for each in self._answers.values() if not each.done()]
        for each in running:
            each.cancel()
        if running:
            await asyncio.wait(running)

    async def _reenroll(self, files: EstFiles, body: bytes, current: CurrentIdentity) -> HttpAnswer:
        """The answer to a renewal. Raises _NotRenewedError where the server does not renew this certificate.

        It may want a password beside the certificate, but one that is spent must not matter beside a good certificate.
        """
        try:
            answer, basic = await self._enroll(wire.REENROLL, files, body, None, current), None
            if answer.status == 401 and files.basic is not None:
                basic = files.basic
                answer = await self._enroll(wire.REENROLL, files, body, basic, current)
        except CertificateRefusedError as error:
            raise _NotRenewedError(error.kind, str(error)) from error
        if answer.status == 200:
            return answer
        refusal = self._refused(answer, wire.REENROLL, basic)
        if answer.status in _NO_RENEWAL:
            raise _NotRenewedError(refusal.kind, str(refusal))
        raise refusal

    async def _cacerts(self, files: EstFiles) -> wire.EstCaCertificates:
        url = self._settings.url + wire.path(self._settings.label, wire.CACERTS)
        name = self._settings.server_name
        asked = HttpsRequest("GET", url, files.roots, server_name=name, certificate=files.certificate)
        answer = await send(asked, self._what)
        if answer.status == 200:
            return wire.read_cacerts(answer.body)
        raise self._refused(answer, wire.CACERTS, None)

    async def _enroll(
        self,
        operation: str,
        files: EstFiles,
        body: bytes,
        basic: wire.BasicCredentials | None,
        certificate: CurrentIdentity | None,
    ) -> HttpAnswer:
        """The answer; with a password, that to an earlier request with this CSR where one was not taken yet.

        A password may be good for one request. So that goes on where its attempt is cancelled, and the next attempt,
        which has the same CSR, takes the answer.
        """
        url = self._settings.url + wire.path(self._settings.label, operation)
        headers, name = wire.enroll_headers(basic), self._settings.server_name
        request = HttpsRequest("POST", url, files.roots, body, headers, name, certificate)
        longest = time_at_least(PASSWORD_TIMEOUT)
        if basic is None:
            return await self._sent(request, longest)
        key = operation, body
        asking = self._answers.get(key)
        if asking is None:
            asking = asyncio.create_task(self._sent(request, longest))
            self._answers[key] = asking
            asking.add_done_callback(partial(self._answered, key))
            asyncio.get_running_loop().call_later(longest + ANSWER_KEPT, self._forget, key, asking)
        await asyncio.wait([asking])
        self._forget(key, asking)
        return asking.result()

    def _answered(self, key: tuple[str, bytes], asking: asyncio.Task[HttpAnswer]) -> None:
        if asking.cancelled() or asking.exception() is not None or asking.result().status != 200:
            self._forget(key, asking)  # which is good for no later attempt

    def _forget(self, key: tuple[str, bytes], asking: asyncio.Task[HttpAnswer]) -> None:
        if self._answers.get(key) is asking:
            del self._answers[key]

    async def _sent(self, request: HttpsRequest, seconds: float) -> HttpAnswer:
        try:
            async with asyncio.timeout(seconds):
                return await send(request, self._what)
        except TimeoutError as error:
            message = (
                f"{self._what} did not answer within {seconds:.0f} s; check that the network lets the agent through"
            )
            raise AuthorityError(ErrorKind.TRANSIENT, message) from error

    def _refused(self, answer: HttpAnswer, operation: str, basic: wire.BasicCredentials | None) -> AuthorityError:
        words = answer.words(*(() if basic is None else basic.secrets))
        error = wire.refused(answer.status, words, operation, answer.headers.get("www-authenticate", ""))
        error.retry_after = answer.retry_after(self._clock.now())
        return error

    def _anchors(self, files: EstFiles, above: wire.EstCaCertificates) -> bytes:
        anchors = above.roots if files.anchors is None else files.anchors
        if not anchors:
            raise AuthorityError(
                ErrorKind.INVALID, "none of the EST server's cacerts is self-signed; name the root's file in roots_file"
            )
        return anchors

    async def _files(self) -> EstFiles:
        return await self._operator.read("the files that the settings name", files_of, self._settings)
