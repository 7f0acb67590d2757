"""How a program of ours ends: at the first SIGTERM, SIGINT or SIGHUP in order, at a second one at once.

SIGHUP says that the terminal was closed; a shell and the kernel may both send it. Under nohup it comes ignored and
stays so.
"""

import asyncio
import logging
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from sds_agent import log

LOG = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@asynccontextmanager
async def until_signalled() -> AsyncIterator[None]:
    """Cancel what runs inside at the first signal, and go on behind it when it has ended."""
    loop = asyncio.get_running_loop()
    scope = asyncio.timeout(None)

    def stop(number: signal.Signals) -> None:
        log.event(LOG, "stopping", signal=number.name)
        scope.reschedule(loop.time())

    with _first_signal(loop, stop):
        try:
            async with scope:
                yield
        except TimeoutError:
            if not scope.expired():
                raise


@contextmanager
def _first_signal(loop: asyncio.AbstractEventLoop, act: Callable[[signal.Signals], None]) -> Iterator[None]:
    """Call `act` for the first signal; a second one does what it does to any program: it ends it at once."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    if before[signal.SIGHUP] is signal.SIG_IGN:
        del before[signal.SIGHUP]

    def first(number: signal.Signals) -> None:
        for each in before:
            loop.remove_signal_handler(each)
            signal.signal(each, signal.SIG_IGN if each is signal.SIGHUP else signal.SIG_DFL)
        act(number)

    for number in before:
        loop.add_signal_handler(number, first, number)
    try:
        yield
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)
