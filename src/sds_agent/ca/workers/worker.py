"""A worker: a process that answers the CA's calls, and asks its parent for whatever there is one of."""

import asyncio
import logging
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from sds_agent import log
from sds_agent.ca.acceptor import Arrival, TlsAcceptor
from sds_agent.ca.audit import Entry
from sds_agent.ca.authentication import Authentication
from sds_agent.ca.denied import NO_IDENTITY, Denied
from sds_agent.ca.jwks import KnownKeys, read_keys
from sds_agent.ca.jwt import TrustedIssuer
from sds_agent.ca.server import FLUSH, check_signer, connection_limits, grpc_serving
from sds_agent.ca.service import CertificateService, Rules
from sds_agent.ca.tls import ServerTls
from sds_agent.ca.tokens import JoinTokens
from sds_agent.ca.workers.channel import Channel
from sds_agent.ca.workers.messages import (
    Admit,
    AreYouThere,
    Begin,
    Denials,
    Drain,
    GiveBack,
    GiveWay,
    HandOver,
    Here,
    Issue,
    Keys,
    Leave,
    Prove,
    Ready,
    Refresh,
    Refuse,
    Reply,
    Say,
    Setup,
    SignerMaterial,
    ToParent,
    ToWorker,
    Unfit,
    to_worker,
)
from sds_agent.clock import SystemClock
from sds_agent.errors import ConfigurationError, leaves
from sds_agent.pki.keys import PrivateKey
from sds_agent.rpc import core
from sds_agent.signing.signer import Signer
from sds_agent.signing.signing_set import SigningSet
from sds_agent.tasks import NonBlockingLookups, background_tasks

LOG = logging.getLogger(__name__)

MOST_QUEUED = 1 << 20
"""Bytes that may wait for the parent when a line of the log is added to them; else the line is dropped."""


def main(descriptor: int) -> None:
    """Reply calls until the parent, at the other end of that Unix socket, says that this is over, or ends."""
    with asyncio.Runner(loop_factory=NonBlockingLookups) as runner:
        runner.run(_work(socket.socket(fileno=descriptor)))


async def _work(connection: socket.socket) -> None:
    parent = _Parent(connection)
    setup = await parent.setup
    log.divert(parent.say, setup.log_level)
    try:
        await _answer_calls(parent, setup)
    except* ConfigurationError as errors:
        parent.send(Unfit(str(next(leaves(errors)))))
    parent.finish()


async def _answer_calls(parent: "_Parent", setup: Setup) -> None:
    clock, age = SystemClock(), timedelta(seconds=setup.connection_age)
    tls = ServerTls(parent.signing, setup.server_names, clock.now, ask_client=setup.mtls)
    check_signer(tls)
    limits = connection_limits(setup.most, age)
    acceptor = parent.acceptor = TlsAcceptor(tls.context, clock.now, limits, _PlacesThere(parent.send))
    tokens = None if setup.join_tokens is None else JoinTokens(Path(setup.join_tokens))
    issuers = list(map(TrustedIssuer, setup.rules, parent.keys))
    authentication = Authentication(setup.trust_domain, issuers, setup.mtls, tokens)
    agents = {each.identity: each for each in setup.node_agents}
    rules = Rules(authentication, agents, setup.per_caller, parent.denied)
    service = CertificateService(rules, parent.signing, acceptor, _BooksThere(parent), clock)
    async with background_tasks() as start:
        async with grpc_serving(service, acceptor, age) as backends:
            start(acceptor.take(parent.arrivals.get, backends))
            log.event(LOG, "grpc_core", level=logging.DEBUG, **core.in_force())
            parent.send(Ready())
            await parent.draining.wait()
            acceptor.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(FLUSH):
                await acceptor.emptied()


class _Parent:
    """The parent as the worker knows it: what it said last, and how to ask it."""

    def __init__(self, connection: socket.socket) -> None:
        self.setup: asyncio.Future[Setup] = asyncio.get_running_loop().create_future()
        self.keys: list[_KeysThere] = []
        self.arrivals = asyncio.Queue[Arrival]()
        self.draining = asyncio.Event()
        self.acceptor: TlsAcceptor | None = None
        self._signing: SigningSet | None = None
        self._denied = NO_IDENTITY
        self._asked = 0
        self._questions: dict[int, asyncio.Future[Reply]] = {}
        self._unsaid = 0
        self._channel = Channel[ToWorker](connection, to_worker, self._receive, _end_at_once)
        self.send = self._channel.send

    def signing(self) -> SigningSet:
        """What signs now."""
        assert self._signing is not None, "it comes with the setup"  # noqa: S101 - for the type checker
        return self._signing

    def denied(self) -> Denied:
        """The identities that get nothing at present."""
        return self._denied

    async def ask(self, question: Callable[[int], ToParent]) -> Reply:
        """Send the question that is made for a number, and wait for its answer."""
        self._asked += 1
        number = self._asked
        self._questions[number] = asyncio.get_running_loop().create_future()
        self.send(question(number))
        try:
            return await self._questions[number]
        finally:
            del self._questions[number]

    async def begin(self) -> int | None:
        """Ask for a place; returns the question's number, by which `GiveBack` gives the place back."""
        asked = list[int]()

        def question(number: int) -> Begin:
            asked.append(number)
            return Begin(number)

        try:
            answer = await self.ask(question)
        except asyncio.CancelledError:
            self.send(GiveBack(asked[0]))  # it may have been granted
            raise
        return answer.call if answer.granted else None

    def say(self, said: log.Event) -> None:
        """Have the parent log an event. While the parent takes nothing, events are dropped, and counted."""
        if self._channel.pending > MOST_QUEUED:
            self._unsaid += 1
            return
        if self._unsaid:
            self.send(Say(said.at, "error", "log_lines_dropped", {"lines": self._unsaid}))
            self._unsaid = 0
        self.send(Say(said.at, said.level, said.name, dict(said.fields)))

    def finish(self) -> None:
        """Write what is left for the parent."""
        self._channel.flush()
        self._channel.close()

    def _receive(self, message: ToWorker, descriptor: Callable[[], int]) -> None:
        match message:
            case Reply(call=call):
                if call in self._questions and not self._questions[call].done():
                    self._questions[call].set_result(message)
            case HandOver():
                self._take(message, descriptor())
            case GiveWay(connection=name):
                if self.acceptor is not None:
                    self.acceptor.end(name)
            case AreYouThere():
                self.send(Here())
            case Drain():
                self.draining.set()
            case _:
                self._learn(message)

    def _learn(self, message: Setup | SignerMaterial | Denials | Keys) -> None:
        """Use from now on what the message says."""
        match message:
            case SignerMaterial():
                self._signing = read(message)
            case Denials(denied=denied):
                self._denied = denied
            case Keys(issuer=issuer, data=data):
                self.keys[issuer].take(data)
            case Setup():
                self._signing, self._denied = read(message.material), message.denied
                self.keys = [_KeysThere(self, issuer, data) for issuer, data in enumerate(message.keys)]
                self.setup.set_result(message)

    def _take(self, message: HandOver, descriptor: int) -> None:
        if descriptor < 0:  # there was none left for it
            self.send(Leave(message.connection))
            return
        plain = socket.socket(fileno=descriptor)
        plain.setblocking(False)
        self.arrivals.put_nowait(Arrival(plain, message.address, message.origin, message.connection))


def _end_at_once() -> None:
    """The parent has ended. Nothing that is left could be written down, and so nothing may be given out."""
    os._exit(1)


class _PlacesThere:
    """The places, which the parent has: a connection that is handed over has one already."""

    def __init__(self, send: Callable[[ToParent], None]) -> None:
        self._send = send

    def arrive(self, connection: str, origin: str) -> None:
        """It has one."""

    def prove(self, connection: str, caller: str) -> None:
        """Tell the parent, which says what has to give way."""
        self._send(Prove(connection, caller))

    def leave(self, connection: str) -> None:
        """Tell the parent."""
        self._send(Leave(connection))


class _BooksThere:
    """The books, which the parent has."""

    def __init__(self, parent: _Parent) -> None:
        self._parent = parent
        self.begin = parent.begin

    async def admit(self, caller: str, now: datetime) -> bool:  # noqa: ARG002 - the parent has the same clock
        """Count a request of that caller; whether it is within its quota."""
        return (await self._parent.ask(lambda call: Admit(call, caller))).granted

    def end(self, place: int) -> None:
        """The request is no work any more."""
        self._parent.send(GiveBack(place))

    async def issued(self, entry: Entry, now: datetime, seconds: float) -> None:
        """Have a certificate written down before it is given out. Raises OSError."""
        answer = await self._parent.ask(lambda call: Issue(call, entry, now, seconds))
        if not answer.granted:
            raise OSError(answer.error, os.strerror(answer.error))

    def refused(self, entry: Entry, now: datetime) -> None:
        """Have a refusal written down."""
        self._parent.send(Refuse(entry, now))


class _KeysThere(KnownKeys):
    """The keys of one issuer, which the parent reads."""

    def __init__(self, parent: _Parent, issuer: int, data: bytes) -> None:
        super().__init__()
        self._parent = parent
        self._issuer = issuer
        self.take(data)

    def take(self, data: bytes) -> None:
        """Use this set from now on."""
        self._keys = read_keys(data) if data else ()

    async def refresh(self) -> None:
        """Have the parent read the set again, unless it did so a moment ago."""
        await self._parent.ask(lambda call: Refresh(call, self._issuer))


def read(material: SignerMaterial) -> SigningSet:
    """The signing set that it was made of."""
    key = load_pem_private_key(material.key, password=None)
    assert isinstance(key, PrivateKey), "the parent signs with it"  # noqa: S101 - for the type checker
    return SigningSet(
        Signer(x509.load_der_x509_certificate(material.signer), key),
        tuple(map(x509.load_der_x509_certificate, material.intermediates)),
        tuple(map(x509.load_der_x509_certificate, material.roots)),
        tuple(map(x509.load_der_x509_crl, material.crls)),
    )
