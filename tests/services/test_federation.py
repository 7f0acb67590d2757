"""The bundles of other trust domains: served under their own names, and never mixed into the agent's own."""

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest
from cryptography import x509
from fakes.clocks import HAND_LOOP, HandClock
from fakes.events import Events, recorded
from fakes.hierarchy import DAY, HOUR, NOW, make_ca, make_leaf

from sds_agent.authority.protocol import (
    AdvertisesAnchors,
    AdvertisesFederation,
    AnnouncesAnchors,
    AuthorityError,
    ErrorKind,
)
from sds_agent.issuance.anchors_file import AnchorsFile
from sds_agent.issuance.anchors_refresh import (
    BETWEEN_ANNOUNCEMENTS,
    FIRST_REFRESH_RETRY,
    follow_times,
    maintain,
    refresh,
)
from sds_agent.issuance.federation import MOST_SHOWN, Federation
from sds_agent.issuance.status import FederatedStatus
from sds_agent.issuance.trust import Trust
from sds_agent.pki.certificates import read_pem, write_pem
from sds_agent.secrets.model import BundleSecret
from sds_agent.secrets.store import SecretStore

OWN, OTHER, THIRD = (make_ca(name).certificate for name in ("own", "other", "third"))


class Federated:
    """An authority that says what a test puts there, and announces it."""

    refresh_every = HOUR

    def __init__(self) -> None:
        self.own = write_pem([OWN])
        self.others: Mapping[str, bytes] | AuthorityError = {"other.example": write_pem([OTHER])}
        self.calls = 0
        self._changed = anyio.Event()

    async def anchors(self) -> bytes:
        """Its own."""
        self.calls += 1
        self._changed = anyio.Event()
        return self.own

    async def federated_anchors(self) -> Mapping[str, bytes]:
        """Those of others."""
        if isinstance(self.others, AuthorityError):
            raise self.others
        return self.others

    async def anchors_changed(self) -> None:
        """Wait for `announce`."""
        await self._changed.wait()

    def announce(self) -> None:
        """Say that something has changed."""
        self._changed.set()


class Bench:
    """A store with two federated names, and an authority that gives both."""

    def __init__(self, events: Events) -> None:
        self.events = events
        self.clock = HandClock()
        self.store = SecretStore(["ROOTCA"], ["spiffe://other.example", "spiffe://third.example"])
        self.trust = Trust(self.store, ["ROOTCA"], self.clock)
        self.federation = Federation(self.store, {"spire": ("other.example", "third.example")}, self.clock)
        self.authority = Federated()

    @asynccontextmanager
    async def refreshing(self, authority: AdvertisesAnchors | None = None) -> AsyncIterator[None]:
        """Ask the authority as the agent does, inside this context."""
        async with anyio.create_task_group() as tasks:

            async def ask() -> None:
                chosen = authority or self.authority
                await refresh(self.trust, "spire", chosen, self.clock, lambda: 1.0, federation=self.federation)

            tasks.start_soon(ask)
            yield
            tasks.cancel_scope.cancel()

    async def again(self) -> None:
        """Announce a change and wait until the authority has been asked."""
        calls = self.authority.calls
        await self.clock.asleep()
        self.clock.elapse(BETWEEN_ANNOUNCEMENTS)
        self.authority.announce()
        with anyio.fail_after(10):
            while self.authority.calls == calls:
                await anyio.wait_all_tasks_blocked()
            await anyio.wait_all_tasks_blocked()

    def served(self, name: str) -> set[x509.Certificate] | None:
        """The anchors under a name; None if there is nothing."""
        secret = self.store.snapshot[name]
        if secret is None:
            return None
        assert isinstance(secret, BundleSecret)
        return set(read_pem(secret.anchors_pem))


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return HAND_LOOP


@pytest.fixture
def bench() -> Iterator[Bench]:
    with recorded() as events:
        yield Bench(events)


def test_the_stand_in_has_all_that_an_authority_may_offer() -> None:
    authority = Federated()
    assert isinstance(authority, AnnouncesAnchors)
    assert isinstance(authority, AdvertisesFederation)


async def test_another_trust_domains_anchors_are_served_under_its_name_alone(bench: Bench) -> None:
    async with bench.refreshing():
        await bench.events.wait("federated_trust_changed")
        assert bench.served("spiffe://other.example") == {OTHER}
        assert bench.served("ROOTCA") == {OWN}
        assert bench.served("spiffe://third.example") is None
        served = [
            (each.trust_domain, each.authority, [a.subject for a in each.anchors]) for each in bench.federation.status
        ]
        assert served == [
            ("other.example", "spire", ["'CN=other'"]),
            ("third.example", "spire", []),
        ]


async def test_an_announced_change_is_served_before_the_next_refresh_is_due(bench: Bench) -> None:
    async with bench.refreshing():
        await bench.events.wait("federated_trust_changed")
        bench.authority.own = write_pem([OWN, THIRD])
        bench.authority.others = {"other.example": write_pem([OTHER]), "third.example": write_pem([THIRD])}
        await bench.again()
        assert bench.served("ROOTCA") == {OWN, THIRD}
        assert bench.served("spiffe://third.example") == {THIRD}
        assert len(bench.events.named("federated_trust_changed", trust_domain="other.example")) == 1


async def test_an_authority_that_announces_without_end_is_asked_once_a_second(bench: Bench) -> None:
    bench.authority.announce()

    class Endless(Federated):
        async def anchors_changed(self) -> None:
            return

    authority = bench.authority = Endless()
    async with bench.refreshing():
        await bench.events.wait("federated_trust_changed")
        for _ in range(10):
            await bench.clock.asleep()
            bench.clock.elapse(BETWEEN_ANNOUNCEMENTS)
            await anyio.wait_all_tasks_blocked()
        assert authority.calls == 11


async def test_a_fault_in_the_announcement_is_reported_and_the_refresh_goes_on(bench: Bench) -> None:
    class Faulty(Federated):
        async def anchors_changed(self) -> None:
            raise KeyError("announcement")

    authority = Faulty()
    async with bench.refreshing(authority):
        await bench.events.wait("federated_trust_changed")
        await bench.clock.asleep()
        bench.clock.elapse(BETWEEN_ANNOUNCEMENTS)
        await bench.events.wait("fault")
        await bench.clock.asleep()
        bench.clock.elapse(HOUR)
        with anyio.fail_after(10):
            while authority.calls < 2:
                await anyio.wait_all_tasks_blocked()


async def test_a_trust_domain_that_is_not_listed_is_not_served_and_logged_once(bench: Bench) -> None:
    """Else whoever federates with the source would decide which names there are."""
    others = {"other.example": write_pem([OTHER]), "stranger.example": write_pem([THIRD])}
    bench.authority.others = others
    async with bench.refreshing():
        await bench.events.wait("federated_trust_changed")
        await bench.again()
        assert set(bench.store.snapshot) == {"ROOTCA", "spiffe://other.example", "spiffe://third.example"}
        (event,) = bench.events.named("federation_not_listed")
        assert event["trust_domains"] == ["stranger.example"]


def test_a_thousand_trust_domains_that_are_not_listed_are_one_short_event(bench: Bench) -> None:
    bench.federation.update("spire", {f"{n:04}\n.example": b"" for n in range(1000)})
    (event,) = bench.events.named("federation_not_listed")
    assert len(event["trust_domains"]) == MOST_SHOWN + 1
    assert event["trust_domains"][-1] == "and 990 more"
    assert all("\n" not in each for each in event["trust_domains"])


def test_a_trust_domain_that_is_federated_no_longer_is_withheld(bench: Bench) -> None:
    bench.federation.update("spire", {"other.example": write_pem([OTHER])})
    bench.federation.update("spire", {})
    assert bench.served("spiffe://other.example") is None
    assert bench.federation.status[0] == FederatedStatus("other.example", "spire")
    (event,) = bench.events.named("federated_trust_withdrawn")
    assert event["trust_domain"] == "other.example"


@pytest.mark.parametrize(
    ("pem", "said"),
    [
        (b"", "holds no certificate"),
        (b"garbage", "holds no certificate"),
        (b"-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n", "PEM block 1"),
        (write_pem([make_leaf(make_ca("a CA"))]), "is no CA"),
    ],
)
def test_a_bundle_without_a_usable_anchor_does_not_replace_the_last_good_one(
    bench: Bench, pem: bytes, said: str
) -> None:
    bench.federation.update("spire", {"other.example": write_pem([OTHER])})
    for _ in range(2):
        bench.federation.update("spire", {"other.example": pem})
    assert bench.served("spiffe://other.example") == {OTHER}
    (event,) = bench.events.named("federated_anchors_left_out")
    assert said in str(event["causes"])


def test_what_is_no_ca_is_left_out_beside_a_good_anchor(bench: Bench) -> None:
    leaf = make_leaf(make_ca("a CA"))
    bench.federation.update("spire", {"other.example": write_pem([leaf, OTHER])})
    assert bench.served("spiffe://other.example") == {OTHER}


async def test_an_authority_that_was_away_for_long_is_asked_when_it_announces_that_it_is_back(bench: Bench) -> None:
    class Away(Federated):
        async def anchors(self) -> bytes:
            if self.own:
                return await super().anchors()
            self.calls += 1
            raise AuthorityError(ErrorKind.TRANSIENT, "away")

    authority = bench.authority = Away()
    good, authority.own = authority.own, b""
    async with bench.refreshing():
        for count in range(1, 9):
            await bench.events.wait("trust_not_refreshed", count=count)
            while authority.calls == count:
                await bench.clock.asleep()
                bench.clock.elapse(FIRST_REFRESH_RETRY)
                await anyio.wait_all_tasks_blocked()
        authority.own = good
        await bench.clock.asleep()
        bench.clock.elapse(FIRST_REFRESH_RETRY)
        authority.announce()
        await bench.events.wait("federated_trust_changed")


async def test_an_error_keeps_what_is_served(bench: Bench) -> None:
    async with bench.refreshing():
        await bench.events.wait("federated_trust_changed")
        bench.authority.others = AuthorityError(ErrorKind.TRANSIENT, "away")
        await bench.again()
        assert (await bench.events.wait("trust_not_refreshed"))["cause"] == "away"
        assert bench.served("spiffe://other.example") == {OTHER}


async def test_an_anchor_that_ends_leaves_its_bundle_by_itself(bench: Bench) -> None:
    ending = make_ca("ending", not_before=NOW - DAY, not_after=NOW + timedelta(seconds=30)).certificate
    bench.federation.update("spire", {"other.example": write_pem([OTHER, ending])})
    assert bench.served("spiffe://other.example") == {OTHER, ending}
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(follow_times, bench.federation, bench.clock)
        for _ in range(6):
            await bench.clock.asleep()
            bench.clock.elapse(timedelta(seconds=5))
        await bench.clock.asleep()
        assert bench.served("spiffe://other.example") == {OTHER}
        tasks.cancel_scope.cancel()


# --- over a restart ---


def restarted(bench: Bench, file: AnchorsFile, sources: Mapping[str, tuple[str, ...]]) -> Federation:
    """What an agent with these sources makes of the file."""
    bench.store = SecretStore(["ROOTCA"], ["spiffe://other.example", "spiffe://third.example"])
    federation = Federation(bench.store, sources, bench.clock)
    federation.restore(file.load().federated)
    return federation


async def stored(bench: Bench, directory: Path) -> AnchorsFile:
    """The file of an agent that was given a bundle, after a moment."""
    kinds = {"spire": "spiffe"}
    file = AnchorsFile(directory, kinds)
    federation = Federation(bench.store, {"spire": ("other.example",)}, bench.clock, bench.trust.store_again)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(maintain, bench.trust, file, bench.clock, federation)
        await bench.clock.asleep(2)
        federation.update("spire", {"other.example": write_pem([OTHER])})
        with anyio.fail_after(10):
            while not (directory / "anchors.json").exists() or not AnchorsFile(directory, kinds).load().federated:
                await anyio.wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
    return AnchorsFile(directory, kinds)


async def test_a_restarted_agent_serves_the_bundle_before_its_authority_answers(bench: Bench, tmp_path: Path) -> None:
    """Else it would refuse every peer of the other trust domain while its source is away."""
    file = await stored(bench, tmp_path)
    federation = restarted(bench, file, {"spire": ("other.example", "third.example")})
    assert bench.served("spiffe://other.example") == {OTHER}
    assert bench.served("spiffe://third.example") is None
    federation.update("spire", {})
    assert bench.served("spiffe://other.example") is None


@pytest.mark.parametrize("sources", [{"spire": ("third.example",)}, {"another": ("other.example",)}, {}])
async def test_a_stored_bundle_that_the_configuration_lists_no_longer_is_not_served(
    bench: Bench, tmp_path: Path, sources: Mapping[str, tuple[str, ...]]
) -> None:
    file = await stored(bench, tmp_path)
    restarted(bench, file, sources)
    assert bench.served("spiffe://other.example") is None
