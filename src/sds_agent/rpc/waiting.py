"""Calls that wait for something that may be long in coming, such as a request or a worker.

An honest request arrives at once. If the newest were refused where too many wait, one caller could keep all others out.
So the one that has waited longest gives way: of the caller that has `each` waiting, or else of the caller with most.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sds_agent.rpc.crowd import Crowd


class GaveWayError(Exception):
    """Too many calls wait, and this one has waited longest."""


class Waiting:
    """At most `most` calls wait at one time, and `each` of one caller, for `timeout` seconds at most.

    A call counts once it has waited `grace` seconds: what is only about to be read keeps nobody out.
    """

    def __init__(self, most: int, each: int, timeout: float, grace: float = 0.0) -> None:
        self.timeout = timeout
        self._grace = grace
        self._most = most
        self._each = each
        self._here = Crowd[asyncio.Timeout]()
        self._gave_way = set[asyncio.Timeout]()

    @asynccontextmanager
    async def place(self, holder: str) -> AsyncIterator[None]:
        """Wait inside this context. Raises TimeoutError after `timeout` seconds, and GaveWayError."""
        loop = asyncio.get_running_loop()  # once: it is a system call in Python 3.11
        ends = loop.time() + self.timeout
        timeout = asyncio.timeout_at(None)
        later: asyncio.TimerHandle | None = None
        try:
            async with timeout:
                if self._grace:  # until then one timer is enough
                    later = loop.call_later(min(self._grace, self.timeout), self._enter, timeout, holder, ends)
                else:
                    self._enter(timeout, holder, ends)
                yield
        except TimeoutError as error:
            if timeout.expired() and timeout in self._gave_way:
                raise GaveWayError from error
            raise
        finally:
            if later is not None:
                later.cancel()
            self._here.leave(timeout)
            self._gave_way.discard(timeout)

    def _enter(self, timeout: asyncio.Timeout, holder: str, ends: float) -> None:
        self._make_room(holder)
        self._here.enter(timeout, holder)
        timeout.reschedule(ends)

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
