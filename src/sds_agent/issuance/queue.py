"""How many CSRs are under way at once, and who goes next.

A restart with many identities must neither stampede the CA nor make a waiting Envoy queue behind certificates that
are good for hours.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import datetime

Priority = tuple[bool, datetime]
"""Lower goes first: (no Envoy waits for it, when what is held expires)."""


class IssuanceQueue:
    """`slots` of them, given to the lowest priority first. A priority is read when a slot becomes free, not when the
    wait began.
    """

    def __init__(self, slots: int = 8) -> None:
        self._free = slots
        self._waiting: dict[asyncio.Event, Callable[[], Priority]] = {}

    @asynccontextmanager
    async def slot(self, priority: Callable[[], Priority]) -> AsyncIterator[None]:
        """Hold a place inside this context."""
        await self._enter(priority)
        try:
            yield
        finally:
            self._leave()

    async def _enter(self, priority: Callable[[], Priority]) -> None:
        if self._free:
            self._free -= 1
            return
        turn = asyncio.Event()
        self._waiting[turn] = priority
        try:
            await turn.wait()
        except BaseException:
            if self._waiting.pop(turn, None) is None:
                self._leave()  # the place was handed over in the moment of cancellation
            raise

    def _leave(self) -> None:
        if not self._waiting:
            self._free += 1
            return
        turn = min(self._waiting, key=lambda waiting: self._waiting[waiting]())
        del self._waiting[turn]
        turn.set()
