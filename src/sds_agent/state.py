"""The state on the disk while the process runs: what was removed is put back, and the log says what cannot be.

A hasty hand, a cleaner or a volume that is mounted over it takes the state directory away from a running agent. It
would show only at the next start, which then makes another root that no peer trusts; and a second agent could begin on
the empty directory at once. All that is kept there is in memory too, so it is written again, under a new lock.
"""

import asyncio
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from sds_agent import log
from sds_agent.directories import LockedDirectory
from sds_agent.errors import SdsAgentError
from sds_agent.tasks import NoThreadError, in_thread

LOG = logging.getLogger(__name__)

LOOK = 5.0
"""Seconds between two looks."""


@runtime_checkable
class PutsBack(Protocol):
    """A part that keeps a file in the state directory, and can write it again."""

    def put_back(self) -> Path | None:
        """Write the file if it is gone; returns its path if it was.

        Blocks for a disk's write, and may be called in any thread. Raises SdsAgentError when it cannot, and when
        another file has its place.
        """
        ...


async def watch(directory: LockedDirectory, parts: Sequence[PutsBack], look_every: float = LOOK) -> None:
    """Put back what is lost, for ever. What keeps it from that is logged once."""
    lost = log.LogOnChange(LOG, "state_lost")
    while True:
        await asyncio.sleep(look_every)
        try:
            # in a thread: a disk of the network that is gone holds up this watch, and must hold up nothing else
            restored, faults = await in_thread(restore, directory, parts)
        except NoThreadError:  # the next look tells
            continue
        if restored:
            paths = [str(path) for path in restored]
            log.event(LOG, "state_restored", level=logging.WARNING, directory=str(directory.path), files=paths)
        if faults:
            lost.report("; ".join(faults), directory=str(directory.path))
        else:
            lost.resolved()


def restore(directory: LockedDirectory, parts: Iterable[PutsBack]) -> tuple[list[Path], list[str]]:
    """Put back what is missing now; the paths, and in words what is still missing or in the way.

    Nothing is written unless this process holds the directory.
    """
    restored: list[Path] = []
    faults: list[str] = []
    if not directory.in_place():
        try:
            directory.claim()
        except SdsAgentError as error:
            return [], [str(error)]
        restored.append(directory.path / "lock")
    for part in parts:
        try:
            path = part.put_back()
        except SdsAgentError as error:
            faults.append(str(error))
        else:
            restored += [] if path is None else [path]
    return restored, faults
