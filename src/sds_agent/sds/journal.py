"""What SDS streams did, as log events that name the Envoy (its node id) and the stream."""

import itertools
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Container, Iterable, Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from sds_agent import log
from sds_agent.budget import Budget, Rate
from sds_agent.digest import sha256
from sds_agent.sds.counts import SdsCounts
from sds_agent.sds.protocol import (
    Acked,
    Action,
    DeltaRequest,
    Finish,
    Nacked,
    Refused,
    Respond,
    SotwRequest,
    Stale,
    StatusCode,
    Subscribed,
    Unsubscribed,
)
from sds_agent.sds.pushes import Pushes, PushOutcome
from sds_agent.sds.status import NameStatus, StreamRecord, StreamStatus
from sds_agent.text import first

if TYPE_CHECKING:
    from sds_agent.sds.refusals import Replacement

LOG = logging.getLogger(__name__)

LINES = 4
"""How many lines an ordinary stream needs for one name: subscribed, sent, acked and left.

A stream may log that many for each name that it may have, and all streams together that many for each stream that
there may be; the same number again in each hour. What a changed secret causes does not count: no peer can cause that.
"""
ENVOYS = Rate(50, 1)
"""Lines `envoy_served`, and as many again in a second: after a restart all Envoys of a node come at once."""
MOST_NODES = 10_000
"""Node ids that are remembered, so that each is logged once."""
PUSHES = "pushes"
"""The key, beside the numbers of the streams, for lines on pushes that a peer can cause."""
HOUR = 3600.0
LINE = 500
"""Characters of a peer's text for which a line counts as one more."""

MOST_REFUSALS = 1024
"""Refusals that are remembered, so that each is logged once."""

MOST_NAMES = 20
"""Names that a line lists."""


class Journal:
    """Numbers the streams, and bounds what they log whatever their peers send.

    It remembers which refusals were logged, because an Envoy that asks for a name that is not served does so for ever.
    It has a budget for the lines of each stream and of all. Warnings have a budget of their own: a flood of other lines
    must not hide why an Envoy refuses a secret. One line a minute says how many were left out.

    At the default level a changed secret makes one line however many streams it goes to (`pushed`), and each Envoy one
    when it has taken its first secret (`envoy_served`). Lines of single streams are for the level debug, but for NACKs
    and refusals. `known` are the names that the configuration has: others are counted together.
    """

    def __init__(
        self,
        monotonic: Callable[[], float] = time.monotonic,
        *,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        most_streams: int = 10_000,
        most_names: int = 100,
        counts: SdsCounts | None = None,
        known: Callable[[], Container[str]] = frozenset,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self.counts = counts or SdsCounts()
        self.pushes = Pushes()
        self.changed = changed
        """Called after each step of a stream."""
        self._known = known
        self._nodes: OrderedDict[bytes, None] = OrderedDict()
        self._envoys = Budget(ENVOYS, ENVOYS, most_keys=1)
        self._numbers = itertools.count(1)
        self._refused: OrderedDict[bytes, None] = OrderedDict()
        self.monotonic = monotonic
        self.now = now
        each, together = _rate(LINES * most_names), _rate(LINES * most_streams)
        self._warnings = Budget(each, together, most_keys=most_streams)
        self._others = Budget(each, together, most_keys=most_streams)

    def open(self, method: str, peer: str) -> "StreamJournal":
        """The journal of a new stream; `peer` is the process at the other end of its connection."""
        self.counts.streams.add(method)
        return StreamJournal(self, StreamRecord(next(self._numbers), method, peer, self.now()))

    def label(self, name: str) -> str:
        """Under which a resource name is counted."""
        return name if name in self._known() else SdsCounts.OTHERS

    def report_pushes(self) -> None:
        """Log the pushes that are over. To be called after each step, and every few seconds."""
        now = self.monotonic()
        for each in self.pushes.finished(now):
            if self._is_of_the_configuration(each.names) or self._others.take(PUSHES, now):
                _log_push(each)

    def first_ack(self, node: str) -> bool:
        """Whether the Envoy of this node id is to be logged as served: once, and not too many in a second."""
        key = _key((node,))
        if key in self._nodes:
            return False
        self._nodes[key] = None
        if len(self._nodes) > MOST_NODES:
            self._nodes.popitem(last=False)
        return self._envoys.take("", self.monotonic())

    def admits(self, stream: int, level: int, fields: Mapping[str, log.Value]) -> bool:
        """Whether a line with these fields may be written. If not, it is counted."""
        cost = 1 + sum(_length(value) for value in fields.values()) // LINE
        budget = self._warnings if level >= logging.WARNING else self._others
        admitted = budget.take(stream, self.monotonic(), cost)
        if not admitted:
            self.report_left_out()
        return admitted

    def report_left_out(self, *, at_the_end: bool = False) -> None:
        """Log how many lines were left out, at most once a minute, or in any case `at_the_end`."""
        now = self.monotonic()
        kinds = ((self._warnings, "warnings"), (self._others, "others"), (self._envoys, "envoys"))
        for budget, kind in kinds:
            if count := budget.left_out(now, at_the_end=at_the_end):
                log.event(LOG, "lines_left_out", level=logging.WARNING, kind=kind, lines=count)

    def first_refusal(self, *what: str) -> bool:
        """Whether this refusal was not logged yet, as far as the journal remembers. It remembers it from now on."""
        key = _key(what)
        first = key not in self._refused
        self._refused[key] = None
        self._refused.move_to_end(key)
        if len(self._refused) > MOST_REFUSALS:
            self._refused.popitem(last=False)
        return first

    def forget_refusal(self, *what: str) -> None:
        """The refusal was left out, and is to be logged the next time."""
        self._refused.pop(_key(what), None)

    def forget_refusals(self) -> None:
        """Other refusals are due from now on: who has lost something is logged, though it was refused before."""
        self._refused.clear()

    def forget_stream(self, stream: int) -> None:
        """The stream is over."""
        self._warnings.forget(stream)
        self._others.forget(stream)

    def _is_of_the_configuration(self, names: Iterable[str]) -> bool:
        """Whether no peer can cause that they change: the secret of a file changes when a peer asks for it anew."""
        known = self._known()
        return all(name in known for name in names)


class StreamJournal:
    """Logs one stream's actions, and keeps its record."""

    __slots__ = ("_journal", "_record", "_took")

    def __init__(self, journal: Journal, record: StreamRecord) -> None:
        self._journal = journal
        self._record = record
        self._took = False  # a secret

    @property
    def number(self) -> int:
        """The stream's number, which every line about it has."""
        return self._record.number

    @property
    def stored(self) -> int:
        """Bytes of what the client said of itself."""
        return self._record.stored

    def met(self, request: SotwRequest | DeltaRequest) -> None:
        """Learn from a message who the client says it is."""
        self._record.met(request.node_id, request.cluster, request.version)

    def due(self, name: str, version: str | None, now: float) -> None:
        """The secret of a name to which the stream subscribes has changed to that version at that monotonic time, and
        was not sent yet. None where nothing is to be sent.
        """
        self._journal.pushes.due(self._record.number, name, version, now)

    def sending(self, answer: Respond, *, changed: bool, by_peer: bool = False) -> None:
        """gRPC is about to send an answer; `changed` if it does because a secret did, `by_peer` if a peer can cause
        that. `sent` follows once it is sent.
        """
        journal, now, monotonic = self._journal, self._journal.now(), self._journal.monotonic()
        has_change = changed
        for each in answer.resources:
            label = journal.label(each.name)
            journal.counts.responses.add(label)
            if journal.pushes.sent(self.number, each.name, each.version):
                journal.counts.pushes.add(label)
                has_change = True  # in the answer to a message, perhaps
        changed = changed and not by_peer
        self._record.sending(answer.nonce, changed=changed, has_change=has_change, now=now, monotonic=monotonic)

    def sent(self, answer: Respond) -> None:
        """Log an answer that gRPC has sent."""
        if LOG.isEnabledFor(logging.DEBUG):
            self._note(answer)
        self._journal.changed()

    def has_change(self, nonce: str) -> bool:
        """Whether the answer of that nonce, which has no reply yet, had a secret that had changed, though by a peer."""
        return self._record.has_change(nonce)

    def sent_at(self, nonce: str) -> float | None:
        """The monotonic time of the answer of that nonce, which has no reply yet; None where it is forgotten."""
        return self._record.sent_at(nonce)

    def monotonic(self) -> float:
        """Now, on the same clock."""
        return self._journal.monotonic()

    def replaced(self, sent: "Replacement") -> None:
        """Log that something was sent in place of what the client refuses."""
        name, version, refused = sent.resource.name, sent.resource.version, sent.version
        if version == refused:
            self._event("sent_anew", names=(name,), version=version)
        else:
            self._event("taken_back", names=(name,), version=version, refused=refused)

    def status(self, names: tuple[NameStatus, ...]) -> StreamStatus:
        """The stream's status; the session gives that of its names."""
        return self._record.status(names)

    def note(self, actions: Iterable[Action]) -> None:
        """Log the actions to which one message or change led."""
        actions = tuple(actions)
        finishing = any(isinstance(action, Finish) for action in actions)
        for action in actions:
            if finishing and isinstance(action, Subscribed):
                continue  # the refusal has the names, and is logged once
            self._note(action)
        if actions:
            self._journal.changed()

    def left(self) -> None:
        """Log that the stream is over."""
        self._event("left", level=logging.DEBUG)
        self._journal.pushes.gone(self.number)
        self._journal.report_pushes()
        self.end()

    def end(self) -> None:
        """The stream logs nothing more: its budget is forgotten."""
        self._journal.forget_stream(self.number)

    def _note(self, action: Action) -> None:
        match action:
            case Subscribed(names, pending):
                record = self._record
                self._detail(
                    "subscribed",
                    names=first(names, MOST_NAMES),
                    pending=first(pending, MOST_NAMES) or None,
                    method=record.method,
                    peer=record.peer,
                )
            case Unsubscribed(names):
                self._journal.pushes.unsubscribed(self.number, names)
                self._detail("unsubscribed", names=first(names, MOST_NAMES))
            case Respond(nonce, resources, removed):
                changed = self._record.is_change(nonce)
                names = tuple(r.name for r in resources)
                versions = tuple(r.version for r in resources)
                peer = None if nonce else self._record.peer  # of a Fetch, which subscribes to nothing
                self._detail(
                    "sent",
                    changed=changed,
                    names=names,
                    removed=removed or None,
                    version=versions,
                    nonce=nonce,
                    peer=peer,
                )
            case Acked(nonce, versions):
                changed, after_ms = self._replied(action)
                self._detail("acked", changed=changed, names=tuple(versions), nonce=nonce, after_ms=after_ms)
                self._settled(action, after_ms)
            case Nacked(nonce, versions, reason):
                changed, _ = self._replied(action)
                self._event(
                    "nacked",
                    level=logging.WARNING,
                    changed=changed,
                    names=tuple(versions),
                    version=tuple(versions.values()),
                    nonce=nonce,
                    reason=reason,
                )
                self._settled(action, None)
            case Stale(nonce, reason):
                self._detail("stale", nonce=nonce, reason=reason)
            case Refused(names, cause):
                self._refused(cause, names)
            case Finish(StatusCode.PERMISSION_DENIED, names, detail):
                self._refused(detail, names)  # which says to whom: each user is logged
            case Finish(code, names, detail):
                self._refused(code.value, names, detail)

    def _refused(self, cause: str, names: tuple[str, ...], detail: str = "") -> None:
        what = (self._record.node, cause, *names)
        if self._journal.first_refusal(*what) and not self._event(
            "refused", level=logging.WARNING, cause=detail or cause, names=first(names, MOST_NAMES) or None
        ):
            self._journal.forget_refusal(*what)

    def _replied(self, reply: Acked | Nacked) -> tuple[bool, float | None]:
        """Whether that answer went out because a secret changed, and the milliseconds from it to the reply."""
        return self._record.is_change(reply.nonce), self._record.replied(reply, monotonic=self._journal.monotonic())

    def _settled(self, reply: Acked | Nacked, after_ms: float | None) -> None:
        """Count a reply, and log what it completes."""
        journal, acked = self._journal, isinstance(reply, Acked)
        replies = journal.counts.acks if acked else journal.counts.nacks
        secrets = {name: version for name, version in reply.versions.items() if version}  # no removed names (Delta)
        for name, version in secrets.items():
            replies.add(journal.label(name))
            journal.pushes.replied(self.number, version, acked=acked, now=journal.monotonic())
        if after_ms is not None:
            journal.counts.seconds_to_ack.observe(after_ms / 1000)
        if acked and not self._took and secrets:
            self._took = True
            self._served(tuple(secrets), after_ms)
        journal.report_pushes()

    def _served(self, names: tuple[str, ...], after_ms: float | None) -> None:
        """The client took its first secret on this stream: log it, if it is the first of this Envoy."""
        record = self._record
        if self._journal.first_ack(record.node or record.peer):
            log.event(
                LOG,
                "envoy_served",
                node=record.node or None,
                envoy_version=record.version or None,
                peer=record.peer,
                names=first(names, MOST_NAMES),
                after_ms=after_ms,
            )

    def _detail(self, name: str, *, changed: bool = False, **fields: log.Value) -> None:
        """Log what one stream does, for the level debug."""
        self._event(name, level=logging.DEBUG, changed=changed, **fields)

    def _event(self, name: str, *, level: int = logging.INFO, changed: bool = False, **fields: log.Value) -> bool:
        """Log the event, unless the budget is spent; whether it did. `changed`: it is never left out."""
        if not LOG.isEnabledFor(level):
            return True
        number, node = self._record.number, self._record.node
        admitted = changed or self._journal.admits(number, level, {"node": node, **fields})
        if admitted:
            log.event(LOG, name, level=level, node=node or None, stream=number, **fields)
        return admitted


def _log_push(push: PushOutcome) -> None:
    log.event(
        LOG,
        "pushed",
        names=first(push.names, MOST_NAMES),
        version=push.version,
        streams=push.streams,
        acked=push.acked,
        nacked=push.nacked,
        left=push.left or None,
        waiting=push.waiting or None,
        last_ack_ms=push.last_ack_ms,
    )


def _key(what: tuple[str, ...]) -> bytes:
    return sha256(repr(what).encode())  # the text itself may be a megabyte


def _rate(lines: int) -> Rate:
    return Rate(lines, lines / HOUR)


def _length(value: log.Value) -> int:
    """Characters that the log writes of a text, or of several."""
    match value:
        case str():
            return min(len(value), log.LONGEST_VALUE)
        case list() | tuple():
            return sum(min(len(each), log.LONGEST_VALUE) for each in value[: log.MOST_VALUES])
        case _:
            return 0
