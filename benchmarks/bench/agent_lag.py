"""Runs the agent as `sds-agent run` does, and notes how long its event loop lets a task wait.

    python benchmarks/bench/agent_lag.py CONFIG FILE

The task sleeps for a millisecond, again and again. FILE gets two numbers a line, in milliseconds, once the program gets
SIGUSR1: how late the task came, and what the loop's thread ran meanwhile. The second does not depend on what else the
machine does: it is how long one turn of the loop keeps all others waiting on an idle machine.
"""

import asyncio
import signal
import sys
import time
from pathlib import Path
from typing import Any

from sds_agent import app, log
from sds_agent.config.loading import load
from sds_agent.tasks import NonBlockingLookups

EVERY = 0.001


async def measured(file: Path, agent: Any) -> None:
    """Run the agent, with the task beside it."""
    noted: list[tuple[float, float]] = []
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, lambda: write(file, noted))
    ticking = asyncio.create_task(tick(noted))
    try:
        await agent
    finally:
        ticking.cancel()


async def tick(noted: list[tuple[float, float]]) -> None:
    """Note each delay, in milliseconds."""
    while True:
        began, ran = time.monotonic(), time.thread_time()
        await asyncio.sleep(EVERY)
        noted.append((1000 * max(time.monotonic() - began - EVERY, 0.0), 1000 * (time.thread_time() - ran)))


def write(file: Path, noted: list[tuple[float, float]]) -> None:
    """Write what was noted since the last time."""
    lines = "".join(f"{late:.3f} {ran:.3f}\n" for late, ran in noted)
    noted.clear()
    part = file.with_suffix(".part")
    part.write_text(lines)
    part.rename(file)


def main() -> None:
    """Run until SIGTERM."""
    config, file = map(Path, sys.argv[1:])
    log.configure("json", "info")
    settings = load(config, {}).settings
    with asyncio.Runner(loop_factory=NonBlockingLookups) as runner:
        runner.run(measured(file, app.run(settings)))


if __name__ == "__main__":
    main()
