"""How many CSRs are under way at once, and who goes next.

A restart with many identities must neither stampede the CA nor make a waiting Envoy queue behind certificates that
are good for hours.
"""

import asyncio
import heapq
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from datetime import datetime

Priority = tuple[int, datetime]
"""Lower goes first: a rank (0: an Envoy waits for the workload, 1: none does; 2 more where the CA let its last attempt
hang), and when its current certificate ends. What a CA lets hang keeps no other identity from its turn.
"""

Hurrying = Callable[[Callable[[], None]], AbstractContextManager[object]]
"""Calls what it is given whenever the priority of one caller has become lower, while its context lasts."""

_SLACK = 64
"""Entries that may be in the heap beyond twice those that wait."""


class _Turn:
    """One caller that waits, until its slot is `given`."""

    __slots__ = ("given", "priority")

    def __init__(self, priority: Callable[[], Priority]) -> None:
        self.priority = priority
        self.given: asyncio.Future[None] = asyncio.get_running_loop().create_future()


def _never(_: Callable[[], None]) -> AbstractContextManager[None]:
    return nullcontext()


class IssuanceQueue:
    """Gives `slots` slots, to the lowest priority first, and to the first to come among equals.

    A priority is computed when the wait begins, whenever it is said to be lower (`Hurrying`), and again when a slot
    becomes free: an Envoy may have connected or left in between. However many wait, a slot costs a few of these.
    """

    def __init__(self, slots: int = 8) -> None:
        self._free = slots
        self._waiting = 0
        self._numbers = itertools.count()
        # a turn may be in it several times, and for a while after its caller was given a slot or went away
        self._heap: list[tuple[Priority, int, _Turn]] = []

    @asynccontextmanager
    async def slot(self, priority: Callable[[], Priority], hurrying: Hurrying = _never) -> AsyncIterator[None]:
        """Have a slot inside this context. `priority` must not wait or raise."""
        if self._free:
            self._free -= 1
        else:
            await self._wait(_Turn(priority), hurrying)
        try:
            yield
        finally:
            self._leave()

    async def _wait(self, turn: _Turn, hurrying: Hurrying) -> None:
        number = next(self._numbers)
        self._waiting += 1
        self._push(turn, number)
        try:
            with hurrying(lambda: self._push(turn, number)):
                await turn.given
        except BaseException:
            if turn.given.cancelled():
                self._waiting -= 1
                self._compact()
            else:
                self._leave()  # the slot was given to this caller in the moment of its cancellation
            raise

    def _push(self, turn: _Turn, number: int) -> None:
        heapq.heappush(self._heap, (turn.priority(), number, turn))
        self._compact()

    def _compact(self) -> None:
        if len(self._heap) > 2 * self._waiting + _SLACK:
            waiting = {number: turn for _, number, turn in self._heap if not turn.given.done()}
            self._heap = [(turn.priority(), number, turn) for number, turn in waiting.items()]
            heapq.heapify(self._heap)

    def _leave(self) -> None:
        while self._heap:
            noted, number, turn = heapq.heappop(self._heap)
            if turn.given.done():
                continue
            if (priority := turn.priority()) > noted:
                heapq.heappush(self._heap, (priority, number, turn))
                continue
            self._waiting -= 1
            turn.given.set_result(None)
            return
        self._free += 1
