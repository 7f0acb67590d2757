"""The cases: what an adapter owes to the agent, each a function that raises AssertionError where the adapter fails."""

import asyncio
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from msgspec import Struct

from sds_agent.authority import registry
from sds_agent.authority.kind import Context
from sds_agent.authority.protocol import (
    AdvertisesAnchors,
    Authority,
    AuthorityError,
    ErrorKind,
    Issuance,
    IssueRequest,
)
from sds_agent.clock import SystemClock
from sds_agent.conformance.front import BEFORE_HTTP, HUGE, RETRY_AFTER, Fault, Front
from sds_agent.conformance.subject import Subject
from sds_agent.conformance.suite_ca import Sign, SuiteCa
from sds_agent.identity.spiffe import SpiffeId
from sds_agent.issuance.acceptance import Accepted, accept
from sds_agent.pki.certificates import read_pem
from sds_agent.pki.csr import make_csr
from sds_agent.pki.keys import KeyType, PrivateKey, generate

TTL = timedelta(hours=1)
TRUST_DOMAIN = "demo.example"
LONGEST_MESSAGE = 2000
"""Characters of an error."""
TIMEOUT = 20.0
"""Seconds until a case fails that waits for something."""

Run = Callable[["_Bench"], Awaitable[None]]


class Case(Struct, frozen=True):
    """One case. `name` says what the adapter does in it."""

    name: str
    body: Run

    async def run(self, subject: Subject, directory: Path, *, seconds: float = TIMEOUT) -> None:
        """Run it; files are written to the directory, which is the case's own. Raises AssertionError, also where it is
        not over in so many `seconds`.
        """
        limit = asyncio.timeout(seconds)
        try:
            async with limit, _bench(subject, directory) as bench:
                await self.body(bench)
        except AssertionError:
            raise
        except Exception as error:
            if limit.expired() and isinstance(error, TimeoutError):
                raise AssertionError(f"{self.name}: that was not over after {seconds:g} s") from error
            raise AssertionError(f"{self.name}: {type(error).__name__} ({error}) came of it") from error


def cases(subject: Subject) -> tuple[Case, ...]:
    """The cases for this adapter."""
    return tuple(_cases(subject))


def _cases(subject: Subject) -> Iterator[Case]:
    yield Case("issues a certificate that the agent accepts", _issues)
    yield Case("asks with the CSR as it is", _sends_the_csr)
    yield Case("opens and closes without its CA, and leaves nothing behind", _leaves_nothing)
    yield Case("advertises the CA's anchors, if it advertises any", _advertises)
    for name, wrong, kinds in _WRONG:
        yield Case(f"gives out {name} as it is, for the agent to refuse", _answers(wrong, kinds))
    for fault in Fault:
        if fault not in _HANGS and (fault in BEFORE_HTTP or subject.http):
            yield Case(f"fails in words where the CA {fault.value}", _faults(fault))
    for fault in Fault:
        if fault in _HANGS:
            yield Case(f"ends its connection when it is cancelled and the CA {fault.value}", _cancelled(fault))
    yield Case("issues again after its CA has failed in every way", _recovers)


_UNUSABLE = frozenset({ErrorKind.INVALID, ErrorKind.MISMATCH})
_WRONG: tuple[tuple[str, Callable[[SuiteCa], Sign], frozenset[ErrorKind]], ...] = (
    ("an answer without a certificate", lambda ca: ca.empty, _UNUSABLE),
    ("a certificate for another key", lambda ca: ca.for_another_key, _UNUSABLE),
    ("a certificate without the name", lambda ca: ca.without_name, _UNUSABLE),
    ("a certificate of tomorrow", lambda ca: ca.of_tomorrow, _UNUSABLE),
    ("an expired certificate", lambda ca: ca.expired, _UNUSABLE),
)

_PASSING = frozenset({ErrorKind.TRANSIENT, ErrorKind.THROTTLED})
_ANY = frozenset(ErrorKind)
_HANGS = frozenset({Fault.SILENT, Fault.SILENT_BEHIND_TLS, Fault.DRIPS})
_FAULT_KINDS: dict[Fault, frozenset[ErrorKind]] = {
    # a person has to act where the CA's answers are of another program, or are too large
    Fault.GARBAGE: _PASSING | {ErrorKind.INVALID},
    Fault.NONSENSE: _PASSING | {ErrorKind.INVALID},
    Fault.EMPTY: _PASSING | {ErrorKind.INVALID},
    Fault.HUGE: _PASSING | {ErrorKind.INVALID},
    Fault.REDIRECT: _ANY,
}
"""The kinds that an error may have; for the others of the passing ones."""


def _require(kept: object, otherwise: str) -> None:
    """An assertion that `python -O` does not remove."""
    if not kept:
        raise AssertionError(otherwise)


class _Bench:
    """One adapter before its CA, with the front between them."""

    def __init__(self, subject: Subject, ca: SuiteCa, front: Front, directory: Path) -> None:
        self.subject = subject
        self.ca = ca
        self.front = front
        self.settings = subject.settings(front.address, directory)
        self.context = Context("upstream", TRUST_DOMAIN, directory / "state", SystemClock())
        self.authority: Authority
        self.key: PrivateKey = generate(KeyType.EC_P256)

    def request(self) -> IssueRequest:
        """A request for a new key."""
        self.key = generate(KeyType.EC_P256)
        csr = make_csr(self.key, self.subject.spiffe_id)
        return IssueRequest(SpiffeId.parse(self.subject.spiffe_id), csr, TTL, f"{id(self.key):x}")

    async def issue(self) -> Accepted:
        """A certificate. Raises AuthorityError."""
        return self.check(await self.authority.issue(self.request()))

    def check(self, answer: Issuance) -> Accepted:
        """What the agent accepts of an answer. Raises AuthorityError."""
        return accept(
            answer,
            identity=SpiffeId.parse(self.subject.spiffe_id),
            public_key=self.key.public_key(),
            anchors=(self.ca.root,),
            now=datetime.now(UTC),
        )

    async def refused(self) -> AuthorityError:
        """The error of one attempt, whose words are fit to be shown."""
        try:
            await self.issue()
        except AuthorityError as error:
            self.check_words(error)
            return error
        except Exception as error:
            raise AssertionError(f"the adapter raised {type(error).__name__} in place of an AuthorityError") from error
        raise AssertionError("the adapter reported success, and the agent accepted what it returned")

    def check_words(self, error: AuthorityError) -> None:
        """An error is one short line without a secret, and so is all that it was raised from."""
        said = str(error)
        _require(said, "an error has to say what is wrong")
        _require("\n" not in said, f"an error has to be one line: {said!r}")
        _require(said.isprintable(), f"an error may hold printable characters alone: {said!r}")
        _require(len(said) <= LONGEST_MESSAGE, f"an error of {len(said)} characters")
        shown = "".join(traceback.format_exception(error))
        for secret in self.subject.secrets:
            _require(secret not in shown, "an error, or what it was raised from, shows a secret")


@asynccontextmanager
async def _bench(subject: Subject, directory: Path) -> AsyncIterator[_Bench]:
    kind, ca = registry.kind(subject.kind), SuiteCa(TRUST_DOMAIN)
    async with subject.serving(ca) as behind, Front(behind).serving() as front:
        bench = _Bench(subject, ca, front, directory)
        async with kind.open(bench.settings, bench.context) as authority:
            if not isinstance(authority, Authority):
                raise AssertionError("open has to give an Authority")  # noqa: TRY004 - a case that fails raises this
            bench.authority = authority
            yield bench


async def _issues(bench: _Bench) -> None:
    accepted = await bench.issue()
    _require(accepted.anchors == (bench.ca.root,), "the root of the CA has to be the one anchor")
    _require(bench.ca.intermediate in accepted.chain, "an intermediate is missing")


async def _sends_the_csr(bench: _Bench) -> None:
    request = bench.request()
    await bench.authority.issue(request)
    sent = [csr for csr in bench.ca.csrs if csr == x509.load_pem_x509_csr(request.csr_pem)]
    _require(len(sent) == 1, f"the CA got the agent's CSR {len(sent)} times")


async def _leaves_nothing(bench: _Bench) -> None:
    await bench.front.set(Fault.REFUSES)
    kind, context = registry.kind(bench.subject.kind), bench.context
    before = asyncio.all_tasks()
    async with kind.open(bench.settings, context):
        pass
    left = asyncio.all_tasks() - before
    _require(not left, f"a closed authority left tasks behind: {left}")


async def _advertises(bench: _Bench) -> None:
    if not isinstance(bench.authority, AdvertisesAnchors):
        return
    _require(bench.authority.refresh_every > timedelta(), "refresh_every has to be a time")
    _require(bench.ca.root in read_pem(await bench.authority.anchors()), "the root of the CA is not among its anchors")
    await bench.front.set(Fault.CLOSES)
    try:
        await bench.authority.anchors()
    except AuthorityError as error:
        bench.check_words(error)
    else:
        raise AssertionError("the adapter returned anchors of a CA that did not answer")


def _answers(wrong: Callable[[SuiteCa], Sign], kinds: frozenset[ErrorKind]) -> Run:
    async def run(bench: _Bench) -> None:
        bench.ca.issue = wrong(bench.ca)
        error = await bench.refused()
        _require(error.kind in kinds, f"the error is {error.kind.name} ({error})")

    return run


def _faults(fault: Fault) -> Run:
    async def run(bench: _Bench) -> None:
        await bench.front.set(fault)
        error = await bench.refused()
        _require(not bench.front.believed, f"the adapter sent its request to a server that {fault.value}")
        kinds = _FAULT_KINDS.get(fault, _PASSING)
        _require(error.kind in kinds, f"the error is {error.kind.name} ({error})")
        if fault in {Fault.THROTTLED, Fault.UNAVAILABLE}:
            _require(error.retry_after == RETRY_AFTER, f"Retry-After was read as {error.retry_after}")
        _require(not bench.front.redirected, "the adapter followed a redirect to a host that no configuration names")
        _require(bench.front.sent < HUGE, "the adapter read an answer of 100 MB")
        _require(not bench.ca.csrs, "the CSR came to the CA by another way")

    return run


def _cancelled(fault: Fault) -> Run:
    async def run(bench: _Bench) -> None:
        await bench.front.set(fault)
        await _ends_by_cancellation(bench)

    return run


async def _ends_by_cancellation(bench: _Bench) -> None:
    """The agent enforces its deadline by cancellation: the adapter has to let go of the connection then."""
    before = asyncio.all_tasks()
    attempt = asyncio.create_task(bench.authority.issue(bench.request()))
    connected = asyncio.create_task(bench.front.connected.wait())
    await asyncio.wait([attempt, connected], return_when=asyncio.FIRST_COMPLETED)
    connected.cancel()
    if attempt.done():
        attempt.result()
        raise AssertionError("the adapter answered without its CA")
    attempt.cancel()
    try:
        await attempt
    except asyncio.CancelledError:
        pass
    else:
        raise AssertionError("the adapter swallowed its cancellation")
    await bench.front.left.wait()
    ours = {task for task in asyncio.all_tasks() - before if task is not connected} - bench.front.tasks
    _require(not ours, f"a cancelled attempt left tasks behind: {ours}")


async def _recovers(bench: _Bench) -> None:
    await bench.issue()
    for fault in Fault:
        if fault in _HANGS or not (fault in BEFORE_HTTP or bench.subject.http):
            continue
        await bench.front.set(fault)
        await bench.refused()
    await bench.front.set(None)
    await bench.issue()
