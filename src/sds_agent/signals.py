"""How a program of ours ends: in order at the first SIGTERM, SIGINT or SIGHUP, at once at a second SIGTERM or SIGINT.

SIGHUP says that the terminal was closed; a shell and the kernel may both send it, so a second one has no effect. nohup
has the program ignore it, and it stays ignored.

For a program that reloads its configuration, SIGHUP asks for that. Such a program still ends with its terminal: where
there was one at the start and the signal finds none, that is what the signal says. The kernel takes a terminal that
hangs up from all processes of its session (credentials(7), tty_ioctl(4)), some of them a moment after the signal.
While such a program starts, it has to hold a SIGHUP until it can reload: the signal's usual effect would end it. So
this module imports nothing that takes long.
"""

import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from types import FrameType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
SAME = 1.5
"""Seconds in which further signals count as the first one. GNU `timeout` sends two, to the program and to its group; a
terminal and a service manager may each send one.
"""

HANG_UP = 0.1
"""Seconds from SIGHUP to the check of the terminal."""


class HeldHangUp:
    """A handler of SIGHUP that notes that one came, and whether there was a terminal before that."""

    def __init__(self) -> None:
        self.came = False
        self.had_terminal = _has_terminal()

    def __call__(self, _number: int, _frame: FrameType | None) -> None:
        """Note it."""
        self.came = True


def hold_hang_up() -> None:
    """Hold a SIGHUP from now on, until `until_signalled` calls its `reload` for it. Where it is ignored, as under
    nohup, it stays so.

    Programs that this one starts meanwhile do not inherit that: exec(2) undoes handlers.
    """
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        signal.signal(signal.SIGHUP, HeldHangUp())


@asynccontextmanager
async def until_signalled(same: float = SAME, reload: Callable[[], None] | None = None) -> AsyncIterator[None]:
    """Cancel the body of this context at the first signal, and leave it without an error once the body has ended.

    Where there is a `reload`, it is called for a SIGHUP that is not about the program's terminal, and for one that
    `hold_hang_up` has held.

    Signals of the next `same` seconds are ignored; a later one ends the process at once.
    """
    import asyncio  # noqa: PLC0415 - a SIGHUP is held before it is imported

    loop = asyncio.get_running_loop()
    scope = asyncio.timeout(None)

    def stop(number: signal.Signals) -> None:
        _say("stopping", signal=number.name)
        scope.reschedule(loop.time())

    with _first_signal(loop, stop, same, reload):
        try:
            async with scope:
                yield
        except TimeoutError:
            if not scope.expired():
                raise


@contextmanager
def _first_signal(
    loop: "asyncio.AbstractEventLoop",
    act: Callable[[signal.Signals], None],
    same: float,
    reload: Callable[[], None] | None,
) -> Iterator[None]:
    """Call `act` for the first signal; more than `same` seconds later a signal has its usual effect on a program."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    if before[signal.SIGHUP] is signal.SIG_IGN:
        del before[signal.SIGHUP]
    ends_at_once: asyncio.TimerHandle | None = None

    def first(number: signal.Signals) -> None:
        nonlocal ends_at_once
        later = time.monotonic() + same

        def again(repeated: int, _frame: FrameType | None) -> None:
            if time.monotonic() >= later:  # the loop is held up, or it would have replaced this handler
                signal.signal(repeated, signal.SIG_DFL)
                signal.raise_signal(repeated)

        for each in before:
            # to remove the loop's handler would give the signal its usual effect for a moment
            loop.add_signal_handler(each, _nothing)
            signal.signal(each, signal.SIG_IGN if each is signal.SIGHUP else again)
        ends_at_once = loop.call_later(same, _still_stopping)
        act(number)

    for number in before:
        loop.add_signal_handler(number, first, number)
    if reload is not None and signal.SIGHUP in before:
        handle = _hang_up_handler(
            lambda: first(signal.SIGHUP), reload, lambda: ends_at_once is not None, before[signal.SIGHUP]
        )
        _handle_hang_up(loop, handle, before[signal.SIGHUP])
    try:
        yield
    finally:
        if ends_at_once is not None:
            ends_at_once.cancel()
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            signal.signal(number, handler)


def _handle_hang_up(loop: "asyncio.AbstractEventLoop", handle: Callable[[], None], before: object) -> None:
    """Call `handle` some time after each SIGHUP, and after one that the handler of before has held."""
    loop.add_signal_handler(signal.SIGHUP, loop.call_later, HANG_UP, handle)
    if isinstance(before, HeldHangUp) and before.came:
        loop.call_later(HANG_UP, handle)


def _hang_up_handler(
    end: Callable[[], None], reload: Callable[[], None], ending: Callable[[], bool], before: object
) -> Callable[[], None]:
    """What to do some time after a SIGHUP: `end` where the terminal has gone that there was, else `reload`. `before` is
    the handler of before.
    """
    had_terminal = before.had_terminal if isinstance(before, HeldHangUp) else _has_terminal()

    def handle() -> None:
        if ending():
            return
        if had_terminal and not _has_terminal():
            end()
        else:
            reload()

    return handle


def _has_terminal() -> bool:
    """Whether this process has a controlling terminal (tty(4))."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK))
    except OSError:
        return False
    return True


def _nothing() -> None:
    """What the event loop does at further signals."""


def _still_stopping() -> None:
    """Give further signals their usual effect: they end the process even where the event loop stands still."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)
    _say("still_stopping", is_warning=True, advice="a second signal ends it at once")


def _say(event: str, *, is_warning: bool = False, **fields: str) -> None:
    import logging  # noqa: PLC0415 - a SIGHUP is held before it is imported

    from sds_agent import log  # noqa: PLC0415 - likewise

    log.event(logging.getLogger(__name__), event, level=logging.WARNING if is_warning else logging.INFO, **fields)
