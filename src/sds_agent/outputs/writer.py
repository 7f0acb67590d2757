"""The loop that writes one workload's secrets to a directory. It watches the store: issuance never waits for a disk."""

import logging
from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path

import anyio
from msgspec import Struct

from sds_agent import log
from sds_agent.clock import Clock
from sds_agent.directories import LockedDirectory
from sds_agent.errors import SdsAgentError
from sds_agent.outputs.directory import SETTING, File, access_of, is_whole, output_directory, write_set
from sds_agent.outputs.hooks import NO_HOOKS, Hooks
from sds_agent.outputs.layout import LAYOUTS, FileLayout, OutputContents
from sds_agent.secrets.store import SecretStore, Snapshot
from sds_agent.tasks import DISK_TIMEOUT, NoThreadError, TimeLimit, uninterrupted

LOG = logging.getLogger(__name__)

FIRST_RETRY = timedelta(seconds=1)
LONGEST_RETRY = timedelta(minutes=1)
CHECK_EVERY = 5.0
"""Seconds between two checks that the files are still there."""


class Output(Struct, frozen=True):
    """What goes where: these contents in this layout into `directory`. The files are given to `owner` and `group`, by
    name or id, and a private one has the permission bits `key_mode`. `hooks` are run after a set is in place.
    """

    directory: Path
    contents: OutputContents
    layout: FileLayout = LAYOUTS["istio"]
    owner: str | None = None
    group: str | None = None
    key_mode: int = 0o600
    hooks: Hooks = NO_HOOKS

    def files(self, snapshot: Snapshot) -> dict[str, File]:
        """The files of the set by name; none while a part is missing."""
        return self.contents.files(self.layout, snapshot)


async def write_changes(output: Output, store: SecretStore, clock: Clock, check_every: float = CHECK_EVERY) -> None:
    """Write each change of the secrets, until cancelled; try again after a failure, and when a file was removed.

    A certificate that is withheld because it has expired stays in the files.
    """
    directory = output_directory(output.directory)
    try:
        await _follow(_OutputDirectory(output, directory, clock), store, check_every)
    finally:
        directory.release()


async def _follow(target: "_OutputDirectory", store: SecretStore, check_every: float) -> None:
    output = target.output
    wanted = {output.contents.name, *output.contents.bundles.values()}
    changed = anyio.Event()

    def wake(names: frozenset[str]) -> None:
        if not names.isdisjoint(wanted):
            changed.set()

    written: dict[str, File] = {}
    with store.watching(wake):
        while True:
            files = output.files(store.snapshot)
            changed = anyio.Event()
            if files and files != written:
                written = files if await target.write(files) else {}
                continue
            with anyio.move_on_after(check_every):
                await changed.wait()
            if written and await target.lost(written):
                written = {}


class _OutputDirectory:
    """The directory of an output, and how long to wait after a failed write."""

    def __init__(self, output: Output, directory: LockedDirectory, clock: Clock) -> None:
        self.output = output
        self._directory = directory
        self._clock = clock
        self._delay = FIRST_RETRY
        self._disk = TimeLimit(DISK_TIMEOUT)

    async def write(self, files: Mapping[str, File]) -> bool:
        """Put the files in force; whether that succeeded. If not, it returns when it is time to try again."""
        try:
            # to its end also when the agent stops, or else a part of a set would lie there
            await uninterrupted(self._disk.call(self._put, files))
        except (OSError, SdsAgentError) as error:
            cause = _explanation(error, self.output.directory) if isinstance(error, OSError) else str(error)
            self._log("output_not_written", logging.ERROR, cause=cause, in_seconds=self._delay)
            await self._clock.sleep(self._delay.total_seconds())
            self._delay = min(self._delay * 2, LONGEST_RETRY)
            return False
        self._delay = FIRST_RETRY
        self._log("output_written", logging.INFO)
        self.output.hooks.renewed()
        return True

    async def lost(self, files: Mapping[str, File]) -> bool:
        """Whether the files that were put in force have been removed."""
        try:
            if await self._disk.call(self._is_there, files):
                return False
        except (NoThreadError, TimeoutError):  # the next check finds it
            return False
        self._log("output_lost", logging.WARNING)
        return True

    def _put(self, files: Mapping[str, File]) -> None:
        if not self._directory.in_place():
            self._directory.claim()
        output = self.output
        access = access_of(output.owner, output.group, output.key_mode, SETTING)
        write_set(output.directory, files, self._clock.now(), access)

    def _is_there(self, files: Mapping[str, File]) -> bool:
        return self._directory.in_place() and is_whole(self.output.directory, files)

    def _log(self, event: str, level: int, **fields: log.Value) -> None:
        log.event(
            LOG, event, level=level, directory=str(self.output.directory), secret=self.output.contents.name, **fields
        )


def _explanation(error: OSError, directory: Path) -> str:
    path = error.filename2 or error.filename or directory  # of a rename the second one is what is in the way
    return (
        f"cannot write to {path}: {error.strerror}; see that the agent's user may, that there is room, and that no "
        "directory stands where a file goes"
    )
