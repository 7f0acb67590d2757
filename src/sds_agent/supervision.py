"""Keeps the service manager informed: that the agent serves, how it does in one line, and that it is alive."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import datetime

from sds_agent.clock import Clock
from sds_agent.secrets.store import SecretStore
from sds_agent.systemd import Notifier
from sds_agent.tasks import background_tasks

EVERY = 30.0
"""Seconds after which the line is written anew where nothing has changed: streams come and go without a secret's
change.
"""


SHORTEST = 1.0
"""Seconds between two lines: thousands of workloads may change one after another."""


@asynccontextmanager
async def supervised(
    manager: Notifier, store: SecretStore, summary: Callable[[datetime], str], clock: Clock
) -> AsyncIterator[None]:
    """Say `ready` at once, inside this context how the agent does, and at its end that it stops.

    Ready means that Envoys can connect. Whether each has a certificate is in the line: an agent whose CA is down at
    boot must not be ended for it.
    """
    manager.ready(summary(clock.now()))
    async with background_tasks() as start:
        if manager.is_there:
            start(_report(manager, store, summary, clock))
        try:
            yield
        finally:
            manager.stopping()


async def _report(manager: Notifier, store: SecretStore, summary: Callable[[datetime], str], clock: Clock) -> None:
    every = EVERY if manager.watchdog is None else min(EVERY, manager.watchdog.total_seconds() / 2)
    changed, written = asyncio.Event(), ""
    with store.watching(lambda _names: changed.set()):
        while True:
            # a loop that stands still sends no sign of life, which is what the manager watches for
            manager.alive()
            if (text := summary(clock.now())) != written:
                manager.status(text)
                written = text
            changed.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(every):
                    await changed.wait()
                    await asyncio.sleep(min(SHORTEST, every / 2))


def summary(workloads: int, renewals: Iterable[datetime | None], lacks: Sequence[str], streams: int) -> str:
    """How the agent does, for `systemctl status`: what is served and when the first of the `renewals` is, or what is
    missing.
    """
    if lacks:
        more = f", and {len(lacks) - 1} more" if len(lacks) > 1 else ""
        return f"not ready: {lacks[0]}{more}"
    first = min((each for each in renewals if each is not None), default=None)
    following = "" if first is None else f"; the next renewal is at {first:%Y-%m-%d %H:%M:%S} UTC"
    return f"serving {_count(workloads, 'workload')} to {_count(streams, 'stream')}{following}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
