"""The file of the deny list, read again as it changes. `denied` decides what it means."""

import logging
import time
from pathlib import Path

from msgspec import Struct

from sds_agent import log
from sds_agent.ca.denied import NO_IDENTITY, Denied, DenyListError, parse
from sds_agent.clock import Clock
from sds_agent.errors import ConfigurationError
from sds_agent.files import read_at_once
from sds_agent.tasks import NoThreadError, TimeLimit, in_thread

LOG = logging.getLogger(__name__)

CHECK_EVERY = 1.0
"""Seconds from one reading of the file to the next."""
TIMEOUT = 5.0
"""Seconds for the disk to answer."""
LARGEST = 4 << 20
"""Bytes of the file: some fifty thousand SPIFFE IDs of the usual length."""


class DenyList:
    """The file, read again as it changes. `open` reads it for the first time."""

    def __init__(self, file: Path, trust_domain: str, clock: Clock) -> None:
        self._file = file
        self._trust_domain = trust_domain
        self._clock = clock
        self._disk = TimeLimit(TIMEOUT)
        self._failure = log.LogOnChange(LOG, "deny_list_not_taken")
        self._denied = NO_IDENTITY
        self._seen: _Seen | None = None

    @classmethod
    async def open(cls, file: Path, trust_domain: str, clock: Clock) -> "DenyList":
        """Read the file for the first time, and once more where it has just been changed: it may have been half written
        then. Raises ConfigurationError when it cannot be used.
        """
        followed = cls(file, trust_domain, clock)
        try:
            await followed._check()
            if await followed._was_just_changed():
                await clock.sleep(CHECK_EVERY)
                await followed._check()
        except DenyListError as error:
            raise _unusable(file, error) from error
        return followed

    def current(self) -> Denied:
        """The identities that get nothing at present."""
        return self._denied

    async def follow(self) -> None:
        """Read the file every CHECK_EVERY seconds, until cancelled. What keeps it from being used is logged once."""
        while True:
            await self._clock.sleep(CHECK_EVERY)
            try:
                await self._check()
            except DenyListError as error:
                self._failure.report(
                    str(error), file=str(self._file), effect="the list that was read before stays in force"
                )
            else:
                self._failure.resolved()

    async def _was_just_changed(self) -> bool:
        """Whether that was less than CHECK_EVERY seconds ago, by the clock that files are marked with."""
        try:
            changed = await self._disk.call(lambda: self._file.stat().st_mtime)
        except (OSError, NoThreadError):
            return False
        return abs(time.time() - changed) < CHECK_EVERY

    async def _check(self) -> None:
        seen = before = self._seen
        try:
            data = await self._disk.call(read_at_once, self._file, LARGEST)
            if seen is None or data != seen.data:
                seen = _Seen(data, await in_thread(_judged, data, self._trust_domain))
        except OSError as error:
            raise _unread(error) from error
        except NoThreadError as error:
            raise DenyListError(f"it cannot be read: {error}") from error
        self._seen, found = seen, seen.outcome
        if isinstance(found, str):
            raise DenyListError(found)
        self._deny(found if seen is before else found.and_also(self._denied))

    def _deny(self, denied: Denied) -> None:
        if denied is self._denied:
            return
        before, self._denied = self._denied, denied
        if denied != before:
            log.event(LOG, "deny_list", file=str(self._file), ids=len(denied.ids), patterns=len(denied.patterns))


def check(file: Path, trust_domain: str) -> None:
    """See that a CA could begin with that file. Blocks on the disk: for a command. Raises ConfigurationError."""
    try:
        found = _judged(read_at_once(file, LARGEST), trust_domain)
    except OSError as error:
        raise _unusable(file, _unread(error)) from error
    if isinstance(found, str):
        raise _unusable(file, DenyListError(found))


def _unusable(file: Path, error: DenyListError) -> ConfigurationError:
    return ConfigurationError(f"callers.deny_file: {file} cannot be used: {error}")


def _unread(error: OSError) -> DenyListError:
    return DenyListError(f"{error.strerror}; put it there, readable for the user that runs this")


class _Seen(Struct, frozen=True):
    """What the file held at the last reading, and what that means, or why it cannot be used."""

    data: bytes
    outcome: Denied | str


def _judged(data: bytes, trust_domain: str) -> Denied | str:
    """Takes half a second for the largest list: not for the event loop, then, and once for each content."""
    if len(data) > LARGEST:
        return f"it has more than {LARGEST} bytes: deny whole branches, by lines that end in /*"
    try:
        return parse(data, trust_domain)
    except DenyListError as error:
        return str(error)
