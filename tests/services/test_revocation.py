"""Revocation lists beside the trust bundle: never a push that makes Envoys refuse a peer who is not revoked."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from fakes.clocks import HAND_LOOP, HandClock
from fakes.events import Events, recorded
from fakes.hierarchy import DAY, HOUR, NOW, Ca, make_ca, make_crl, make_leaf

from sds_agent.authority.protocol import AdvertisedLists, AuthorityError, ErrorKind
from sds_agent.issuance.anchors_refresh import TIMEOUT
from sds_agent.issuance.list_refresh import follow_lists, next_reading
from sds_agent.issuance.lists import read_lists
from sds_agent.issuance.trust import Trust
from sds_agent.pki.certificates import read_pem, write_pem
from sds_agent.pki.validation.revocation import read_crls
from sds_agent.secrets.model import BundleSecret, CertificateSecret
from sds_agent.secrets.store import SecretStore

NAME = "ROOTCA"
ROOT = make_ca("root")
SIGNER = make_ca("signer", ROOT)
NEW_ROOT = make_ca("root 2")
NEW_SIGNER = make_ca("signer 2", NEW_ROOT)
SECOND = timedelta(seconds=1)
EVERY = timedelta(minutes=5)
POINTS = x509.CRLDistributionPoints(
    [x509.DistributionPoint([x509.UniformResourceIdentifier("https://ca.example/crl")], None, None, None)]
)


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return HAND_LOOP


@pytest.fixture
def events() -> Iterator[Events]:
    with recorded() as events:
        yield events


class Bench:
    """A trust bundle with lists of the authority `a`, and every bundle that was pushed."""

    def __init__(self, *asked: str) -> None:
        self.clock = HandClock()
        self.store = SecretStore([NAME])
        self.trust = Trust(self.store, [NAME], self.clock, with_lists=asked or ["a"])
        self.first: CertificateSecret
        self.pushes: list[tuple[set[x509.Certificate], set[str]]] = []

    def seen(self, _names: frozenset[str]) -> None:
        bundle = self.store.snapshot[NAME]
        assert isinstance(bundle, BundleSecret)
        issuers = {each.issuer.rfc4514_string() for each in read_crls(bundle.lists_pem)}
        self.pushes.append((set(read_pem(bundle.anchors_pem)), issuers))

    @property
    def lists(self) -> tuple[x509.CertificateRevocationList, ...]:
        bundle = self.store.snapshot[NAME]
        return read_crls(bundle.lists_pem) if isinstance(bundle, BundleSecret) else ()

    def publishes(self, *lists: x509.CertificateRevocationList, issuers: tuple[Ca, ...] = ()) -> None:
        """The CA publishes these lists now."""
        read = read_lists([each.public_bytes(Encoding.DER) for each in lists])
        self.trust.update_lists("a", read, tuple(each.certificate for each in issuers))

    def use(self, *chain: x509.Certificate) -> CertificateSecret:
        secret = CertificateSecret(write_pem(chain), b"", chain[0].not_valid_after_utc)
        self.trust.add_in_use("a", secret)
        return secret


@pytest.fixture
def bench() -> Iterator[Bench]:
    """With a root, a certificate that is in use, and the list of its CA."""
    made = Bench()
    made.trust.update("a", (ROOT.certificate,))
    made.first = made.use(make_leaf(SIGNER), SIGNER.certificate)
    made.publishes(make_crl(SIGNER))
    with made.store.watching(made.seen):
        yield made


def test_the_list_is_served_with_the_anchors(bench: Bench) -> None:
    assert [each.issuer for each in bench.lists] == [SIGNER.certificate.subject]


def test_nothing_is_said_before_the_authorities_were_asked(events: Events) -> None:
    """A start is no fault."""
    made = Bench("a", "b")
    made.trust.update("a", (ROOT.certificate,))
    made.use(make_leaf(SIGNER), SIGNER.certificate)
    made.publishes(make_crl(SIGNER))
    assert made.lists == ()
    assert events.named("revocation_off") == []
    made.trust.update_lists("b", None)
    assert len(made.lists) == 1


def test_lists_stay_while_an_authority_that_is_new_has_not_answered(bench: Bench, events: Events) -> None:
    """A reload adds one: nobody who is revoked is to be let in meanwhile, as long as its roots are not served."""
    bench.trust.follow(["a", "b"], ["a", "b"])
    bench.use(make_leaf(SIGNER), SIGNER.certificate)
    assert [each.issuer for each in bench.lists] == [SIGNER.certificate.subject]
    bench.trust.update("b", (NEW_ROOT.certificate,))
    between = bench.lists
    assert between == (), "peers below the new root would be refused"
    assert events.named("revocation_off") == []
    bench.trust.update_lists(
        "b", read_lists([make_crl(NEW_SIGNER).public_bytes(Encoding.DER)]), (NEW_SIGNER.certificate,)
    )
    assert {each.issuer for each in bench.lists} == {SIGNER.certificate.subject, NEW_SIGNER.certificate.subject}


@pytest.mark.parametrize(
    ("stay", "asked", "replaced"),
    [("a", "a", ""), ("ab", "a", ""), ("ab", "ab", "b")],
    ids=["removed", "off", "another"],
)
def test_a_list_by_nobody_known_counts_no_longer_once_it_is_not_asked_for(
    bench: Bench, stay: str, asked: str, replaced: str
) -> None:
    """An authority that has not issued yet advertises nothing, and its list alone keeps revocation off."""
    bench.trust.follow("ab", "ab")
    bench.trust.update_lists("b", read_lists([make_crl(NEW_SIGNER).public_bytes(Encoding.DER)]))
    between = bench.lists
    assert between == ()
    bench.trust.follow(stay, asked, replaced)
    for name in asked:
        bench.trust.update_lists(name, None)
    assert [each.issuer for each in bench.lists] == [SIGNER.certificate.subject]


def test_nothing_is_said_before_the_first_certificate(events: Events) -> None:
    made = Bench()
    made.trust.update("a", (ROOT.certificate,))
    made.publishes(make_crl(SIGNER))
    assert made.lists == ()
    assert events.named("revocation_off") == []
    made.use(make_leaf(SIGNER), SIGNER.certificate)
    assert len(made.lists) == 1


def test_without_the_setting_there_are_no_lists_and_no_words(events: Events) -> None:
    store = SecretStore([NAME])
    trust = Trust(store, [NAME], HandClock())
    trust.update("a", (ROOT.certificate,))
    trust.update_lists("a", read_lists([make_crl(SIGNER).public_bytes(Encoding.DER)]))
    trust.add_in_use("a", CertificateSecret(write_pem([make_leaf(SIGNER), SIGNER.certificate]), b"", NOW + HOUR))
    bundle = store.snapshot[NAME]
    assert isinstance(bundle, BundleSecret)
    assert bundle.lists_pem == b""
    assert {each["event"] for each in events.seen} == {"trust_changed"}


def test_a_new_anchor_without_a_list_takes_the_lists_out_in_the_same_push(bench: Bench, events: Events) -> None:
    bench.trust.update("a", (ROOT.certificate, NEW_ROOT.certificate))
    assert bench.pushes == [({ROOT.certificate, NEW_ROOT.certificate}, set())]
    (off,) = events.named("revocation_off")
    assert off["level"] == "error"
    assert "below the trust anchor 'CN=root 2'" in off["causes"][0]


def test_the_new_cas_list_comes_in_the_same_push_as_its_anchor(bench: Bench, events: Events) -> None:
    """In a rotation revocation goes on where the CA tells the new list in time."""
    bench.publishes(make_crl(SIGNER), make_crl(NEW_SIGNER), issuers=(SIGNER, NEW_SIGNER, NEW_ROOT))
    bench.trust.update("a", (ROOT.certificate, NEW_ROOT.certificate))
    assert bench.pushes[-1] == ({ROOT.certificate, NEW_ROOT.certificate}, {"CN=signer", "CN=signer 2"})
    assert all(lists for _, lists in bench.pushes)
    assert events.named("revocation_off") == []


def test_a_certificate_by_a_ca_without_a_list_waits_until_the_lists_are_out(bench: Bench) -> None:
    """Envoys that have the old bundle would refuse it."""
    other = make_ca("other", ROOT)
    chain = (make_leaf(other), other.certificate)
    before = bench.clock.now()
    assert not bench.trust.vouched(chain, before)
    bench.clock.set_wall(SECOND)
    bench.use(*chain)
    assert bench.pushes == [({ROOT.certificate}, set())], "before the certificate itself"
    assert not bench.trust.vouched(chain, before)
    bench.clock.set_wall(SECOND)
    assert bench.trust.vouched(chain, bench.clock.now() - SECOND)


def test_a_renewal_by_the_same_ca_waits_for_nothing(bench: Bench) -> None:
    assert bench.trust.vouched((make_leaf(SIGNER), SIGNER.certificate), NOW - DAY)


def test_of_many_certificates_of_one_kind_one_is_judged(bench: Bench) -> None:
    """A thousand workloads must not cost a thousand choices with a thousand signatures each."""
    revocation = bench.trust.revocation
    assert not revocation.is_new((make_leaf(SIGNER), SIGNER.certificate))
    other = (make_leaf(SIGNER, extra=[(POINTS, False)]), SIGNER.certificate)
    assert revocation.is_new(other)
    bench.use(*other)
    assert not revocation.is_new(other)


def test_the_former_cas_list_stays_until_no_certificate_of_it_can_be_in_use(bench: Bench) -> None:
    """Its CA publishes it no more, and peers have certificates of it that were issued for others."""
    signer = make_ca("signer 3", ROOT)
    bench.publishes(make_crl(signer), issuers=(signer,))
    bench.use(make_leaf(signer, not_after=NOW + DAY), signer.certificate)
    bench.trust.remove_in_use("a", bench.first)
    bench.trust.update_lists("a", None)
    assert {each.issuer for each in bench.lists} == {SIGNER.certificate.subject, signer.certificate.subject}
    assert bench.pushes == [({ROOT.certificate}, {"CN=signer", "CN=signer 3"})]
    bench.clock.set_wall(2 * HOUR)  # a certificate of this CA lasts as long
    bench.trust.check_times()
    assert [each.issuer for each in bench.lists] == [signer.certificate.subject]


@pytest.mark.parametrize("end", [NOW + DAY, datetime(9999, 12, 31, 23, 59, 59, tzinfo=UTC)])
def test_the_longest_life_of_a_former_cas_certificates_counts(bench: Bench, end: datetime) -> None:
    """The last one to go may have been a short one, and of those that others have some may never end."""
    signer = make_ca("signer 3", ROOT)
    bench.publishes(make_crl(signer), issuers=(signer,))
    bench.use(make_leaf(signer, not_after=NOW + DAY), signer.certificate)
    long = bench.use(make_leaf(SIGNER, not_after=end), SIGNER.certificate)
    for each in (long, bench.first):
        bench.trust.remove_in_use("a", each)
    bench.trust.update_lists("a", None)
    bench.clock.set_wall(2 * HOUR)
    bench.trust.check_times()
    assert {each.issuer for each in bench.lists} == {SIGNER.certificate.subject, signer.certificate.subject}


def test_a_clock_that_was_ahead_for_a_while_does_not_keep_a_former_ca_for_as_long(bench: Bench) -> None:
    """Its list ends, and nobody publishes another one: revocation would be off for years."""
    signer = make_ca("signer 3", ROOT)
    bench.publishes(make_crl(signer), issuers=(signer,))
    bench.clock.set_wall(3650 * DAY)
    bench.trust.remove_in_use("a", bench.first)
    bench.clock.set_wall(-3650 * DAY)
    bench.use(make_leaf(signer, not_after=NOW + DAY), signer.certificate)
    bench.trust.update_lists("a", None)
    assert {each.issuer for each in bench.lists} == {SIGNER.certificate.subject, signer.certificate.subject}
    bench.clock.set_wall(3 * HOUR)
    bench.trust.check_times()
    assert [each.issuer for each in bench.lists] == [signer.certificate.subject]


def test_an_authority_that_does_not_answer_changes_nothing(bench: Bench) -> None:
    bench.trust.update_lists("a", None)
    assert bench.pushes == []
    assert len(bench.lists) == 1


def test_an_older_list_does_not_take_a_newer_ones_place(bench: Bench) -> None:
    """A node that is behind would take a revocation back."""
    bench.publishes(make_crl(SIGNER, 7, last_update=NOW - 2 * HOUR))
    assert bench.pushes == []


def test_a_list_that_was_not_replaced_is_warned_of_once_and_then_taken_out(bench: Bench, events: Events) -> None:
    bench.publishes(make_crl(SIGNER, last_update=NOW - SECOND, next_update=NOW - SECOND + timedelta(minutes=16)))
    bench.clock.set_wall(timedelta(minutes=13))
    bench.trust.check_times()
    assert events.named("list_ends_soon") == []
    bench.clock.set_wall(timedelta(minutes=1))
    for _ in range(2):
        bench.trust.check_times()
    (warned,) = events.named("list_ends_soon")
    assert warned["level"] == "warning"
    assert events.named("revocation_off") == []
    bench.clock.set_wall(timedelta(minutes=1, seconds=30))
    bench.trust.check_times()
    assert bench.lists == ()
    assert len(events.named("revocation_off")) == 1


class Publishing:
    """An `AdvertisesLists`: each step is its lists, an exception, or None to hang; it repeats the last."""

    refresh_every = EVERY
    revocation_lists = True

    def __init__(self, *script: AdvertisedLists | Exception | None) -> None:
        self.script = list(script)
        self.calls = 0

    async def anchors(self) -> bytes:
        return write_pem([ROOT.certificate])

    async def lists(self) -> AdvertisedLists:
        self.calls += 1
        step = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if step is None:
            await anyio.sleep_forever()
        if isinstance(step, Exception):
            raise step
        assert step is not None
        return step


def advertised(*cas: Ca, **changed: Any) -> AdvertisedLists:
    return AdvertisedLists(
        tuple(make_crl(ca, **changed).public_bytes(Encoding.DER) for ca in cas),
        write_pem([ca.certificate for ca in cas]),
    )


async def pass_time(clock: HandClock, time: timedelta) -> None:
    for _ in range(int(time / SECOND)):
        await clock.asleep()
        clock.elapse(SECOND)


@asynccontextmanager
async def following(bench: Bench, authority: Publishing) -> AsyncIterator[None]:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(follow_lists, bench.trust, "a", authority, bench.clock, lambda: 1.0)
        yield
        tasks.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("step", "cause"),
    [
        (AuthorityError(ErrorKind.TRANSIENT, "away"), "away"),
        (AdvertisedLists((b"<html>",)), "its revocation list 1 is damaged"),
        (AdvertisedLists((b"0" * ((4 << 20) + 1),)), "the revocation lists have more than 4194304 bytes"),
        (ZeroDivisionError("token"), "failed with ZeroDivisionError; please report the event fault"),
    ],
)
async def test_an_answer_that_cannot_be_used_costs_no_list(
    bench: Bench, events: Events, step: AdvertisedLists | Exception, cause: str
) -> None:
    async with following(bench, Publishing(step)):
        reported = await events.wait("lists_not_refreshed", authority="a")
    assert cause in reported["cause"]
    assert "token" not in reported["cause"]
    assert bench.pushes == []


async def test_an_authority_that_hangs_is_given_up(bench: Bench, events: Events) -> None:
    authority = Publishing(None)
    async with following(bench, authority):
        with anyio.fail_after(10):
            while not authority.calls:
                await checkpoint()
        bench.clock.elapse(timedelta(seconds=TIMEOUT))
        assert (await events.wait("lists_not_refreshed"))["cause"] == f"the CA did not answer within {TIMEOUT:.0f} s"
    assert bench.pushes == []


async def test_lists_are_read_at_the_authoritys_intervals(bench: Bench, events: Events) -> None:
    fresh, newer = (advertised(SIGNER, last_update=NOW - n * SECOND) for n in (2, 1))
    async with following(bench, Publishing(fresh, newer)):
        await events.wait("lists_changed", count=1)
        await pass_time(bench.clock, EVERY - SECOND)
        assert len(events.named("lists_changed")) == 1
        await pass_time(bench.clock, 2 * SECOND)
        await events.wait("lists_changed", count=2)


async def test_a_list_that_has_come_to_be_lacking_is_asked_for_at_once(bench: Bench, events: Events) -> None:
    """Not only after `refresh_every`: until then revocation is off."""
    other = make_ca("other", ROOT)
    fresh, both = advertised(SIGNER, last_update=NOW - SECOND), advertised(SIGNER, other, last_update=NOW - SECOND)
    async with following(bench, Publishing(fresh, both)):
        await events.wait("lists_changed")
        bench.use(make_leaf(other), other.certificate)
        assert bench.lists == ()
        await pass_time(bench.clock, 6 * SECOND)
        await events.wait("revocation_on")
    assert len(bench.lists) == 2


async def test_a_busy_authority_is_asked_for_lists_no_sooner_than_it_says(bench: Bench, events: Events) -> None:
    """Not even for a list that is lacking."""
    other = make_ca("other", ROOT)
    fresh = advertised(SIGNER, last_update=NOW - SECOND)
    authority = Publishing(fresh, AuthorityError(ErrorKind.THROTTLED, "slow down", retry_after=60), fresh)
    async with following(bench, authority):
        await events.wait("lists_changed")
        await pass_time(bench.clock, EVERY + SECOND)
        assert (await events.wait("lists_not_refreshed"))["in_seconds"] == 60
        bench.use(make_leaf(other), other.certificate)
        assert bench.lists == ()
        await pass_time(bench.clock, 50 * SECOND)
        assert authority.calls == 2
        await pass_time(bench.clock, 12 * SECOND)
        assert authority.calls == 3


async def test_a_list_is_asked_for_before_its_end_whatever_the_authority_says(bench: Bench, events: Events) -> None:
    """And once it has ended, no sooner than that: revocation is off by then."""
    left = EVERY + 40 * SECOND
    short = make_crl(SIGNER, last_update=NOW - SECOND, next_update=NOW + 2 * left).public_bytes(Encoding.DER)
    busy = AuthorityError(ErrorKind.TRANSIENT, "in maintenance", retry_after=EVERY.total_seconds())
    authority = Publishing(AdvertisedLists((short,)), busy)
    async with following(bench, authority):
        await events.wait("lists_changed")
        seconds = list[float]()
        while not seconds or seconds[-1] < EVERY.total_seconds():
            assert len(seconds) < 20
            await pass_time(bench.clock, timedelta(seconds=seconds[-1] if seconds else EVERY.total_seconds()) + SECOND)
            seconds.append((await events.wait("lists_not_refreshed", count=len(seconds) + 1))["in_seconds"])
    assert seconds[0] == pytest.approx((2 * left - EVERY).total_seconds() / 2, abs=2)
    assert bench.lists == ()


def test_a_list_is_asked_for_again_at_half_of_what_is_left_of_its_life() -> None:
    lists = read_lists([make_crl(SIGNER, next_update=NOW + timedelta(minutes=4)).public_bytes(Encoding.DER)])
    assert next_reading(lists, NOW, EVERY) == NOW + timedelta(minutes=2)
    assert next_reading(lists, NOW + timedelta(minutes=4), EVERY) == NOW + timedelta(minutes=4, seconds=5)
    assert next_reading(lists, NOW, SECOND) == NOW + SECOND
    assert next_reading((), NOW, EVERY) == NOW + EVERY
