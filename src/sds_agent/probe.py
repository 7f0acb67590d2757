"""What each CA says to a request for a short certificate that is thrown away: the proof that it is set up right."""

import asyncio
from contextlib import suppress
from datetime import datetime, timedelta

from msgspec import Struct, structs

from sds_agent import app, once, preflight
from sds_agent.authority import registry
from sds_agent.authority.protocol import (
    AdvertisesAnchors,
    Authority,
    AuthorityError,
    CertifiesKeys,
    ErrorKind,
    Supplier,
)
from sds_agent.clock import Clock
from sds_agent.config.settings import Settings
from sds_agent.configfile.durations import format_duration
from sds_agent.errors import SdsAgentError
from sds_agent.issuance.anchors_refresh import refresh_once
from sds_agent.issuance.requester import Obtained, Receiver, Requester
from sds_agent.issuance.trust import Trust
from sds_agent.issuance.workload import Workload
from sds_agent.live import assembly
from sds_agent.pki.certificates import describe, describe_time, serial_hex
from sds_agent.secrets.store import SecretStore
from sds_agent.tasks import NoThreadError, in_thread

TTL = timedelta(minutes=1)
"""What is asked for. A CA that gives only more is asked for the workload's own lifetime next."""
MOST_SHOWN = 5
"""Anchors that are named."""
_SPARE = "; an agent that has a certificate from it renews with that, which a probe does not have"


class Finding(Struct, frozen=True):
    """What was found of one authority, in words; `good` is None where it was not asked."""

    authority: str
    good: bool | None
    said: str


async def probe(settings: Settings, clock: Clock, *, spend: bool) -> list[Finding]:
    """Ask every authority for a certificate for one of its workloads, all at one time; in the order of the file.

    With `spend` also where that uses up something, such as a join token.
    """
    async with asyncio.TaskGroup() as tasks:
        asked = [tasks.create_task(_finding(settings, name, clock, spend=spend)) for name in settings.authorities]
    return [each.result() for each in asked]


async def _finding(settings: Settings, name: str, clock: Clock, *, spend: bool) -> Finding:
    chosen = settings.authorities[name]
    kind = registry.kind_of(chosen)
    asking = [workload for workload in settings.workloads if name in settings.authorities_of(workload)]
    if not asking:
        return Finding(name, None, "not asked: no workload gets its certificate from it")
    if kind.holds_ca:
        try:
            kind.check(chosen, preflight.context(settings, name, clock))
        except SdsAgentError as error:
            return Finding(name, False, str(error))
        return Finding(name, True, "it is a part of the agent, and what it stores is good; it was not asked")
    if not spend and (spent := await in_thread(kind.spends, chosen)) is not None:
        fix = "`sds-agent check --probe --spend-token` asks all the same"
        return Finding(name, None, f"not asked: {spent}, and a probe would spend it; {fix}")
    workload = structs.replace(asking[0], authority=(name,))
    only = structs.replace(settings, workloads=(workload,), authorities={name: chosen})
    try:
        with once.copied_state(only, None) as placed:
            async with app.authorities(placed, clock) as cas:
                return await _ask(placed, cas[name], clock, renews=kind.renews(chosen))
    except (SdsAgentError, NoThreadError) as error:
        return Finding(name, False, str(error))


async def _ask(settings: Settings, authority: Authority | Supplier, clock: Clock, *, renews: bool) -> Finding:
    """`renews`: a running agent may have another proof than the probe, its current certificate."""
    (workload,) = assembly.workloads(settings)
    name, timeout = workload.authority, settings.requests.timeout.total_seconds()
    trust = Trust(SecretStore(settings.bundle_names), settings.bundle_names, clock)
    anchors_fault = ""
    if isinstance(authority, AdvertisesAnchors):
        anchors_fault, _ = await refresh_once(trust, name, authority)
    short, refused = structs.replace(workload, ttl=min(TTL, workload.ttl)), ""
    try:
        obtained = await _attempt(short, authority, trust, clock, timeout)
    except AuthorityError as error:
        if error.kind not in {ErrorKind.DENIED, ErrorKind.INVALID} or isinstance(authority, Supplier):
            spare = _SPARE if renews and error.kind is ErrorKind.UNAUTHENTICATED else ""
            return Finding(name, False, f"{_failed(error, anchors_fault)}{spare}")
        refused = f"; it gives none of {format_duration(short.ttl)} ({error})"
        try:
            obtained = await _attempt(workload, authority, trust, clock, timeout)
        except AuthorityError as again:
            return Finding(name, False, _failed(again, anchors_fault))
    else:
        if obtained.accepted.warnings and short.ttl != workload.ttl:  # perhaps of a lifetime that nobody configured
            with suppress(AuthorityError):
                obtained = await _attempt(workload, authority, trust, clock, timeout)
    if anchors_fault:
        return Finding(name, False, f"it issued, but its trust anchors cannot be had: {anchors_fault}")
    return Finding(name, True, f"{_described(obtained, workload)}{refused}")


async def _attempt(
    workload: Workload, authority: Authority | Supplier, trust: Trust, clock: Clock, seconds: float
) -> Obtained:
    try:
        async with asyncio.timeout(seconds):
            if isinstance(authority, Supplier):
                return await Receiver(workload, workload.authority, authority, trust, clock).ask(None)
            certifying = authority if isinstance(authority, CertifiesKeys) else None
            requester = Requester(
                workload, workload.authority, authority, trust, clock, certifying=certifying, timeout=seconds
            )
            return await requester.ask(None)
    except TimeoutError as error:
        raise AuthorityError(ErrorKind.TRANSIENT, f"no certificate came within {seconds:g} s") from error


def _failed(error: AuthorityError, anchors_fault: str) -> str:
    if not anchors_fault or anchors_fault == str(error):
        besides = "; nor does it give its trust anchors" if anchors_fault else ""
    else:
        besides = f"; nor can its trust anchors be had: {anchors_fault}"
    return f"{error.kind.value}: {error}{besides}"


def _described(obtained: Obtained, workload: Workload) -> str:
    accepted, took = obtained.accepted, obtained.took.total_seconds()
    chain = " below ".join([str(workload.identity), *(describe(each) for each in accepted.chain[1:])])
    anchors = [f"{describe(a)} until {describe_time(a.not_valid_after_utc)}" for a in accepted.anchors[:MOST_SHOWN]]
    more = f" and {len(accepted.anchors) - MOST_SHOWN} more" if len(accepted.anchors) > MOST_SHOWN else ""
    warned = "".join(f"; warning: {each}" for each in accepted.warnings)
    return (
        f"it issued a certificate in {took:.2f} s, valid for {_life(accepted.leaf.not_valid_after_utc, obtained)} "
        f"(serial number {serial_hex(accepted.leaf)}): {chain}; the anchors are {', '.join(anchors)}{more}{warned}"
    )


def _life(end: datetime, obtained: Obtained) -> str:
    return format_duration(timedelta(seconds=round((end - obtained.issued_at).total_seconds())))
