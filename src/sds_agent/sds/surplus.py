"""Who gives way when peers make the agent store too much: the process for which most is stored loses the connection
with most of it.

All calls on that connection end with RESOURCE_EXHAUSTED, and gRPC gets nothing more of what it sends. A moment later,
in which its client may read that, the connection ends too: gRPC itself ends no call whose answer waits. Such calls are
reset then, for the same reason.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from heapq import heapify, heappop, heappush
from typing import Generic, Protocol, TypeVar

from msgspec import Struct

from sds_agent import log
from sds_agent.budget import Budget, Rate
from sds_agent.sds.acceptor import A_MINUTE, Connection, StoredBytes
from sds_agent.sds.relay import CLOSE_AFTER

LOG = logging.getLogger(__name__)


class Call(Protocol):
    """A stream, or a Fetch: `writing` are the bytes of its answer that gRPC has not taken yet."""

    account: Connection
    writing: int

    def look(self, before: float) -> int:
        """Bytes that its client makes the agent store beside that. What began to wait after `before` is on its way."""
        ...


C = TypeVar("C", bound=Call)


class Surplus(Generic[C]):
    """`end` ends a call, and takes its place among the streams that there may be."""

    def __init__(self, stored: StoredBytes, end: Callable[[C], None]) -> None:
        self._stored = stored
        self._end_call = end
        self._giving_way: dict[Connection, int] = {}  # with the bytes that each of them made the agent store
        self._budget = Budget(A_MINUTE, Rate(20, 20 / 60), most_keys=100)

    def look(self, connections: Iterable[Connection], calls: Iterable[C], before: float) -> None:
        """Count what is stored, and end connections until it is not too much. What began to wait after `before`, by the
        event loop's clock, is on its way.
        """
        on = dict[Connection, list[C]]()
        for call in calls:
            on.setdefault(call.account, []).append(call)
        found = [
            Share(each, each.holder, _stored(each, on.get(each, ()), before))
            for each in connections
            if not each.gives_way
        ]
        left = total = sum(each.stored for each in found)
        for share in surplus(found, self._stored.most):
            left -= share.stored
            self._report(share.holder, total)
            self._end(share.connection, share.stored, on.get(share.connection, ()))
        self._stored.found(left - self._stored.unfinished)

    def _end(self, connection: Connection, stored: int, calls: Sequence[C]) -> None:
        loop = asyncio.get_running_loop()
        if sum(self._giving_way.values()) > self._stored.most:  # more is stored before they have read how it ended
            for each in self._giving_way:
                loop.call_soon(each.refuse)  # it may be at work: what it read led here
            self._giving_way.clear()
        self._giving_way[connection] = stored
        connection.give_way()
        for call in calls:
            self._end_call(call)
        loop.call_later(CLOSE_AFTER, self._close, connection)

    def _close(self, connection: Connection) -> None:
        self._giving_way.pop(connection, None)
        connection.refuse()

    def _report(self, holder: str, stored: int) -> None:
        if self._budget.take(holder, time.monotonic()):
            most = self._stored.most
            log.event(LOG, "too_much_stored", level=logging.WARNING, holder=holder, stored_bytes=stored, most=most)


class Share(Struct, frozen=True):
    """What the peer of a connection makes the agent store, in bytes, and the process that it is."""

    connection: Connection
    holder: str
    stored: int


def surplus(shares: Iterable[Share], most: int) -> list[Share]:
    """Those that have to go so that no more than `most` is left: each time the largest of the holder that has most."""
    of = dict[str, list[Share]]()
    for share in sorted(shares, key=lambda each: each.stored):
        of.setdefault(share.holder, []).append(share)
    amounts = [(-sum(each.stored for each in held), holder) for holder, held in of.items()]
    heapify(amounts)
    left, gone = -sum(amount for amount, _ in amounts), list[Share]()
    while left > most:
        amount, holder = heappop(amounts)
        gone.append(of[holder].pop())
        left -= gone[-1].stored
        heappush(amounts, (amount + gone[-1].stored, holder))
    return gone


def _stored(connection: Connection, calls: Sequence[Call], before: float) -> int:
    answers = connection.unread(sum(each.writing for each in calls), len(calls))
    return connection.unfinished + answers + sum(each.look(before) for each in calls)
