"""Calls that wait for something that may be long in coming, such as a request or a worker.

An honest request arrives at once. If the newest were refused where too many wait, one caller could keep all others out.
So the one that has waited longest gives way: of the caller that has `each` waiting, or else of the caller with most.
"""

import asyncio
from types import TracebackType

from sds_agent.rpc.crowd import Crowd


class GaveWayError(Exception):
    """Too many calls wait, and this one has waited longest."""


class Waiting:
    """At most `most` calls wait at one time, and `each` of one caller, for `timeout` seconds at most.

    A call counts once it has waited `grace` seconds: what is only about to be read keeps nobody out.
    """

    def __init__(self, most: int, each: int, timeout: float, grace: float = 0.0) -> None:
        self.timeout = timeout
        self.grace = min(grace, timeout)
        self._most = most
        self._each = each
        self._here = Crowd[asyncio.Timeout]()
        self._gave_way = set[asyncio.Timeout]()

    def place(self, holder: str) -> "_Place":
        """Wait inside this context. Raises TimeoutError after `timeout` seconds, and GaveWayError."""
        return _Place(self, holder)

    def enter(self, timeout: asyncio.Timeout, holder: str, ends: float) -> None:
        """It counts from now on, and may wait until `ends`, by the event loop's clock. Others may give way to it."""
        self._make_room(holder)
        self._here.enter(timeout, holder)
        timeout.reschedule(ends)

    def leave(self, timeout: asyncio.Timeout) -> bool:
        """It waits no more; whether it gave way."""
        self._here.leave(timeout)
        gave_way = timeout in self._gave_way
        self._gave_way.discard(timeout)
        return gave_way

    def _make_room(self, holder: str) -> None:
        if self._here.count(holder) >= self._each:
            gives_way = self._here.oldest_of(holder)
        elif len(self._here) >= self._most:
            gives_way = self._here.oldest_of_the_largest()
        else:
            return
        if gives_way is not None:
            self._here.leave(gives_way)
            if not gives_way.expired():
                self._gave_way.add(gives_way)
                gives_way.reschedule(asyncio.get_running_loop().time())


class _Place:
    """Where one call waits. One timer is set, for the end of its grace, and cancelled: nearly all calls end before.

    A class costs half of what a generator that is made a context manager does.
    """

    __slots__ = ("_ends", "_holder", "_later", "_timeout", "_waiting")

    def __init__(self, waiting: Waiting, holder: str) -> None:
        self._waiting = waiting
        self._holder = holder
        self._timeout = asyncio.timeout_at(None)
        self._later: asyncio.TimerHandle | None = None
        self._ends = 0.0

    async def __aenter__(self) -> None:
        loop, waiting = asyncio.get_running_loop(), self._waiting
        began = loop.time()
        self._ends = began + waiting.timeout
        await self._timeout.__aenter__()
        if waiting.grace:
            self._later = loop.call_at(began + waiting.grace, self._enter)
        else:
            self._enter()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._later is not None:
            self._later.cancel()
        gave_way = self._waiting.leave(self._timeout)
        try:
            await self._timeout.__aexit__(kind, error, trace)
        except TimeoutError as late:
            if gave_way:
                raise GaveWayError from late
            raise

    def _enter(self) -> None:
        self._waiting.enter(self._timeout, self._holder, self._ends)
