"""A running agent by its status: pure."""

import shlex
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from datetime import datetime

from sds_agent.admin.model import (
    TIME,
    BundleView,
    IdentityView,
    Status,
    SubscriberView,
    first_name,
    goes_on,
    nears_its_end,
    refused_again,
    roots_near_their_end,
    served_names,
    why_no_peer_is_accepted,
    why_unusable,
)
from sds_agent.doctor.diagnosis import Diagnosis, bad, good, warning
from sds_agent.doctor.served import Served

MOST_NAMES = 5
"""Workloads that a line names, or causes."""


def of_agent(status: Status, version: str, named: str = "") -> Iterator[Diagnosis]:
    """The agent, its identities, its bundles, and the Envoys that are connected; `version` is this command's, and
    `named` the option by which the agent was named to it.
    """
    agent = status.agent
    if agent.version != version:
        yield warning(
            "agent",
            f"it runs version {agent.version}, and this command is {version}; restart the agent after an upgrade",
        )
    if agent.ready:
        yield good("agent", f"version {agent.version}, ready, since {agent.started_at:{TIME}}")
    if agent.reload_refused:
        yield bad(
            "agent",
            f"it has not taken its configuration as that is now: {_listed(agent.reload_refused, '; ')}; correct the "
            "file, or start the agent again for a key that only a restart applies",
        )
    for each in status.identities:
        yield _of_identity(each, status.at, named)
    for bundle in status.bundles:
        yield from _of_bundle(bundle, status)
    yield from of_subscribers(status, named)


def of_file(configured: Mapping[str, str], status: Status) -> Iterator[Diagnosis]:
    """Whether the agent serves what its file says: `configured` are the SPIFFE IDs of the workloads in that, by their
    names.

    Only what the agent says itself makes a difference bad: it may run on another file than this command has read, or
    with other variables, and is about to reload a file that was changed this moment.
    """
    served = {each.name: each.spiffe_id for each in status.identities}
    lacking = [name for name, spiffe_id in configured.items() if served.get(name) != spiffe_id]
    surplus = [name for name in served if name not in configured]
    made, fix = (
        (bad, "")
        if status.agent.reload_refused
        else (
            warning,
            "; if it runs on this file, look for reload_refused in its log; otherwise name its own file, and set its "
            "SDS_AGENT__ variables for this command",
        )
    )
    if lacking:
        yield made("agent", f"it does not serve as the file says: {_listed(lacking)}{fix}")
    if surplus:
        yield warning("agent", f"it serves what the file does not have: {_listed(surplus)}{fix}")


def _listed(names: Sequence[str], between: str = ", ") -> str:
    more = len(names) - MOST_NAMES
    return between.join(names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def _of_identity(identity: IdentityView, at: datetime, named: str) -> Diagnosis:
    subject, failure = f"workload {identity.name}", identity.failure
    why = "" if failure is None else f": {failure.kind}, {failure.attempts} in a row: {failure.cause}"
    if identity.current is None:
        return bad(subject, f"has no certificate yet{why}; see {_explained(identity.name, named)}")
    if (unusable := why_unusable(identity, at)) is not None:
        return bad(subject, f"its certificate {unusable}{why}; see {_explained(identity.name, named)}")
    until = f"{identity.current.valid_until:{TIME}}"
    if failure is not None:
        return warning(subject, f"its certificate is good until {until}, and its renewal fails{why}")
    if nears_its_end(identity, at):
        return warning(
            subject,
            f"its certificate is good until {until} alone, when {identity.current.ends_with} ends; the log says by the "
            "event expiring what to do",
        )
    return good(subject, f"its certificate is good until {until}, from {identity.authority}")


def _explained(name: str, named: str) -> str:
    return f"`sds-agent explain {shlex.quote(name)}{named}`"


def _of_bundle(bundle: BundleView, status: Status) -> Iterator[Diagnosis]:
    subject = f"bundle {first_name(bundle)}"
    if not bundle.anchors:
        yield bad(subject, "has no root yet; no authority has told it one")
        return
    last, near = max(each.not_after for each in bundle.anchors), roots_near_their_end(bundle, status.at)
    if (ended := why_no_peer_is_accepted(bundle, status.at)) is not None:
        yield bad(subject, ended)
    for root in near[:MOST_NAMES]:
        text = f"its root {root.subject} ends at {root.not_after:{TIME}}"
        yield warning(subject, f"{text}; let the CA advertise its successor before then")
    if not near and ended is None:
        yield good(subject, f"its last root ends at {last:{TIME}}")
    for each in bundle.left_out:
        yield warning(subject, f"what {each.authority} advertises is not all served: {'; '.join(each.causes)}")


def of_subscribers(status: Status, named: str = "") -> Iterator[Diagnosis]:
    """The Envoys that are connected, those in trouble each, the others counted."""
    known = Served(served_names(status))
    troubles = [each for subscriber in status.subscribers for each in _of_subscriber(subscriber, known, named)]
    troubles += _refused(status)
    yield from troubles
    if not status.subscribers:
        yield warning("Envoys", f"none is connected to {status.agent.socket}; {_missing(status)}")
    elif not troubles:
        yield good("Envoys", f"{len({each.node for each in status.subscribers})} connected, all have what is served")


def _refused(status: Status) -> Iterator[Diagnosis]:
    for left in refused_again(status):
        names = " and ".join(left.names)
        yield bad(f"Envoy {left.node or left.peer}", f"did not get {names} at {left.left_at:{TIME}}: {left.cause}")


def _missing(status: Status) -> str:
    if not status.departed:
        return "check the path in their clusters"
    last = status.departed[-1]
    if last.cause:
        return f"the agent ended the last stream, of {last.node or last.peer}, at {last.left_at:{TIME}}: {last.cause}"
    return f"the last, {last.node or last.peer}, left at {last.left_at:{TIME}}: see whether it runs"


def _of_subscriber(subscriber: SubscriberView, known: Served, named: str) -> Iterator[Diagnosis]:
    subject = f"Envoy {subscriber.node or subscriber.peer}"
    for each in subscriber.subscriptions:
        match each.state:
            case "refused" if each.nacked is not None:
                yield bad(
                    subject,
                    f"refuses {each.name}: {each.nacked.reason}; {goes_on(each)}; change what it names, or where this "
                    "Envoy asks for it",
                )
            case "unknown":
                yield bad(subject, f"asks for {each.name}, which is not served; {known.instead_of(each.name)}")
            case "denied":
                yield bad(
                    subject,
                    f"may not have {each.name}: add a user or group of its process, {subscriber.peer}, to "
                    "workloads[].clients, or run it as one that is named there",
                )
            case "behind":
                yield warning(subject, f"has not acknowledged {each.name} yet; its log says whether it is held up")
            case "waiting":
                yield warning(subject, f"waits for {each.name}; see {_explained(each.name, named)}")


def judged(tried: Mapping[str, Sequence[Diagnosis]], chains: Iterable[Sequence[str]]) -> Iterator[Diagnosis]:
    """What was found of each authority. One that cannot be used is only a warning where each workload has another one.

    `chains` are the authorities of each workload.
    """
    chains = list(chains)
    usable = {name for name, found in tried.items() if not found or any(each.condition != "bad" for each in found)}
    needed = {name for chain in chains if not usable.intersection(chain) for name in chain}
    for name, found in tried.items():
        for each in found:
            spare = each.condition == "bad" and name not in needed
            yield warning(each.subject, f"{each.text}; {_instead(name, usable, chains)}") if spare else each


def _instead(name: str, usable: Container[str], chains: Iterable[Sequence[str]]) -> str:
    """What serves where a place of this authority cannot be used."""
    if name in usable:
        return "another address of it can be reached"
    return "its workloads have another authority" if any(name in each for each in chains) else "no workload has it"


def worst(found: Iterable[Diagnosis]) -> bool:
    """Whether anything is bad."""
    return any(each.condition == "bad" for each in found)
