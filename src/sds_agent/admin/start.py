"""Starts the agent's admin server beside the agent."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from sds_agent.admin.events import EventFeed
from sds_agent.admin.settings import AdminSettings
from sds_agent.clock import Clock

if TYPE_CHECKING:
    from sds_agent.admin.asgi import Application
    from sds_agent.admin.observed import Observed


class Watched(Protocol):
    """What calls a watcher after each change of it."""

    def watching(self, watcher: Callable[..., None]) -> AbstractContextManager[None]:
        """Call `watcher` until the context is left."""
        ...


PROBE = 1.0
"""Seconds that the SDS socket may take to accept."""


@asynccontextmanager
async def observed(settings: AdminSettings, *changing: Watched) -> AsyncIterator[EventFeed]:
    """The feed of what is logged and of what changes, inside this context; without an admin server it stays empty."""
    feed = EventFeed()
    with ExitStack() as stack:
        if settings.enabled:
            stack.enter_context(feed.following())
            for each in changing:
                stack.enter_context(each.watching(lambda *_: feed.status_changed()))
        yield feed


@asynccontextmanager
async def administered(
    settings: AdminSettings, agent: "Observed", feed: EventFeed, socket: Path, clock: Clock
) -> AsyncIterator[None]:
    """Serve the agent's status inside this context. `socket` is where it serves SDS."""
    from sds_agent.admin.server import serving  # noqa: PLC0415 - measured: 3 ms

    def make() -> "Application":
        from sds_agent.admin.application import Sources, application  # noqa: PLC0415 - measured: 60 ms

        return application(Sources(agent, feed, clock, lambda: unreachable(socket)))

    async with serving(settings, make, clock):
        yield


async def unreachable(socket: Path) -> str | None:
    """Why no Envoy can connect to the SDS socket; None if they can."""
    try:
        async with asyncio.timeout(PROBE):
            _, writer = await asyncio.open_unix_connection(str(socket))
    except (OSError, TimeoutError) as error:
        return f"the SDS socket {socket} does not answer: {getattr(error, 'strerror', None) or 'no answer in time'}"
    writer.close()
    return None
