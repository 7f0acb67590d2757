"""The files, followed as they change."""

import asyncio
import hashlib
import logging
import os
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path

from msgspec import Struct

from sds_agent import log
from sds_agent.authority.files.contents import (
    FileSet,
    Material,
    Unreadable,
    UnusableSetError,
    certificate_key,
    check_identity,
    judged,
    placed,
    watched,
)
from sds_agent.authority.files.settings import FilesSettings
from sds_agent.authority.protocol import AuthorityError, ErrorKind, Supplied
from sds_agent.clock import Clock
from sds_agent.errors import Problem
from sds_agent.file_sets import CHECK_EVERY, LARGEST_FILE, Doubt, doubted, settled
from sds_agent.files import read_at_once
from sds_agent.identity.spiffe import SpiffeId
from sds_agent.path_watch import PathWatch
from sds_agent.pki.certificates import describe_time, read_pem
from sds_agent.tasks import DISK_TIMEOUT, NoThreadError, TimeLimit

LOG = logging.getLogger(__name__)

REMIND_EVERY, REMIND_EVERY_UNSERVED = timedelta(minutes=5), timedelta(seconds=10)
"""How often the same error is raised again while the files stay as they are, and while they have given nothing yet."""


class _FilesReading(Struct, frozen=True):
    """One reading: a hash of the contents, and what they give, or why they cannot be used."""

    digest: bytes
    outcome: Material | AuthorityError


class FilesAuthority:
    """A `Supplier` that knows when its anchors change. Only `follow` reads the files; all others wait for it."""

    refresh_every = timedelta(minutes=5)

    def __init__(self, chosen: FilesSettings, clock: Clock) -> None:
        self._chosen = chosen
        self._clock = clock
        self._disk = TimeLimit(DISK_TIMEOUT)
        self._watch = PathWatch()
        self._seen: _FilesReading | None = None
        self._good: Material | None = None
        self._doubt: Doubt | None = None
        self._error: AuthorityError | None = None
        self._raised: tuple[str, float] | None = None
        self._anchors_given: bytes | None = None
        self._read = asyncio.Event()

    async def follow(self) -> None:
        """Read the files whenever they change, until cancelled."""
        try:
            while True:
                await self._look()
                self._read.set()
                self._read = asyncio.Event()
                now = self._clock.now()
                await self._watch.changed(self._clock, CHECK_EVERY if self._doubt is None else self._doubt.pause(now))
        finally:
            self._watch.close()

    async def supply(self, identity: SpiffeId, held: bytes | None) -> Supplied:
        """The newest certificate. An error is raised once, and again after REMIND_EVERY; a change is waited for."""
        while True:
            self._raise_new_error()
            # before the first reading, and while the error that was raised lasts, there is nothing to give
            if self._good is not None and self._raised is None and self._good.chain_pem != held:
                check_identity(self._chosen, self._good, identity)
                return self._good.supplied
            await self._read.wait()

    async def anchors(self) -> bytes:
        """The roots of the last set that went together."""
        while self._good is None:
            if self._error is not None and self._doubt is not None and self._doubt.overdue(self._clock.now()):
                raise _copied(self._error)
            await self._read.wait()
        self._anchors_given = self._good.anchors_pem
        return self._good.anchors_pem

    async def anchors_changed(self) -> None:
        """Return when the roots are others than `anchors` gave."""
        while self._good is None or self._good.anchors_pem == self._anchors_given:
            await self._read.wait()

    def _raise_new_error(self) -> None:
        if self._error is None or self._doubt is None or not self._doubt.overdue(self._clock.now()):
            return
        passed = self._clock.passed()
        pause = (REMIND_EVERY_UNSERVED if self._good is None else REMIND_EVERY).total_seconds()
        if self._raised is not None and self._raised[0] == str(self._error) and passed - self._raised[1] < pause:
            return
        self._raised = (str(self._error), passed)
        raise _copied(self._error)

    async def _look(self) -> None:
        """Read the files once, and note what that gives."""
        before = self._seen
        try:
            reading = await self._disk.call(self._reading, before)
        except TimeoutError as error:
            reading = _nothing_read(f"the files cannot be read: {error.strerror}; check that their disk is there")
        except NoThreadError as error:
            reading = _nothing_read(f"the files cannot be read: {error}")
        if reading is None:
            reading = _nothing_read("the files change all the time; whatever writes them has to come to an end")
        else:
            self._seen = reading
        self._note(reading.outcome)

    def _note(self, outcome: Material | AuthorityError) -> None:
        if isinstance(outcome, Material):
            self._good, self._doubt, self._error, self._raised = outcome, None, None, None
        else:
            self._error, self._doubt = outcome, doubted(self._doubt, str(outcome), self._clock.now())

    def _reading(self, before: _FilesReading | None) -> _FilesReading | None:
        """The files as they are now; None while they change. Blocks on the disk, and for the decryption of a key."""
        self._watch.arm(watched(self._chosen))
        read = settled(lambda: read_files(self._chosen))
        if read is None:
            return None
        digest = _digest(read)
        if before is not None and before.digest == digest:
            return before
        return _FilesReading(digest, _outcome(self._chosen, read))


def read_files(chosen: FilesSettings) -> FileSet:
    """Every file once, one after the other. Blocks on the disk, but for no pipe."""
    places = placed(chosen, os.path.lexists)
    return FileSet(places, {} if places is None else {each: _content(each) for each in places.all})


def find_problems(chosen: FilesSettings, now: datetime) -> Iterator[Problem]:
    """What is wrong with the files at present, by the key that leads to them. Blocks on the disk."""
    read = settled(lambda: read_files(chosen))
    if read is None:
        return
    try:
        leaf = read_pem(judged(chosen, read).chain_pem)[0]
    except UnusableSetError as error:
        yield error.problem
        return
    if leaf.not_valid_after_utc <= now:
        found = f"has a certificate that expired at {describe_time(leaf.not_valid_after_utc)}"
        yield Problem((certificate_key(chosen),), found, "have the program that writes it renew it")


def _content(file: Path) -> bytes | Unreadable:
    try:
        data = read_at_once(file, LARGEST_FILE)
    except OSError as error:
        return Unreadable(error.strerror or type(error).__name__)
    return Unreadable(f"it has more than {LARGEST_FILE} bytes") if len(data) > LARGEST_FILE else data


def _outcome(chosen: FilesSettings, read: FileSet) -> Material | AuthorityError:
    try:
        return judged(chosen, read)
    except UnusableSetError as error:
        return error
    except Exception as error:  # noqa: BLE001 - what another program writes must not end the agent
        log.fault(LOG, "authority files", error)
        message = f"the files cannot be read: they led to a {type(error).__name__}; please report the event fault"
        return AuthorityError(ErrorKind.INVALID, message)


def _nothing_read(cause: str) -> _FilesReading:
    return _FilesReading(b"", AuthorityError(ErrorKind.TRANSIENT, cause))


def _copied(error: AuthorityError) -> AuthorityError:
    """The same error for one caller: an exception that is raised again and again grows a traceback each time."""
    return AuthorityError(error.kind, str(error))


def _digest(read: FileSet) -> bytes:
    digest = hashlib.sha256()
    for file, content in read.contents.items():
        for part in (os.fsencode(file), content if isinstance(content, bytes) else b"\0" + content.reason.encode()):
            digest.update(len(part).to_bytes(8, "big") + part)
    return digest.digest()
