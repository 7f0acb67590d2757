"""The client of Istio's certificate service: istiod, cert-manager's istio-csr, or `sds-agent` itself as a CA.

The agent authenticates with a bearer token, with its current certificate (mTLS), or with both: istiod checks the
certificate before the token. A certificate that the CA refuses fails the whole connection, even beside a good token, so
the client then sends the token alone. Every attempt reads the token and the roots again and has a connection of its
own: no channel remembers an old root or an old certificate.
"""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from pathlib import Path

import grpc
import grpc.aio

from sds_agent import log
from sds_agent.authority.answers import all_failed, words
from sds_agent.authority.credentials import SERVER_ROOTS, Token, read_certificates, read_token
from sds_agent.authority.grpc_retry import retry_after
from sds_agent.authority.istio import reach
from sds_agent.authority.istio.proof import can_speak, read_provisioned
from sds_agent.authority.istio.settings import IstioSettings
from sds_agent.authority.istio.wire import METHOD, CallStatus, read_response, refusal, request_bytes
from sds_agent.authority.operator_files import OperatorFiles
from sds_agent.authority.protocol import AuthorityError, CurrentIdentity, ErrorKind, Issuance, IssueRequest
from sds_agent.clock import Clock
from sds_agent.pki.certificates import write_pem
from sds_agent.signing.signing_set import LARGEST_ANSWER
from sds_agent.tasks import part_of_time, uninterrupted
from sds_agent.values import Sensitive

LOG = logging.getLogger(__name__)

TIMEOUT = 9.0
"""Seconds for an attempt, where the caller does not say how long it may take."""
OWN_SHARE = 0.9
"""The part of what the caller gives in which an attempt ends by itself, with a cause. Each endpoint has an equal part
of it, so a silent one leaves the others their time.
"""
BACK_TO_THE_FIRST = timedelta(minutes=5)
"""How long the client asks another endpoint first, once that one has answered in place of the first."""

DIAGNOSIS_SHARE = 0.25
"""The part of an endpoint's remaining time that the search for the cause of a failed connection may take."""

_CERTIFICATE_REFUSED = frozenset({"UNAVAILABLE", "UNAUTHENTICATED"})
"""The answers of a CA that refuses the certificate: the token alone may succeed."""


class _CallProof(Sensitive, frozen=True):
    """What the client shows in one call: a token, a certificate, or both."""

    token: Token | None
    certificate: CurrentIdentity | None = None


class IstioAuthority:
    """Asks an Istio CA."""

    def __init__(self, settings: IstioSettings, clock: Clock, *, timeout: float = TIMEOUT) -> None:
        self._timeout = timeout
        self._settings = settings
        self._clock = clock
        self._first = self._answering = 0
        self._since: datetime | None = None
        self._extra = b""
        self._operator = OperatorFiles()
        self._left_out: dict[Path, log.LogOnChange] = {}

    async def issue(self, request: IssueRequest) -> Issuance:
        """Ask the endpoints one after another until one answers.

        Raises AuthorityError; where no endpoint answers its message has the cause of each.
        """
        settings = self._settings
        now = self._clock.now()
        extra, warnings = await self._extra_anchors()
        proofs = await self._proofs(request, now)
        message = request_bytes(request, cert_signer=settings.cert_signer, impersonate=settings.impersonate)
        data = await self._any_endpoint(proofs, message, now)
        issuance = read_response(data, extra)
        return Issuance(issuance.chain_pem, issuance.anchors_pem, (*issuance.warnings, *warnings))

    @property
    def _share(self) -> float:
        """The seconds that one endpoint has."""
        return part_of_time(OWN_SHARE, self._timeout) / len(self._settings.address)

    async def _any_endpoint(self, proofs: tuple[_CallProof, ...], message: bytes, now: datetime) -> bytes:
        failures = []
        for index in self._order(now):
            try:
                data = await self._endpoint(self._settings.address[index], proofs, message)
            except AuthorityError as error:
                if error.kind is not ErrorKind.TRANSIENT:
                    raise
                failures.append(error)
            else:
                self._answered(index, now)
                return data
        raise all_failed(failures, ErrorKind.TRANSIENT)

    def _order(self, now: datetime) -> tuple[int, ...]:
        every = range(len(self._settings.address))
        first = self._first
        if self._since is None or not self._since <= now < self._since + BACK_TO_THE_FIRST:
            first = 0
        return (*every[first:], *every[:first])

    def _answered(self, index: int, now: datetime) -> None:
        if index != self._answering:
            level, address = logging.WARNING if index else logging.INFO, self._settings.address[index]
            log.event(LOG, "endpoint_changed", level=level, address=address)
        self._answering = index
        if index == 0:
            self._first, self._since = 0, None
        elif index != self._order(now)[0]:
            self._first, self._since = index, now

    async def _endpoint(self, address: str, proofs: tuple[_CallProof, ...], message: bytes) -> bytes:
        """Show each proof in turn, all within this endpoint's part of the time. Raises AuthorityError."""
        end = asyncio.get_running_loop().time() + self._share
        *before, last = proofs
        for proof in before:
            answer = await self._answer(address, proof, message, end)
            if isinstance(answer, bytes):
                return answer
            if answer.code not in _CERTIFICATE_REFUSED:
                raise self._refusal(answer, address)
            said = {"status": answer.code, "cause": words(answer.details)}
            log.event(LOG, "certificate_not_taken", level=logging.WARNING, address=address, **said)
        answer = await self._answer(address, last, message, end)
        if isinstance(answer, bytes):
            return answer
        raise self._refusal(answer, address)

    async def _answer(self, address: str, proof: _CallProof, message: bytes, end: float) -> bytes | CallStatus:
        """The answer to one call. Raises AuthorityError where no caller reaches the CA, whatever it shows."""
        now = asyncio.get_running_loop().time
        answer = await self._call(address, proof, message, end - now())
        if isinstance(answer, bytes) or answer.code != "UNAVAILABLE":
            return answer
        if fault := await self._connection_fault(address, end - now()):
            raise AuthorityError(ErrorKind.TRANSIENT, f"the Istio CA at {address} cannot be reached: {fault}")
        return answer

    async def _connection_fault(self, address: str, seconds: float) -> str | None:
        """Why no caller can connect to the CA, found within a part of these seconds; None for any other cause."""
        roots = await self._roots()
        if roots is None or seconds <= 0:
            return None
        name = self._settings.server_name or address.rpartition(":")[0].strip("[]")
        return await reach.connection_fault(address, name, roots, seconds * DIAGNOSIS_SHARE)

    def _refusal(self, status: CallStatus, address: str) -> AuthorityError:
        return refusal(status, address, impersonate=self._settings.impersonate)

    async def _call(self, address: str, proof: _CallProof, message: bytes, seconds: float) -> bytes | CallStatus:
        """One call over a connection of its own, and at most that long."""
        metadata = [("clusterid", self._settings.cluster_id)] if self._settings.cluster_id is not None else []
        if proof.token is not None:
            metadata.append(("authorization", f"Bearer {proof.token.text}"))
        async with _closing(self._channel(address, proof.certificate, await self._roots())) as channel:
            ask: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes | None] = channel.unary_unary(METHOD)
            try:
                # gRPC gives None for a success without a message
                return await ask(message, metadata=metadata, timeout=seconds) or b""
            except grpc.aio.AioRpcError as error:
                # not raised from here: the library's error would pass on the CA's words, whatever they are
                return _status(error, proof.token)

    async def _roots(self) -> bytes | None:
        """The roots that vouch for the CA's server; None where the client speaks without TLS, on this machine."""
        if self._settings.plaintext_loopback or self._settings.ca_file is None:
            return None
        return await self._certificates_in(self._settings.ca_file, SERVER_ROOTS)

    def _channel(self, address: str, certificate: CurrentIdentity | None, roots: bytes | None) -> grpc.aio.Channel:
        settings = self._settings
        target = f"dns:///{address}"
        arguments: list[tuple[str, int | str]] = [
            ("grpc.use_local_subchannel_pool", 1),  # or a connection made with other roots might be shared
            ("grpc.enable_http_proxy", 0),  # only the CA may see the token
            ("grpc.enable_retries", 0),
            ("grpc.min_reconnect_backoff_ms", int(self._share * 1000)),  # how long a handshake may outlive its channel
            ("grpc.max_receive_message_length", LARGEST_ANSWER),
        ]
        if roots is None:
            return grpc.aio.insecure_channel(target, options=arguments)
        if settings.server_name is not None:
            arguments.append(("grpc.ssl_target_name_override", settings.server_name))
        credentials = grpc.ssl_channel_credentials(
            roots,
            None if certificate is None else certificate.private_key_pem,
            None if certificate is None else certificate.chain_pem,
        )
        return grpc.aio.secure_channel(target, credentials, options=arguments)

    async def _proofs(self, request: IssueRequest, now: datetime) -> tuple[_CallProof, ...]:
        """What to show the CA, the best first. Raises AuthorityError UNAUTHENTICATED when there is nothing."""
        faults: list[AuthorityError] = []
        token = None
        if self._settings.token_file is not None:
            try:
                token = await self._operator.read("the token", read_token, self._settings.token_file)
            except AuthorityError as error:
                faults.append(error)
        certificate = await self._certificate(request, now, faults)
        proofs = [] if certificate is None else [_CallProof(token, certificate)]
        if token is not None:
            proofs.append(_CallProof(token))
        if not proofs:
            causes = "; ".join(map(str, faults)) or "there is no current certificate that names a workload"
            raise AuthorityError(
                ErrorKind.UNAUTHENTICATED, f"the agent has nothing to authenticate with at the Istio CA: {causes}"
            ) from (faults[0] if faults else None)
        return tuple(proofs)

    async def _certificate(
        self, request: IssueRequest, now: datetime, faults: list[AuthorityError]
    ) -> CurrentIdentity | None:
        """The certificate to show, if there is one. What is wrong with a provisioned one is added to `faults`."""
        settings = self._settings
        if not settings.mtls or settings.impersonate or settings.plaintext_loopback:
            return None
        if request.current is not None and can_speak(request.current, now):
            return request.current
        if settings.provisioned is None:
            return None
        try:
            provisioned = await self._operator.read(
                "the provisioned certificate", read_provisioned, settings.provisioned
            )
        except AuthorityError as error:
            faults.append(error)
            return None
        if can_speak(provisioned, now):
            return provisioned
        found = f"the certificate in {settings.provisioned} has expired or names no workload"
        faults.append(AuthorityError(ErrorKind.UNAUTHENTICATED, f"{found}; provision another"))
        return None

    async def _certificates_in(self, file: Path, what: str) -> bytes:
        """The usable certificates in a file, in PEM; others are logged once. Raises AuthorityError UNAUTHENTICATED."""
        reading = await self._operator.read(f"{what} ({file})", read_certificates, file, what)
        left_out = self._left_out.setdefault(file, log.LogOnChange(LOG, "certificates_left_out"))
        if reading.left_out:
            left_out.report("; ".join(reading.left_out), file=str(file))
        else:
            left_out.resolved()
        return write_pem(reading.certificates)

    async def _extra_anchors(self) -> tuple[bytes, tuple[str, ...]]:
        """The file's anchors in PEM, or those read before with a warning. Raises AuthorityError for neither."""
        if self._settings.extra_anchors is None:
            return b"", ()
        try:
            self._extra = await self._certificates_in(self._settings.extra_anchors, "the extra anchors")
        except AuthorityError as error:
            if not self._extra:
                raise
            return self._extra, (f"the extra anchors that were read before stay in use: {error}",)
        return self._extra, ()


def _status(error: grpc.aio.AioRpcError, token: Token | None) -> CallStatus:
    details = error.details() or ""
    delay = retry_after((*(error.trailing_metadata() or ()), *(error.initial_metadata() or ())))
    return CallStatus(error.code().name, details if token is None else token.pieces_removed_from(details), delay)


@asynccontextmanager
async def _closing(channel: grpc.aio.Channel) -> AsyncIterator[grpc.aio.Channel]:
    """Close the channel at the end, also after a cancellation, which interrupts the channel's own context manager."""
    try:
        yield channel
    finally:
        await uninterrupted(channel.close())
