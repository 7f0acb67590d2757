"""What is said of certificates that near their end: which, of what, until when, how to act, and once for each stage."""

import itertools
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import anyio
import pytest
from fakes.clocks import HAND_LOOP, HandClock
from fakes.events import Event, Events, recorded
from fakes.hierarchy import DAY, HOUR, NOW
from msgspec import structs

from sds_agent.issuance.expiry import CHECK_EVERY, FIRST_AFTER, REST, Expiring, watch, watched
from sds_agent.issuance.schedule import CurrentLeaf
from sds_agent.issuance.status import AnchorStatus, CertificateEnd, LeafStatus, TrustStatus, WorkloadStatus

YEAR = timedelta(days=365)
MINUTE = timedelta(minutes=1)
SECOND = timedelta(seconds=1)
CA = CertificateEnd("'CN=ca'", "ca1", NOW - YEAR, NOW + YEAR)
LEAF = LeafStatus(
    "4f", NOW, NOW, NOW + HOUR, NOW, NOW + HOUR, "web", NOW + HOUR / 2, authority="vault", intermediates=(CA,)
)
WEB = WorkloadStatus("web", "spiffe://demo.example/web", "vault", LEAF, served=True)
API = structs.replace(WEB, name="api", spiffe_id="spiffe://demo.example/api")
ROOT = AnchorStatus("'CN=root'", "1", NOW - 9 * YEAR, NOW + YEAR, ("vault",), None)


@pytest.fixture
def anyio_backend() -> tuple[str, dict[str, Any]]:
    return HAND_LOOP


@pytest.fixture
def events() -> Iterator[Events]:
    with recorded() as events:
        yield events


def found(certificate: str, *workloads: WorkloadStatus, anchors: tuple[AnchorStatus, ...] = (ROOT,)) -> list[Expiring]:
    return [each for each in watched(workloads, TrustStatus(None, anchors)) if each.certificate == certificate]


def left(expiring: Expiring) -> tuple[timedelta, timedelta]:
    """What is left at the warning and at the error."""
    return expiring.not_after - expiring.warn_at, expiring.not_after - expiring.alarm_at


# --- when ---


def test_a_leaf_whose_renewal_fails_is_warned_of_when_a_fifth_is_left() -> None:
    (leaf,) = found("leaf", WEB)
    assert (leaf.workload, leaf.authority, leaf.not_after) == ("web", "vault", NOW + HOUR)
    assert left(leaf) == (12 * MINUTE, 3 * MINUTE)
    assert "retrying" in leaf.fix


def test_a_leaf_that_is_renewed_late_by_intention_is_not_warned_of_before() -> None:
    late = structs.replace(LEAF, renew_at=NOW + HOUR * 0.9)
    (leaf,) = found("leaf", structs.replace(WEB, current=late))
    assert left(leaf) == (4 * MINUTE, 2 * MINUTE)


def test_of_a_source_it_is_said_that_it_makes_no_new_one() -> None:
    """No attempt fails there, so nothing else in the log says that the certificate ends."""
    (leaf,) = found("leaf", structs.replace(WEB, current=structs.replace(LEAF, renew_at=None)))
    assert left(leaf) == (12 * MINUTE, 3 * MINUTE)
    assert "what makes its certificates" in leaf.fix


@pytest.mark.parametrize(
    ("life", "warning", "error"),
    [
        pytest.param(10 * YEAR, 30 * DAY, 7 * DAY, id="ten years"),
        pytest.param(100 * DAY, 10 * DAY, 3 * DAY, id="a hundred days"),
        pytest.param(DAY, DAY * 0.1, DAY * 0.03, id="a day"),
    ],
)
def test_a_ca_is_warned_of_in_time_for_people_to_act(life: timedelta, warning: timedelta, error: timedelta) -> None:
    ca = structs.replace(CA, not_before=NOW, not_after=NOW + life)
    (intermediate,) = found("intermediate", structs.replace(WEB, current=structs.replace(LEAF, intermediates=(ca,))))
    root = structs.replace(ROOT, not_before=NOW, not_after=NOW + life)
    (anchor,) = found("anchor", anchors=(root,))
    assert left(intermediate) == left(anchor) == (warning, error)
    assert "the authority vault" in intermediate.fix
    assert "let vault advertise its successor" in anchor.fix


def test_what_is_not_served_or_has_a_successor_is_not_warned_of() -> None:
    assert found("leaf", structs.replace(WEB, served=False), structs.replace(WEB, current=None)) == []
    renewed = structs.replace(ROOT, serial="2", not_after=NOW + 9 * YEAR)
    assert [each.serial for each in found("anchor", anchors=(ROOT, renewed))] == ["2"]
    needed = structs.replace(ROOT, advertised_by=(), needed_until=NOW + HOUR)
    assert found("anchor", anchors=(needed,)) == []
    another = structs.replace(ROOT, subject="'CN=another'", serial="3", not_after=NOW + 9 * YEAR)
    assert [each.serial for each in found("anchor", anchors=(ROOT, another))] == ["1", "3"], "it follows nothing"


# --- how often ---


class Looked:
    """A workload that counts how often its certificate's times were looked at, and its status."""

    def __init__(self, status: WorkloadStatus) -> None:
        self.now = status
        self.glances, self.looks = 0, 0
        self.look: Callable[[], None] = lambda: None

    @property
    def serial(self) -> str | None:
        return self.now.current.serial if self.now.current is not None and self.now.served else None

    @property
    def ends(self) -> tuple[CurrentLeaf, tuple[CertificateEnd, ...]] | None:
        self.glances += 1
        self.look()
        if self.serial is None or (leaf := self.now.current) is None:
            return None
        return CurrentLeaf(leaf.issued_at, leaf.not_before, leaf.not_after, leaf.serial), leaf.intermediates

    @property
    def status(self) -> WorkloadStatus:
        self.looks += 1
        self.look()
        return self.now


class Seen:
    """What the loop sees."""

    def __init__(self, *workloads: WorkloadStatus) -> None:
        self.clock = HandClock()
        self.workloads = {each.name: Looked(each) for each in workloads}
        self.checks = list[timedelta]()

    def trust(self) -> TrustStatus:
        self.checks.append(self.clock.now() - NOW)
        return TrustStatus(None, (ROOT,))

    async def watch(self) -> None:
        await watch(lambda: self.workloads, self.trust, self.clock)

    async def pass_time(self, time: timedelta, step: timedelta) -> None:
        end = self.clock.now() + time
        while self.clock.now() < end:
            await self.clock.asleep()
            self.clock.elapse(step)
            await anyio.wait_all_tasks_blocked()


def said(events: Events, **fields: object) -> list[tuple[str, str]]:
    return [(str(each["level"]), str(each["certificate"])) for each in events.named("expiring", **fields)]


async def test_each_stage_is_logged_once_and_a_renewed_certificate_no_more(events: Events) -> None:
    seen = Seen(WEB, API)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(seen.watch)
        await seen.pass_time(HOUR - 13 * MINUTE, 5 * SECOND)
        assert events.named("expiring") == []
        await seen.pass_time(2 * MINUTE, 5 * SECOND)
        assert said(events, workload="web") == [("warning", "leaf")]
        renewed = structs.replace(LEAF, serial="50", not_after=NOW + DAY)
        seen.workloads["api"].now = structs.replace(API, current=renewed)
        await seen.pass_time(9 * MINUTE, 5 * SECOND)
        assert said(events, workload="web") == [("warning", "leaf"), ("error", "leaf")]
        assert said(events, workload="api") == [("warning", "leaf")]
        event: Event = events.named("expiring", workload="web")[0]
        assert event["in_seconds"] == pytest.approx(12 * 60, abs=10)
        assert (event["subject"], event["serial"], event["authority"]) == ("spiffe://demo.example/web", "4f", "vault")
        tasks.cancel_scope.cancel()


async def test_what_was_kept_and_is_renewed_at_the_start_is_not_warned_of(events: Events) -> None:
    seen = Seen(structs.replace(WEB, current=structs.replace(LEAF, issued_at=NOW - HOUR, not_after=NOW + MINUTE)))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(seen.watch)
        await seen.clock.asleep()
        seen.workloads["web"].now = structs.replace(WEB, current=structs.replace(LEAF, serial="50"))
        await seen.pass_time(2 * MINUTE, FIRST_AFTER)
        assert said(events) == []
        tasks.cancel_scope.cancel()


async def test_an_intermediate_of_many_workloads_is_logged_once(events: Events) -> None:
    soon = structs.replace(LEAF, intermediates=(structs.replace(CA, not_after=NOW + DAY),))
    seen = Seen(*(structs.replace(WEB, name=f"w{n}", spiffe_id=f"spiffe://x/{n}", current=soon) for n in range(9)))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(seen.watch)
        await seen.pass_time(4 * CHECK_EVERY, CHECK_EVERY)
        assert said(events) == [("error", "intermediate")]
        tasks.cancel_scope.cancel()


async def test_a_certificate_that_comes_later_is_watched_too(events: Events) -> None:
    seen = Seen()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(seen.watch)
        await seen.pass_time(HOUR / 2, MINUTE)
        seen.workloads["web"] = Looked(WEB)
        await seen.pass_time(HOUR / 2 - MINUTE, 5 * SECOND)
        assert said(events) == [("warning", "leaf"), ("error", "leaf")]
        tasks.cancel_scope.cancel()


# --- at what price ---


async def test_a_certificate_far_from_its_end_is_glanced_at_once(events: Events) -> None:
    """With thousands of identities the agent would otherwise never be at rest. Its status is not made at all."""
    seen = Seen(WEB, structs.replace(API, served=False))
    web, api = seen.workloads.values()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(seen.watch)
        await seen.pass_time(10 * CHECK_EVERY, CHECK_EVERY)
        assert (len(seen.checks), web.glances, api.glances) == (10, 1, 0)
        web.now = structs.replace(WEB, current=structs.replace(LEAF, serial="50"))
        await seen.pass_time(10 * CHECK_EVERY, CHECK_EVERY)
        assert (web.glances, api.glances) == (2, 0)
        api.now = API
        await seen.pass_time(2 * CHECK_EVERY, CHECK_EVERY)
        assert (web.glances, api.glances) == (2, 1), "what was withheld is served again"
        assert (web.looks, api.looks) == (0, 0)
        assert said(events) == []
        tasks.cancel_scope.cancel()


async def test_an_intermediate_that_ends_before_its_leaf_nears_its_end_is_not_overlooked(events: Events) -> None:
    short = structs.replace(CA, not_before=NOW, not_after=NOW + HOUR / 2)
    seen = Seen(structs.replace(WEB, current=structs.replace(LEAF, intermediates=(short,))))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(seen.watch)
        await seen.pass_time(26 * MINUTE, CHECK_EVERY)
        assert said(events) == []
        await seen.pass_time(MINUTE, CHECK_EVERY)
        assert said(events) == [("warning", "intermediate")]
        tasks.cancel_scope.cancel()


async def test_a_renewal_that_was_to_be_late_and_no_more_is_warned_of_in_time(events: Events) -> None:
    """As where the root ends sooner than was known."""
    seen = Seen(structs.replace(WEB, current=structs.replace(LEAF, renew_at=NOW + HOUR * 0.95)))
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(seen.watch)
        await seen.pass_time(40 * MINUTE, CHECK_EVERY)
        seen.workloads["web"].now = WEB
        await seen.pass_time(9 * MINUTE, CHECK_EVERY)
        assert said(events) == [("warning", "leaf")]
        tasks.cancel_scope.cancel()


async def test_a_check_that_takes_long_leaves_most_of_the_time_to_others(events: Events) -> None:
    """As while a CA is away and thousands of certificates near their end, each at a moment of its own."""
    leaves = [
        structs.replace(LEAF, serial=f"{n}", not_after=NOW + (60 + n) * SECOND, renew_at=None) for n in range(100)
    ]
    seen = Seen(*(structs.replace(WEB, name=each.serial, spiffe_id=each.serial, current=each) for each in leaves))
    seen.workloads["0"].look = lambda: seen.clock.elapse(SECOND)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(seen.watch)
        await seen.pass_time(3 * MINUTE, SECOND)
        between = [later - earlier for earlier, later in itertools.pairwise(seen.checks[1:])]
        assert min(between) >= REST * SECOND, "each took a second"
        assert max(between) <= CHECK_EVERY + 2 * SECOND
        assert {each["subject"] for each in events.named("expiring")} == seen.workloads.keys()
        tasks.cancel_scope.cancel()


async def test_a_clock_that_is_set_during_a_check_delays_no_warning_for_long(events: Events) -> None:
    seen = Seen(WEB)
    seen.workloads["web"].look = lambda: seen.clock.elapse(HOUR - 15 * MINUTE)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(seen.watch)
        await seen.clock.asleep()
        seen.clock.elapse(FIRST_AFTER)
        await anyio.wait_all_tasks_blocked()
        seen.workloads["web"].look = lambda: None
        await seen.pass_time(4 * MINUTE, CHECK_EVERY)
        assert said(events) == [("warning", "leaf")]
        tasks.cancel_scope.cancel()
