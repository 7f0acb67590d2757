"""Asks an authority for its revocation lists again and again."""

import asyncio
import logging
import random
from collections.abc import Callable
from datetime import datetime, timedelta

from sds_agent import log
from sds_agent.authority.protocol import AdvertisesLists, AuthorityError, ErrorKind
from sds_agent.clock import Clock
from sds_agent.issuance.adapter_calls import failures_of
from sds_agent.issuance.anchors_refresh import FIRST_REFRESH_RETRY, TIMEOUT, next_refresh
from sds_agent.issuance.lists import LARGEST_LISTS, PublishedList, read_lists
from sds_agent.issuance.trust import Trust
from sds_agent.pki.certificates import CertificateError, read_bundle
from sds_agent.pki.validation.revocation import RevocationListError
from sds_agent.pki.validation.rules import Chain
from sds_agent.tasks import in_thread

LOG = logging.getLogger(__name__)

LEAST_WAIT = timedelta(milliseconds=100)
"""Between two checks of the lists' times."""
SHARE = 0.5
"""The part of what is left of a list's life after which it is asked for again, if `refresh_every` is longer."""


async def follow_lists(
    trust: Trust,
    name: str,
    authority: AdvertisesLists,
    clock: Clock,
    randomness: Callable[[], float] = random.random,
) -> None:
    """Ask the authority `name` for its lists at its own intervals, and at once when one is lacking, until cancelled.

    A failure is logged (`lists_not_refreshed`) and changes nothing that is served; the authority is asked again sooner,
    but not before the time that it names, unless that is more than half of what is left of a list's life.
    """
    failures = 0
    known: tuple[PublishedList, ...] = ()
    while True:
        lists, cause, retry_after = await _ask(trust, name, authority)
        failures = failures + 1 if cause else 0
        delay = next_refresh(authority.refresh_every, failures, retry_after, randomness())
        now, known = clock.now(), known if cause else lists
        due = next_reading(tuple(each for each in known if not (cause and _has_ended(each, now))), now, delay)
        if cause:
            in_seconds = due - now
            log.event(
                LOG, "lists_not_refreshed", level=logging.WARNING, authority=name, cause=cause, in_seconds=in_seconds
            )
        await _until(clock, min(due, now + FIRST_REFRESH_RETRY) if retry_after is None else due, trust)
        lacking = asyncio.create_task(trust.revocation.lacking())
        try:
            await _until(clock, due, trust, lacking)
        finally:
            lacking.cancel()
            await asyncio.wait([lacking])


def next_reading(lists: tuple[PublishedList, ...], now: datetime, every: timedelta) -> datetime:
    """When to ask again after an answer with these lists: long before the first of them ends."""
    ends = [each.crl.next_update_utc for each in lists]
    left = min((end - now for end in ends if end is not None), default=every / SHARE)
    return now + min(every, max(left * SHARE, min(every, FIRST_REFRESH_RETRY)))


def _has_ended(published: PublishedList, now: datetime) -> bool:
    end = published.crl.next_update_utc
    return end is not None and end <= now


async def _until(clock: Clock, due: datetime, trust: Trust, sooner: asyncio.Task[None] | None = None) -> None:
    """Return at that time, or when the task `sooner` is done. Until then lists begin and end in the bundle on time."""
    while (now := clock.now()) < due and (sooner is None or not sooner.done()):
        check_at = trust.revocation.check_at or due
        sleep = asyncio.create_task(clock.until(min(due, max(check_at, now + LEAST_WAIT))))
        try:
            await asyncio.wait([each for each in (sleep, sooner) if each], return_when=asyncio.FIRST_COMPLETED)
        finally:
            sleep.cancel()
            await asyncio.wait([sleep])
        if check_at <= clock.now():
            trust.check_times()


async def _ask(
    trust: Trust, name: str, authority: AdvertisesLists
) -> tuple[tuple[PublishedList, ...], str, float | None]:
    """Ask once. Returns the lists, why that failed, empty if it did not, and the delay in seconds that the authority
    asks for.
    """
    try:
        with failures_of(name, TIMEOUT):
            lists, issuers = await _read(authority)
    except AuthorityError as error:
        trust.update_lists(name, None)
        return (), str(error), error.retry_after
    trust.update_lists(name, lists, issuers)
    return lists, "", None


async def _read(authority: AdvertisesLists) -> tuple[tuple[PublishedList, ...], Chain]:
    async with asyncio.timeout(TIMEOUT):
        advertised = await authority.lists()
        if sum(map(len, advertised.lists)) > LARGEST_LISTS:
            message = f"the revocation lists have more than {LARGEST_LISTS} bytes"
            raise AuthorityError(ErrorKind.INVALID, f"{message}; let the CA drop entries of expired certificates")
        try:
            # in a thread: a long list takes as long as a hundred handshakes
            lists = await in_thread(read_lists, advertised.lists)
            return lists, read_bundle(advertised.issuers_pem).certificates
        except (CertificateError, RevocationListError) as error:
            raise AuthorityError(ErrorKind.INVALID, str(error)) from error
