"""Why a name is or is not served to an Envoy: a chain of findings, from the configuration to its last ACK. Pure."""

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Literal

from msgspec import Struct

from sds_agent.admin.model import (
    TIME,
    BundleView,
    DepartedView,
    IdentityView,
    LeafView,
    Status,
    SubscriberView,
    SubscriptionView,
    goes_on,
    is_taken_back,
    nears_its_end,
    why_no_peer_is_accepted,
    why_unusable,
)
from sds_agent.configfile.phrases import did_you_mean
from sds_agent.log import LONGEST_VALUE
from sds_agent.sds.departed import LONGEST
from sds_agent.text import cut, printable

Verdict = Literal["good", "warning", "bad"]
_FILES = ("file-cert:", "file-root:")
FORGETS_FROM = 1000
"""Streams that have ended, from which on the agent may have forgotten others."""
MOST_EACH = 5
"""Envoys in the same state that get a sentence each; of more the state has one that counts them."""


class ExplanationStep(Struct, frozen=True):
    """One link of the chain: what holds, or what does not and how to fix it."""

    verdict: Verdict
    text: str


def explain(status: Status, name: str, node: str | None = None) -> tuple[ExplanationStep, ...]:
    """The findings in order. `name` is a resource name, or that of a workload; `node` an Envoy's id, as that has it or
    as the status shows it.
    """
    return tuple(_findings(status, name, None if node is None else _as_shown(status, node)))


def _as_shown(status: Status, node: str) -> str:
    shown = any(each.node == node for each in status.subscribers)
    left = any(each.node == cut(node, LONGEST) for each in status.departed or ())
    return node if shown or left else printable(node, LONGEST_VALUE)


def _findings(status: Status, name: str, node: str | None) -> Iterator[ExplanationStep]:
    identity = next((each for each in status.identities if name in {each.name, each.spiffe_id, *each.names}), None)
    bundle = next((each for each in status.bundles if name in each.names), None)
    if identity is not None:
        yield from _of_identity(identity, status.at)
    elif bundle is not None:
        yield from _of_bundle(bundle, status.at)
    elif name.startswith(_FILES):
        yield ExplanationStep(
            "warning",
            f"{name} names a file; it is served if sds.files allows its directory and the file is usable: the log has "
            "refused where it does not, and file_secret_unusable where it is not",
        )
    else:
        yield _unknown(status, name)
    aliases = identity.names if identity is not None else bundle.names if bundle is not None else ()
    # the name of a file is shown escaped, and cut
    yield from _of_subscribers(status, (name, printable(name, LONGEST_VALUE), *aliases), node)


def _unknown(status: Status, name: str) -> ExplanationStep:
    known = [each for identity in status.identities for each in identity.names]
    known += [each for bundle in status.bundles for each in bundle.names]
    same = next((each for each in known if each.lower() == name.lower()), None)
    hint = f"names differ by case: ask for {same}" if same is not None else did_you_mean(name, known)
    fix = hint or f"the agent serves {', '.join(known[:20])}"
    return ExplanationStep("bad", f"{name} is no name that the agent serves; {fix}")


def _of_identity(identity: IdentityView, at: datetime) -> Iterator[ExplanationStep]:
    names = " and ".join(identity.names)
    yield ExplanationStep(
        "good", f"the workload {identity.name} is configured as {identity.spiffe_id}, served under {names}"
    )
    leaf = identity.current
    if leaf is None:
        yield ExplanationStep("bad", f"it has no certificate yet from {identity.authority}{_failed(identity)}")
        return
    if (unusable := why_unusable(identity, at)) is not None:
        yield ExplanationStep("bad", f"its certificate {leaf.serial} {unusable}{_failed(identity)}")
        return
    yield ExplanationStep("good", _certificate(leaf))
    if identity.failure is not None:
        yield ExplanationStep("warning", f"its renewal fails{_failed(identity)}")
    elif nears_its_end(identity, at):
        yield ExplanationStep(
            "warning",
            f"that is near ({leaf.ends_with} ends then): the log says by the event expiring what to do",
        )
    elif identity.next_renewal is not None:
        yield ExplanationStep("good", f"its next renewal is at {identity.next_renewal:{TIME}}")


def _certificate(leaf: LeafView) -> str:
    return (
        f"its certificate {leaf.serial}, issued by {leaf.authority} at {leaf.issued_at:{TIME}}, is good until "
        f"{leaf.valid_until:{TIME}}"
    )


def _failed(identity: IdentityView) -> str:
    failure = identity.failure
    if failure is None:
        return ""
    return (
        f": attempt {failure.attempts} failed at {failure.at:{TIME}} ({failure.kind}: {failure.cause}); the next is "
        f"at {failure.next_attempt:{TIME}}"
    )


def _of_bundle(bundle: BundleView, at: datetime) -> Iterator[ExplanationStep]:
    yield ExplanationStep(
        "good", f"it is the trust bundle of {bundle.trust_domain}, served under {' and '.join(bundle.names)}"
    )
    if not bundle.anchors:
        yield ExplanationStep(
            "bad", "it has no root yet: no authority has answered; see the workloads' errors (sds-agent status)"
        )
        return
    roots = ", ".join(f"{each.subject} until {each.not_after:{TIME}}" for each in bundle.anchors)
    if (ended := why_no_peer_is_accepted(bundle, at)) is not None:
        yield ExplanationStep("bad", ended)
    else:
        yield ExplanationStep("good", f"its version {bundle.version} has {roots}")
    for each in bundle.left_out:
        yield ExplanationStep("warning", f"what {each.authority} advertises is not all in it: {'; '.join(each.causes)}")


def _of_subscribers(status: Status, names: Sequence[str], node: str | None) -> Iterator[ExplanationStep]:
    streams = [each for each in status.subscribers if node is None or each.node == node]
    left = _departed(status, names, node)
    if not streams:
        yield _not_connected(status, node, left)
        return
    asking = [(each, sub) for each in streams for sub in each.subscriptions if sub.name in names]
    if not asking:
        asked = sorted({sub.name for each in streams for sub in each.subscriptions})
        who = "no connected Envoy asks" if node is None else f"the Envoy {node} is connected and does not ask"
        if left is not None and left.cause and any(name in names for name in left.names):
            yield ExplanationStep("bad", f"{who} for it; {_how_it_left(left)}")
            return
        yield ExplanationStep(
            "warning" if node is None else "bad",
            f"{who} for it{_now_left(left)}, but for {', '.join(asked[:20])}; check the names in its configuration",
        )
        return
    states: dict[str, list[tuple[SubscriberView, SubscriptionView]]] = {}
    for subscriber, subscription in asking:
        states.setdefault(subscription.state, []).append((subscriber, subscription))
    for found in states.values():
        for subscriber, subscription in found[:MOST_EACH]:
            yield _of_subscription(subscriber, subscription)
            if subscription.state == "current":
                yield from _beside_refused(status, subscriber)
        if (more := len(found) - MOST_EACH) > 0:
            verdict = _of_subscription(*found[-1]).verdict
            yield ExplanationStep(
                verdict, f"{more} more Envoys are like that ({found[0][1].state}); name one by --envoy"
            )


def _beside_refused(status: Status, subscriber: SubscriberView) -> Iterator[ExplanationStep]:
    """What the same Envoy refuses for good: it may mean a secret that it has acknowledged."""
    for other in status.subscribers:
        if (other.node, other.peer) != (subscriber.node, subscriber.peer):
            continue
        for each in other.subscriptions:
            if each.state == "refused" and each.nacked is not None and not is_taken_back(each):
                yield ExplanationStep(
                    "warning",
                    f"it refuses {each.name} ({each.nacked.reason}): these words may be about this secret, which "
                    "it has acknowledged and does not use then",
                )


def _departed(status: Status, names: Sequence[str], node: str | None) -> DepartedView | None:
    """The stream for one of these names that ended last, or else any of that Envoy's."""
    found = [each for each in status.departed or () if node is None or each.node == cut(node, LONGEST)]
    remembered = {cut(name, LONGEST) for name in names}
    asking = [each for each in found if not remembered.isdisjoint(each.names)]
    return max(asking or (found if node is not None else []), key=lambda each: each.left_at, default=None)


def _now_left(left: DepartedView | None) -> str:
    return "" if left is None else f" (the stream of {left.node or left.peer} for it ended at {left.left_at:{TIME}})"


def _not_connected(status: Status, node: str | None, left: DepartedView | None) -> ExplanationStep:
    verdict: Verdict = "warning" if node is None else "bad"
    who = "no Envoy is connected" if node is None else f"no Envoy with the node id {node} is connected"
    if left is not None:
        return ExplanationStep(verdict, f"{who}; {_how_it_left(left)}")
    never = "" if status.departed is None else f", and none was since {status.agent.started_at:{TIME}}"
    if status.departed is not None and len(status.departed) >= FORGETS_FROM:
        never = ", as far as the agent remembers"
    if node is None:
        return ExplanationStep(
            "warning", f"{who} to {status.agent.socket}{never}; check the path in its cluster, and the log"
        )
    nodes = sorted({each.node for each in status.subscribers if each.node})
    hint = did_you_mean(node, nodes) or f"connected are {', '.join(nodes[:20])}" if nodes else "no Envoy is connected"
    came = never or ": it never was, or its stream has ended"
    return ExplanationStep(
        "bad",
        f"{who}{came}; check that it runs, that its node.id is {node} and that its cluster leads to "
        f"{status.agent.socket}; {hint}",
    )


def _how_it_left(left: DepartedView) -> str:
    """When an Envoy was there, how its stream ended, and what to look at."""
    stream = (
        f"stream {left.stream} of {left.node or left.peer} for {' and '.join(left.names) or 'nothing'} was open from "
        f"{left.since:{TIME}} until {left.left_at:{TIME}}"
    )
    if left.cause:
        return f"{stream}, when the agent ended it: {left.cause}"
    return (
        f"{stream}, when it was closed from there, or its connection was; see whether {left.peer} still runs, and what "
        "its log says"
    )


def _of_subscription(subscriber: SubscriberView, subscription: SubscriptionView) -> ExplanationStep:
    who = f"the Envoy {subscriber.node or subscriber.peer}"
    since = f"connected since {subscriber.since:{TIME}}"
    match subscription.state:
        case "current":
            took = "" if subscriber.ack_ms is None else f", {subscriber.ack_ms} ms after it was sent"
            return ExplanationStep("good", f"{who}, {since}, has taken version {subscription.acked}{took}")
        case "refused" if subscription.nacked is not None:
            return ExplanationStep(
                "bad",
                f"{who} refuses version {subscription.nacked.version}: {subscription.nacked.reason}; "
                f"{goes_on(subscription)}; a new version is sent when the secret changes",
            )
        case "waiting":
            return ExplanationStep("warning", f"{who}, {since}, waits for it; it is sent as soon as there is one")
        case "unknown":
            return ExplanationStep("bad", f"{who} asks for {subscription.name}, which is not served")
        case "denied":
            return ExplanationStep(
                "bad",
                f"{who} may not have {subscription.name}: its process, {subscriber.peer}, is of none of the users and "
                "groups that workloads[].clients names",
            )
        case _:
            return ExplanationStep(
                "warning",
                f"{who} was sent version {subscription.sent or 'nothing'} and has not acknowledged it yet; if that "
                "stays so, its main thread is busy or stopped: its log and its admin interface say more",
            )
