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

Given = Callable[[], None]
"""What is called when a slot is given."""

_SLACK = 64
"""Entries that may be in the heap beyond twice those that wait."""


class Place:
    """One caller's place in the queue, without a task: `given` is called when a slot is its own, which it then has to
    `leave`.
    """

    __slots__ = ("_given", "_number", "_priority", "_queue", "waits")

    def __init__(self, queue: "IssuanceQueue", number: int, priority: Callable[[], Priority], given: Given) -> None:
        self._queue = queue
        self._number = number
        self._priority = priority
        self._given = given
        self.waits = True
        """Whether a slot has not been given to it yet."""

    def hurry(self) -> None:
        """Its priority has become lower."""
        if self.waits:
            self._queue.push(self)

    def cancel(self) -> bool:
        """Give the place up; returns False where a slot was given, which is to be left."""
        if not self.waits:
            return False
        self.waits = False
        self._queue.gone()
        return True

    def leave(self) -> None:
        """Give the slot to the next."""
        self._queue.leave()

    def entry(self) -> "tuple[Priority, int, Place]":
        """Where it stands now: entries are ordered, and no two turns have one number."""
        return self._priority(), self._number, self

    def give(self) -> None:
        """Have a slot."""
        self.waits = False
        self._given()


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
        self._heap: list[tuple[Priority, int, Place]] = []

    def join(self, priority: Callable[[], Priority], given: Given) -> Place:
        """Take a place; `given` is called at once where a slot is free. Neither must wait or raise."""
        turn = Place(self, next(self._numbers), priority, given)
        if self._free:
            self._free -= 1
            turn.give()
        else:
            self._waiting += 1
            self.push(turn)
        return turn

    @asynccontextmanager
    async def slot(self, priority: Callable[[], Priority], hurrying: Hurrying = _never) -> AsyncIterator[None]:
        """Have a slot inside this context. `priority` must not wait or raise."""
        given = asyncio.Event()
        turn = self.join(priority, given.set)
        try:
            with hurrying(turn.hurry):
                await given.wait()
            yield
        finally:
            # where the slot was given to this caller in the moment of its cancellation, it is left at once
            if not turn.cancel():
                turn.leave()

    def push(self, turn: Place) -> None:
        """For a turn: it stands further to the front from now on."""
        heapq.heappush(self._heap, turn.entry())
        self._compact()

    def gone(self) -> None:
        """For a turn: it waits no longer."""
        self._waiting -= 1
        self._compact()

    def leave(self) -> None:
        """For a turn: its slot is free."""
        while self._heap:
            noted, _, turn = heapq.heappop(self._heap)
            if not turn.waits:
                continue
            if (entry := turn.entry())[0] > noted:
                heapq.heappush(self._heap, entry)
                continue
            self._waiting -= 1
            turn.give()
            return
        self._free += 1

    def _compact(self) -> None:
        if len(self._heap) > 2 * self._waiting + _SLACK:
            waiting = {number: turn for _, number, turn in self._heap if turn.waits}
            self._heap = [turn.entry() for turn in waiting.values()]
            heapq.heapify(self._heap)
