"""How many CSRs are under way at once, and who goes next.

A restart with many identities must neither stampede the CA nor make a waiting Envoy queue behind certificates that
are good for hours.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import datetime

Priority = tuple[int, datetime]
"""Lower goes first: a rank (0: an Envoy waits for the workload, 1: none does; 2 more where the CA let its last attempt
hang), and when its current certificate ends. What a CA lets hang keeps no other identity from its turn.
"""


class IssuanceQueue:
    """Gives `slots` slots, to the lowest priority first. A priority is computed when a slot becomes free, not when the
    wait begins: an Envoy may have connected in between.
    """

    def __init__(self, slots: int = 8) -> None:
        self._free = slots
        self._waiting: dict[asyncio.Event, Callable[[], Priority]] = {}

    @asynccontextmanager
    async def slot(self, priority: Callable[[], Priority]) -> AsyncIterator[None]:
        """Have a slot inside this context. `priority` must not wait or raise."""
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
                self._leave()  # the slot was given to this caller in the moment of its cancellation
            raise

    def _leave(self) -> None:
        if not self._waiting:
            self._free += 1
            return
        turn = min(self._waiting, key=lambda waiting: self._waiting[waiting]())
        del self._waiting[turn]
        turn.set()
