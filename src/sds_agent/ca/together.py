"""Work that blocks, done for all who ask for it at about the same time, in one thread that stays.

To begin a thread and to hear of its end takes longer than a file takes to read, and one write to disk can serve many.

The module is asyncio's.
"""

import asyncio
import threading
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from queue import SimpleQueue
from typing import Generic, TypeVar

from sds_agent.tasks import NoThreadError, no_answer, still_out, uninterrupted

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
    while one is late, no other begins. The thread begins with the first run and ends with this object; the end of the
    process does not wait for it.
    """

    def __init__(self, work: Callable[[Sequence[T]], Sequence[R | Exception]], seconds: float, most: int) -> None:
        self._work = work
        self._seconds = seconds
        self._most = most
        self._turn = asyncio.Lock()
        self._waiting = deque[_Asked[T, R]]()
        self._late = False
        self._given: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._has_thread = False
        weakref.finalize(self, self._given.put, None)

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
            outcomes = await self._outcomes([each.item for each in batch])
        except (NoThreadError, TimeoutError) as error:
            outcomes = [error] * len(batch)
        for each, outcome in zip(batch, outcomes, strict=True):
            each.settle(outcome)

    async def _outcomes(self, items: Sequence[T]) -> Sequence[R | Exception]:
        """What comes of these. Raises NoThreadError and TimeoutError."""
        if self._late:
            raise still_out()
        self._begin_thread()
        loop, work = asyncio.get_running_loop(), self._work
        done: asyncio.Future[Sequence[R | Exception]] = loop.create_future()

        def settle(outcomes: Sequence[R | Exception]) -> None:
            self._late = False
            if not done.done():
                done.set_result(outcomes)

        def act() -> None:
            try:
                outcomes = work(items)
            except Exception as error:  # noqa: BLE001 - the callers get it
                outcomes = [error] * len(items)
            with suppress(RuntimeError):  # the loop is closed, and with it every caller
                loop.call_soon_threadsafe(settle, outcomes)

        self._given.put(act)
        try:
            async with asyncio.timeout(self._seconds):
                return await done
        except TimeoutError as error:
            self._late = True
            raise no_answer(self._seconds) from error

    def _begin_thread(self) -> None:
        if self._has_thread:
            return
        name = f"together {getattr(self._work, '__name__', 'work')}"
        try:
            threading.Thread(target=_act, args=(self._given,), name=name, daemon=True).start()
        except RuntimeError as error:
            raise NoThreadError from error
        self._has_thread = True


def _act(given: "SimpleQueue[Callable[[], None] | None]") -> None:
    """Do what is given, one after another, until that is None."""
    while (act := given.get()) is not None:
        act()
        del act  # with it goes the reference to who gave it
