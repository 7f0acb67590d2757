"""What SDS streams did, as log events that name the Envoy (its node id) and the stream."""

import hashlib
import itertools
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable

from sds_agent import log
from sds_agent.sds.protocol import (
    Acked,
    Action,
    Finish,
    Nacked,
    Refused,
    Respond,
    Stale,
    Subscribed,
    Unsubscribed,
)

LOG = logging.getLogger(__name__)

MOST_REFUSALS = 1024
"""How many different refusals are remembered so as not to log them again."""

MOST_TIMED = 32
"""Of how many answers of a stream the time is kept until they are taken."""

MOST_NAMES = 20
"""How many of a peer's own words a line tells."""


class Journal:
    """Numbers the streams and remembers which refusals were logged: an Envoy that may not have a name asks for it for
    ever.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._numbers = itertools.count(1)
        self._refused: OrderedDict[bytes, None] = OrderedDict()
        self.monotonic = monotonic

    def open(self, method: str) -> "StreamJournal":
        """The journal of a new stream."""
        return StreamJournal(self, next(self._numbers), method)

    def first_refusal(self, *what: str) -> bool:
        """Whether this refusal has not been logged yet (or so long ago that it is forgotten)."""
        key = hashlib.sha256(repr(what).encode()).digest()  # the words themselves may be a megabyte
        first = key not in self._refused
        self._refused[key] = None
        self._refused.move_to_end(key)
        if len(self._refused) > MOST_REFUSALS:
            self._refused.popitem(last=False)
        return first


class StreamJournal:
    """Logs one stream's actions."""

    def __init__(self, journal: Journal, number: int, method: str) -> None:
        self._journal = journal
        self.number = number
        self._method = method
        self._node = ""
        self._sent_at: dict[str, float] = {}

    def met(self, node_id: str) -> None:
        """Learn who the peer says it is; only the first message of a stream is sure to tell."""
        if node_id:
            self._node = node_id

    def note(self, actions: Iterable[Action]) -> None:
        """Log the actions that one message or change led to."""
        actions = tuple(actions)
        finishing = any(isinstance(action, Finish) for action in actions)
        for action in actions:
            if finishing and isinstance(action, Subscribed):
                continue  # the refusal tells it, and only once
            self._note(action)

    def left(self) -> None:
        """Log that the stream is over."""
        self._event("left", level=logging.DEBUG)

    def _note(self, action: Action) -> None:
        match action:
            case Subscribed(names, held):
                self._event("subscribed", names=_some(names), held=_some(held) or None, method=self._method)
            case Unsubscribed(names):
                self._event("unsubscribed", level=logging.DEBUG, names=_some(names))
            case Respond(nonce, resources, removed):
                self._time(nonce)
                names = tuple(r.name for r in resources)
                versions = tuple(r.version for r in resources)
                self._event("pushed", names=names, removed=removed or None, version=versions, nonce=nonce)
            case Acked(nonce, names):
                self._event("acked", names=names, nonce=nonce, after_ms=self._after(nonce))
            case Nacked(nonce, names, reason):
                self._event("nacked", level=logging.WARNING, names=names, nonce=nonce, reason=reason)
            case Stale(nonce, reason):
                self._event("stale", level=logging.DEBUG, nonce=nonce, reason=reason)
            case Refused(names):
                self._refused("unknown name", names)
            case Finish(status, names, detail):
                self._refused(status.value, names, detail)

    def _refused(self, cause: str, names: tuple[str, ...], detail: str = "") -> None:
        if self._journal.first_refusal(self._node, cause, *names):
            self._event("refused", level=logging.WARNING, cause=detail or cause, names=_some(names) or None)

    def _time(self, nonce: str) -> None:
        self._sent_at[nonce] = self._journal.monotonic()
        if len(self._sent_at) > MOST_TIMED:
            del self._sent_at[next(iter(self._sent_at))]

    def _after(self, nonce: str) -> float | None:
        sent = self._sent_at.pop(nonce, None)
        return None if sent is None else round((self._journal.monotonic() - sent) * 1000, 1)

    def _event(self, name: str, level: int = logging.INFO, **fields: log.Value) -> None:
        log.event(LOG, name, level=level, node=self._node or None, stream=self.number, **fields)


def _some(names: tuple[str, ...]) -> tuple[str, ...]:
    more = len(names) - MOST_NAMES
    return names if more <= 0 else (*names[:MOST_NAMES], f"and {more} more")
