"""The last events of the log and the news that the status has changed, for any number of readers.

There is one ring for all readers, and a reader only remembers how far it is. So one that does not read costs nothing,
and learns how many events it has missed.
"""

import asyncio
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from threading import Lock, get_ident

from msgspec import Struct

from sds_agent import log

KEPT = 200
"""Events that a reader who comes, or comes back, is given."""
QUIET = {"debug", "info"}
"""The levels of events that tell of no failure."""


class NumberedEvent(Struct, frozen=True):
    """An event of the log and its number, which rises by one with each."""

    number: int
    event: log.Event


class Reading(Struct, frozen=True):
    """What is new to a reader: events, how many were lost before them, and whether the status has changed."""

    events: tuple[NumberedEvent, ...]
    missed: int
    status_changed: bool


class EventFeed:
    """Collects events on any thread; readers wait on the event loop's."""

    def __init__(self) -> None:
        self._loop, self._thread = asyncio.get_running_loop(), get_ident()
        self._numbering = Lock()  # else a reader that has seen a later number would never see an earlier one
        self._numbers = count(1)
        self._ring = deque[NumberedEvent](maxlen=KEPT)
        self._changes = 0
        self._wake = asyncio.Event()
        self._waiting = 0  # readers

    @contextmanager
    def following(self) -> Iterator[None]:
        """Collect what is logged, inside this context."""
        with log.watching(self.add):
            yield

    def add(self, event: log.Event) -> None:
        """An event was logged. May be called on any thread.

        A warning or an error is a change of the status: a failed attempt at a CA changes nothing that is served.
        """
        with self._numbering:
            self._ring.append(NumberedEvent(next(self._numbers), event))
        tell = self._rouse if event.level in QUIET else self.status_changed
        if get_ident() == self._thread:
            tell()  # to wake the loop that runs this would take longer than all else about an event
            return
        with suppress(RuntimeError):  # the loop is closed, and with it every reader
            self._loop.call_soon_threadsafe(tell)

    def status_changed(self) -> None:
        """Something that the status shows has changed. To be called on the event loop's thread."""
        self._changes += 1
        self._rouse()

    def reader(self, after: int | None = None) -> "EventReader":
        """A reader that has everything up to the event numbered `after`; without it, one to whom all is new.

        A number that is still to come is one of an earlier run of the agent: to that reader, too, all is new.
        """
        newest = self._ring[-1].number if self._ring else 0
        return EventReader(self, -1 if after is None or after > newest else after)

    def _rouse(self) -> None:
        if self._waiting:  # seldom: each step of each stream comes here
            self._wake.set()
            self._wake = asyncio.Event()

    async def _news(self) -> None:
        self._waiting += 1
        try:
            await self._wake.wait()
        finally:
            self._waiting -= 1

    def _since(self, number: int, changes: int) -> Reading:
        events = tuple(each for each in tuple(self._ring) if each.number > number)
        missed = events[0].number - number - 1 if events and number >= 0 else 0
        return Reading(events, missed, self._changes != changes)


class EventReader:
    """One reader of a feed."""

    def __init__(self, feed: EventFeed, number: int) -> None:
        self._feed = feed
        self._number = number
        self._changes = -1  # the status is new to it

    async def next(self) -> Reading:
        """Wait until something is new, and return it."""
        while True:
            reading = self._feed._since(self._number, self._changes)  # noqa: SLF001 - the two are one unit
            if reading.events or reading.status_changed:
                self._number = reading.events[-1].number if reading.events else self._number
                self._changes = self._feed._changes  # noqa: SLF001 - as above
                return reading
            await self._feed._news()  # noqa: SLF001 - as above
