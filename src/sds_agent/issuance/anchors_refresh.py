"""The loops around the trust bundle: they ask the authorities for their anchors, and follow the anchors' times."""

import asyncio
import logging
import random
from collections.abc import Callable
from datetime import datetime, timedelta

from sds_agent import log
from sds_agent.authority.protocol import (
    AdvertisesAnchors,
    AdvertisesFederation,
    AnnouncesAnchors,
    AuthorityError,
    ErrorKind,
)
from sds_agent.clock import Clock
from sds_agent.issuance.adapter_calls import failures_of
from sds_agent.issuance.anchors_file import AnchorsFile
from sds_agent.issuance.federation import Federation
from sds_agent.issuance.trust import Trust
from sds_agent.pki.certificates import CertificateError, read_bundle
from sds_agent.tasks import background_tasks

LOG = logging.getLogger(__name__)

TIMEOUT = 10.0
"""Seconds that an authority may take to answer with its anchors."""
FIRST_REFRESH_RETRY = timedelta(seconds=5)
"""The bound of the first delay after a refresh that failed; it doubles up to the authority's own interval."""
BETWEEN_ANNOUNCEMENTS = timedelta(seconds=1)
"""The least time between two attempts to read the anchors of an authority that announces changes."""
RETRY = 10.0
"""Seconds until a file that could not be written is tried again."""


async def follow_times(trust: Trust | Federation, clock: Clock) -> None:
    """Publish the bundles anew whenever an anchor ends or begins, until cancelled."""
    while True:
        await clock.until(trust.check_times())


async def refresh(
    trust: Trust,
    name: str,
    authority: AdvertisesAnchors,
    clock: Clock,
    randomness: Callable[[], float] = random.random,
    *,
    federation: Federation | None = None,
) -> None:
    """Ask the authority `name` for its anchors at its own intervals, also while nothing is issued, until cancelled.

    One that announces changes is asked then too. After its own anchors, those of other trust domains are asked for
    where it has them and there is a `federation`. A failure is logged (`trust_not_refreshed`) and changes nothing that
    is served; the authority is asked again sooner. `randomness` returns a float uniform in [0, 1).
    """
    failures = 0
    while True:
        cause, retry_after = await refresh_once(trust, name, authority, federation)
        failures = failures + 1 if cause else 0
        delay = next_refresh(authority.refresh_every, failures, retry_after, randomness())
        if cause:
            log.event(LOG, "trust_not_refreshed", level=logging.WARNING, authority=name, cause=cause, in_seconds=delay)
        due = clock.now() + delay
        if isinstance(authority, AnnouncesAnchors):
            await clock.until(clock.now() + min(delay, FIRST_REFRESH_RETRY if cause else BETWEEN_ANNOUNCEMENTS))
            await _announced(name, authority, clock, due)
        else:
            await clock.until(due)


async def _announced(name: str, authority: AnnouncesAnchors, clock: Clock, due: datetime) -> None:
    """Return at that time, or sooner when the authority announces other anchors."""
    waits = [asyncio.create_task(clock.until(due)), asyncio.create_task(_anchors_changed(name, authority))]
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for each in waits:
            each.cancel()
        await asyncio.wait(waits)


async def _anchors_changed(name: str, authority: AnnouncesAnchors) -> None:
    try:
        await authority.anchors_changed()
    except Exception as error:  # noqa: BLE001 - a bug in one adapter must not end the agent
        log.fault(LOG, f"authority {name}", error)
        await asyncio.Event().wait()  # the authority is asked at its intervals all the same


def next_refresh(every: timedelta, failures: int, retry_after: float | None, randomness: float) -> timedelta:
    """How long after an attempt an authority is asked for its anchors again, after so many failures in a row.

    The delay after a failure is half certain and half random, below a bound that doubles up to `every`. An authority's
    own delay (`retry_after`, in seconds) counts up to `every` too.
    """
    if not failures:
        return every
    bound = min(FIRST_REFRESH_RETRY * float(2 ** min(failures - 1, 16)), every)
    delay = bound / 2 + bound * randomness / 2
    if retry_after is not None and retry_after > 0:
        delay = max(delay, timedelta(seconds=min(retry_after, every.total_seconds())))
    return delay


async def refresh_once(
    trust: Trust, name: str, authority: AdvertisesAnchors, federation: Federation | None = None
) -> tuple[str, float | None]:
    """Ask once. Returns why that failed, empty if it did not, and the delay in seconds that the authority asks for."""
    try:
        with failures_of(name, TIMEOUT):
            await _take_anchors(trust, name, authority, federation)
    except AuthorityError as error:
        return str(error), error.retry_after
    return "", None


async def _take_anchors(trust: Trust, name: str, authority: AdvertisesAnchors, federation: Federation | None) -> None:
    async with asyncio.timeout(TIMEOUT):
        pem = await authority.anchors()
    try:
        advertised = read_bundle(pem)
    except CertificateError as error:
        raise AuthorityError(ErrorKind.INVALID, str(error)) from error
    trust.update(name, advertised.certificates, advertised.left_out)
    if federation is not None and isinstance(authority, AdvertisesFederation):
        async with asyncio.timeout(TIMEOUT):
            federated = await authority.federated_anchors()
        federation.update(name, federated)


async def maintain(trust: Trust, file: AnchorsFile, clock: Clock, federation: Federation | None = None) -> None:
    """Drop anchors when they end or are needed no longer, and write to the file what has to outlive the process, until
    cancelled.
    """
    async with background_tasks() as start:
        start(_drop_ended(trust, clock))
        start(follow_times(trust, clock))
        if federation is not None:
            start(follow_times(federation, clock))
        while True:
            while not await file.save(trust.stored._replace(federated=() if federation is None else federation.stored)):
                await clock.sleep(RETRY)
            await trust.stored_changed()


async def _drop_ended(trust: Trust, clock: Clock) -> None:
    while (end := trust.drop_ended()) is not None:
        await clock.until(end)
