"""Work that blocks, such as a disk's, in anyio's worker threads.

The caller waits until it ends, cancelled or not; `tasks.in_thread` is for work that a cancelled caller may leave
behind.
"""

from collections.abc import Callable
from typing import TypeVar

import anyio
import anyio.to_thread

from sds_agent.tasks import NoThreadError

T = TypeVar("T")


async def in_worker(function: Callable[..., T], *arguments: object, limiter: anyio.CapacityLimiter | None = None) -> T:
    """Call it in a worker thread. Raises NoThreadError when there is no idle one and none can be started."""
    begun = False

    def work() -> T:
        nonlocal begun
        begun = True
        return function(*arguments)

    try:
        return await anyio.to_thread.run_sync(work, limiter=limiter)
    except RuntimeError as error:
        if begun:
            raise
        raise NoThreadError from error
