"""Views of thousands, made in slices: the event loop has Envoys to serve in between."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import TypeVar

Item = TypeVar("Item")

SLICE = 50
"""Items, such as the identities of a status, that are taken before other tasks have their turn: a millisecond."""


async def sliced(items: Iterable[Item]) -> AsyncIterator[Item]:
    """The items; after each `SLICE` of them other tasks have their turn."""
    for number, each in enumerate(items, start=1):
        yield each
        if number % SLICE == 0:
            await asyncio.sleep(0)
