"""istio.v1.auth.IstioCertificateService on raw bytes: from a request to a signed chain or a refusal, and its audit.

The order of the steps keeps the CA from work for callers that are entitled to none: it proves the caller, takes from
its quota, reads and judges the request, spends a join token, and only then signs. A request counts as work once it is
there in full, so that no caller holds a place by sending slowly. gRPC itself reads the message of a unary method before
it calls the method: requests that never end could fill the memory, from every client that can connect. So the method is
declared to take a stream of messages, which is the same on the wire.

The module is asyncio's, as gRPC is.
"""

import asyncio
import functools
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Protocol, TypeVar

import grpc
import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from google.protobuf.message import DecodeError
from msgspec import Struct
from sds_agent_proto.istio_pb2 import CertificateRequest, CertificateResponse

from sds_agent import log
from sds_agent.budget import Bucket, Rate
from sds_agent.ca.acceptor import Peer
from sds_agent.ca.audit import Entry
from sds_agent.ca.authentication import Authentication, Proven
from sds_agent.ca.books import Books
from sds_agent.ca.callers import Caller
from sds_agent.ca.denied import NO_IDENTITY, Denied
from sds_agent.ca.policy import NodeAgent, Order, check_not_denied, identity_for, key_of, ttl_of
from sds_agent.ca.refusal import Reason, RefusalError, invalid
from sds_agent.clock import Clock
from sds_agent.pki.certificates import serial_hex, write_pem
from sds_agent.rpc.calls import Context, next_message
from sds_agent.rpc.waiting import GaveWayError, Waiting
from sds_agent.signing.signer import SignerError
from sds_agent.signing.signing_set import SigningSet
from sds_agent.tasks import NoThreadError

T = TypeVar("T")

LOG = logging.getLogger(__name__)

SERVICE = "istio.v1.auth.IstioCertificateService"
METHOD = "CreateCertificate"
LARGEST_REQUEST = 256 << 10
"""Bytes: four times the largest CSR, and no more than the event loop reads in some 10 ms, whatever its content."""
TIMEOUT = 10.0
"""Seconds for a proven caller's request to arrive."""
PROOF_TIMEOUT = 15.0
"""Seconds for a caller's proof, which may have to wait for its issuer's server (see `jwks.TIMEOUT`)."""
MOST_UNPROVEN = 1024
MOST_UNPROVEN_OF_ONE = 128
"""Calls at one time whose callers are not proven yet: in all, and on one connection."""
MOST_UNREAD = 64
MOST_UNREAD_OF_ONE = 8
"""Requests of proven callers at one time that are not there in full after GRACE: in all, and of one caller."""
GRACE = 0.1
"""Seconds. An honest request is there already and waits only for the event loop; the callers' quotas bound the rest."""
SIGNERS = 4
"""RSA signatures at one time. Each runs in a thread, for it would hold up the event loop for a millisecond or more."""

A_MINUTE = Rate(1, 1 / 60)
"""Lines of the log that say that no thread can be started."""

_CODES = {
    Reason.UNAUTHENTICATED: grpc.StatusCode.UNAUTHENTICATED,
    Reason.DENIED: grpc.StatusCode.PERMISSION_DENIED,
    Reason.INVALID: grpc.StatusCode.INVALID_ARGUMENT,
    Reason.EXHAUSTED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    Reason.INTERNAL: grpc.StatusCode.INTERNAL,
}


class Connections(Protocol):
    """What the service asks of the acceptor. gRPC's name for a call's peer leads to the connection of the call."""

    def peer(self, grpc_peer: str) -> Peer:
        """What is known of that connection."""
        ...

    def proven(self, grpc_peer: str, caller: str) -> None:
        """Let the connection stay on which a call proved this caller."""
        ...


class Rules(Struct, frozen=True):
    """Who may ask and by what proof, who may act for others, and who gets nothing.

    `per_caller` are the requests of one caller in a minute that the books let pass.
    """

    authentication: Authentication
    node_agents: Mapping[str, NodeAgent]
    per_caller: int
    deny_list: Callable[[], Denied] = lambda: NO_IDENTITY


class _Request(Struct):
    """One request, with what is known of it so far, which the audit log says when the CA refuses it."""

    connection: str
    peer: Peer
    now: datetime
    began: float
    caller: Caller | None = None
    spiffe_id: str | None = None


class Signers:
    """At most `most` threads that sign. A call whose caller has gone keeps its thread until it returns."""

    def __init__(self, most: int) -> None:
        self._threads = ThreadPoolExecutor(most, "signer")

    async def call(self, sign: Callable[[], T]) -> T:
        """Call it in one of the threads. Raises NoThreadError where none is idle and none can be started."""
        try:
            signed = asyncio.get_running_loop().run_in_executor(self._threads, sign)
        except RuntimeError as error:
            raise NoThreadError from error
        return await signed


class CertificateService:
    """The service. `current` gives the signing set in use, which may change from one call to the next."""

    def __init__(
        self,
        rules: Rules,
        current: Callable[[], SigningSet],
        connections: Connections,
        books: Books,
        clock: Clock,
    ) -> None:
        self._rules = rules
        self._current = current
        self._connections = connections
        self._books = books
        self._clock = clock
        self._unproven = Waiting(MOST_UNPROVEN, MOST_UNPROVEN_OF_ONE, PROOF_TIMEOUT)
        self._unread = Waiting(MOST_UNREAD, MOST_UNREAD_OF_ONE, TIMEOUT, GRACE)
        self._signers = Signers(SIGNERS)
        # every peer can cause the one, and every proven caller the other
        self._no_thread = Bucket(A_MINUTE, time.monotonic())
        self._cannot_sign = log.LogOnChange(LOG, "cannot_sign")
        self._rest: tuple[SigningSet, bytes] | None = None  # the end of every answer by that set

    def handler(self) -> grpc.GenericRpcHandler:
        """The handler for gRPC's server."""
        return grpc.method_handlers_generic_handler(
            SERVICE, {METHOD: grpc.stream_unary_rpc_method_handler(self._create)}
        )

    async def _create(self, _: object, context: Context) -> bytes:
        connection = context.peer()
        request = _Request(connection, self._connections.peer(connection), self._clock.now(), time.monotonic())
        try:
            proven = await self._prove(request, context)
            data = await self._received(context, proven.caller)
            return await self._in_work(request, proven, data)
        except RefusalError as error:
            refusal = error
        except NoThreadError as error:
            self._report_no_thread(error)
            refusal = RefusalError(Reason.EXHAUSTED, "the CA cannot begin the work at present: ask again in a moment")
        except Exception as error:  # noqa: BLE001 - it must not end the server, nor its text reach the caller
            log.fault(LOG, "certificate service", error)
            refusal = RefusalError(Reason.INTERNAL, "the CA failed on this request; its log says where")
        self._refused(request, refusal)
        return await context.abort(_CODES[refusal.reason], str(refusal))

    async def _prove(self, request: _Request, context: Context) -> Proven:
        metadata = list(context.invocation_metadata() or ())
        signing = self._current()
        proven = self._rules.authentication.known(request.peer, metadata, signing, request.now)
        if proven is None:
            proven = await self._proven_anew(request, metadata, signing)
        request.caller = proven.caller
        # a spent token that leaked gets nothing; so it must not use up the quota of its machine either
        who = str(proven.caller.identity) if proven.token is None else proven.token.name
        if not await self._books.admit(who, request.now):
            raise RefusalError(
                Reason.EXHAUSTED,
                f"{proven.caller.identity} asked more than {self._rules.per_caller} times in a minute",
            )
        check_not_denied(proven.caller.identity, self._rules.deny_list())
        return proven

    async def _proven_anew(
        self, request: _Request, metadata: Sequence[tuple[str, str | bytes]], signing: SigningSet
    ) -> Proven:
        try:
            async with self._unproven.place(request.connection):
                return await self._rules.authentication.prove(request.peer, metadata, signing, request.now)
        except TimeoutError as error:
            raise RefusalError(Reason.INTERNAL, "what proves the caller took too long: try again later") from error
        except GaveWayError as error:
            raise RefusalError(
                Reason.EXHAUSTED, "too many callers are not proven yet: ask again in a moment"
            ) from error

    async def _received(self, context: Context, caller: Caller) -> bytes:
        try:
            async with self._unread.place(str(caller.identity)):
                data = await next_message(context)
        except TimeoutError as error:
            raise invalid(f"the request did not arrive within {TIMEOUT:g} s") from error
        except GaveWayError as error:
            raise RefusalError(Reason.EXHAUSTED, "too many requests have begun and not ended") from error
        if data is None:
            raise invalid(f"the call ended without a request, or with one of more than {LARGEST_REQUEST} bytes")
        return data

    async def _in_work(self, request: _Request, proven: Proven, data: bytes) -> bytes:
        """Answer a request that is there in full. Raises RefusalError, also where too many are in work already."""
        place = await self._books.begin()
        if place is None:
            raise RefusalError(Reason.EXHAUSTED, "the CA is busy with other requests: ask again in a moment")
        try:
            return await self._issue(request, proven, data)
        finally:
            self._books.end(place)

    async def _issue(self, request: _Request, proven: Proven, data: bytes) -> bytes:
        # 1. Judge first: a request that is refused spends no join token.
        order = self._judge(request, data, proven.caller)
        # 2. Bind the join token to the key before anything is signed: of two calls with it, one key gets a certificate.
        await self._rules.authentication.spend(proven, order.public_key)
        # 3. Only a caller that brought a good request keeps its connection.
        self._connections.proven(request.connection, str(proven.caller.identity))
        # 4. Sign with the set of this moment, which may be another than the one that proved the caller.
        signing = self._current()
        chain = await self._sign(signing, order, request.now)
        # 5. No certificate leaves before the audit log has it.
        await self._issued(request, chain[0])
        return self._response(chain[0], signing)

    def _response(self, leaf: x509.Certificate, signing: SigningSet) -> bytes:
        """The answer: leaf, each intermediate, and all roots in the last element, as Istio's clients expect them."""
        if self._rest is None or self._rest[0] is not signing:
            above = [write_pem([certificate]).decode() for certificate in signing.intermediates]
            rest = CertificateResponse(cert_chain=(*above, write_pem(signing.roots).decode()))
            self._rest = (signing, rest.SerializeToString())
        # two messages one after the other are the message with the elements of both (protobuf's encoding guide)
        return CertificateResponse(cert_chain=(write_pem([leaf]).decode(),)).SerializeToString() + self._rest[1]

    def _judge(self, request: _Request, data: bytes, caller: Caller) -> Order:
        asked = _read(data)
        impersonated = _impersonated(asked)
        request.spiffe_id = impersonated or str(caller.identity)
        identity = identity_for(caller, impersonated, self._rules.node_agents)
        deny_list = self._rules.deny_list()  # which may have changed since the caller was proven
        check_not_denied(caller.identity, deny_list)
        if identity is not caller.identity:
            check_not_denied(identity, deny_list)
        return Order(identity, key_of(asked.csr), ttl_of(asked.validity_duration))

    async def _sign(self, signing: SigningSet, order: Order, now: datetime) -> tuple[x509.Certificate, ...]:
        arguments = (order.public_key, str(order.identity), now, order.ttl)
        try:
            if isinstance(signing.signer.key, rsa.RSAPrivateKey):
                chain = await self._signers.call(functools.partial(signing.issue, *arguments))
            else:
                chain = signing.issue(*arguments)
        except SignerError as error:
            self._cannot_sign.report(str(error))
            raise RefusalError(Reason.INTERNAL, f"the CA cannot sign: {error}") from error
        self._cannot_sign.resolved()
        return chain

    async def _issued(self, request: _Request, leaf: x509.Certificate) -> None:
        entry = Entry(
            outcome="issued",
            address=request.peer.address,
            caller=request.caller,
            spiffe_id=request.spiffe_id,
            serial=serial_hex(leaf),
            not_after=leaf.not_valid_after_utc,
        )
        try:
            await self._books.issued(entry, request.now, time.monotonic() - request.began)
        except OSError as error:
            raise RefusalError(Reason.INTERNAL, "the CA cannot write its audit log, so it signs nothing") from error

    def _report_no_thread(self, error: NoThreadError) -> None:
        if self._no_thread.holds(time.monotonic()):
            self._no_thread.draw()
            log.event(LOG, "no_thread", level=logging.ERROR, cause=str(error))

    def _refused(self, request: _Request, refusal: RefusalError) -> None:
        entry = Entry(
            outcome=refusal.reason.value,
            address=request.peer.address,
            caller=request.caller,
            spiffe_id=request.spiffe_id,
            reason=str(refusal),
        )
        self._books.refused(entry, request.now)


def _read(data: bytes) -> CertificateRequest:
    try:
        return CertificateRequest.FromString(data)
    except DecodeError as error:
        raise invalid("the message is not an IstioCertificateRequest") from error


def _impersonated(asked: CertificateRequest) -> str:
    """The SPIFFE ID that the caller asks for in place of its own, which pilot-agent may send as an empty text."""
    value = asked.metadata.fields.get("ImpersonatedIdentity")
    if value is None:
        return ""
    if not value.HasField("string_value"):
        raise invalid("ImpersonatedIdentity is not a text")
    return value.string_value
