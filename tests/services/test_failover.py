"""Several authorities for a workload: the loop asks the next when one fails, and goes back by a real certificate.

Everything is by a clock that the test moves, and by events: no test measures time.
"""

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from cryptography import x509
from fakes.authorities import Hang, ScriptedAuthority, ScriptedSupplier, Step, UpstreamCa, answering, failing, made
from fakes.clocks import HAND_LOOP, HandClock
from fakes.events import Event, Events, recorded
from fakes.hierarchy import DAY, HOUR, URI

from sds_agent.authority.protocol import Authority, AuthorityError, ErrorKind, Issuance, IssueRequest, Supplier
from sds_agent.clock import LONGEST_SLEEP
from sds_agent.identity.spiffe import SpiffeId
from sds_agent.issuance.cache import CertificateCache, WorkloadCache
from sds_agent.issuance.failover import PATIENCE, FailoverPolicy
from sds_agent.issuance.issuer import Issuer
from sds_agent.issuance.publication import HANDSHAKE, PublicationTarget
from sds_agent.issuance.queue import IssuanceQueue
from sds_agent.issuance.schedule import Renewal
from sds_agent.issuance.source import Upstream
from sds_agent.issuance.status import AuthorityStatus, WorkloadStatus
from sds_agent.issuance.trust import Trust
from sds_agent.issuance.workload import Workload
from sds_agent.pki.certificates import read_pem, write_pem
from sds_agent.pki.keys import KeyType
from sds_agent.secrets.model import BundleSecret, CertificateSecret
from sds_agent.secrets.store import SecretStore
from sds_agent.tasks import background_tasks, time_given

SECOND = timedelta(seconds=1)
MINUTE = timedelta(minutes=1)
TICK = timedelta(seconds=LONGEST_SLEEP)
POLICY = FailoverPolicy(failures=3, after=30 * SECOND, back_after=5 * MINUTE)
DOWN = failing(ErrorKind.TRANSIENT, "the CA is down")


def workload(name: str = "default", *names: str, ttl: timedelta = HOUR) -> Workload:
    """A workload of these authorities, or of the two that are usual here."""
    first, *others = names or ("first", "second")
    uri = URI if name == "default" else f"spiffe://demo.example/{name}"
    kinds = dict.fromkeys(others, "test")
    identity = SpiffeId.parse(uri)
    return Workload(name, identity, KeyType.EC_P256, ttl, first, (name,), "test", Renewal(jitter=0), kinds)


class Bench:
    """What issuers work with. Each authority has a queue of its own, which their workloads share."""

    def __init__(self, events: Events) -> None:
        self.events = events
        self.clock = HandClock()
        self.first, self.second = UpstreamCa(self.clock.now, "first"), UpstreamCa(self.clock.now, "second")
        self.store = SecretStore(["default", "other", "ROOTCA"])
        self.trust = Trust(self.store, ["ROOTCA"], self.clock)
        self.queues: dict[str, IssuanceQueue] = {}
        self.issuers: list[Issuer] = []

    def issuer(
        self, *authorities: Authority | Supplier, of: Workload | None = None, cache: WorkloadCache | None = None
    ) -> Issuer:
        of = of or workload()
        first, *others = (
            Upstream(each, self.queues.setdefault(name, IssuanceQueue()))
            for name, each in zip(of.authorities, authorities, strict=True)
        )
        issuer = Issuer(
            of,
            first,
            PublicationTarget(self.store, self.trust),
            clock=self.clock,
            cache=cache,
            randomness=lambda: 0.0,
            fallbacks=others,
            policy=POLICY,
        )
        self.issuers.append(issuer)
        return issuer

    @asynccontextmanager
    async def issuing(self, *authorities: Authority | Supplier, **options: Any) -> AsyncIterator[Issuer]:
        """The one workload, inside this context."""
        async with anyio.create_task_group() as tasks:
            issuer = self.issuer(*authorities, **options)
            tasks.start_soon(issuer.run)
            yield issuer
            tasks.cancel_scope.cancel()

    def by(self, ca: UpstreamCa) -> ScriptedAuthority:
        """An authority that always answers."""
        return ScriptedAuthority(answering(ca))

    @property
    def leaf(self) -> x509.Certificate:
        """The leaf that is served."""
        secret = self.store.snapshot["default"]
        assert isinstance(secret, CertificateSecret)
        return read_pem(secret.chain_pem)[0]

    @property
    def anchors(self) -> set[x509.Certificate]:
        """What the bundle has in it."""
        bundle = self.store.snapshot["ROOTCA"]
        assert isinstance(bundle, BundleSecret)
        return set(read_pem(bundle.anchors_pem))

    async def settled(self) -> None:
        """Wait until no attempt is under way and every issuer sleeps."""
        with anyio.fail_after(10):
            while any(issuer.status.attempt for issuer in self.issuers):
                await checkpoint()
            await self.clock.asleep(len(self.issuers))

    async def pass_time(self, time: timedelta, step: timedelta = TICK) -> None:
        """Let time pass in steps, and what is due be done after each."""
        end = self.clock.now() + time
        while self.clock.now() < end:
            await self.settled()
            self.clock.elapse(min(step, end - self.clock.now()))
            await anyio.wait_all_tasks_blocked()
        await self.settled()

    async def renewed(self, authority: str, count: int = 1) -> Event:
        """Wait for the renewal by this authority, whose root is new to peers: they load it first."""
        await self.events.wait("held_back", count=count)
        await self.settled()
        self.clock.elapse(HANDSHAKE)
        return await self.events.wait("renewed", authority=authority)

    async def changed(self, count: int = 1) -> Event:
        """Wait for the count-th switch."""
        return await self.events.wait("authority_changed", count=count)


def standing(status: WorkloadStatus) -> list[tuple[str, bool, int]]:
    """Each authority: whether it is in use, and how often it failed since it issued last."""
    return [(each.name, each.in_use, each.failure.attempts if each.failure else 0) for each in status.authorities]


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return HAND_LOOP


class Timed(ScriptedAuthority):
    """Notes how many seconds its caller gives it, and fails or answers as the script says."""

    def __init__(self, *script: Step) -> None:
        super().__init__(*script)
        self.given: list[float | None] = []

    async def issue(self, request: IssueRequest) -> Issuance:
        self.given.append(time_given())
        return await super().issue(request)


@pytest.fixture
def bench() -> Iterator[Bench]:
    with recorded() as events:
        yield Bench(events)


# --- nothing is served yet ---


async def test_the_first_certificate_comes_from_the_first_authority_while_that_works(bench: Bench) -> None:
    second = bench.by(bench.second)
    async with bench.issuing(bench.by(bench.first), second) as issuer:
        event = await bench.events.wait("issued")
        assert (event["authority"], issuer.status.authority) == ("first", "first")
        assert standing(issuer.status) == [("first", True, 0), ("second", False, 0)]
        await bench.pass_time(DAY, HOUR / 4)
    assert (second.requests, bench.events.named("authority_changed")) == ([], [])


@pytest.mark.parametrize("kind", ErrorKind)
async def test_the_next_is_asked_at_once_when_the_first_fails_and_nothing_is_served(
    bench: Bench, kind: ErrorKind
) -> None:
    """No time has to pass for it, and a refusal or a delay that the first asks for holds up nothing."""
    first = ScriptedAuthority(failing(kind, "not now", retry_after=3600))
    async with bench.issuing(first, bench.by(bench.second)) as issuer:
        event = await bench.events.wait("issued")
        assert (event["authority"], bench.clock.now()) == ("second", HandClock().now())
        change = await bench.changed()
        assert (change["from"], change["to"], change["level"]) == ("first", "second", "warning")
        assert change["why"] == f"the last attempt at first failed ({kind.value}): not now"
        status = issuer.status
        assert (status.authority, status.failure, standing(status)) == (
            "second",
            None,
            [("first", False, 1), ("second", True, 0)],
        )
        assert [each.failure.cause for each in status.authorities if each.failure] == ["not now"]


async def test_an_authority_is_told_how_long_it_has(bench: Bench) -> None:
    """It may divide that among its servers, and has to use no less where an operator gives it more."""
    first, alone = Timed(DOWN), Timed(answering(bench.first))
    async with bench.issuing(first, bench.by(bench.second)):
        await bench.events.wait("issued", authority="second")
    (given,) = first.given
    assert given is not None
    assert 0 < given <= PATIENCE.total_seconds()
    patient = Upstream(alone, IssuanceQueue(), timeout=60.0)
    target = PublicationTarget(bench.store, bench.trust)
    async with background_tasks() as start:
        start(Issuer(workload("other", "alone"), patient, target, clock=bench.clock).run())
        await bench.events.wait("issued", authority="alone")
    assert alone.given == [60.0]


async def test_an_authority_is_told_what_the_wait_for_its_turn_has_left(bench: Bench) -> None:
    """Or it would give its first server more time than there is for all of them."""
    first = Timed(DOWN)
    queue = bench.queues["first"] = IssuanceQueue(1)
    async with AsyncExitStack() as other:
        await other.enter_async_context(queue.slot(lambda: (0, bench.clock.now())))
        async with bench.issuing(first, bench.by(bench.second)) as issuer:
            with anyio.fail_after(10):
                while issuer.status.attempt != "queued":
                    await checkpoint()
            await anyio.wait_all_tasks_blocked()
            bench.clock.elapse(SECOND)
            await other.aclose()
            await bench.events.wait("issued", authority="second")
    (given,) = first.given
    assert given is not None
    assert given <= (PATIENCE - SECOND).total_seconds()


async def test_a_first_authority_that_hangs_is_given_up_long_before_its_deadline(bench: Bench) -> None:
    hang = Hang(answering(bench.first))
    first, second = ScriptedAuthority(hang), bench.by(bench.second)
    async with bench.issuing(first, second):
        await first.asked(1)
        bench.clock.elapse(PATIENCE - SECOND)
        await anyio.wait_all_tasks_blocked()
        assert second.requests == []
        bench.clock.elapse(SECOND)
        await bench.events.wait("issued", authority="second")
        assert hang.given_up
        assert (await bench.events.wait("retrying"))["cause"] == "the CA did not answer within 3 s"


async def test_a_slow_authority_issues_where_the_other_one_is_down(bench: Bench) -> None:
    """Giving up early must not make an authority useless that answers within its deadline."""
    slow = Hang(answering(bench.first))
    first, second = ScriptedAuthority(slow), ScriptedAuthority(DOWN)
    async with bench.issuing(first, second):
        for count, patience in ((1, PATIENCE), (2, 2 * PATIENCE)):
            while len(first.requests) < count:
                await anyio.wait_all_tasks_blocked()
                bench.clock.elapse(SECOND / 4)
            bench.clock.elapse(patience)
            await bench.events.wait("retrying", authority="first", count=count)
        while len(first.requests) < 3:
            await anyio.wait_all_tasks_blocked()
            bench.clock.elapse(SECOND / 4)
        bench.clock.elapse(3 * PATIENCE)
        slow.release.set()
        await bench.events.wait("issued", authority="first")


async def test_an_identity_on_a_good_authority_is_not_delayed_by_those_on_a_hung_one(bench: Bench) -> None:
    """Eight slots of the hung authority are taken, and more wait: neither the other authority nor an identity that may
    go to the other one waits for them.
    """
    hung, second = ScriptedAuthority(Hang(answering(bench.first))), bench.by(bench.second)
    async with anyio.create_task_group() as tasks:
        for number in range(10):
            tasks.start_soon(bench.issuer(hung, of=workload(f"w{number}", "first")).run)
        await hung.asked(8)
        tasks.start_soon(bench.issuer(second, of=workload("other", "second")).run)
        await bench.events.wait("issued", workload="other")
        tasks.start_soon(bench.issuer(hung, second).run)
        await anyio.wait_all_tasks_blocked()
        bench.clock.elapse(PATIENCE)
        await bench.events.wait("issued", workload="default", authority="second")
        assert (hung.most_under_way, len(hung.requests)) == (8, 8), "it was given up while it waited for its turn"
        tasks.cancel_scope.cancel()


async def test_identities_that_a_ca_lets_hang_leave_the_others_their_turn(bench: Bench) -> None:
    """As where a CA waits for an approval of some of them: those that have no certificate would always go first."""
    hang = Hang(answering(bench.first))

    class Picky(ScriptedAuthority):
        async def issue(self, request: Any) -> Any:
            return await (super().issue(request) if "/w" in str(request.identity) else answering(bench.first)(request))

    authority = Picky(hang)
    bench.queues["first"] = IssuanceQueue(1)
    async with anyio.create_task_group() as tasks:
        for number in range(3):
            tasks.start_soon(bench.issuer(authority, of=workload(f"w{number}", "first")).run)
        for number in range(1, 4):
            await authority.asked(number)
            bench.clock.elapse(10 * SECOND)
            await bench.events.wait("retrying", count=number)
        await authority.asked(4)
        with anyio.fail_after(10):
            while [issuer.status.attempt for issuer in bench.issuers].count("queued") < 2:
                await anyio.wait_all_tasks_blocked()
                bench.clock.elapse(SECOND)
        tasks.start_soon(bench.issuer(authority, of=workload("other", "first")).run)
        await anyio.wait_all_tasks_blocked()
        bench.clock.elapse(10 * SECOND)
        await bench.events.wait("issued", workload="other")
        tasks.cancel_scope.cancel()


# --- a valid certificate is served ---


async def test_a_renewal_goes_to_the_next_after_some_failures_and_withdraws_nothing(bench: Bench) -> None:
    first = ScriptedAuthority(answering(bench.first), DOWN)
    async with bench.issuing(first, bench.by(bench.second)) as issuer:
        await bench.events.wait("issued")
        leaf = bench.leaf
        await bench.settled()
        bench.clock.elapse(HOUR / 2)
        for count in (1, 2):
            await bench.events.wait("retrying", count=count)
            assert (bench.leaf, issuer.status.authority) == (leaf, "first")
            await bench.settled()
            bench.clock.elapse(TICK)
        await bench.renewed("second")
        change = await bench.changed()
        assert change["why"] == "3 attempts in a row at first failed (transient): the CA is down"
        assert len(first.requests) == 4
        assert issuer.status.authority == "second"


async def test_a_renewal_that_hangs_goes_to_the_next_while_the_certificate_is_valid(bench: Bench) -> None:
    """A certificate of 20 s leaves no time for a deadline of ten: the attempt leaves the other one its turn."""
    first = ScriptedAuthority(answering(bench.first), Hang(answering(bench.first)))
    async with bench.issuing(first, bench.by(bench.second), of=workload(ttl=20 * SECOND)):
        await bench.events.wait("issued")
        await bench.settled()
        bench.clock.elapse(10 * SECOND)
        await first.asked(2)
        for _ in range(10):
            bench.clock.elapse(SECOND)
            await anyio.wait_all_tasks_blocked()
            if bench.events.named("renewed"):
                break
        assert (await bench.events.wait("renewed"))["authority"] == "second"
        assert bench.events.named("expired") == []


async def test_the_second_authority_renews_with_its_own_certificate_alone(bench: Bench) -> None:
    """A CA refuses a caller who shows it another CA's certificate."""
    first, second = ScriptedAuthority(answering(bench.first), DOWN), bench.by(bench.second)
    async with bench.issuing(first, second):
        await bench.events.wait("issued")
        first_chain = bench.store.snapshot["default"]
        await bench.pass_time(HOUR)
        assert isinstance(first_chain, CertificateSecret)
        assert first.requests[0].current is None
        assert {each.current.chain_pem for each in first.requests[1:4] if each.current} == {first_chain.chain_pem}
        assert second.requests[0].current is None, "it has issued none yet"
        await bench.pass_time(HOUR)
        shown = second.requests[1].current
        assert shown is not None
        assert write_pem([bench.second.lower.certificate]) in shown.chain_pem


# --- the way back ---


async def test_the_first_is_in_use_again_once_it_issues(bench: Bench) -> None:
    first = ScriptedAuthority(DOWN, DOWN, answering(bench.first))
    second = bench.by(bench.second)
    async with bench.issuing(first, second) as issuer:
        await bench.events.wait("issued", authority="second")
        await bench.pass_time(5 * MINUTE)
        leaf = bench.leaf
        assert len(first.requests) == 2, "the attempt to go back failed"
        assert (issuer.status.authority, bench.leaf) == ("second", leaf)
        await bench.pass_time(10 * MINUTE)
        await bench.renewed("first")
        change = await bench.changed(2)
        assert (change["from"], change["to"], change["why"]) == ("second", "first", "first issues again")
        assert change["level"] == "info"
        assert len(second.requests) == 1
        assert standing(issuer.status) == [("first", True, 0), ("second", False, 0)]


async def test_a_failed_way_back_changes_nothing_that_is_served(bench: Bench) -> None:
    """Hung for as long as a trial may take, for a day: the renewals of the second go on as if there were no first."""
    first, second = ScriptedAuthority(Hang(answering(bench.first))), bench.by(bench.second)
    async with bench.issuing(first, second, of=workload(ttl=4 * MINUTE)):
        await first.asked(1)
        bench.clock.elapse(PATIENCE)
        await bench.events.wait("issued", authority="second")
        end = bench.clock.now() + HOUR
        while bench.clock.now() < end:
            await anyio.wait_all_tasks_blocked()
            bench.clock.elapse(5 * SECOND)
        assert bench.store.snapshot["default"] is not None
        assert bench.events.named("expired") == []
        assert len(bench.events.named("authority_changed")) == 1
        assert len(second.requests) in range(25, 32), "every two minutes, as without the first"
        assert first.most_under_way == 1


async def test_a_restart_goes_on_with_the_authority_that_issued_the_stored_certificate(
    bench: Bench, tmp_path: Path
) -> None:
    def cache() -> WorkloadCache:
        return WorkloadCache(workload(), CertificateCache(tmp_path))

    async with bench.issuing(ScriptedAuthority(DOWN), bench.by(bench.second), cache=cache()):
        await bench.events.wait("issued", authority="second")
        stored = bench.leaf
    bench.issuers.clear()
    first, second = bench.by(bench.first), bench.by(bench.second)
    async with bench.issuing(first, second, cache=cache()) as issuer:
        await bench.events.wait("restored")
        await bench.settled()
        assert (issuer.status.authority, bench.leaf, first.requests, second.requests) == ("second", stored, [], [])
        assert issuer.status.authorities == (AuthorityStatus("first", False), AuthorityStatus("second", True))
        await bench.pass_time(5 * MINUTE)
        await bench.renewed("first")


# --- trust ---


async def test_the_bundle_has_the_roots_of_both_sides_while_certificates_of_both_are_valid(bench: Bench) -> None:
    first = ScriptedAuthority(answering(bench.first), DOWN)
    roots = {bench.first.root.certificate, bench.second.root.certificate}
    async with bench.issuing(first, bench.by(bench.second)):
        await bench.events.wait("issued")
        await bench.pass_time(HOUR * 0.75)
        assert bench.leaf.issuer == bench.second.lower.certificate.subject
        assert bench.anchors == roots
        needed = {(each.authority, each.anchor) for each in bench.trust.needed}
        assert needed == {("first", bench.first.root.certificate), ("second", bench.second.root.certificate)}


# --- sources that make certificates by themselves ---


async def test_a_source_that_does_not_renew_in_time_is_followed_by_the_next(bench: Bench) -> None:
    supplier, second = ScriptedSupplier(), bench.by(bench.second)
    supplier.give(made(bench.first))
    async with bench.issuing(supplier, second) as issuer:
        await bench.events.wait("issued", authority="first")
        end = bench.leaf.not_valid_after_utc
        life = end - bench.clock.now()
        for _ in range(2):
            await anyio.wait_all_tasks_blocked()
            bench.clock.elapse(life * 0.39)
        await anyio.wait_all_tasks_blocked()
        assert second.requests == [], "waiting is what it does"
        bench.clock.elapse(life * 0.03)
        await bench.renewed("second")
        assert issuer.status.authority == "second"
        assert bench.clock.now() < end


async def test_a_source_that_is_down_is_followed_by_the_next_and_has_its_way_back(bench: Bench) -> None:
    down = AuthorityError(ErrorKind.TRANSIENT, "the source is down")
    supplier, second = ScriptedSupplier(), bench.by(bench.second)
    supplier.give(down)
    async with bench.issuing(supplier, second):
        await bench.events.wait("issued", authority="second")
        supplier.give(made(bench.first))
        await bench.pass_time(5 * MINUTE - TICK)
        bench.clock.elapse(TICK)
        await bench.events.wait("held_back")
        await anyio.wait_all_tasks_blocked()
        bench.clock.elapse(HANDSHAKE)
        await bench.events.wait("renewed", authority="first")
        assert (await bench.changed(2))["to"] == "first"


async def test_a_source_that_still_gives_the_certificate_that_was_given_up_is_not_gone_back_to(bench: Bench) -> None:
    """It would take the place of a good one for the few minutes until its end, again and again."""
    supplier, second = ScriptedSupplier(), bench.by(bench.second)
    supplier.give(made(bench.first))
    async with bench.issuing(supplier, second, of=workload(ttl=2 * HOUR)) as issuer:
        await bench.events.wait("issued", authority="first")
        await anyio.wait_all_tasks_blocked()
        for _ in range(9):
            bench.clock.elapse(HOUR * 0.09)
            await anyio.wait_all_tasks_blocked()
        await bench.renewed("second")
        leaf = bench.leaf
        while not bench.events.named("retrying", authority="first", attempt=2):
            await anyio.wait_all_tasks_blocked()
            bench.clock.elapse(TICK)
        refused = bench.events.named("retrying", authority="first", attempt=2)[0]
        assert "was not replaced in time; see that what makes it runs" in refused["cause"]
        assert (bench.leaf, issuer.status.authority) == (leaf, "second")
        supplier.give(made(bench.first))
        while issuer.status.authority != "first":
            await anyio.wait_all_tasks_blocked()
            bench.clock.elapse(TICK)
