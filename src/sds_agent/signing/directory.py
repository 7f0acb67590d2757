"""A directory with a plugged-in CA, read again whenever its content changes.

Only the content of the files counts, neither their times nor their inodes: so a change is seen however the files are
replaced, in place, by renames, or by the swap of a symlink as Kubernetes does it.

To compare times and inodes first would pay only for a large revocation list. A check each second takes 0.5 ms of
processor time, 0.3 ms of it for its thread; a list of 200 kB makes that 0.7 ms, and one of the 4 MiB that are allowed
10 ms, a hundredth of one core. In return a second change within the grain of the times, and a network disk that answers
from its cache, would each need a rule.
"""

import hashlib
import logging
import stat
from collections.abc import Iterable, Mapping
from datetime import datetime
from pathlib import Path

from msgspec import Struct

from sds_agent import log
from sds_agent.errors import Problem, ProblemsError, within
from sds_agent.files import looked_up, read_at_once
from sds_agent.pki.keyfile import LONGEST_PASSPHRASE
from sds_agent.signing.cacerts import FILES, read_signing_set
from sds_agent.signing.signing_set import SigningSet
from sds_agent.tasks import NoThreadError, TimeLimit, in_thread
from sds_agent.values import Sensitive

LOG = logging.getLogger(__name__)

LARGEST_FILE = 4 << 20
"""Bytes of one file. A revocation list of some hundred thousand certificates fits."""
TIMEOUT = 10.0
"""Seconds for the disk to answer."""
MOST_CAUSES = 20
"""Problems named in one line of the log: a file may hold thousands of revocation lists, each with one."""
MOST_READINGS = 5
"""How often the files are read until two readings agree; files that change faster are read again at the next check."""


class DirectoryError(ProblemsError):
    """The directory, or a file in it, cannot be read."""

    def __init__(self, found: str, fix: str) -> None:
        super().__init__([Problem((), found, fix)])


class Contents(Sensitive, frozen=True):
    """The CA's files by name, all of one moment."""

    files: Mapping[str, bytes]


class Unsettled(Struct, frozen=True):
    """The files changed while they were read."""


class Events(Struct, frozen=True):
    """The names of the log events for a content that is refused, and for a directory that no thread could read."""

    refused: str
    unread: str


class PluggedDirectory:
    """A directory, what was last read there, and what was last refused.

    To read and to judge are two steps, since a read may hang on a network's disk: one that returns late changes nothing
    here. Without `lists` the CA does not depend on its revocation lists (`read_signing_set`).
    """

    def __init__(
        self,
        directory: Path,
        trust_domain: str,
        passphrase_file: Path | None,
        events: Events,
        *,
        lists: bool = True,
    ) -> None:
        self.path = directory
        self._trust_domain = trust_domain
        self._passphrase_file = passphrase_file
        self._lists = lists
        self._events = events
        self._unread = log.LogOnChange(LOG, events.unread)
        self._disk = TimeLimit(TIMEOUT)
        self._good = b""  # a hash of the content that was last good
        self._seen = b""  # of the content that was last read
        self._reported = b""  # of the content whose refusal was last logged

    async def first(self, now: datetime) -> SigningSet:
        """The CA in it. Raises ProblemsError with everything that is wrong."""
        read = _whole(await self._read(), self.path)
        with within(str(self.path)):
            return await self._taken(read, now)

    async def read_again(self, now: datetime) -> SigningSet | None:
        """As `changed`, but logs what is wrong, once for each content, and returns None: what was read before goes on
        signing.
        """
        try:
            found = await self.changed(now)
        except ProblemsError as error:
            self._report(error)
            return None
        except NoThreadError as error:
            self._unread.report(str(error), directory=str(self.path))
            return None
        self._unread.resolved()
        return found

    async def changed(self, now: datetime) -> SigningSet | None:
        """The CA in it, or None where it was returned before, or the files are being written.

        Logs what is left out of the CA, once for each content. Raises ProblemsError, for the same content each time: a
        signer that is not valid yet becomes valid.
        """
        read = await self._read()
        if read is None:
            return None
        self._seen = read.digest
        if self._seen == self._good:
            self._reported = b""
            return None
        return await self._taken(read, now)

    async def _read(self) -> "_Snapshot | None":
        try:
            return await self._disk.call(_read, self.path, self._passphrase_file)
        except TimeoutError as error:
            raise DirectoryError(f"cannot read {self.path}: {error.strerror}", "see that its disk is there") from error

    async def _taken(self, read: "_Snapshot", now: datetime) -> SigningSet:
        signing = await in_thread(self._judged, read, now)
        self._good = read.digest
        if signing.left_out:
            causes = signing.left_out
            log.event(LOG, "ca_files_left_out", level=logging.ERROR, directory=str(self.path), causes=causes)
        return signing

    def _judged(self, read: "_Snapshot", now: datetime) -> SigningSet:
        return read_signing_set(
            read.files, now, passphrase=read.passphrase, trust_domain=self._trust_domain, lists=self._lists
        )

    def _report(self, error: ProblemsError) -> None:
        """Log what `changed` raised, once for each content."""
        if isinstance(error, DirectoryError):  # there is no content, so the error stands for it
            self._seen = _digest([str(error)])
        if self._seen != self._reported:
            log.event(
                LOG,
                self._events.refused,
                level=logging.ERROR,
                directory=str(self.path),
                causes=[str(problem) for problem in error.problems[:MOST_CAUSES]],
                serving="the CA that was read before goes on signing",
            )
        self._reported = self._seen


def check(directory: Path, trust_domain: str, passphrase_file: Path | None, now: datetime) -> None:
    """See that an agent could sign with the CA in it. Raises ProblemsError, as `first` does.

    Blocks on the disk without a limit: for a command.
    """
    read = _whole(_read(directory, passphrase_file), directory)
    with within(str(directory)):
        read_signing_set(read.files, now, passphrase=read.passphrase, trust_domain=trust_domain, lists=False)


def _whole(read: "_Snapshot | None", directory: Path) -> "_Snapshot":
    if read is None:
        raise DirectoryError(f"{directory}: its files change all the time", "start again when they are complete")
    return read


class _Snapshot(Sensitive, frozen=True):
    """The files by name, the passphrase of the key, and a hash of both."""

    files: Mapping[str, bytes]
    passphrase: bytes | None
    digest: bytes


def _read(directory: Path, passphrase_file: Path | None) -> _Snapshot | None:
    """The files and the passphrase; None while the files change."""
    contents = read_directory(directory)
    if isinstance(contents, Unsettled):
        return None
    passphrase = read_passphrase(passphrase_file) if passphrase_file else None
    parts = (part for pair in sorted(contents.files.items()) for part in pair)
    return _Snapshot(contents.files, passphrase, _digest([*parts, passphrase or b""]))


def read_directory(directory: Path) -> Contents | Unsettled:
    """The CA's files in `directory` as they were at one moment; files that are not there are left out.

    Two equal readings, one after the other, prove that there was such a moment: every file stayed the same from its
    first reading to its second, and the instant between the two readings lies in all of these spans. Raises
    DirectoryError.
    """
    before = _read_all(directory)
    for _ in range(MOST_READINGS):
        after = _read_all(directory)
        if after == before:
            return Contents(after)
        before = after
    return Unsettled()


def read_file(file: Path) -> bytes | None:
    """One of a CA's files, or None where it is missing. Raises DirectoryError."""
    try:
        data = read_at_once(file, LARGEST_FILE)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DirectoryError(
            f"cannot read {file}: {error.strerror}", "it must be a file that this user may read"
        ) from error
    if len(data) > LARGEST_FILE:
        raise DirectoryError(f"{file} has more than {LARGEST_FILE} bytes", "put the CA's own file there")
    return data


def read_passphrase(file: Path, *, waits: bool = False) -> bytes:
    """The passphrase in a file: its first line, as `openssl ... -passin file:FILE` reads it. Raises DirectoryError.

    For a command that `waits` it may be a pipe.
    """
    most = LONGEST_PASSPHRASE + len(b"\r\n")
    try:
        if waits:
            with file.open("rb") as opened:
                line = opened.readline(most)
        else:
            line = read_at_once(file, most)[:most].partition(b"\n")[0]
    except OSError as error:
        raise DirectoryError(
            f"the passphrase cannot be read: {file}: {error.strerror}",
            "name a file that holds it and that this user may read",
        ) from error
    passphrase = line.removesuffix(b"\n").removesuffix(b"\r")
    if not passphrase:
        raise DirectoryError(
            f"the first line of the passphrase file {file} is empty, and only that line is read",
            "write the passphrase there",
        )
    if len(passphrase) > LONGEST_PASSPHRASE:
        raise DirectoryError(
            f"the first line of the passphrase file {file} has more than {LONGEST_PASSPHRASE} bytes, the most that a "
            "passphrase can have",
            "write the passphrase there",
        )
    return passphrase


def _read_all(directory: Path) -> dict[str, bytes]:
    try:
        there = looked_up(directory)
    except OSError as error:  # this user may not search a directory above it, or the name is too long
        raise DirectoryError(
            f"cannot read {directory}: {error.strerror}", "name a directory that this user may read"
        ) from error
    if there is None or not stat.S_ISDIR(there.st_mode):
        raise DirectoryError(f"{directory} is not a directory", "name the one that holds the CA's files")
    found = {name: read_file(directory / name) for name in FILES}
    return {name: data for name, data in found.items() if data is not None}


def _digest(parts: Iterable[str | bytes]) -> bytes:
    """A hash that is another one when the same bytes are divided otherwise."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        digest.update(len(data).to_bytes(8, "big") + data)
    return digest.digest()
