"""Work that blocks, done for all who ask for it at about the same time in one thread.

To begin a thread and to hear of its end takes longer than a file takes to read, and one write to disk can serve many.

The module is asyncio's.
"""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Generic, TypeVar

from sds_agent.tasks import NoThreadError, TimeLimit, uninterrupted

T = TypeVar("T")
R = TypeVar("R")


class _Asked(Generic[T, R]):
    """One of them, and what came of it, once it is `done`."""

    __slots__ = ("done", "item", "outcome")

    def __init__(self, item: T) -> None:
        self.item = item
        self.done = False
        self.outcome: R | Exception

    def settle(self, outcome: R | Exception) -> None:
        self.outcome, self.done = outcome, True


class Together(Generic[T, R]):
    """Calls of `work`, which gets several items and returns for each what came of it: a result or an error.

    What is asked for while it runs goes into the next run, at most `most` items in one. A run has `seconds` to return;
    one that is late keeps its thread, and until it returns no other one begins.
    """

    def __init__(self, work: Callable[[Sequence[T]], Sequence[R | Exception]], seconds: float, most: int) -> None:
        self._work = work
        self._most = most
        self._limit = TimeLimit(seconds)
        self._turn = asyncio.Lock()
        self._waiting = deque[_Asked[T, R]]()

    async def call(self, item: T) -> R:
        """What came of this item.

        Raises its error; TimeoutError, an OSError with a reason, where a run is late; and NoThreadError. A caller that
        leaves before its run has begun takes its item back.
        """
        asked = _Asked[T, R](item)
        self._waiting.append(asked)
        try:
            async with self._turn:
                if not asked.done:  # in the run of another one
                    await uninterrupted(self._run())
        finally:
            with suppress(ValueError):
                self._waiting.remove(asked)
        if isinstance(asked.outcome, Exception):
            raise asked.outcome
        return asked.outcome

    async def _run(self) -> None:
        await asyncio.sleep(0)  # for what comes in the same turn of the event loop
        batch = [self._waiting.popleft() for _ in range(min(len(self._waiting), self._most))]
        try:
            outcomes = await self._limit.call(self._work, [each.item for each in batch])
        except (NoThreadError, TimeoutError) as error:
            outcomes = [error] * len(batch)
        for each, outcome in zip(batch, outcomes, strict=True):
            each.settle(outcome)
