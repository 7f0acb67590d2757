"""`sds-agent status`: which identity is served to whom, until when, and what is wrong, of a running agent."""

import argparse
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import datetime

from sds_agent.admin.model import BundleView, IdentityView, Status, SubscriberView
from sds_agent.cli import asking, output
from sds_agent.cli.formats import add_format, coloured, document, left, table

NOT_READY = 1
EVERY = 1.0
"""Seconds between two looks with --watch."""
MOST_ROWS = 50
"""Subscribers in the table; those that are not current come first."""
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
    found = asking.status(arguments)
    output.write(rendered(found, arguments.format))
    if arguments.watch:
        _watch(found, arguments)
    return 0 if found.agent.ready else NOT_READY


def _watch(shown: Status, arguments: argparse.Namespace) -> None:
    """Show each change, for ever. On a terminal what is shown is replaced."""
    clear = "\x1b[H\x1b[2J" if sys.stdout is not None and sys.stdout.isatty() else ""
    while True:
        time.sleep(EVERY)
        found = asking.status(arguments)
        if clear or _lasting(found) != _lasting(shown):
            output.write(clear + rendered(found, arguments.format))
        shown = found


def _lasting(status: Status) -> object:
    """What of a status does not change by itself."""
    return status.identities, status.bundles, status.subscribers, status.agent.ready, status.agent.lacks


def rendered(status: Status, form: str) -> str:
    """The status in a format."""
    return document(status, form) if form != "table" else "\n".join(tables(status))


def tables(status: Status) -> Iterator[str]:
    """The status for people: a line that says whether all is well, then a table of each kind."""
    yield _headline(status)
    yield from (f"  {each}" for each in status.agent.lacks)
    yield f"\n{_identities(status.identities, status.at)}"
    yield f"\n{_bundles(status.bundles, status.at)}"
    yield f"\n{_subscribers(status.subscribers, status.at)}"
    for subscriber in status.subscribers:
        for each in subscriber.subscriptions:
            if each.nacked is not None:
                node = subscriber.node or subscriber.peer
                yield coloured(f"\n{node} refused {each.name}: {each.nacked.reason}", "bad")


def _headline(status: Status) -> str:
    agent = status.agent
    state = coloured("ready", "good") if agent.ready else coloured("not ready", "bad")
    counts = agent.counts
    return (
        f"sds-agent {agent.version}, {agent.trust_domain}: {state}; up {left(agent.started_at, status.at)[:-4]}, "
        f"{counts.issued} certificates issued, {counts.failed} attempts failed, {counts.pushes} pushes, "
        f"{counts.nacks} refused"
    )


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
        (bundle.names[0], bundle.version or "", anchor.subject, left(anchor.not_after, now), anchor.why)
        for bundle in bundles
        for anchor in bundle.anchors
    ]
    rows += [(each.names[0], "", "", "", "nothing is served yet") for each in bundles if not each.anchors]
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
