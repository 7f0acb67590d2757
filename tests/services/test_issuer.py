"""The loop that keeps a certificate fresh, against a scripted CA and by a clock that the test moves."""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from datetime import datetime, timedelta
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from fakes.authorities import (
    ODD,
    WRONG,
    Answer,
    Hang,
    ScriptedAuthority,
    Step,
    UpstreamCa,
    answering,
    failing,
    faulty,
    good,
    huge_serial,
    shifted,
)
from fakes.clocks import HAND_LOOP, HandClock
from fakes.events import Event, Events, recorded
from fakes.hierarchy import DAY, HOUR, URI, Ca, common_name, make_ca
from msgspec import structs

from sds_agent import log
from sds_agent.authority.protocol import Authority, ErrorKind, Issuance, IssueRequest
from sds_agent.clock import LONGEST_SLEEP
from sds_agent.identity.spiffe import SpiffeId
from sds_agent.issuance.attempts import AttemptRecord
from sds_agent.issuance.counts import IssuanceCounts
from sds_agent.issuance.failover import DEFAULT_POLICY
from sds_agent.issuance.issuer import Issuer
from sds_agent.issuance.publication import HANDSHAKE, HOLD, PublicationTarget
from sds_agent.issuance.queue import IssuanceQueue
from sds_agent.issuance.requester import CA_TIMEOUT
from sds_agent.issuance.schedule import CurrentLeaf, Renewal
from sds_agent.issuance.source import Upstream
from sds_agent.issuance.status import CertificateEnd, FailureStatus, LeafStatus, WorkloadStatus
from sds_agent.issuance.trust import Trust
from sds_agent.issuance.workload import Workload
from sds_agent.live.assembly import Issuing
from sds_agent.live.workloads import RunningWorkloads
from sds_agent.log import timestamp
from sds_agent.pki.certificates import has_key, read_pem, serial_hex, write_pem
from sds_agent.pki.keys import KeyType, PublicKey, describe_key
from sds_agent.secrets.model import BundleSecret, CertificateSecret
from sds_agent.secrets.store import SecretStore
from sds_agent.tasks import background_tasks

SECOND = timedelta(seconds=1)
MINUTE = timedelta(minutes=1)
TICK = timedelta(seconds=LONGEST_SLEEP)
ANSWER_BY = timedelta(seconds=CA_TIMEOUT)
NAMES = ("default", URI)
PASSING = [ErrorKind.TRANSIENT, ErrorKind.THROTTLED, ErrorKind.PENDING]
REFUSED = [ErrorKind.UNAUTHENTICATED, ErrorKind.DENIED, ErrorKind.INVALID, ErrorKind.MISMATCH]


def workload(number: int | None = None, *, ttl: timedelta = HOUR, key: KeyType = KeyType.EC_P256) -> Workload:
    """The one workload, or one of many."""
    if number is None:
        return Workload("default", SpiffeId.parse(URI), key, ttl, "upstream", NAMES)
    uri = f"spiffe://demo.example/w{number}"
    return Workload(f"w{number}", SpiffeId.parse(uri), key, ttl, "upstream", (f"w{number}", uri))


DEFAULT = workload()


class Bench:
    """What issuers work with."""

    def __init__(self, events: Events) -> None:
        self.events = events
        self.clock = HandClock()
        self.ca = UpstreamCa(self.clock.now)
        self.store = SecretStore([*NAMES, "ROOTCA"])
        self.trust = Trust(self.store, ["ROOTCA"], self.clock)
        self.queue = IssuanceQueue()
        self.issuers: list[Issuer] = []

    def issuer(
        self, authority: Authority, workload: Workload, *, randomness: float = 0.5, renewal: Renewal | None = None
    ) -> Issuer:
        """An issuer that renews at exactly half the lifetime, unless given another share."""
        issuer = Issuer(
            structs.replace(workload, renewal=renewal or Renewal(jitter=0)),
            Upstream(authority, self.queue),
            PublicationTarget(self.store, self.trust),
            clock=self.clock,
            randomness=lambda: randomness,
        )
        self.issuers.append(issuer)
        return issuer

    @asynccontextmanager
    async def issuing(
        self, *script: Step, workload: Workload = DEFAULT, randomness: float = 0.5, renewal: Renewal | None = None
    ) -> AsyncIterator[ScriptedAuthority]:
        """One workload, whose certificate is renewed inside this context."""
        authority = ScriptedAuthority(*script)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self.issuer(authority, workload, randomness=randomness, renewal=renewal).run)
            yield authority
            tasks.cancel_scope.cancel()

    def good(self) -> Step:
        """The step that gives what was asked for."""
        return answering(self.ca)

    @property
    def served(self) -> CertificateSecret | None:
        """What an Envoy would be given, the same under both names."""
        secret, other = (self.store.snapshot[name] for name in NAMES)
        assert secret is other
        assert not isinstance(secret, BundleSecret)
        return secret

    @property
    def anchors(self) -> set[x509.Certificate]:
        """What the bundle has in it."""
        bundle = self.store.snapshot["ROOTCA"]
        assert isinstance(bundle, BundleSecret)
        return set(read_pem(bundle.anchors_pem))

    @property
    def leaf(self) -> x509.Certificate:
        """The leaf that is served. Its key has to be the one served with it."""
        assert self.served is not None
        leaf = read_pem(self.served.chain_pem)[0]
        key = load_pem_private_key(self.served.private_key_pem, None).public_key()
        assert isinstance(key, PublicKey)
        assert has_key(leaf, key)
        return leaf

    @property
    def status(self) -> WorkloadStatus:
        """What can be seen of the first workload."""
        return self.issuers[0].status

    async def settled(self) -> None:
        """Wait until no attempt is under way and every issuer sleeps: there is nothing to do but to let time pass."""
        with anyio.fail_after(10):
            while any(issuer.status.attempt for issuer in self.issuers):
                await checkpoint()
            await self.clock.asleep(len(self.issuers))

    async def queued(self, count: int) -> None:
        """Wait until so many attempts wait for their turn."""
        with anyio.fail_after(10):
            while [issuer.status.attempt for issuer in self.issuers].count("queued") < count:
                await checkpoint()
            await anyio.wait_all_tasks_blocked()  # those that have been begun are in the queue

    async def issued(self, count: int = 1) -> Event:
        """Wait for the count-th certificate."""
        return await (self.events.wait("issued") if count == 1 else self.events.wait("renewed", count=count - 1))

    async def anchor_loaded(self) -> None:
        """Let the time pass in which peers load the anchor of the certificate that is held back."""
        await self.events.wait("held_back")
        await self.settled()
        self.clock.elapse(HANDSHAKE)

    async def retrying(self, count: int = 1) -> Event:
        """Wait for the count-th failed attempt."""
        return await self.events.wait("retrying", count=count)


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return HAND_LOOP


@pytest.fixture
def bench() -> Iterator[Bench]:
    with recorded() as events:
        yield Bench(events)


# --- the usual course ---


async def test_a_certificate_is_issued_and_served_under_all_its_names(bench: Bench) -> None:
    async with bench.issuing(bench.good()) as authority:
        event = await bench.issued()
        assert bench.leaf.not_valid_after_utc == bench.clock.now() + HOUR
        assert event["serial"] == f"{bench.leaf.serial_number:x}"
        assert event["spiffe_id"] == URI
        assert event["authority"] == "upstream"
        request = authority.requests[0]
        assert (str(request.identity), request.ttl, request.current) == (URI, HOUR, None)


@pytest.mark.parametrize("key", [KeyType.EC_P256, KeyType.EC_P384, KeyType.RSA_2048])
async def test_the_key_is_of_the_kind_that_was_configured(bench: Bench, key: KeyType) -> None:
    async with bench.issuing(bench.good(), workload=workload(key=key)):
        await bench.issued()
        public_key = bench.leaf.public_key()
        assert isinstance(public_key, PublicKey)
        name = public_key.curve.name if hasattr(public_key, "curve") else f"rsa-{public_key.key_size}"
        assert name == {"ec-p256": "secp256r1", "ec-p384": "secp384r1", "rsa-2048": "rsa-2048"}[key]


async def test_it_is_renewed_at_half_its_life_with_a_new_key_and_never_missing(bench: Bench) -> None:
    served: list[CertificateSecret | None] = []
    async with bench.issuing(bench.good()) as authority:
        await bench.issued()
        first, secret = bench.leaf, bench.served
        assert secret is not None
        with bench.store.watching(lambda _names: served.append(bench.served)):
            await bench.settled()
            bench.clock.elapse(HOUR / 2 - SECOND)
            await bench.settled()
            assert len(authority.requests) == 1
            bench.clock.elapse(SECOND)
            await bench.issued(2)
        second = bench.leaf
        assert first.serial_number != second.serial_number
        assert first.public_key() != second.public_key()
        assert served == [bench.served]
        asked, again = authority.requests
        assert asked.csr_pem != again.csr_pem
        assert asked.request_id != again.request_id
        assert again.current is not None
        assert again.current.chain_pem == secret.chain_pem
        assert again.current.private_key_pem == secret.private_key_pem


async def test_a_new_root_is_served_before_the_first_leaf_from_it(bench: Bench) -> None:
    """The other way round, peers would refuse the leaf until their bundle came."""
    reported: list[frozenset[str]] = []
    with bench.store.watching(reported.append):
        async with bench.issuing(bench.good(), answering(UpstreamCa(bench.clock.now, "new"))):
            await bench.issued()
            await bench.settled()
            bench.clock.elapse(HOUR / 2)
            await bench.anchor_loaded()
            await bench.issued(2)
    assert reported == [{"ROOTCA"}, set(NAMES)] * 2


@pytest.mark.parametrize("end", ["acknowledged", "left", "silent"])
async def test_a_leaf_below_a_new_root_waits_until_every_envoy_has_loaded_the_root(bench: Bench, end: str) -> None:
    """Each secret has a stream of its own: without waiting, an Envoy meets the leaf of a peer before the root."""
    noted = bench.store.acknowledgements

    def version() -> str:
        bundle = bench.store.snapshot["ROOTCA"]
        assert bundle is not None
        return bundle.version

    async with bench.issuing(bench.good(), answering(UpstreamCa(bench.clock.now, "new"))):
        await bench.issued()
        noted.note("an Envoy", {"ROOTCA": version()})
        await bench.settled()
        bench.clock.elapse(HOUR / 2)
        held = await bench.events.wait("held_back")
        assert (held["cause"], held["serving"]) == (
            "Envoys load its new trust anchor first",
            "the certificate before it",
        )
        before = bench.served
        for _ in range(4):
            await bench.settled()
            bench.clock.elapse(2 * SECOND)
            await anyio.wait_all_tasks_blocked()
            assert bench.served is before
        await bench.settled()
        if end == "silent":
            bench.clock.elapse(HOLD - 8 * SECOND)
        else:
            noted.note("an Envoy", {"ROOTCA": version()} if end == "acknowledged" else {})
            with anyio.fail_after(10):
                while not bench.clock.sleepers or bench.clock.next_wake != HANDSHAKE:
                    await checkpoint()
            assert bench.served is before, "a handshake that has begun goes on with the bundle before"
            bench.clock.elapse(HANDSHAKE)
        await bench.issued(2)


async def test_the_first_leaf_below_a_new_root_goes_out_at_once_if_nothing_valid_is_served(bench: Bench) -> None:
    bench.trust.update("another", (make_ca("another").certificate,))
    bench.store.acknowledgements.note("an Envoy", {"ROOTCA": ""})
    async with bench.issuing(bench.good(), failing(ErrorKind.TRANSIENT), answering(UpstreamCa(bench.clock.now, "new"))):
        await bench.issued()
        await bench.settled()
        bench.clock.elapse(HOUR)
        await bench.events.wait("expired")
        await bench.retrying()
        await bench.settled()
        bench.clock.elapse(MINUTE)
        await bench.issued(2)
        assert bench.events.named("held_back") == []


async def test_a_leaf_below_a_root_that_the_bundle_has_had_for_a_while_waits_for_nothing(bench: Bench) -> None:
    """As where an authority tells its next root before it signs with it."""
    new = UpstreamCa(bench.clock.now, "new")
    async with bench.issuing(bench.good(), answering(new)):
        await bench.issued()
        await bench.settled()
        bench.trust.update("upstream", (bench.ca.root.certificate, new.root.certificate))
        bench.store.acknowledgements.note("an Envoy that never replies", {"ROOTCA": ""})
        bench.clock.elapse(HOUR / 2)
        await bench.issued(2)
        assert bench.events.named("held_back") == []


async def test_a_leaf_waits_though_its_root_came_into_the_bundle_a_moment_before_it(bench: Bench) -> None:
    """As where the roots are refreshed right before a renewal: the Envoys have not loaded them yet."""
    new = UpstreamCa(bench.clock.now, "new")
    async with bench.issuing(bench.good(), answering(new)):
        await bench.issued()
        await bench.settled()
        bench.clock.elapse(HOUR / 2 - SECOND)
        bench.trust.update("upstream", (bench.ca.root.certificate, new.root.certificate))
        bench.store.acknowledgements.note("an Envoy", {"ROOTCA": ""})
        await bench.settled()
        bench.clock.elapse(SECOND)
        held = await bench.events.wait("held_back")
        assert held["publish_at"] == timestamp(bench.clock.now() + HOLD)


async def test_a_short_backdated_leaf_is_renewed_in_the_middle_of_its_life(bench: Bench) -> None:
    async with bench.issuing(bench.good(), workload=workload(ttl=20 * SECOND), renewal=Renewal()) as authority:
        await bench.issued()
        await bench.settled()
        bench.clock.elapse(9 * SECOND - SECOND / 100)
        await bench.settled()
        assert len(authority.requests) == 1
        bench.clock.elapse(2 * SECOND + SECOND / 50)
        await bench.issued(2)


async def test_a_certificate_that_came_late_is_renewed_when_one_in_time_would_be(bench: Bench) -> None:
    """All the agents that wait for the end of an outage would ask together from then on."""
    renewal = Renewal(jitter=1e-9)
    script = (bench.good(), failing(ErrorKind.THROTTLED, "later", retry_after=600), bench.good(), bench.good())
    async with bench.issuing(*script, renewal=renewal):
        first = await bench.issued()
        due = datetime.fromisoformat(str(first["renew_at"]))
        await bench.settled()
        bench.clock.elapse(due + SECOND - bench.clock.now())
        await bench.events.wait("retrying")
        await bench.settled()
        bench.clock.elapse(timedelta(minutes=10))
        second = await bench.issued(2)
        assert abs(datetime.fromisoformat(str(second["renew_at"])) - (due + HOUR / 2)) <= SECOND


async def test_renewals_leave_no_tasks_behind_and_no_certificate_that_has_ended(bench: Bench) -> None:
    async with bench.issuing(bench.good()):
        await bench.issued()
        await bench.settled()
        tasks = len(asyncio.all_tasks())
        for count in range(2, 22):
            await bench.settled()
            bench.clock.elapse(HOUR / 2)
            await bench.issued(count)
        await bench.settled()
        assert len(asyncio.all_tasks()) == tasks
        assert bench.clock.sleepers == 1
        assert len(bench.status.earlier) == 1


@pytest.mark.parametrize("answer", ODD.values(), ids=ODD)
async def test_an_odd_answer_is_served_in_order_and_without_roots(bench: Bench, answer: Answer) -> None:
    async with bench.issuing(answering(bench.ca, answer)):
        await bench.issued()
        assert bench.served is not None
        chain = read_pem(bench.served.chain_pem)
        assert chain == (bench.leaf, bench.ca.lower.certificate, bench.ca.upper.certificate)
        bundle = bench.store.snapshot["ROOTCA"]
        assert isinstance(bundle, BundleSecret)
        assert read_pem(bundle.anchors_pem) == (bench.ca.root.certificate,)


async def test_known_anchors_count_where_the_ca_sends_none_with_its_answer(bench: Bench) -> None:
    def without_anchors(ca: UpstreamCa, request: IssueRequest) -> Issuance:
        return Issuance(good(ca, request).chain_pem)

    async with bench.issuing(answering(bench.ca, without_anchors)):
        assert "none are configured" in (await bench.retrying())["cause"]
        bench.trust.update("another", (bench.ca.root.certificate,))
        bench.clock.elapse(MINUTE)
        assert "none are configured" in (await bench.retrying(2))["cause"]
        bench.trust.update("upstream", (bench.ca.root.certificate,))
        bench.clock.elapse(MINUTE)
        await bench.issued()


async def test_a_ca_that_changes_its_root_between_two_renewals_leaves_both_trusted(bench: Bench) -> None:
    """Until then another workload's certificate, and who still has the old one in use, would be refused."""
    after = UpstreamCa(bench.clock.now, "new")
    old, new = bench.ca.root.certificate, after.root.certificate
    async with bench.issuing(bench.good(), answering(after)):
        await bench.issued()
        await bench.settled()
        bench.clock.elapse(HOUR / 2)
        await bench.anchor_loaded()
        await bench.issued(2)
        bench.clock.set_wall(-MINUTE)
        for time in (TICK, HOUR / 2 + MINUTE - 2 * TICK - HANDSHAKE):
            await bench.settled()
            bench.clock.elapse(time)
            await bench.settled()
            assert bench.anchors == {old, new}
        bench.clock.elapse(TICK)
        await bench.events.wait("trust_changed", count=3)
        assert bench.anchors == {new}


async def test_an_expired_certificate_keeps_no_anchor_that_its_ca_advertises_no_more(bench: Bench) -> None:
    """A root that was withdrawn would be trusted for as long as its CA answers nothing."""
    async with bench.issuing(bench.good(), failing(ErrorKind.DENIED, "no more")):
        await bench.issued()
        new = make_ca("new").certificate
        bench.trust.update("upstream", (new,))
        assert bench.anchors == {bench.ca.root.certificate, new}
        await bench.settled()
        bench.clock.elapse(HOUR)
        await bench.events.wait("expired")
        assert bench.anchors == {new}


async def test_a_serial_number_of_any_size_is_served(bench: Bench) -> None:
    """A CA's whim must not end the agent and all its workloads."""
    async with bench.issuing(answering(bench.ca, huge_serial)):
        await bench.issued()
        assert bench.leaf.serial_number.bit_length() > 256
        await bench.settled()


async def test_a_chain_lives_as_long_as_its_first_certificate_to_expire(bench: Bench) -> None:
    """A leaf is worthless from the moment its intermediate is."""
    short = make_ca("short", bench.ca.root, not_before=bench.clock.now(), not_after=bench.clock.now() + HOUR / 4)

    def under_short(ca: UpstreamCa, request: IssueRequest) -> Issuance:
        return ca.issuance(ca.leaf(request, issuer=short), short.certificate)

    async with bench.issuing(answering(bench.ca, under_short), failing(ErrorKind.TRANSIENT)):
        event = await bench.issued()
        assert bench.served is not None
        assert bench.served.not_after == bench.clock.now() + HOUR / 4
        assert event["not_after"] == "2026-03-14T15:24:26.000Z"
        assert event["renew_at"] == "2026-03-14T15:16:56.000Z"
        await bench.settled()
        bench.clock.elapse(HOUR / 8)
        await bench.retrying()
        await bench.settled()
        bench.clock.elapse(HOUR / 8)
        await bench.events.wait("expired")
        assert bench.served is None


async def test_the_cas_warnings_are_logged(bench: Bench) -> None:
    async with bench.issuing(answering(bench.ca, shifted(30 * SECOND, HOUR))):
        event = await bench.events.wait("ca_warning")
        assert event["warning"] == "the certificate is valid only in 30 s: the CA's clock is ahead of this one"
        assert event["level"] == "warning"


# --- a CA whose clock is ahead ---


def ahead(ca: UpstreamCa) -> Step:
    """A CA whose clock is 40 s ahead, and that does not backdate."""
    return answering(ca, shifted(40 * SECOND, HOUR))


async def test_a_certificate_that_is_not_valid_yet_replaces_none_that_is(bench: Bench) -> None:
    """Every request would fail until its NotBefore. The new root goes out at once all the same."""
    new = UpstreamCa(bench.clock.now, "new")
    async with bench.issuing(bench.good(), ahead(new)) as authority:
        await bench.issued()
        before = bench.served
        await bench.settled()
        bench.clock.elapse(HOUR / 2)
        event = await bench.events.wait("held_back")
        assert (event["level"], event["serving"]) == ("warning", "the certificate before it")
        assert (event["not_before"], event["publish_at"]) == ("2026-03-14T15:40:06.000Z", "2026-03-14T15:40:36.000Z")
        assert bench.anchors == {bench.ca.root.certificate, new.root.certificate}
        await bench.settled()
        bench.clock.elapse(70 * SECOND - SECOND)
        await bench.settled()
        assert bench.served == before
        bench.clock.elapse(SECOND)
        await bench.issued(2)
        assert bench.leaf.not_valid_before_utc == bench.clock.now() - 30 * SECOND
        assert len(authority.requests) == 2


async def test_a_first_certificate_that_is_not_valid_yet_is_given_to_no_envoy(bench: Bench) -> None:
    """The agent would call itself ready, and Envoys begin to fail where they would have waited."""
    async with bench.issuing(ahead(bench.ca)) as authority:
        event = await bench.events.wait("held_back")
        assert (event["level"], event["serving"]) == ("warning", "nothing")
        assert bench.served is None
        assert bench.anchors == {bench.ca.root.certificate}
        await bench.settled()
        assert bench.clock.next_wake == TICK
        bench.clock.elapse(40 * SECOND - TICK)
        await bench.settled()
        assert bench.served is None
        bench.clock.elapse(TICK)
        await bench.issued()
        assert bench.leaf.not_valid_before_utc == bench.clock.now()
        assert len(authority.requests) == 1


async def test_a_certificate_is_withheld_at_its_end_while_the_next_one_is_asked_for(bench: Bench) -> None:
    async with bench.issuing(answering(bench.ca, shifted(-DAY, MINUTE)), Hang(ahead(bench.ca))) as authority:
        await bench.issued()
        await bench.settled()
        bench.clock.elapse(MINUTE / 2)
        await authority.asked(2)
        bench.clock.elapse(MINUTE / 2)
        await bench.events.wait("expired")
        assert bench.served is None


# --- while an attempt is under way ---


class Stubborn(Hang):
    """An adapter that does not even end when it is cancelled, as one that waits for a thread of its own."""

    async def __call__(self, request: IssueRequest) -> Issuance:
        while not self.release.is_set():
            with suppress(asyncio.CancelledError):
                await self.release.wait()
        return await self._then(request)


@asynccontextmanager
async def released(hang: Hang) -> AsyncIterator[Hang]:
    """Let an adapter hang inside this context and no longer: the end of its issuer waits for it."""
    try:
        yield hang
    finally:
        hang.release.set()


@asynccontextmanager
async def hanging(bench: Bench, hang: Hang) -> AsyncIterator[ScriptedAuthority]:
    """A workload with a certificate of an hour whose renewal hangs, whatever happens to it."""
    async with bench.issuing(bench.good(), hang) as authority, released(hang):
        await bench.issued()
        await bench.settled()
        bench.clock.elapse(HOUR / 2)
        await authority.asked(2)
        await bench.clock.asleep()
        yield authority


@pytest.mark.parametrize("kind", [Hang, Stubborn])
async def test_a_certificate_is_withheld_at_its_end_though_the_ca_hangs(bench: Bench, kind: type[Hang]) -> None:
    """An Envoy that connects would be given a certificate that every peer refuses, for as long as the CA pleases."""
    async with hanging(bench, kind(bench.good())):
        bench.clock.elapse(HOUR / 2 - SECOND)
        await bench.clock.asleep()
        assert bench.served is not None
        assert bench.status.served
        bench.clock.elapse(SECOND)
        await bench.events.wait("expired")
        assert bench.served is None
        assert not bench.status.served


async def test_a_certificate_is_withheld_at_its_end_though_its_renewal_waits_for_its_turn(bench: Bench) -> None:
    """Behind others of a CA that hangs, for as long as their deadlines take."""
    bench.queue = IssuanceQueue(1)
    async with bench.issuing(bench.good()) as authority:
        await bench.issued()
        await bench.settled()
        async with bench.queue.slot(lambda: (False, bench.clock.now())):
            bench.clock.elapse(HOUR / 2)
            await bench.queued(1)
            bench.clock.elapse(HOUR / 2)
            await bench.events.wait("expired")
            assert bench.served is None
            assert len(authority.requests) == 1
        await bench.issued(2)
        assert bench.served is not None


async def test_a_certificate_that_is_valid_again_is_offered_though_the_ca_hangs(bench: Bench) -> None:
    async with hanging(bench, Stubborn(bench.good())):
        secret = bench.served
        bench.clock.set_wall(HOUR)
        bench.clock.elapse(TICK)
        await bench.events.wait("expired")
        await bench.clock.asleep()
        bench.clock.set_wall(-HOUR)
        bench.clock.elapse(TICK)
        await bench.events.wait("valid_again")
        assert bench.served == secret


async def test_one_that_waits_for_its_not_before_is_published_though_the_ca_hangs(bench: Bench) -> None:
    """The first is about to end, the second has been waiting for its time, and the third is asked for already."""
    short = answering(bench.ca, shifted(-DAY, 20 * SECOND))
    stubborn = Stubborn(bench.good())
    coming = answering(bench.ca, shifted(40 * SECOND, MINUTE + 2 * SECOND))
    async with bench.issuing(short, coming, stubborn) as authority, released(stubborn):
        await bench.issued()
        await bench.settled()
        bench.clock.elapse(10 * SECOND)
        await bench.events.wait("held_back")
        await bench.settled()
        assert [leaf.valid_from for leaf in bench.status.coming] == [bench.clock.now() + 40 * SECOND]
        bench.clock.elapse(31 * SECOND)  # half of the life that it will have
        await authority.asked(3)
        await bench.clock.asleep()
        bench.clock.elapse(9 * SECOND)
        await bench.issued(2)
        assert bench.status.served
        assert bench.status.attempt == "asking"


async def test_the_anchors_of_an_earlier_certificate_go_at_its_end_though_the_ca_hangs(bench: Bench) -> None:
    new = UpstreamCa(bench.clock.now, "new")
    stubborn = Stubborn(bench.good())
    script = (bench.good(), answering(new, shifted(-DAY, HOUR / 4)), stubborn)
    async with bench.issuing(*script) as authority, released(stubborn):
        await bench.issued()
        await bench.settled()
        bench.clock.elapse(HOUR / 2)
        await bench.anchor_loaded()
        await bench.issued(2)
        assert bench.anchors == {bench.ca.root.certificate, new.root.certificate}
        await bench.settled()
        bench.clock.elapse(HOUR / 8)
        await authority.asked(3)
        await bench.clock.asleep()
        bench.clock.elapse(HOUR / 2 - HOUR / 8 - HANDSHAKE)
        await bench.events.wait("trust_changed", count=3)
        assert bench.anchors == {new.root.certificate}
        assert bench.status.earlier == ()


async def test_of_two_earlier_certificates_each_is_released_at_its_own_end(bench: Bench) -> None:
    new = UpstreamCa(bench.clock.now, "new")
    async with bench.issuing(bench.good(), answering(new, shifted(-DAY, HOUR / 4)), bench.good()):
        await bench.issued()
        first = bench.status.current
        for count, time in enumerate((HOUR / 2, HOUR / 8), start=2):
            await bench.settled()
            bench.clock.elapse(time)
            if count == 2:
                await bench.anchor_loaded()
            await bench.issued(count)
        assert [leaf.valid_until for leaf in bench.status.earlier] == [
            bench.clock.now() + HOUR / 2 - HOUR / 8 - HANDSHAKE,
            bench.clock.now() + HOUR / 8 - HANDSHAKE,
        ]
        await bench.settled()
        bench.clock.elapse(HOUR / 8)
        await bench.settled()
        assert bench.status.earlier == (first,)
        assert bench.anchors == {bench.ca.root.certificate}


async def test_an_adapter_whose_own_task_was_cancelled_is_asked_again(bench: Bench) -> None:
    """Its CancelledError could be taken for the end of the agent; then the workload would never be renewed again."""

    async def cancelled(_request: IssueRequest) -> Issuance:
        raise asyncio.CancelledError

    async with bench.issuing(cancelled, bench.good()):
        event = await bench.retrying()
        assert (event["kind"], "failed with CancelledError" in event["cause"]) == ("invalid", True)
        bench.clock.elapse(MINUTE)
        await bench.issued()


async def test_a_clock_set_back_before_the_publication_asks_anew(bench: Bench) -> None:
    """To wait for a day for what was valid in a moment would leave the Envoys with nothing."""
    async with bench.issuing(ahead(bench.ca), bench.good()):
        await bench.events.wait("held_back")
        await bench.settled()
        bench.clock.set_wall(-DAY)
        bench.clock.elapse(TICK)
        await bench.issued()
        assert bench.leaf.not_valid_after_utc == bench.clock.now() + HOUR
        await bench.settled()
        ends = {each.until for each in bench.trust.needed}
        assert ends == {bench.leaf.not_valid_after_utc}, "nothing is needed for the one that was overtaken"


# --- a CA that ends ---


def ending(bench: Bench, rest: timedelta) -> tuple[Ca, Step]:
    """A root with so much life left, and the step that gives a certificate of an hour below it."""
    root = make_ca("short", not_before=bench.clock.now() - DAY, not_after=bench.clock.now() + rest)

    def answer(ca: UpstreamCa, request: IssueRequest) -> Issuance:
        return Issuance(write_pem([ca.leaf(request, issuer=root)]), write_pem([root.certificate]))

    return root, answering(bench.ca, answer)


async def test_a_root_that_ends_first_decides_on_renewal_and_end_and_is_named(bench: Bench) -> None:
    """All is green otherwise until the root ends, and from then on every handshake fails."""
    _, step = ending(bench, MINUTE)
    async with bench.issuing(step, failing(ErrorKind.TRANSIENT)):
        event = await bench.issued()
        assert (event["not_after"], event["renew_at"]) == ("2026-03-14T15:10:26.000Z", "2026-03-14T15:09:56.000Z")
        warning = bench.events.named("ca_warning", level="warning")[0]["warning"]
        assert warning.startswith("the trust anchor 'CN=short' ends at 2026-03-14T15:10:26Z")
        await bench.settled()
        bench.clock.elapse(MINUTE)
        await bench.events.wait("expired")
        assert bench.served is None


async def test_a_root_that_ends_makes_no_hot_loop(bench: Bench) -> None:
    """Each renewal brings the same end: half of what is left is waited for, and a second at least."""
    _, step = ending(bench, HOUR)
    async with bench.issuing(step, randomness=0.999) as authority:
        await bench.issued()
        await bench.settled()
        end = bench.clock.now() + HOUR
        while bench.clock.now() < end:
            bench.clock.elapse(bench.clock.next_wake)
            for _ in range(50):
                await checkpoint()
        await bench.events.wait("expired")
        assert 12 <= len(authority.requests) <= 16


async def test_a_root_that_was_renewed_in_the_meantime_lets_the_certificate_live_on(bench: Bench) -> None:
    root, step = ending(bench, MINUTE)
    async with bench.issuing(step, failing(ErrorKind.TRANSIENT)):
        await bench.issued()
        await bench.settled()
        renewed = make_ca("short", key=root.key)
        bench.trust.update("upstream", (root.certificate, renewed.certificate))
        bench.clock.elapse(MINUTE)
        await bench.settled()
        assert bench.served is not None


async def test_a_certificate_that_ended_with_its_root_is_offered_again_when_the_root_is_renewed(bench: Bench) -> None:
    """Within seconds, though no attempt succeeds: the CA that renewed its root need not issue."""
    root, step = ending(bench, MINUTE)
    async with bench.issuing(step, failing(ErrorKind.DENIED)):
        await bench.issued()
        await bench.settled()
        bench.clock.elapse(MINUTE)
        await bench.events.wait("expired")
        await bench.settled()
        renewed = make_ca("short", key=root.key)
        bench.trust.update("upstream", (root.certificate, renewed.certificate))
        bench.clock.elapse(TICK)
        await bench.events.wait("valid_again")
        assert bench.served is not None
        assert bench.status.current is not None
        assert bench.status.current.valid_until == bench.status.current.not_after


# --- what can be seen ---


def end(certificate: x509.Certificate) -> CertificateEnd:
    return CertificateEnd(
        repr(certificate.subject.rfc4514_string()),
        serial_hex(certificate),
        certificate.not_valid_before_utc,
        certificate.not_valid_after_utc,
        repr(certificate.issuer.rfc4514_string()),
        describe_key(certificate.public_key()),
    )


async def test_the_status_shows_the_certificates_and_the_attempts(bench: Bench) -> None:
    down = failing(ErrorKind.DENIED, "go away")
    async with bench.issuing(bench.good(), down, ahead(bench.ca)):
        assert bench.status == WorkloadStatus("default", URI, "upstream")
        assert bench.issuers[0].ends is None
        await bench.issued()
        now, leaf = bench.clock.now(), bench.leaf
        current = LeafStatus(
            serial=f"{leaf.serial_number:x}",
            issued_at=now,
            not_before=leaf.not_valid_before_utc,
            not_after=now + HOUR,
            valid_from=leaf.not_valid_before_utc,
            valid_until=now + HOUR,
            ends_with=repr(URI),
            renew_at=now + HOUR / 2,
            authority="upstream",
            intermediates=(end(bench.ca.lower.certificate), end(bench.ca.upper.certificate)),
            anchor=end(bench.ca.root.certificate),
            subject=repr(URI),
            issuer=repr(bench.ca.lower.certificate.subject.rfc4514_string()),
            key="EC secp256r1",
        )
        assert bench.status == WorkloadStatus("default", URI, "upstream", current, served=True)
        assert bench.status.renew_at == now + HOUR / 2
        assert bench.issuers[0].ends == (
            CurrentLeaf(now, current.valid_from, current.valid_until, current.serial),
            current.intermediates,
        )
        await bench.settled()
        bench.clock.elapse(HOUR / 2)
        await bench.retrying()
        failed = now + HOUR / 2
        failure = FailureStatus(ErrorKind.DENIED, failed, 1, failed + 7.5 * SECOND, "go away")
        assert bench.status == WorkloadStatus("default", URI, "upstream", current, served=True, failure=failure)
        await bench.settled()
        bench.clock.elapse(8 * SECOND)
        await bench.events.wait("held_back")
        status = bench.status
        assert (status.current, status.failure) == (current, None)
        assert [leaf.valid_from for leaf in status.coming] == [bench.clock.now() + 40 * SECOND]
        assert status.renew_at == status.coming[0].renew_at


async def test_the_status_names_a_certificate_by_the_subject_that_its_ca_gave_it(bench: Bench) -> None:
    def answer(ca: UpstreamCa, request: IssueRequest) -> Issuance:
        return ca.under(ca.leaf(request, subject=common_name("web.example")))

    async with bench.issuing(answering(bench.ca, answer)):
        await bench.issued()
        current = bench.status.current
        assert current is not None
        assert (current.subject, current.ends_with) == ("'CN=web.example'", "'CN=web.example'")


async def test_the_status_names_what_ends_first(bench: Bench) -> None:
    _, step = ending(bench, MINUTE)
    async with bench.issuing(step):
        await bench.issued()
        current = bench.status.current
        assert current is not None
        assert (current.valid_until, current.ends_with) == (bench.clock.now() + MINUTE, "'CN=short'")
        assert current.not_after == bench.clock.now() + HOUR


# --- answers that are wrong ---


@pytest.mark.parametrize(("answer", "kind"), WRONG.values(), ids=WRONG)
async def test_a_wrong_answer_is_never_served_and_the_next_good_one_is(
    bench: Bench, answer: Answer, kind: ErrorKind
) -> None:
    wrong = answering(bench.ca, answer)
    async with bench.issuing(wrong, bench.good(), wrong, bench.good()):
        event = await bench.retrying()
        assert event["kind"] == kind.value
        assert (event["level"], event["serving"]) == ("error", "nothing")
        assert set(bench.store.snapshot.values()) == {None}
        bench.clock.elapse(MINUTE)
        await bench.issued()
        before = bench.store.snapshot
        await bench.settled()
        bench.clock.elapse(HOUR / 2)
        event = await bench.retrying(2)
        assert (event["kind"], event["serving"]) == (kind.value, "the current certificate")
        assert bench.store.snapshot is before
        bench.clock.elapse(MINUTE)
        await bench.issued(2)
        assert bench.store.snapshot["default"] != before["default"]


async def test_a_bug_in_an_adapter_is_reported_and_does_not_end_the_agent(bench: Bench) -> None:
    async with bench.issuing(faulty, bench.good()):
        event = await bench.retrying()
        assert event["kind"] == "invalid"
        assert event["cause"] == (
            "the adapter of authority 'upstream' failed with KeyError; please report the event fault in the log"
        )
        (fault,) = bench.events.named("fault", level="error", part="authority upstream", type="KeyError")
        assert fault["at"].startswith("fakes/authorities.py:")
        assert any("sds_agent.issuance.requester:" in frame for frame in fault["frames"])
        bench.clock.elapse(MINUTE)
        await bench.issued()


@pytest.mark.parametrize("rest", [SECOND, 2 * SECOND, 5 * SECOND])
async def test_leaves_that_are_about_to_expire_make_no_hot_loop(bench: Bench, rest: timedelta) -> None:
    """They are past their renewal time when they come. Asking without pause would bring nothing but such ones."""
    async with bench.issuing(answering(bench.ca, shifted(-DAY, rest))) as authority:
        await bench.issued()
        for _ in range(40):
            await bench.settled()
            bench.clock.elapse(SECOND / 4)
        await bench.settled()
        assert 2 <= len(authority.requests) <= 11


# --- an outage ---


async def test_a_failing_renewal_withdraws_nothing_until_the_expiry(bench: Bench) -> None:
    """Elsewhere an outage of the CA takes a good certificate from every Envoy that restarts in it."""
    async with bench.issuing(bench.good(), failing(ErrorKind.TRANSIENT, "down")):
        await bench.issued()
        expiry = bench.leaf.not_valid_after_utc
        secret = bench.served
        failures = 0
        while bench.clock.now() < expiry - SECOND:
            await bench.settled()
            bench.clock.elapse(min(SECOND * 10, expiry - SECOND - bench.clock.now()))
            assert bench.served == secret
            failures = len(bench.events.named("retrying"))
        assert failures > 30
        bench.clock.elapse(SECOND)
        event = await bench.events.wait("expired")
        assert event["level"] == "error"
        assert bench.served is None
        assert bench.store.snapshot["ROOTCA"] is not None


async def test_what_has_expired_is_given_out_again_when_it_is_renewed(bench: Bench) -> None:
    down = Hang(answering(bench.ca))
    async with bench.issuing(bench.good(), failing(ErrorKind.TRANSIENT), down):
        await bench.issued()
        await bench.settled()
        bench.clock.elapse(HOUR / 2)
        await bench.retrying()
        bench.clock.elapse(HOUR / 2)
        await bench.events.wait("expired")
        assert bench.served is None
        down.release.set()
        await bench.issued(2)
        assert bench.leaf.not_valid_after_utc == bench.clock.now() + HOUR


async def test_the_log_becomes_loud_when_little_life_is_left(bench: Bench) -> None:
    async with bench.issuing(bench.good(), failing(ErrorKind.TRANSIENT, "down")):
        await bench.issued()
        await bench.settled()
        bench.clock.elapse(HOUR / 2)
        event = await bench.retrying()
        assert (event["level"], event["serving"], event["cause"]) == ("warning", "the current certificate", "down")
        await bench.settled()
        bench.clock.elapse(HOUR * 0.3)
        assert (await bench.retrying(2))["level"] == "error"
        await bench.settled()
        bench.clock.elapse(HOUR * 0.3)
        event = await bench.retrying(3)
        assert (event["level"], event["serving"]) == ("error", "nothing")


@pytest.mark.parametrize("kind", PASSING)
async def test_a_retry_brings_the_same_request_again(bench: Bench, kind: ErrorKind) -> None:
    """A CA that waits for a person's approval must recognise what was approved."""
    async with bench.issuing(failing(kind), failing(kind), bench.good()) as authority:
        for count, delay in enumerate((0.25, 0.5), start=1):
            event = await bench.retrying(count)
            assert (event["attempt"], event["in_seconds"]) == (count, delay)
            await bench.settled()
            assert bench.clock.next_wake == timedelta(seconds=delay)
            bench.clock.elapse(timedelta(seconds=delay))
        await bench.issued()
        assert len({request.csr_pem for request in authority.requests}) == 1
        assert len({request.request_id for request in authority.requests}) == 1
        await bench.settled()
        bench.clock.elapse(HOUR / 2)
        await bench.issued(2)
        assert authority.requests[-1].csr_pem != authority.requests[0].csr_pem
        assert authority.requests[-1].request_id != authority.requests[0].request_id


@pytest.mark.parametrize(
    ("changed", "requests"),
    [
        ({"renewal": Renewal(jitter=0.5)}, 1),
        ({"ttl": 2 * HOUR}, 2),
        ({"key_type": KeyType.EC_P384}, 2),
        ({"identity": SpiffeId.parse("spiffe://demo.example/other")}, 2),
    ],
    ids=lambda given: str(*given) if isinstance(given, dict) else "",
)
async def test_a_workload_that_is_changed_goes_on_with_its_request_where_that_is_the_same(
    bench: Bench, changed: dict[str, Any], requests: int
) -> None:
    authority = ScriptedAuthority(failing(ErrorKind.PENDING), bench.good())
    upstreams = (Upstream(authority, bench.queue),)
    before = {"web": Issuing(DEFAULT, upstreams, DEFAULT_POLICY)}
    after = {"web": Issuing(structs.replace(DEFAULT, **changed), upstreams, DEFAULT_POLICY)}
    target = PublicationTarget(bench.store, bench.trust)
    workloads = RunningWorkloads(target, bench.clock, IssuanceCounts(), None)
    async with background_tasks() as start:
        workloads.replace(before)
        workloads.start_issuing(start)
        await bench.retrying()
        await workloads.stop(after, {})
        workloads.replace(after)
        workloads.start_issuing(start)
        await bench.issued()
    assert len({request.csr_pem for request in authority.requests}) == requests
    assert len({request.request_id for request in authority.requests}) == requests


@pytest.mark.parametrize("kind", REFUSED)
async def test_a_refused_request_comes_again_slowly_and_made_anew_unless_the_credentials_failed(
    bench: Bench, kind: ErrorKind
) -> None:
    async with bench.issuing(failing(kind), bench.good()) as authority:
        event = await bench.retrying()
        assert event["level"] == "error"
        assert event["in_seconds"] == 7.5
        await bench.settled()
        bench.clock.elapse(7 * SECOND)
        await bench.settled()
        assert len(authority.requests) == 1
        bench.clock.elapse(SECOND)
        await bench.issued()
        requests = 1 if kind is ErrorKind.UNAUTHENTICATED else 2  # a person may have approved it meanwhile
        assert len({request.csr_pem for request in authority.requests}) == requests
        assert len({request.request_id for request in authority.requests}) == requests


async def test_a_certificate_of_a_later_time_is_asked_for_anew_with_the_same_key(bench: Bench) -> None:
    """Behind a clock that a boot has not set yet: a join token has been spent on this key, and is good for no other.

    Where it is the CA's clock, the same request might be answered by the same certificate.
    """
    early = answering(bench.ca, shifted(5 * MINUTE, HOUR))
    async with bench.issuing(early, bench.good()) as authority:
        event = await bench.retrying()
        assert (event["kind"], event["level"]) == ("invalid", "error")
        assert "compare this machine's clock" in event["cause"]
        await bench.settled()
        bench.clock.elapse(8 * SECOND)
        await bench.issued()
    assert len({request.csr_pem for request in authority.requests}) == 1
    assert len({request.request_id for request in authority.requests}) == len(authority.requests) == 2


@pytest.mark.parametrize("kind", REFUSED)
async def test_a_refusal_is_loud_though_a_good_certificate_is_served(bench: Bench, kind: ErrorKind) -> None:
    """An operator has to act, and has half a lifetime to do so."""
    async with bench.issuing(bench.good(), failing(kind)):
        await bench.issued()
        await bench.settled()
        bench.clock.elapse(HOUR / 2)
        event = await bench.retrying()
        assert (event["level"], event["serving"]) == ("error", "the current certificate")


async def test_a_ca_that_says_when_to_come_back_is_not_asked_before(bench: Bench) -> None:
    throttled = failing(ErrorKind.THROTTLED, "slow down", retry_after=120)
    async with bench.issuing(throttled, bench.good()) as authority:
        assert (await bench.retrying())["in_seconds"] == 120
        await bench.settled()
        bench.clock.elapse(119 * SECOND)
        await bench.settled()
        assert len(authority.requests) == 1
        bench.clock.elapse(SECOND)
        await bench.issued()


async def test_no_wait_outlasts_the_current_certificate(bench: Bench) -> None:
    """Even of a CA that asks for an hour's timeout: half of what is left is the most."""
    async with bench.issuing(bench.good(), failing(ErrorKind.THROTTLED, "slow down", retry_after=3600)):
        await bench.issued()
        for count, left in enumerate((HOUR / 2, HOUR / 4, HOUR / 8), start=1):
            await bench.settled()
            bench.clock.elapse(left)
            assert (await bench.retrying(count))["in_seconds"] == left.total_seconds() / 2


# --- a CA that does not answer ---


async def test_an_answer_within_the_deadline_counts(bench: Bench) -> None:
    slow = Hang(answering(bench.ca))
    async with bench.issuing(slow) as authority:
        await authority.asked(1)
        bench.clock.elapse(ANSWER_BY - SECOND)
        slow.release.set()
        await bench.issued()
        assert not slow.given_up


async def test_an_answer_after_30_seconds_has_been_given_up_and_asked_for_again(bench: Bench) -> None:
    slow = Hang(answering(bench.ca))
    async with bench.issuing(slow, bench.good()) as authority:
        await authority.asked(1)
        bench.clock.elapse(ANSWER_BY)
        event = await bench.retrying()
        assert (event["kind"], event["cause"]) == ("transient", "the CA did not answer within 10 s")
        assert slow.given_up
        bench.clock.elapse(30 * SECOND - ANSWER_BY)
        slow.release.set()
        await bench.issued()
        assert authority.requests[0].csr_pem == authority.requests[1].csr_pem
        assert len(authority.requests) == 2


async def test_a_ca_that_never_answers_is_asked_again_and_again_one_call_at_a_time(bench: Bench) -> None:
    async with bench.issuing(Hang(answering(bench.ca))) as authority:
        for count in range(1, 6):
            await authority.asked(count)
            bench.clock.elapse(ANSWER_BY)
            await bench.retrying(count)
            await bench.settled()
            bench.clock.elapse(MINUTE)
        assert authority.most_under_way == 1


async def test_a_ca_that_hangs_holds_up_no_other_identity(bench: Bench) -> None:
    """Elsewhere one hung call blocks everybody behind a lock."""
    hung = ScriptedAuthority(Hang(answering(bench.ca)))
    healthy = ScriptedAuthority(answering(bench.ca))
    async with anyio.create_task_group() as tasks:
        for number in range(7):
            tasks.start_soon(bench.issuer(hung, workload(number)).run)
        await hung.asked(7)
        tasks.start_soon(bench.issuer(healthy, workload()).run)
        await bench.issued()
        assert bench.served is not None
        tasks.cancel_scope.cancel()


async def test_identities_of_a_hung_ca_do_not_hold_up_those_of_another(bench: Bench) -> None:
    """Eight hung calls are all that one CA's queue lets through; the other CA has its own."""
    hung = ScriptedAuthority(Hang(answering(bench.ca)))
    async with anyio.create_task_group() as tasks:
        for number in range(12):
            tasks.start_soon(bench.issuer(hung, workload(number)).run)
        await hung.asked(8)
        bench.queue = IssuanceQueue()
        tasks.start_soon(bench.issuer(ScriptedAuthority(bench.good()), workload()).run)
        await bench.issued()
        assert hung.under_way == hung.most_under_way == 8
        tasks.cancel_scope.cancel()


async def test_a_queue_behind_a_hung_ca_moves_on_with_the_deadlines(bench: Bench) -> None:
    authority = ScriptedAuthority(*[Hang(answering(bench.ca))] * 8, answering(bench.ca))
    async with anyio.create_task_group() as tasks:
        for number in range(10):
            tasks.start_soon(bench.issuer(authority, workload(number)).run)
        await authority.asked(8)
        bench.clock.elapse(ANSWER_BY)
        await bench.events.wait("issued", count=2)
        assert [event["workload"] for event in bench.events.named("issued")] == ["w8", "w9"]
        tasks.cancel_scope.cancel()


# --- who goes first ---


async def test_at_most_eight_ask_at_once_and_all_get_theirs(bench: Bench) -> None:
    slow = Hang(answering(bench.ca))
    authority = ScriptedAuthority(slow)
    async with anyio.create_task_group() as tasks:
        for number in range(30):
            tasks.start_soon(bench.issuer(authority, workload(number)).run)
        await authority.asked(8)
        slow.release.set()
        await bench.events.wait("issued", count=30)
        assert authority.most_under_way == 8
        tasks.cancel_scope.cancel()


async def test_an_identity_that_an_envoy_waits_for_goes_first_and_then_the_nearest_to_expiry(bench: Bench) -> None:
    """After a long suspend everything is due at once."""
    authority = ScriptedAuthority(bench.good())
    lifetimes = {0: 3 * HOUR, 1: HOUR, 2: 2 * HOUR, 3: 4 * HOUR}
    bench.queue = IssuanceQueue(1)
    async with anyio.create_task_group() as tasks:
        for number, ttl in lifetimes.items():
            tasks.start_soon(bench.issuer(authority, workload(number, ttl=ttl)).run)
        await bench.events.wait("issued", count=4)
        await bench.settled()
        authority.requests.clear()
        async with bench.queue.slot(lambda: (False, bench.clock.now())):
            bench.clock.elapse(5 * HOUR / 2)
            tasks.start_soon(bench.issuer(authority, workload(4)).run)  # one that has no certificate yet
            await bench.queued(5)
            bench.store.await_names("an envoy", frozenset({"spiffe://demo.example/w3"}))
        await authority.asked(5)
        asked = [str(request.identity)[-2:] for request in authority.requests]
        assert asked == ["w3", "w4", "w1", "w2", "w0"]
        tasks.cancel_scope.cancel()


# --- clocks ---


async def test_a_clock_set_ahead_by_a_day_renews_at_once(bench: Bench) -> None:
    async with bench.issuing(bench.good()):
        await bench.issued()
        await bench.settled()
        bench.clock.set_wall(DAY)
        bench.clock.elapse(TICK)
        await bench.issued(2)
        assert bench.leaf.not_valid_after_utc > bench.clock.now()


async def test_a_clock_set_back_by_a_day_renews_at_once(bench: Bench) -> None:
    """To every peer whose clock is right the certificate is not valid yet."""
    async with bench.issuing(bench.good()):
        await bench.issued()
        await bench.settled()
        bench.clock.set_wall(-DAY)
        bench.clock.elapse(TICK)
        await bench.issued(2)
        assert bench.leaf.not_valid_before_utc <= bench.clock.now()
        assert bench.leaf.not_valid_after_utc == bench.clock.now() + HOUR


async def test_a_clock_set_back_during_an_outage_does_not_stretch_the_wait(bench: Bench) -> None:
    async with bench.issuing(failing(ErrorKind.TRANSIENT), bench.good(), randomness=0.999):
        await bench.retrying()
        await bench.settled()
        bench.clock.set_wall(-DAY)
        bench.clock.elapse(TICK)
        await bench.issued()


async def test_a_suspended_machine_renews_within_seconds_of_its_awakening(bench: Bench) -> None:
    """The monotonic clock stood still: by it, the certificate would have most of its life before it."""
    async with bench.issuing(bench.good()) as authority:
        await bench.issued()
        await bench.settled()
        bench.clock.elapse(2 * SECOND)
        bench.clock.set_wall(40 * MINUTE)
        assert len(authority.requests) == 1
        bench.clock.elapse(TICK - 2 * SECOND)
        await bench.issued(2)


async def test_a_certificate_that_expired_in_suspend_is_withheld_within_seconds(bench: Bench) -> None:
    async with bench.issuing(bench.good(), Hang(answering(bench.ca))):
        await bench.issued()
        await bench.settled()
        bench.clock.set_wall(2 * HOUR)
        bench.clock.elapse(TICK)
        await bench.events.wait("expired")
        assert bench.served is None


async def test_a_clock_that_was_wrong_for_a_while_takes_no_good_certificate_away(bench: Bench) -> None:
    """Set ahead, the certificate has expired; set right again in an outage, it is the best there is."""
    async with bench.issuing(bench.good(), failing(ErrorKind.TRANSIENT)):
        await bench.issued()
        secret = bench.served
        for turn in (1, 2):
            await bench.settled()
            bench.clock.set_wall(DAY)
            bench.clock.elapse(TICK)
            await bench.events.wait("expired", count=turn)
            assert bench.served is None
            await bench.settled()
            bench.clock.set_wall(-DAY)
            bench.clock.elapse(TICK)
            assert (await bench.events.wait("valid_again", count=turn))["level"] == "warning"
            assert bench.served == secret


async def test_a_clock_that_was_wrong_for_a_while_leaves_the_former_root_trusted(bench: Bench) -> None:
    """Set ahead, the certificate has expired and its root is needed no more; set right again, both are."""
    async with bench.issuing(bench.good(), failing(ErrorKind.TRANSIENT)):
        await bench.issued()
        await bench.settled()
        bench.clock.set_wall(DAY)
        bench.clock.elapse(TICK)
        await bench.events.wait("expired")
        new = make_ca("new").certificate
        bench.trust.update("upstream", (new,))
        assert bench.anchors == {new}
        await bench.settled()
        bench.clock.set_wall(-DAY)
        bench.clock.elapse(TICK)
        await bench.events.wait("valid_again")
        assert bench.anchors == {bench.ca.root.certificate, new}


# --- the event loop, and its end ---


async def test_rsa_keys_are_made_off_the_event_loop(bench: Bench) -> None:
    """They take up to seconds, in which no Envoy would be answered."""
    async with bench.issuing(bench.good(), workload=workload(key=KeyType.RSA_3072)) as authority:
        with anyio.fail_after(10):
            while not any(thread.name == "in_thread generate" for thread in threading.enumerate()):
                await checkpoint()
        assert authority.requests == []
        await bench.issued()


async def reach(bench: Bench, state: str, authority: ScriptedAuthority) -> None:
    """Wait until the issuer is in that state."""
    match state:
        case "in the queue":
            await bench.queued(1)
        case "in the call":
            await authority.asked(1)
        case "between attempts":
            await bench.retrying()
            await bench.settled()
        case "until the renewal":
            await bench.settled()


@pytest.mark.parametrize(
    ("state", "step"),
    [
        ("in the queue", None),
        ("in the call", Hang(failing(ErrorKind.DENIED))),
        ("between attempts", failing(ErrorKind.TRANSIENT)),
        ("until the renewal", None),
    ],
)
async def test_an_issuer_ends_at_once_wherever_it_waits_and_gives_back_its_place(
    bench: Bench, state: str, step: Step | None
) -> None:
    bench.queue = IssuanceQueue(1)
    if state == "in the queue":
        async with bench.queue.slot(lambda: (False, bench.clock.now())), bench.issuing(bench.good()) as authority:
            await reach(bench, state, authority)
    else:
        async with bench.issuing(step or bench.good()) as authority:
            await reach(bench, state, authority)
    with anyio.fail_after(10):
        for _ in range(2):  # a place that were given to the issuer, or reserved for it, would be missing
            async with bench.queue.slot(lambda: (False, bench.clock.now())):
                pass
    assert bench.clock.sleepers == 0
    assert authority.under_way == 0


@pytest.mark.parametrize("step", [-DAY, DAY])
async def test_a_clock_that_is_set_meanwhile_changes_nothing_of_how_long_an_attempt_took(
    bench: Bench, step: timedelta
) -> None:
    """Or else the durations are negative, or one of them hides all others in an average for good."""
    records: list[AttemptRecord] = []

    async def late(request: IssueRequest) -> Issuance:
        bench.clock.elapse(2 * SECOND)
        bench.clock.set_wall(step)
        return bench.ca.under(bench.ca.leaf(request))

    issuer = bench.issuer(ScriptedAuthority(late), DEFAULT)
    issuer.watch_attempts(records.append)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(issuer.run)
        issued = await bench.issued()
        tasks.cancel_scope.cancel()
    assert issued["took_ms"] == 2000
    assert [each.ended - each.began for each in records] == [2 * SECOND]


async def test_the_lines_of_one_attempt_can_be_found(bench: Bench) -> None:
    """Also those of the CA's adapter, among the lines of other workloads' attempts at the same time."""
    records: list[AttemptRecord] = []

    class Talking(ScriptedAuthority):
        async def issue(self, request: IssueRequest) -> Issuance:
            log.event(logging.getLogger("sds_agent.other"), "endpoint_changed", address="a")
            return await super().issue(request)

    authority = Talking(failing(ErrorKind.TRANSIENT, "down"), bench.good())
    issuer = bench.issuer(authority, DEFAULT)
    issuer.watch_attempts(records.append)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(issuer.run)
        first = (await bench.retrying())["attempt_id"]
        await bench.settled()
        bench.clock.elapse(timedelta(seconds=0.25))
        await bench.issued()
        tasks.cancel_scope.cancel()
    ids = [each.attempt_id for each in records]
    assert (len(set(ids)), ids[0]) == (2, first)
    for attempt, names in zip(ids, (["asking", "endpoint_changed", "retrying"], None), strict=True):
        found = [each["event"] for each in bench.events.seen if each.get("attempt_id") == attempt]
        assert names in (None, found)
    renewed = [each["event"] for each in bench.events.seen if each.get("attempt_id") == ids[1]]
    assert renewed[:2] == ["asking", "endpoint_changed"]
    assert {"trust_changed", "issued"} <= set(renewed)
