"""Which certificates near their end without another one in sight, and how to act: pure, but for the loop that logs it.

Leaves are renewed by the agent, so one that gets old is the sign that something fails. Intermediate CAs and trust
anchors are renewed by people, who need weeks. Each is reported once at each of two stages: `expiring` as a warning, and
later as an error.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Literal, Protocol

from msgspec import Struct

from sds_agent import log
from sds_agent.clock import Clock
from sds_agent.issuance.schedule import ALARM, CurrentLeaf
from sds_agent.issuance.status import AnchorStatus, CertificateEnd, LeafStatus, TrustStatus, WorkloadStatus
from sds_agent.pki.ending import near_end_of_ca

LOG = logging.getLogger(__name__)

FIRST_AFTER = timedelta(seconds=10)
"""What an earlier process has kept is renewed until then, if it can be."""
CHECK_EVERY = timedelta(seconds=30)
"""The longest time between two checks, so that those of new certificates are noticed."""
LOOKED_AT_ONCE, PASSED_AT_ONCE = 16, 512
"""Workloads that are looked at in one turn of the event loop, and those that are passed over: a millisecond each."""
REST = 9
"""After a check that took long, as where thousands near their end, the next one waits for so many times that."""
LEAF_SHARES = (ALARM, ALARM / 4)
"""What is left of a leaf's life at the warning and at the error, at most."""
REST_SHARES = (2 / 3, 1 / 3)
"""The same, as shares of what is left when its renewal is due: one that is renewed late by intention is not late."""


class Expiring(Struct, frozen=True):
    """A certificate that nears its end: what it is, whose, and how to act.

    `workload` is set for leaves and intermediates, `authority` names those that issued or advertise it. Reaching
    `alarm_at`, a warning becomes an error.
    """

    certificate: Literal["leaf", "intermediate", "anchor"]
    subject: str
    serial: str
    not_after: datetime
    warn_at: datetime
    alarm_at: datetime
    authority: str
    fix: str
    workload: str | None = None

    def stage(self, now: datetime) -> int | None:
        """The level of the log that it deserves now; None while there is time, and when it has ended."""
        if not self.warn_at <= now < self.not_after:
            return None
        return logging.ERROR if now >= self.alarm_at else logging.WARNING


class WatchedWorkload(Protocol):
    """A workload whose certificate is watched. Its status takes a tenth of a millisecond, the times of its certificate
    a tenth of that, and the serial number nothing.
    """

    @property
    def serial(self) -> str | None:
        """Of the leaf that Envoys are given; None while they are given none."""

    @property
    def ends(self) -> tuple[CurrentLeaf, tuple[CertificateEnd, ...]] | None:
        """The times of that leaf, and its intermediates; None while Envoys are given none."""

    @property
    def status(self) -> WorkloadStatus:
        """What can be seen of it."""


def watched(workloads: Iterable[WorkloadStatus], trust: TrustStatus) -> Iterator[Expiring]:
    """Everything whose end matters: the certificates that are served with their intermediates, and the anchors."""
    for workload in workloads:
        yield from _served(workload)
    yield from _advertised(trust)


def warned_from(leaf: LeafStatus) -> datetime:
    """From when on the agent warns that this leaf, or a CA between it and its anchor, nears its end."""
    ends = (near_end_of_ca(each.not_before, each.not_after)[0] for each in leaf.intermediates)
    return min((_near_end_of_leaf(leaf)[0], *ends))


def _served(workload: WorkloadStatus) -> Iterator[Expiring]:
    if workload.current is not None and workload.served:
        yield _leaf(workload, workload.current)
        yield from _intermediates(workload, workload.current)


def _advertised(trust: TrustStatus) -> Iterator[Expiring]:
    """Of the anchors: one that another of its name outlives has been renewed, one that nobody advertises is to end."""
    for anchor in not_outlived(trust.anchors):
        if anchor.advertised_by:
            yield _anchor(anchor)


def not_outlived(anchors: Sequence[AnchorStatus]) -> list[AnchorStatus]:
    """Without those that another one of the same name outlives."""
    ends = dict[str, datetime]()
    for anchor in anchors:
        ends[anchor.subject] = max(anchor.not_after, ends.get(anchor.subject, anchor.not_after))
    return [each for each in anchors if each.not_after == ends[each.subject]]


def anchor_warned_from(anchor: AnchorStatus) -> datetime:
    """From when on the end of an anchor is near."""
    return near_end_of_ca(anchor.not_before, anchor.not_after)[0]


def _near_end_of_leaf(leaf: LeafStatus) -> tuple[datetime, datetime]:
    life = leaf.not_after - leaf.issued_at
    late = None if leaf.renew_at is None else max(leaf.not_after - leaf.renew_at, timedelta(0))
    left = [
        life * share if late is None else min(life * share, late * rest)
        for share, rest in zip(LEAF_SHARES, REST_SHARES, strict=True)
    ]
    return leaf.not_after - left[0], leaf.not_after - left[1]


def _leaf(workload: WorkloadStatus, leaf: LeafStatus) -> Expiring:
    fix = (
        "see that what makes its certificates runs, and makes them in time"
        if leaf.renew_at is None
        else "the events retrying say why it is not renewed"
    )
    return Expiring(
        "leaf",
        workload.spiffe_id,
        leaf.serial,
        leaf.not_after,
        *_near_end_of_leaf(leaf),
        leaf.authority,
        fix,
        workload.name,
    )


def _intermediates(workload: WorkloadStatus, leaf: LeafStatus) -> Iterator[Expiring]:
    for each in leaf.intermediates:
        yield Expiring(
            "intermediate",
            each.subject,
            each.serial,
            each.not_after,
            *near_end_of_ca(each.not_before, each.not_after),
            leaf.authority,
            f"renew this CA at the authority {leaf.authority}: no certificate below it is accepted after its end",
            workload.name,
        )


def _anchor(anchor: AnchorStatus) -> Expiring:
    names = ", ".join(anchor.advertised_by)
    return Expiring(
        "anchor",
        anchor.subject,
        anchor.serial,
        anchor.not_after,
        *near_end_of_ca(anchor.not_before, anchor.not_after),
        names,
        f"let {names} advertise its successor beside it before then, and issue below that one",
    )


class _Leaves:
    """The workloads' certificates: all are watched, and few are looked at."""

    def __init__(self) -> None:
        self._quiet = dict[str, tuple[str, datetime]]()  # by workload: its serial number, and until when all is well

    async def near(self, workloads: Mapping[str, WatchedWorkload], by: datetime) -> list[Expiring]:
        """Those that are at a stage or reach one by then. Others have their turn meanwhile."""
        found, quiet, looks = list[Expiring](), dict[str, tuple[str, datetime]](), 0
        for number, (name, workload) in enumerate(tuple(workloads.items()), start=1):
            if number % PASSED_AT_ONCE == 0 or looks >= LOOKED_AT_ONCE:
                looks = 0
                await asyncio.sleep(0)
            serial, known = workload.serial, self._quiet.get(name)
            if serial is None:
                continue
            if known is None or known[0] != serial:
                looks += 1
                known = serial, _well_until(workload, by)
            if known[1] <= by:
                looks += 1
                found += [each for each in _served(workload.status) if each.warn_at <= by]
            quiet[name] = known
        self._quiet = quiet
        return found


def _well_until(workload: WatchedWorkload, default: datetime) -> datetime:
    """Before that its certificate is not warned of, whatever changes but the certificate."""
    if (ends := workload.ends) is None:
        return default
    leaf, intermediates = ends
    return min([leaf.alarm_at, *(near_end_of_ca(each.not_before, each.not_after)[0] for each in intermediates)])


async def watch(
    workloads: Callable[[], Mapping[str, WatchedWorkload]], trust: Callable[[], TrustStatus], clock: Clock
) -> None:
    """Log `expiring` of each certificate that nears its end, once at each stage, until cancelled."""
    logged = dict[tuple[str, str, str], int]()
    leaves = _Leaves()
    await clock.until(clock.now() + FIRST_AFTER)
    while True:
        now = clock.now()
        by = now + CHECK_EVERY
        found = await leaves.near(workloads(), by)
        found += [each for each in _advertised(trust()) if each.warn_at <= by]
        stages = {(each.certificate, each.subject, each.serial): stage for each in found if (stage := each.stage(now))}
        for each in found:
            key = (each.certificate, each.subject, each.serial)
            if (stage := stages.get(key)) is not None and stage > logged.get(key, 0):
                logged[key] = stage  # at once: workloads share intermediates
                _report(each, stage, now)
        logged = {key: max(stage, logged.get(key, 0)) for key, stage in stages.items()}
        moments = (moment for each in found for moment in (each.warn_at, each.alarm_at) if moment > now)
        ended = clock.now()
        rested = ended + min((ended - now) * REST, CHECK_EVERY)  # at most so long, as somebody may set the clock
        await clock.until(max(min((*moments, by)), rested))


def _report(expiring: Expiring, level: int, now: datetime) -> None:
    log.event(
        LOG,
        "expiring",
        level=level,
        certificate=expiring.certificate,
        workload=expiring.workload,
        authority=expiring.authority,
        subject=expiring.subject,
        serial=expiring.serial,
        not_after=expiring.not_after,
        in_seconds=expiring.not_after - now,
        fix=expiring.fix,
    )
