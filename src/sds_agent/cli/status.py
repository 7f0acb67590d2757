"""`sds-agent status`: which identity is served to whom, until when, and what is wrong, of a running agent."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime, timedelta

from sds_agent.admin.model import (
    BundleView,
    IdentityView,
    Status,
    SubscriberView,
    first_name,
    nears_its_end,
    refused_again,
    roots_near_their_end,
)
from sds_agent.cli import asking, output
from sds_agent.cli.formats import add_format, coloured, document, left, span, table
from sds_agent.text import first

NOT_READY = 1
MOST_ROWS = 50
"""Subscribers in the table; those that are not current come first."""
MOST_NODES = 5
"""Envoys that a sentence names."""
MOST_REASONS = 5
"""Workloads of which the first line says why they have no certificate (the table has all), and causes why a changed
configuration is not in force.
"""
_TROUBLES = {
    "refused": "refuse a secret",
    "unknown": "ask for a name that is not served",
    "denied": "ask for what is for other users",
}
"""States of a name that a person has to mend, and what Envoys do that have one."""
_STATES = {"serving": "good", "pending": "warning", "expired": "bad", "current": "good", "refused": "bad"}

EXIT_CODES = (
    "0 every workload has a valid certificate; 1 one has none, or no agent answers; 2 a wrong call, or a configuration "
    "that cannot be used"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The agent, the format, and whether to go on."""
    asking.add_agent(parser)
    add_format(parser)
    parser.add_argument("--watch", "-w", action="store_true", help="show it anew each time that it has changed")


def run(arguments: argparse.Namespace) -> int:
    """Show the status. Raises NoAdminError and ProblemsError."""
    if arguments.watch:
        _watch(arguments)
    found = asking.status(arguments)
    output.write(rendered(found, arguments.format))
    return 0 if found.agent.ready else NOT_READY


def _watch(arguments: argparse.Namespace) -> None:
    """Show each change until the agent or the user ends it. On a terminal what is shown is replaced, also from time to
    time without a change, for the lengths of time; elsewhere a change is appended. Raises NoAdminError, and OutputError
    once no one reads.
    """
    clear = "\x1b[H\x1b[2J" if sys.stdout is not None and sys.stdout.isatty() else ""
    between = "---\n" if arguments.format == "yaml" else "" if arguments.format == "json" else "\n"
    shown: Status | None = None
    for changed in asking.changes(arguments):
        if not changed and not clear:
            output.look_for_reader()
            continue
        found = asking.status(arguments)
        if clear or shown is None or _lasting(found) != _lasting(shown):
            output.write((clear or (between if shown else "")) + rendered(found, arguments.format))
        shown = found


def _lasting(status: Status) -> object:
    """What of a status does not change by itself."""
    agent = status.agent
    return status.identities, status.bundles, status.subscribers, agent.ready, agent.lacks, agent.reload_refused


def rendered(status: Status, form: str) -> str:
    """The status in a format."""
    return document(status, form) if form != "table" else "\n".join(tables(status))


def tables(status: Status) -> Iterator[str]:
    """The status for people: a line that says whether all is well, then a table of each kind."""
    yield headline(status)
    yield _agent(status)
    yield f"\n{_identities(status.identities, status.at)}"
    yield f"\n{_bundles(status.bundles, status.at)}"
    yield f"\n{_subscribers(status.subscribers, status.at)}"
    yield from (coloured(f"\n{each}", "bad") for each in _refusals(status.subscribers))


def headline(status: Status) -> str:
    """Whether all is well, and why not."""
    concerns = list(_concerns(status))
    if not status.agent.ready:
        return f"{coloured('not ready', 'bad')}: {'; '.join((*first(status.agent.lacks, MOST_REASONS), *concerns))}"
    if concerns:
        return f"{coloured('ready, and not all is well', 'warning')}: {'; '.join(concerns)}"
    return f"{coloured('ready', 'good')}: all is well"


def _concerns(status: Status) -> Iterator[str]:
    """What is wrong while certificates are served."""
    if refused := status.agent.reload_refused:
        yield f"the configuration as it is now is not in force: {'; '.join(first(refused, MOST_REASONS))}"
    failing = [each.name for each in status.identities if each.state == "serving" and each.failure is not None]
    if failing:
        yield f"the renewal of {_some(failing)} fails"
    near = [
        each.name
        for each in status.identities
        if each.state == "serving" and each.failure is None and nears_its_end(each, status.at)
    ]
    if near:
        yield f"the certificate of {_some(near)} nears its end"
    roots = [each.subject for bundle in status.bundles for each in roots_near_their_end(bundle, status.at)]
    if roots:
        yield f"roots near their end: {_some(roots)}"
    for state, verb in _TROUBLES.items():
        nodes = [
            each.node or each.peer
            for each in status.subscribers
            if any(subscription.state == state for subscription in each.subscriptions)
        ]
        if nodes:
            yield f"Envoys that {verb}: {_some(nodes)}"
    if again := [each.node or each.peer for each in refused_again(status)]:
        yield f"Envoys that ask again and again for what they do not get: {_some(again)}"


def _some(names: Sequence[str]) -> str:
    """The first of these, each once, and how many more there are."""
    found = list(dict.fromkeys(names))
    more = len(found) - MOST_NODES
    return ", ".join(found[:MOST_NODES]) + (f" and {more} more" if more > 0 else "")


def _agent(status: Status) -> str:
    agent, counts = status.agent, status.agent.counts
    return (
        f"sds-agent {agent.version} of {agent.trust_domain}, up {span(timedelta(seconds=agent.uptime_seconds))}; "
        f"certificates issued: {counts.issued}, attempts failed: {counts.failed}, pushes: {counts.pushes}, refused: "
        f"{counts.nacks}"
    )


def _refusals(subscribers: Sequence[SubscriberView]) -> Iterator[str]:
    """Each reason that Envoys gave for a refusal of what is served now, once, with the Envoys that gave it."""
    found: dict[tuple[str, str], list[str]] = {}
    for subscriber in subscribers:
        for each in subscriber.subscriptions:
            if each.state == "refused" and each.nacked is not None:
                found.setdefault((each.name, each.nacked.reason), []).append(subscriber.node or subscriber.peer)
    for (name, reason), nodes in found.items():
        yield f"{name} is refused by {_some(nodes)}: {reason}"


def _identities(identities: Sequence[IdentityView], now: datetime) -> str:
    head = ("WORKLOAD", "SPIFFE ID", "STATE", "SERIAL", "AUTHORITY", "EXPIRES", "RENEWS", "LAST ERROR")
    rows = []
    for each in identities:
        leaf, failure = each.current, each.failure
        rows.append(
            (
                each.name,
                each.spiffe_id,
                coloured(each.state, _STATES[each.state]),
                "" if leaf is None else leaf.serial,
                each.authority,
                "" if leaf is None else left(leaf.valid_until, now),
                "" if each.next_renewal is None else left(each.next_renewal, now),
                "" if failure is None else f"{failure.kind}, {failure.attempts} in a row: {failure.cause}",
            )
        )
    return table(head, rows)


def _bundles(bundles: Sequence[BundleView], now: datetime) -> str:
    head = ("BUNDLE", "VERSION", "ROOT", "EXPIRES", "WHY")
    rows = [
        (first_name(bundle), bundle.version or "", anchor.subject, left(anchor.not_after, now), anchor.why)
        for bundle in bundles
        for anchor in bundle.anchors
    ]
    rows += [(first_name(each), "", "", "", "nothing is served yet") for each in bundles if not each.anchors]
    return table(head, rows)


def _subscribers(subscribers: Sequence[SubscriberView], now: datetime) -> str:
    if not subscribers:
        return "No Envoy is connected."
    head = ("ENVOY", "VERSION", "NAME", "STATE", "ACK", "SINCE", "PEER")
    rows = [
        (
            subscriber.node,
            subscriber.version,
            each.name,
            coloured(each.state, _STATES.get(each.state, "warning")),
            "" if subscriber.ack_ms is None else f"{subscriber.ack_ms} ms",
            left(subscriber.since, now),
            subscriber.peer,
        )
        for subscriber in sorted(subscribers, key=_is_current)
        for each in subscriber.subscriptions
    ]
    more = len(rows) - MOST_ROWS
    shown = table(head, rows[:MOST_ROWS])
    return f"{shown}\nand {more} more; -o json has all" if more > 0 else shown


def _is_current(subscriber: SubscriberView) -> bool:
    return all(each.state == "current" for each in subscriber.subscriptions)
