"""The state directory while the process runs: a removed file is written again, and the log says what cannot be.

An operator, a cleaner or a volume that is mounted over it can take the state directory away from a running agent. That
would show only at the next start, which then makes another root that no peer trusts; and a second agent could start on
the empty directory at once. The process has all of the state in memory too, so it writes it again, under a new lock.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from sds_agent import log
from sds_agent.directories import LockedDirectory
from sds_agent.errors import SdsAgentError
from sds_agent.tasks import NoThreadError, in_thread

LOG = logging.getLogger(__name__)

CHECK_EVERY = 5.0
"""Seconds between two checks."""


@runtime_checkable
class Restorable(Protocol):
    """A part that has a file in the state directory, and can write it again."""

    def put_back(self) -> Path | None:
        """Write the file if it is gone; returns its path if it was.

        Blocks on the disk, and may be called in any thread. Raises SdsAgentError when it cannot, and when another
        process has replaced the file.
        """
        ...


@runtime_checkable
class RestorableFiles(Protocol):
    """A part that has many files in the state directory, and can write them again."""

    def put_back_all(self) -> list[Path]:
        """Write those that are gone; returns their paths. As `Restorable.put_back` otherwise."""
        ...


async def watch(
    directory: LockedDirectory,
    parts: Callable[[], Sequence[Restorable | RestorableFiles]],
    check_every: float = CHECK_EVERY,
) -> None:
    """Restore what is lost, until cancelled. An error is logged as `state_lost` when it begins or changes.

    `parts` is called anew for each check.
    """
    lost = log.LogOnChange(LOG, "state_lost")
    while True:
        await asyncio.sleep(check_every)
        try:
            # in a thread: a network's disk that is gone holds up this check, and must hold up nothing else
            restored, faults = await in_thread(restore, directory, parts())
        except NoThreadError:  # the next check finds it
            continue
        if restored:
            paths = [str(path) for path in restored]
            log.event(LOG, "state_restored", level=logging.WARNING, directory=str(directory.path), files=paths)
        if faults:
            lost.report("; ".join(faults), directory=str(directory.path))
        else:
            lost.resolved()


def restore(directory: LockedDirectory, parts: Iterable[Restorable | RestorableFiles]) -> tuple[list[Path], list[str]]:
    """Write the missing files again; returns their paths, and in words what could not be written.

    Writes nothing unless this process has the directory's lock.
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
            found = part.put_back_all() if isinstance(part, RestorableFiles) else [part.put_back()]
        except SdsAgentError as error:
            faults.append(str(error))
        else:
            restored += [path for path in found if path is not None]
    return restored, faults
