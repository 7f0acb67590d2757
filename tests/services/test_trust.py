"""The trust bundle: every peer's root in it, never empty, and pushed only when it has changed."""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from cryptography import x509
from fakes.authorities import ScriptedTrust
from fakes.calls import counted
from fakes.clocks import HAND_LOOP, HandClock
from fakes.disks import DeadDisk
from fakes.events import Events, recorded
from fakes.hierarchy import DAY, HOUR, NOW, make_ca, make_leaf, new_key
from fakes.odd_certificates import NOT_READ, together

from sds_agent.authority.protocol import AdvertisesAnchors, AuthorityError, ErrorKind
from sds_agent.clock import LONGEST_SLEEP
from sds_agent.issuance.anchors_file import (
    AdvertisedAnchors,
    AnchorsFile,
    AnchorsFileError,
    NeededAnchor,
    StoredAnchors,
)
from sds_agent.issuance.anchors_refresh import (
    FIRST_REFRESH_RETRY,
    RETRY,
    TIMEOUT,
    follow_times,
    maintain,
    next_refresh,
    refresh,
)
from sds_agent.issuance.status import TrustStatus
from sds_agent.issuance.trust import Trust
from sds_agent.pki.certificates import longest_valid_first, read_pem, write_pem
from sds_agent.sealing import Seal
from sds_agent.secrets.model import BundleSecret, CertificateSecret
from sds_agent.secrets.store import SecretStore
from sds_agent.statefile import FORMAT
from sds_agent.tasks import DISK_TIMEOUT

NAMES = ("ROOTCA", "spiffe://demo.example")
ROOT = make_ca("another root")
ROOTS = [make_ca(f"root {number}").certificate for number in range(4)]
TICK = timedelta(seconds=LONGEST_SLEEP)
REFRESH = ScriptedTrust.refresh_every


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return HAND_LOOP


@pytest.fixture
def events() -> Iterator[Events]:
    with recorded() as events:
        yield events


@pytest.fixture
def store() -> SecretStore:
    return SecretStore(NAMES)


@pytest.fixture
def trust(store: SecretStore) -> Trust:
    return Trust(store, NAMES, HandClock())


def served(store: SecretStore) -> set[x509.Certificate]:
    """The anchors in the bundle, which has to be one under all its names and without repetitions."""
    secret, other = (store.snapshot[name] for name in NAMES)
    assert secret == other
    if secret is None:
        return set()
    assert isinstance(secret, BundleSecret)
    anchors = read_pem(secret.anchors_pem)
    assert len(set(anchors)) == len(anchors)
    return set(anchors)


def in_use(*chain: x509.Certificate) -> CertificateSecret:
    """A certificate that is served, with these as its chain. Its key does not matter here."""
    return CertificateSecret(write_pem(chain), b"", NOW + HOUR)


# --- the bundle ---


def test_the_bundle_holds_the_anchors_of_every_authority(store: SecretStore, trust: Trust) -> None:
    assert served(store) == set()
    trust.update("a", (ROOTS[0], ROOTS[1]))
    trust.update("b", (ROOTS[1], ROOTS[2]))
    assert served(store) == {ROOTS[0], ROOTS[1], ROOTS[2]}
    assert trust.anchors_of("a") == (ROOTS[0], ROOTS[1])
    assert trust.anchors_of("c") == ()


def test_a_certificate_that_is_no_ca_does_not_enter_the_bundle(
    store: SecretStore, trust: Trust, events: Events
) -> None:
    """A CA that advertises a server's certificate as a root would make every Envoy trust that server."""
    server = make_leaf(make_ca("root"))
    for _ in range(2):
        trust.update("a", (server, ROOTS[0]))
    assert served(store) == {ROOTS[0]}
    (reported,) = events.named("anchors_left_out")
    assert reported["level"] == "error"
    assert "is no CA" in reported["causes"][0]
    trust.update("a", (server,))
    assert served(store) == {ROOTS[0]}, "an empty bundle would make every handshake fail"


def test_anchors_that_cannot_be_used_are_logged_once(store: SecretStore, trust: Trust, events: Events) -> None:
    for _ in range(2):
        trust.update("a", (ROOTS[0],), ("PEM block 2 is damaged",))
    assert served(store) == {ROOTS[0]}
    (reported,) = events.named("anchors_left_out")
    assert (reported["authority"], reported["causes"]) == ("a", ["PEM block 2 is damaged"])


def test_an_authoritys_new_anchors_take_the_place_of_its_old_ones(store: SecretStore, trust: Trust) -> None:
    """A root that a CA no longer advertises is trusted no longer; those of other CAs stay."""
    trust.update("a", (ROOTS[0],))
    trust.update("b", (ROOTS[1],))
    trust.update("a", (ROOTS[2], ROOTS[3]))
    assert served(store) == {ROOTS[1], ROOTS[2], ROOTS[3]}


def test_an_anchor_stays_while_a_certificate_below_it_is_in_use(
    store: SecretStore, trust: Trust, events: Events
) -> None:
    """Workloads of one agent would refuse each other from a change of the CA's root to the renewal of all."""
    old = make_ca("old root")
    lower = make_ca("lower", old)
    unused, new = ROOTS[:2]
    trust.update("a", (old.certificate, unused))
    first, last = (in_use(make_leaf(issuer), lower.certificate) for issuer in (lower, lower))
    for certificate in (first, last):
        trust.add_in_use("a", certificate)
    trust.add_in_use("b", in_use(make_leaf(make_ca("lost"))))
    trust.update("a", (new,))
    assert served(store) == {new, old.certificate}, "what no certificate needs goes at once"
    (stored,) = events.named("old_anchors_kept")
    assert (stored["anchors"], stored["certificates"], stored["authority"]) == (1, 2, "a")
    trust.update("a", (ROOTS[2],))
    assert served(store) == {ROOTS[2], old.certificate}, "nor is it forgotten at the next change"
    trust.remove_in_use("a", first)
    assert served(store) == {ROOTS[2], old.certificate}
    trust.remove_in_use("a", last)
    assert served(store) == {ROOTS[2]}


@pytest.mark.parametrize("way", ["removed", "moved", "withdrawn"])
def test_each_of_many_certificates_costs_the_same_when_all_of_them_are_affected(way: str) -> None:
    """As by one change of the configuration, or of a CA's roots: an agent with thousands must not stand still."""
    costs = list[float]()
    for count in (10, 40):
        store = SecretStore(NAMES)
        trust = Trust(store, NAMES, HandClock(), authorities=("a", "b"))
        trust.update("a", (ROOT.certificate,))
        certificates = [in_use(make_leaf(ROOT)) for _ in range(count)]
        for each in certificates:
            trust.add_in_use("a", each)
        with counted() as calls:
            for each in certificates:
                if way == "removed":
                    trust.outlive("a", each)
                elif way == "moved":
                    trust.move_in_use("a", "b", each)
            if way == "withdrawn":
                trust.update("a", (ROOTS[0],))
            else:
                trust.follow(["b"], ())
        costs.append(sum(calls.of.values()) / count)
        assert calls.of["find_path"] == 0, "what a certificate chains to is known"
        assert ROOT.certificate in served(store)
        assert {each.until for each in trust.needed} == {NOW + HOUR}
    assert costs[1] <= 1.2 * costs[0]


@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_of_removed_workloads_the_certificate_that_ends_last_keeps_the_root(
    trust: Trust, order: tuple[int, int]
) -> None:
    trust.update("a", (ROOT.certificate,))
    for hours in order:
        certificate = CertificateSecret(write_pem([make_leaf(ROOT)]), b"", NOW + hours * HOUR)
        trust.add_in_use("a", certificate)
        trust.outlive("a", certificate)
    assert trust.needed == (NeededAnchor("a", ROOT.certificate, NOW + 2 * HOUR),)


def test_an_anchor_that_is_replaced_by_one_of_the_same_key_goes_at_once(store: SecretStore, trust: Trust) -> None:
    """The new one vouches for what the old one did, as where istiod renews its own root."""
    old = make_ca("root")
    renewed = make_ca("root", key=old.key)
    trust.update("a", (old.certificate,))
    trust.add_in_use("a", in_use(make_leaf(old)))
    trust.update("a", (renewed.certificate,))
    assert served(store) == {renewed.certificate}


def renewed_while_in_use(
    trust: Trust, *, not_before: datetime = NOW - DAY, not_after: datetime = NOW + DAY
) -> tuple[x509.Certificate, x509.Certificate]:
    """A root below which a certificate is in use, and the root that the authority advertises instead from then on."""
    old = make_ca("root")
    renewed = make_ca("root", key=old.key, not_before=not_before, not_after=not_after)
    trust.update("a", (old.certificate,))
    trust.add_in_use("a", in_use(make_leaf(old)))
    trust.update("a", (renewed.certificate,))
    return old.certificate, renewed.certificate


def test_an_anchor_stays_beside_one_of_the_same_key_that_ends_first(store: SecretStore, trust: Trust) -> None:
    """A certificate in use would be refused once the new one has ended."""
    assert served(store) == set()
    assert set(renewed_while_in_use(trust, not_after=NOW + HOUR / 2)) == served(store)


async def test_an_anchor_stays_until_one_of_the_same_key_that_begins_later_is_valid(store: SecretStore) -> None:
    """A certificate in use would be refused until then, also where both were served: Envoy may choose the new one."""
    clock = HandClock()
    trust = Trust(store, NAMES, clock)
    old, renewed = renewed_while_in_use(trust, not_before=NOW + timedelta(seconds=30))
    assert served(store) == {old}
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(follow_times, trust, clock)
        await clock.asleep()
        for _ in range(6):
            assert served(store) == {old}
            clock.elapse(timedelta(seconds=5))
            await clock.asleep()
        assert served(store) == {old, renewed}
        tasks.cancel_scope.cancel()


async def test_a_root_that_ends_leaves_the_bundle_while_nothing_else_happens(store: SecretStore) -> None:
    """Envoys up to 1.37 take the last of several of one name, and that is the one that ends first."""
    clock = HandClock()
    trust = Trust(store, NAMES, clock)
    key = new_key()
    former, renewed = (make_ca("root", key=key, not_after=NOW + end).certificate for end in (TICK, DAY))
    trust.update("a", (former, renewed))
    assert served(store) == {former, renewed}
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(follow_times, trust, clock)
        await clock.asleep()
        clock.elapse(TICK)
        await clock.asleep()
        assert served(store) == {renewed}
        tasks.cancel_scope.cancel()


def test_an_anchor_that_is_advertised_again_is_trusted_once_and_may_go_again(store: SecretStore, trust: Trust) -> None:
    old = make_ca("old root")
    trust.update("a", (old.certificate,))
    certificate = in_use(make_leaf(old))
    trust.add_in_use("a", certificate)
    for anchors in ((ROOTS[0],), (old.certificate, ROOTS[0]), (ROOTS[0],)):
        trust.update("a", anchors)
        assert served(store) == {ROOTS[0], old.certificate}
    trust.remove_in_use("a", certificate)
    assert served(store) == {ROOTS[0]}


def test_an_authority_that_advertises_none_changes_nothing(store: SecretStore, trust: Trust) -> None:
    """An empty bundle would make every handshake of every Envoy fail."""
    trust.update("a", ())
    assert served(store) == set()
    trust.update("a", (ROOTS[0],))
    trust.update("a", ())
    assert served(store) == {ROOTS[0]}
    assert trust.anchors_of("a") == (ROOTS[0],)


@pytest.mark.parametrize(
    "again",
    [
        pytest.param((ROOTS[0], ROOTS[1]), id="the same"),
        pytest.param((ROOTS[1], ROOTS[0]), id="in another order"),
        pytest.param((ROOTS[0], ROOTS[1], ROOTS[0]), id="one of them twice"),
        pytest.param(read_pem(write_pem([ROOTS[0]]) + b"# text\r\n" + write_pem([ROOTS[1]])), id="read anew"),
    ],
)
def test_what_has_not_changed_is_not_pushed(
    store: SecretStore, trust: Trust, events: Events, again: tuple[x509.Certificate, ...]
) -> None:
    """A CA may advertise its roots in any order, and each would reach every Envoy as a change."""
    trust.update("a", (ROOTS[0], ROOTS[1]))
    reported: list[frozenset[str]] = []
    with store.watching(reported.append):
        trust.update("a", again)
        trust.update("b", again)
    assert reported == []
    assert len(events.named("trust_changed")) == 1


def test_a_restart_gives_the_same_bundle_whichever_authority_answers_first(store: SecretStore, trust: Trust) -> None:
    trust.update("a", (ROOTS[0], ROOTS[1]))
    trust.update("b", (ROOTS[2],))
    restarted = SecretStore(NAMES)
    other = Trust(restarted, NAMES, HandClock())
    other.update("b", (ROOTS[2],))
    other.update("a", (ROOTS[1], ROOTS[0]))
    assert restarted.snapshot == store.snapshot


def test_of_a_root_and_its_renewals_the_one_that_is_valid_longest_comes_first(store: SecretStore, trust: Trust) -> None:
    """Of roots with one name and key Envoy 1.40 takes the first and 1.36 the last: one that has expired is left out."""
    key = new_key()
    renewed = [make_ca("root", key=key, not_after=NOW + days * DAY).certificate for days in (3, -1, 2, 1)]
    trust.update("a", tuple(renewed))
    secret = store.snapshot[NAMES[0]]
    assert isinstance(secret, BundleSecret)
    assert [root.not_valid_after_utc - NOW for root in read_pem(secret.anchors_pem)] == [3 * DAY, 2 * DAY, DAY]


def test_a_bundle_of_which_everything_has_expired_stays_as_it_is(store: SecretStore, trust: Trust) -> None:
    """Envoy refuses a secret without anchors, and it may be this machine's clock that is wrong."""
    expired = make_ca("root", not_after=NOW - DAY).certificate
    trust.update("a", (expired,))
    secret = store.snapshot[NAMES[0]]
    assert isinstance(secret, BundleSecret)
    assert read_pem(secret.anchors_pem) == (expired,)


# --- what can be seen ---


def test_the_status_names_who_advertises_each_anchor_or_why_it_is_still_served(trust: Trust) -> None:
    old, new = make_ca("old"), ROOTS[0]
    assert trust.status == TrustStatus(None, ())
    trust.update("a", (old.certificate, new))
    trust.update("b", (new,))
    trust.add_in_use("a", in_use(make_leaf(old)))
    trust.update("a", (new, make_leaf(old)), ("PEM block 3 is damaged",))
    status = trust.status
    assert {anchor.subject: (anchor.advertised_by, anchor.needed_until) for anchor in status.anchors} == {
        "'CN=old'": ((), NOW + HOUR),
        "'CN=root 0'": (("a", "b"), None),
    }
    assert [(each.serial, each.not_after) for each in status.anchors] == [
        (f"{anchor.serial_number:x}", anchor.not_valid_after_utc)
        for anchor in longest_valid_first([old.certificate, new])
    ]
    (left_out,) = status.left_out
    assert (left_out.authority, left_out.causes[0], len(left_out.causes)) == ("a", "PEM block 3 is damaged", 2)
    trust.update("a", (new,))
    assert trust.status.left_out == ()


def test_the_status_has_the_version_that_envoys_get_and_no_endless_text(store: SecretStore, trust: Trust) -> None:
    trust.update("a", (ROOTS[0],), ("x" * 10_000,))
    secret = store.snapshot[NAMES[0]]
    assert secret is not None
    assert trust.status.version == secret.version
    assert len(trust.status.left_out[0].causes[0]) < 1000


def test_the_status_separates_restored_anchors_from_advertised_ones(trust: Trust) -> None:
    trust.restore([NeededAnchor("gone", ROOT.certificate, NOW + HOUR)])
    trust.update("a", (ROOTS[0],))
    assert {(each.advertised_by, each.needed_until) for each in trust.status.anchors} == {
        ((), NOW + HOUR),
        (("a",), None),
    }


# --- over a restart ---


def restarted(needs: tuple[NeededAnchor, ...], *authorities: str) -> tuple[SecretStore, Trust, HandClock]:
    """The trust of the next agent, which remembers these."""
    store, clock = SecretStore(NAMES), HandClock()
    trust = Trust(store, NAMES, clock, authorities=authorities)
    trust.restore(needs)
    return store, trust, clock


def test_what_certificates_in_use_chain_to_is_needed_until_the_last_has_ended(trust: Trust) -> None:
    root, lower = make_ca("root"), make_ca("lower")
    trust.update("a", (root.certificate, lower.certificate, ROOTS[0]))
    short = CertificateSecret(write_pem([make_leaf(root)]), b"", NOW + HOUR / 2)
    for certificate in (in_use(make_leaf(root)), short, in_use(make_leaf(lower))):
        trust.add_in_use("a", certificate)
    assert set(trust.needed) == {
        NeededAnchor("a", root.certificate, NOW + HOUR),
        NeededAnchor("a", lower.certificate, NOW + HOUR),
    }, "an anchor that nothing chains to is not needed"


def test_an_old_root_outlives_a_restart_with_another_ca_until_what_chains_to_it_has_ended(
    trust: Trust, events: Events
) -> None:
    """Envoys still hold certificates of the CA before, and their peers would refuse them from the restart on."""
    old = make_ca("old")
    trust.update("embedded", (old.certificate, ROOT.certificate))
    trust.add_in_use("embedded", in_use(make_leaf(old)))
    trust.add_in_use("embedded", CertificateSecret(write_pem([make_leaf(ROOT)]), b"", NOW + HOUR / 2))
    store, after, clock = restarted(trust.needed, "plugged")
    clock.set_wall(HOUR / 2)
    assert after.drop_ended() == NOW + HOUR
    assert served(store) == set(), "alone it would make Envoys refuse all others"
    after.update("plugged", (ROOTS[0],))
    assert served(store) == {ROOTS[0], old.certificate}
    (stored,) = events.named("old_anchors_kept")
    assert (stored["authority"], stored["anchors"], stored["until"]) == ("embedded", 1, "2026-03-14T16:09:26.000Z")
    assert after.needed == (NeededAnchor("embedded", old.certificate, NOW + HOUR),), (
        "nor does the next restart forget it"
    )
    clock.set_wall(HOUR / 2 - timedelta(seconds=1))
    assert after.drop_ended() == NOW + HOUR
    assert served(store) == {ROOTS[0], old.certificate}
    clock.set_wall(timedelta(seconds=1))
    assert after.drop_ended() is None
    assert served(store) == {ROOTS[0]}
    assert not after.needed


def test_a_restart_with_the_same_ca_changes_no_bundle_and_no_word(
    store: SecretStore, trust: Trust, events: Events
) -> None:
    root = make_ca("root")
    for authority, anchor in (("a", root.certificate), ("b", ROOTS[1])):
        trust.update(authority, (anchor,))
    trust.add_in_use("a", in_use(make_leaf(root)))
    after, other, _ = restarted(trust.needed, "a", "b")
    other.update("b", (ROOTS[1],))
    other.update("a", (root.certificate,))
    assert after.snapshot == store.snapshot
    assert events.named("old_anchors_kept") == []


def test_what_has_ended_or_is_no_ca_is_not_remembered() -> None:
    server = make_leaf(make_ca("root"))
    store, trust, _ = restarted((NeededAnchor("a", ROOTS[0], NOW), NeededAnchor("a", server, NOW + HOUR)))
    trust.update("b", (ROOTS[1],))
    assert served(store) == {ROOTS[1]}


def rebuilt(stored: StoredAnchors, *authorities: str) -> tuple[SecretStore, Trust, HandClock]:
    """The trust of the next agent, which restores all of these."""
    store, clock = SecretStore(NAMES), HandClock()
    trust = Trust(store, NAMES, clock, authorities=authorities)
    trust.restore(stored.needed, stored.advertised)
    return store, trust, clock


def test_after_a_restart_the_whole_bundle_is_served_at_once_though_no_ca_answers(
    store: SecretStore, trust: Trust
) -> None:
    """The same bytes as before: an Envoy that connects again is not disturbed, and no peer is refused."""
    lower = make_ca("lower")
    trust.update("a", (ROOT.certificate, ROOTS[0]))
    trust.update("b", (ROOTS[1], lower.certificate))
    trust.add_in_use("a", in_use(make_leaf(ROOT)))
    trust.update("a", (ROOTS[0],))
    after, _, _ = rebuilt(trust.stored, "a", "b")
    assert served(after) == {ROOT.certificate, ROOTS[0], ROOTS[1], lower.certificate}
    assert after.snapshot == store.snapshot


def test_a_root_that_a_ca_withdrew_while_the_agent_was_down_goes_when_the_ca_answers(trust: Trust) -> None:
    trust.update("a", (ROOTS[0], ROOTS[1]))
    trust.update("b", (ROOTS[2],))
    store, after, _ = rebuilt(trust.stored, "a", "b")
    after.update("a", (ROOTS[1],))
    assert served(store) == {ROOTS[1], ROOTS[2]}


def test_restored_anchors_never_replace_what_a_ca_has_advertised_since_the_start(trust: Trust) -> None:
    """The CA may answer before a workload's certificate is read from the disk."""
    trust.update("a", (ROOTS[1],))
    trust.restore_advertised("a", (ROOTS[0],), NOW + HOUR)
    trust.restore((), [AdvertisedAnchors("a", (ROOTS[0],), NOW + HOUR)])
    assert trust.anchors_of("a") == (ROOTS[1],)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_of_two_restored_sets_of_anchors_the_newer_counts(trust: Trust, order: tuple[int, int]) -> None:
    """Killed after a certificate was stored and before the bundle was: the certificate's anchors are the newer."""
    for number in order:
        trust.restore_advertised("a", (ROOTS[number],), NOW - HOUR + number * timedelta(minutes=1))
    assert trust.anchors_of("a") == (ROOTS[1],)


def test_an_expired_anchor_is_not_restored(trust: Trust) -> None:
    short = make_ca("short", not_after=NOW)
    trust.restore_advertised("a", (short.certificate, ROOTS[0]), NOW - HOUR)
    assert trust.anchors_of("a") == (ROOTS[0],)
    trust.restore_advertised("b", (short.certificate,), NOW - HOUR)
    assert trust.anchors_of("b") == ()


def test_what_is_advertised_again_unchanged_is_not_written_again(trust: Trust) -> None:
    trust.update("a", (ROOTS[0], ROOTS[1]))
    _, after, clock = rebuilt(trust.stored, "a")
    clock.set_wall(HOUR)
    after.update("a", (ROOTS[1], ROOTS[0]))
    assert after.stored == trust.stored


@asynccontextmanager
async def remembering(trust: Trust, file: AnchorsFile, clock: HandClock) -> AsyncIterator[None]:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(maintain, trust, file, clock)
        yield
        tasks.cancel_scope.cancel()


def test_a_file_that_others_may_write_adds_no_root(tmp_path: Path, events: Events) -> None:
    file = AnchorsFile(tmp_path)
    assert asyncio.run(file.save(StoredAnchors((NeededAnchor("a", ROOT.certificate, NOW + HOUR),))))
    (tmp_path / "anchors.json").chmod(0o666)
    assert AnchorsFile(tmp_path).load() == StoredAnchors()
    assert "may be read or written by others (mode 0666)" in events.named("anchors_not_restored")[0]["cause"]


def needed_in(file: Path) -> tuple[NeededAnchor, ...]:
    """What the file says of certificates in use. To read it as an agent does would take away what is being written."""
    return AnchorsFile(file.parent)._decode(file.read_bytes()).needed


async def until_written(directory: Path, needs: tuple[NeededAnchor, ...]) -> None:
    """Wait until these are in the file."""
    file = directory / "anchors.json"
    with anyio.fail_after(10):
        while not file.exists() or needed_in(file) != needs:
            await anyio.lowlevel.checkpoint()


async def test_the_file_follows_what_is_needed_and_time_empties_it(tmp_path: Path) -> None:
    root, clock = make_ca("root"), HandClock()
    trust, file = Trust(SecretStore(NAMES), NAMES, clock), AnchorsFile(tmp_path)
    trust.update("a", (root.certificate,))
    async with remembering(trust, file, clock):
        trust.add_in_use("a", in_use(make_leaf(root)))
        await until_written(tmp_path, (NeededAnchor("a", root.certificate, NOW + HOUR),))
        short = CertificateSecret(write_pem([make_leaf(ROOT)]), b"", NOW + HOUR / 2)
        trust.update("a", (root.certificate, ROOT.certificate))
        trust.add_in_use("a", short)
        await until_written(tmp_path, trust.needed)
        assert len(trust.needed) == 2
        trust.remove_in_use("a", short)
        await until_written(tmp_path, (NeededAnchor("a", root.certificate, NOW + HOUR),))
    store, after, clock = restarted(file.load().needed)
    after.update("b", (ROOTS[0],))
    assert await file.save(after.stored), "or its time to write would be over in the hour that passes now"
    async with remembering(after, file, clock):
        await clock.asleep()
        assert served(store) == {ROOTS[0], root.certificate}
        clock.elapse(HOUR)
        await until_written(tmp_path, ())
        assert served(store) == {ROOTS[0]}


async def test_a_disk_that_is_full_is_tried_again_and_logged_once(tmp_path: Path, events: Events) -> None:
    (tmp_path / "state").write_text("where the directory should be")
    root, clock = make_ca("root"), HandClock()
    trust, file = Trust(SecretStore(NAMES), NAMES, clock), AnchorsFile(tmp_path / "state")
    trust.update("a", (root.certificate,))
    async with remembering(trust, file, clock):
        trust.add_in_use("a", in_use(make_leaf(root)))
        for _ in range(3):  # what follows the anchors' times sleeps as well
            await clock.asleep(2)
            clock.elapse(timedelta(seconds=RETRY))
        await clock.asleep(2)
        (reported,) = events.named("anchors_not_kept")
        assert (reported["level"], str(tmp_path) in reported["cause"]) == ("error", True)
        (tmp_path / "state").unlink()
        clock.elapse(timedelta(seconds=RETRY))
        await until_written(tmp_path / "state", (NeededAnchor("a", root.certificate, NOW + HOUR),))


async def test_a_disk_that_does_not_answer_is_tried_again_and_holds_up_no_other_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, events: Events
) -> None:
    """As one of the network that is gone: the end of the agent waits for this loop as for every other."""
    root, clock, disk = make_ca("root"), HandClock(), DeadDisk(monkeypatch)
    trust, file = Trust(SecretStore(NAMES), NAMES, clock), AnchorsFile(tmp_path)
    trust.update("a", (root.certificate,))
    trust.add_in_use("a", in_use(make_leaf(root)))
    try:
        async with remembering(trust, file, clock):
            await clock.asleep()  # what follows the anchors' times
            await anyio.wait_all_tasks_blocked()
            clock.elapse(timedelta(seconds=DISK_TIMEOUT))
            for count in (1, 2):
                await events.wait("anchors_not_kept", level="error", count=count)
                await clock.asleep(2)
                clock.elapse(timedelta(seconds=RETRY))
            assert [each["cause"] for each in events.named("anchors_not_kept")] == [
                f"cannot write {tmp_path / 'anchors.json'}: no answer within 5 s",
                f"cannot write {tmp_path / 'anchors.json'}: an earlier attempt has not come back yet",
            ]
    finally:
        disk.revive()


async def test_what_a_disk_took_too_late_is_not_taken_for_what_was_there_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or else the next agent would trust, or miss, an anchor that this one has long thought better of."""
    clock, file = HandClock(), AnchorsFile(tmp_path)
    before = (NeededAnchor("a", ROOT.certificate, NOW + HOUR),)
    assert await file.save(StoredAnchors(before))
    with monkeypatch.context() as patched:
        disk = DeadDisk(patched)
        try:
            async with asyncio.TaskGroup() as tasks:
                saving = tasks.create_task(file.save(StoredAnchors()))
                await anyio.wait_all_tasks_blocked()
                clock.elapse(timedelta(seconds=DISK_TIMEOUT))
                assert not await saving
        finally:
            disk.revive()
    await until_written(tmp_path, ())
    with anyio.fail_after(10):
        while not await file.save(StoredAnchors(before)):
            await anyio.lowlevel.checkpoint()
    assert needed_in(tmp_path / "anchors.json") == before


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"[",
        b"[" * 200_000,
        b"\xff" * 100,
        b'[{"authority": "a", "until": 1e300, "anchor_pem": ""}]',
        b'[{"authority": "a", "until": 1e12, "anchor_pem": "-----BEGIN CERTIFICATE-----"}]',
        b" " * (9 << 20),
        None,
    ],
)
def test_a_damaged_file_costs_the_old_anchors_and_not_the_agent(
    tmp_path: Path, events: Events, damage: bytes | None
) -> None:
    file = tmp_path / "anchors.json"
    if damage is None:
        os.mkfifo(file)
    else:
        file.write_bytes(damage)
    assert AnchorsFile(tmp_path).load() == StoredAnchors()
    (reported,) = events.named("anchors_not_restored", level="warning")
    assert str(file) in reported["cause"]


def test_a_file_that_was_removed_is_put_back_and_another_is_left_alone(tmp_path: Path) -> None:
    file = AnchorsFile(tmp_path)
    assert file.put_back() is None, "there is nothing to keep yet"
    needs = (NeededAnchor("a", ROOT.certificate, NOW + HOUR),)
    assert asyncio.run(file.save(StoredAnchors(needs)))
    path = tmp_path / "anchors.json"
    path.unlink()
    assert file.put_back() == path
    assert needed_in(path) == needs
    path.write_text("another's")
    assert file.put_back() is None
    assert path.read_text() == "another's"
    path.unlink()
    tmp_path.chmod(0o777)
    with pytest.raises(AnchorsFileError, match="cannot write the anchors"):
        file.put_back()


KINDS = {"a": "embedded", "b": "cacerts"}
STORED = StoredAnchors(
    (NeededAnchor("a", ROOTS[3], NOW + HOUR),),
    (AdvertisedAnchors("a", (ROOTS[0], ROOTS[1]), NOW), AdvertisedAnchors("b", (ROOTS[2],), NOW)),
)


@pytest.mark.parametrize("seal", [None, Seal(b"k" * 32)], ids=["plain", "sealed"])
def test_the_file_holds_all_that_authorities_advertised(tmp_path: Path, seal: Seal | None) -> None:
    assert asyncio.run(AnchorsFile(tmp_path, KINDS, seal).save(STORED))
    assert AnchorsFile(tmp_path, KINDS, seal).load() == STORED
    assert (b"CERTIFICATE" in (tmp_path / "anchors.json").read_bytes()) == (seal is None)


@pytest.mark.parametrize("kinds", [{"a": "embedded"}, {"a": "embedded", "b": "istio"}])
def test_what_an_authority_advertised_that_is_gone_or_of_another_kind_now_is_not_restored(
    tmp_path: Path, kinds: dict[str, str]
) -> None:
    assert asyncio.run(AnchorsFile(tmp_path, KINDS).save(STORED))
    assert AnchorsFile(tmp_path, kinds).load() == StoredAnchors(STORED.needed, STORED.advertised[:1])


def test_the_file_of_a_version_that_stored_needed_anchors_alone_is_read(tmp_path: Path, events: Events) -> None:
    """An upgrade would lose the roots that Envoys' certificates chain to, and with them the peers."""
    old = [{"authority": "a", "until": (NOW + HOUR).timestamp(), "anchor_pem": write_pem([ROOTS[3]]).decode()}]
    (tmp_path / "anchors.json").write_text(json.dumps(old))
    file = AnchorsFile(tmp_path, KINDS)
    assert file.load() == StoredAnchors(STORED.needed)
    assert asyncio.run(file.save(StoredAnchors(STORED.needed)))
    assert json.loads((tmp_path / "anchors.json").read_bytes())["format"] == FORMAT
    assert events.seen == []


def test_a_file_of_a_newer_version_is_put_aside_with_words(tmp_path: Path, events: Events) -> None:
    (tmp_path / "anchors.json").write_text(json.dumps({"format": FORMAT + 1, "anchors": "somewhere else"}))
    assert AnchorsFile(tmp_path, KINDS).load() == StoredAnchors()
    cause = events.named("anchors_not_restored")[0]["cause"]
    assert f"has the format {FORMAT + 1}, and this version of the agent knows {FORMAT}" in cause
    assert "rename it to anchors.json and start the newer one" in cause
    assert [path.name for path in tmp_path.iterdir()] == ["anchors.json.unusable"]


def test_no_file_makes_an_anchor_needed_after_its_end(tmp_path: Path) -> None:
    stored = StoredAnchors((NeededAnchor("a", ROOT.certificate, NOW + 400 * DAY),))
    assert asyncio.run(AnchorsFile(tmp_path).save(stored))
    assert AnchorsFile(tmp_path).load().needed == (
        NeededAnchor("a", ROOT.certificate, ROOT.certificate.not_valid_after_utc),
    )


def test_the_first_start_has_nothing_to_remember_and_says_nothing(tmp_path: Path, events: Events) -> None:
    assert AnchorsFile(tmp_path).load() == StoredAnchors()
    assert events.seen == []


# --- refreshing ---


@asynccontextmanager
async def refreshing(trust: Trust, authority: ScriptedTrust) -> AsyncIterator[HandClock]:
    clock = HandClock()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(refresh, trust, "a", authority, clock)
        yield clock
        tasks.cancel_scope.cancel()


def test_an_authority_may_advertise_its_anchors_without_issuing() -> None:
    assert isinstance(ScriptedTrust(), AdvertisesAnchors)


async def test_roots_that_change_between_renewals_are_served_within_minutes(store: SecretStore, trust: Trust) -> None:
    """Elsewhere a new root reaches the proxies only with their next certificate, hours late."""
    authority = ScriptedTrust(write_pem([ROOTS[0]]), write_pem([ROOTS[0], ROOTS[1]]), write_pem([ROOTS[1]]))
    async with refreshing(trust, authority) as clock:
        await clock.asleep()
        assert served(store) == {ROOTS[0]}
        clock.elapse(REFRESH - TICK)
        await clock.asleep()
        assert authority.calls == 1
        for expected in ({ROOTS[0], ROOTS[1]}, {ROOTS[1]}):
            clock.elapse(REFRESH)
            await clock.asleep()
            assert served(store) == expected


FAILURES = {
    "an error": (AuthorityError(ErrorKind.TRANSIENT, "the CA is down"), "the CA is down"),
    "garbage": (b"-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n", "not a"),
    "a bug": (KeyError("roots"), "KeyError; please report the event fault in the log"),
    "a cancelled task of its own": (asyncio.CancelledError(), "CancelledError; please report the event fault"),
    "a time-out": (TimeoutError("timed out while connecting"), "the CA did not answer within 10 s"),
}


@pytest.mark.parametrize(("failure", "cause"), FAILURES.values(), ids=FAILURES)
async def test_a_refresh_that_fails_keeps_what_is_served_and_is_tried_again(
    store: SecretStore, trust: Trust, events: Events, failure: bytes | BaseException, cause: str
) -> None:
    authority = ScriptedTrust(write_pem([ROOTS[0]]), failure, failure, write_pem([ROOTS[1]]))
    async with refreshing(trust, authority) as clock:
        for count in (1, 2):
            await clock.asleep()
            clock.elapse(REFRESH)
            event = await events.wait("trust_not_refreshed", count=count, authority="a")
            assert cause in event["cause"]
            assert event["level"] == "warning"
            assert served(store) == {ROOTS[0]}
        await clock.asleep()
        clock.elapse(REFRESH)
        await events.wait("trust_changed", count=2)
    # outside, for a refresh that ends by a cancellation ends the block without an error
    assert served(store) == {ROOTS[1]}


async def test_a_refresh_that_fails_is_tried_again_before_its_interval_is_over(
    store: SecretStore, trust: Trust, events: Events
) -> None:
    """Elsewhere an agent that met a CA for one second too early misses its roots for hours."""
    down = AuthorityError(ErrorKind.TRANSIENT, "the CA is down")
    authority = ScriptedTrust(down, down, write_pem([ROOTS[0]]), write_pem([ROOTS[1]]))
    async with refreshing(trust, authority) as clock:
        for count in (1, 2):
            event = await events.wait("trust_not_refreshed", count=count)
            await clock.asleep()
            clock.elapse(timedelta(seconds=event["in_seconds"] + 0.001))  # the event rounds it
        await clock.asleep()
        assert served(store) == {ROOTS[0]}
        clock.elapse(FIRST_REFRESH_RETRY)
        await clock.asleep()
        assert authority.calls == 3, "after a success the interval counts again"
        clock.elapse(REFRESH)
        await authority.asked(4)


@pytest.mark.parametrize(
    ("failures", "retry_after", "least", "most"),
    [
        pytest.param(0, None, 300.0, 300.0, id="no failure"),
        pytest.param(1, None, 2.5, 5.0, id="the first"),
        pytest.param(3, None, 10.0, 20.0, id="the third"),
        pytest.param(1000, None, 150.0, 300.0, id="many"),
        pytest.param(1, 60.0, 60.0, 60.0, id="a CA that names a delay"),
        pytest.param(1, 1e9, 300.0, 300.0, id="a CA that names a year"),
        pytest.param(1, float("nan"), 2.5, 5.0, id="a CA that names no number"),
    ],
)
def test_the_delay_of_a_refresh_grows_to_its_interval(
    failures: int, retry_after: float | None, least: float, most: float
) -> None:
    delays = [next_refresh(REFRESH, failures, retry_after, each).total_seconds() for each in (0.0, 1.0)]
    assert delays == [least, most]


async def test_a_root_that_cannot_be_used_does_not_keep_the_others_from_being_refreshed(
    store: SecretStore, trust: Trust, events: Events
) -> None:
    authority = ScriptedTrust(write_pem([ROOTS[0]]), together(NOT_READ["critical FALSE"]))
    async with refreshing(trust, authority) as clock:
        await clock.asleep()
        clock.elapse(REFRESH)
        reported = await events.wait("anchors_left_out", authority="a")
        assert "Plain Root" in str(reported["causes"])
        assert [anchor.subject.rfc4514_string() for anchor in served(store)] == ["CN=good root"]


async def test_a_ca_that_sends_no_certificate_leaves_what_is_served(store: SecretStore, trust: Trust) -> None:
    authority = ScriptedTrust(write_pem([ROOTS[0]]), b"", b"<html>maintenance</html>")
    async with refreshing(trust, authority) as clock:
        for _ in range(3):
            await clock.asleep()
            clock.elapse(REFRESH)
        await clock.asleep()
        assert authority.calls == 4
        assert served(store) == {ROOTS[0]}


async def test_a_ca_that_says_nothing_is_given_up_and_asked_again(
    store: SecretStore, trust: Trust, events: Events
) -> None:
    authority = ScriptedTrust(None, write_pem([ROOTS[0]]))
    async with refreshing(trust, authority) as clock:
        await authority.asked(1)
        clock.elapse(timedelta(seconds=TIMEOUT))
        assert (await events.wait("trust_not_refreshed"))["cause"] == "the CA did not answer within 10 s"
        await clock.asleep()
        clock.elapse(REFRESH)
        await events.wait("trust_changed")
        assert served(store) == {ROOTS[0]}


@pytest.mark.parametrize("step", [DAY, -DAY])
async def test_a_clock_that_is_set_refreshes_within_seconds(trust: Trust, step: timedelta) -> None:
    """Set back by a day, it would otherwise be a day until the next time."""
    authority = ScriptedTrust(write_pem([ROOTS[0]]))
    async with refreshing(trust, authority) as clock:
        await clock.asleep()
        clock.set_wall(step)
        clock.elapse(TICK)
        await authority.asked(2)
