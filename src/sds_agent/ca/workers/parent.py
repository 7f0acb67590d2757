"""`sds-agent ca serve` with several workers put together: the process that keeps the CA, and how it ends."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sds_agent import log
from sds_agent.ca.opening import administered, listening, opened
from sds_agent.ca.settings import CaSettings
from sds_agent.ca.workers.pool import Pool
from sds_agent.ca.workers.process import Command
from sds_agent.clock import Clock, SystemClock
from sds_agent.configfile.listening import ListenAddress
from sds_agent.signals import until_signalled
from sds_agent.tasks import background_tasks

LOG = logging.getLogger(__name__)


async def run(settings: CaSettings, count: int, command: Command) -> None:
    """Serve with so many workers, each started by `command`, until SIGTERM, SIGINT or SIGHUP.

    Raises ConfigurationError and WorkerError when it cannot start, alone or in an exception group.
    """
    async with until_signalled(), serving(settings, SystemClock(), count, command):
        await asyncio.get_running_loop().create_future()
    log.event(LOG, "stopped")


@asynccontextmanager
async def serving(settings: CaSettings, clock: Clock, count: int, command: Command) -> AsyncIterator[ListenAddress]:
    """The CA, running inside this context; gives the address it listens at. Raises ConfigurationError, WorkerError."""
    async with opened(settings, clock) as parts:
        with listening(settings.listen) as listener:
            host, port = listener.getsockname()[:2]
            address = ListenAddress(host, port)
            # At the end the workers drain first, while what they ask for is still there.
            async with background_tasks() as start:
                pool = Pool(parts, count, command)
                async with pool.running(listener):
                    for loop in parts.loops():
                        start(loop())
                    log.event(LOG, "listening", address=str(address), trust_domain=settings.trust_domain, workers=count)
                    running = parts.running(address, pool, pool.statuses)
                    async with administered(settings.admin, running, clock):
                        yield address
