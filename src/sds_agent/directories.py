"""Directories that no other user may change: made with their modes, and checked up to the root.

A user who may write to a directory can put a file in the place of the agent's, and one who may write to a directory
above it can move all of it away. So each directory on the way must belong to root or to the agent's user, and others
may not write to it, unless its sticky bit keeps what is in it to its owners, as in /tmp. That is what ssh asks for
with StrictModes, with two differences. Symbolic links are followed name by name, because a link that another user may
replace leads anywhere. And a directory that a group may write to is taken, with a warning: Kubernetes gives every
volume to the group of its pod (fsGroup), and the operator alone knows who is in a group.
"""

import errno
import logging
import os
import stat
from collections.abc import Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from enum import Enum
from pathlib import Path

from msgspec import Struct, structs

from sds_agent import log
from sds_agent.errors import ConfigurationError, SdsAgentError
from sds_agent.files import FULL, check_lock, check_writable, locked

LOG = logging.getLogger(__name__)

ROOT = 0
LOCK = "lock"
"""The name of the lock file in a directory that is held."""
MOST_LINKS = 40
"""Symbolic links on one way, as Linux has it (path_resolution(7))."""
ABOVE = 0o755
"""The mode of a directory that is made because another one goes into it."""
UNMAPPED = 65534
"""What Linux shows for a user or a group without an id in a user namespace (user_namespaces(7))."""


class UntrustedDirectoryError(SdsAgentError):
    """Another user could put a file in the place of the agent's."""


class NotLockedError(SdsAgentError):
    """A directory is not, or no longer, locked by this process."""


class Role(Enum):
    """What a step on the way to a directory is."""

    ABOVE = "a directory above it"
    LAST = "the directory itself"
    LINK = "a symbolic link in a directory that others may write to"
    FILE = "a file in the directory's place"
    SOCKET = "a socket there: who may write to it may connect, and changes nothing"


class Step(Struct, frozen=True):
    """What was found on the way to a directory.

    `owner` and `group` are ids, the owner None for a user of the machine who has no id in this user namespace; `mode`
    holds the permission bits and the sticky bit.
    """

    path: Path
    owner: int | None
    group: int
    mode: int
    role: Role = Role.ABOVE

    def writable(self, by: int) -> bool:
        """Whether these users (stat.S_IWOTH, stat.S_IWGRP) may replace what is in it."""
        if self.role is Role.LINK:
            return False
        sticky = (
            self.mode & stat.S_ISVTX and self.role is Role.ABOVE
        )  # the next step belongs to its owner, who is checked
        return bool(self.mode & by) and not sticky


class Verdict(Struct, frozen=True):
    """Why a directory is refused, or None, and who else could change what is in it, in words."""

    refused: str | None
    shared: tuple[str, ...]


def judge(steps: Iterable[Step], target: Path, user: int, also: Collection[int] = ()) -> Verdict:
    """The verdict on the way to `target`, for an agent that runs as `user` and trusts the users `also` too."""
    found = tuple(steps)
    trusted = {ROOT, user, *also}
    refusals = (_fault(step, target, user, trusted) for step in found)
    notes = (_shared(step, target) for step in found)
    return Verdict(next((each for each in refusals if each), None), tuple(each for each in notes if each))


def _fault(step: Step, target: Path, user: int, trusted: Collection[int]) -> str | None:
    last = step.role is Role.LAST
    if step.owner not in trusted and (last or step.owner is not None):
        owner = "a user of another namespace" if step.owner is None else f"uid {step.owner}"
        return (
            f"{step.path} belongs to {owner}, who could {_does(step, target)}; "
            f"use a directory {'of' if last else 'below those of'} the agent's own user (uid {user}) or of root"
        )
    if step.writable(stat.S_IWOTH):
        # One with the sticky bit, such as /tmp, is meant for all users: it must not be closed for this agent's sake.
        fix = "make one in it" if step.mode & stat.S_ISVTX else f"chmod o-w {step.path}"
        return (
            f"every user may write to {step.path}, and so could {_does(step, target)}; "
            f"use a directory that only the agent may write to ({fix})"
        )
    return None


def _shared(step: Step, target: Path) -> str | None:
    if step.owner is None:
        return f"{step.path} belongs to a user of another namespace, who could {_does(step, target)}"
    if step.writable(stat.S_IWGRP):
        does = _does(step, target)
        return f"the group {step.group} may write to {step.path} and could {does} (chmod g-w {step.path})"
    return None


def _does(step: Step, target: Path) -> str:
    """What who may replace the step could do."""
    if step.role is Role.LAST:
        return "replace the agent's files"
    return f"put another directory in the place of {target}"


def own_directory(directory: Path, mode: int, *, any_owner: bool = False) -> tuple[str, ...]:
    """Make the directory with `mode` if it is missing, and make sure that no other user may replace what is in it.

    Missing directories above it get the mode 0755. No mode depends on the umask. With `any_owner` the directory's
    owner may be another user. Returns the groups that could replace it, in words: those are allowed, with a warning.
    Raises UntrustedDirectoryError, and OSError.
    """
    while True:
        steps, missing = walk(directory)
        owner = steps[-1].owner if any_owner and missing is None else None
        found = judge(steps, directory, os.geteuid(), () if owner is None else (owner,))
        if found.refused is not None:
            raise UntrustedDirectoryError(found.refused)
        if missing is None:
            return found.shared
        make_directory(missing.path, mode if missing.last else ABOVE)


def check_directory(directory: Path) -> tuple[str, ...]:
    """Check, without a change, what `own_directory` would raise and return here."""
    steps, missing = walk(directory)
    found = judge(steps, directory, os.geteuid())
    if found.refused is not None:
        raise UntrustedDirectoryError(found.refused)
    if missing is not None:
        check_writable(missing.path.parent, missing.path)
    return found.shared


def make_directory(path: Path, mode: int) -> None:
    """Make one directory with these permission bits, whatever the umask. An existing one stays as it is.

    Raises OSError.
    """
    with suppress(FileExistsError):  # made by another process in this moment
        path.mkdir(mode)
        made = stat.S_IMODE(path.stat().st_mode)
        if made & 0o777 != mode:
            path.chmod(mode | made & stat.S_ISGID)  # set by the directory above, for its group


def warn_shared(setting: str, causes: Iterable[str]) -> None:
    """Log, as `directory_shared`, who else could change what is in the directory that `setting` names."""
    for cause in causes:
        log.event(LOG, "directory_shared", level=logging.WARNING, setting=setting, cause=cause)


class Missing(Struct, frozen=True):
    """The first name on a way that is not there, and whether the way ends with it."""

    path: Path
    last: bool


def walk(directory: Path, *, or_file: bool = False) -> tuple[tuple[Step, ...], Missing | None]:
    """The steps of the way to a directory from the root, as far as there is one. Raises OSError.

    With `or_file` it may end with a file.
    """
    resolution = _Resolution(directory, or_file=or_file)
    while resolution.names and resolution.missing is None:
        resolution.take(resolution.names.pop())
    steps = resolution.steps
    if resolution.missing is None and steps[-1].role is Role.ABOVE:
        steps[-1] = structs.replace(steps[-1], role=Role.LAST)
    return tuple(steps), resolution.missing


class _Resolution:
    """The resolution of one path (path_resolution(7)): the steps so far, and the names that are left, the next last."""

    def __init__(self, directory: Path, *, or_file: bool) -> None:
        self._or_file = or_file
        self.names = list(reversed(directory.absolute().parts[1:]))
        self.steps: list[Step] = []
        self.missing: Missing | None = None
        self._links = 0
        self._own = len(self.names) + 1  # where fewer names than this are left, they are not those of a link
        self._enter(Path("/"))

    def take(self, name: str) -> None:
        """Go to the next name."""
        if name == "..":  # the path so far holds no link
            self._enter(self._at.path.parent)
            return
        path = self._at.path / name
        try:
            found = path.lstat()
        except FileNotFoundError:
            if self._of_link():  # to a disk that is not mounted, say: what is made in its place would be lost there
                raise
            self.missing = Missing(path, not self.names)
            return
        if stat.S_ISLNK(found.st_mode):
            self._follow(path, found)
        elif self._or_file and not self.names and not stat.S_ISDIR(found.st_mode):
            self.steps.append(_step(path, found, Role.SOCKET if stat.S_ISSOCK(found.st_mode) else Role.FILE))
        else:
            self._enter(path, found)

    def _of_link(self) -> bool:
        """Whether the name that was taken last is one that a link leads to."""
        return len(self.names) >= self._own

    def _enter(self, path: Path, found: os.stat_result | None = None) -> None:
        found = path.lstat() if found is None else found
        if not stat.S_ISDIR(found.st_mode):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
        self._at = _step(path, found)
        self.steps.append(self._at)

    def _follow(self, link: Path, found: os.stat_result) -> None:
        self._links += 1
        if self._links > MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(link))
        if self._at.mode & (stat.S_IWOTH | stat.S_IWGRP):
            self.steps.append(_step(link, found, Role.LINK))
        if not self._of_link():
            self._own = len(self.names)
        to = link.readlink()
        if to.is_absolute():
            self._enter(Path("/"))
        self.names += reversed(to.parts[1:] if to.is_absolute() else to.parts)


def _step(path: Path, found: os.stat_result, role: Role = Role.ABOVE) -> Step:
    owner = found.st_uid if found.st_uid != UNMAPPED or _is_mapped(UNMAPPED) else None
    return Step(path, owner, found.st_gid, stat.S_IMODE(found.st_mode), role)


def _is_mapped(uid: int) -> bool:
    """Whether the id is one of this user namespace's (user_namespaces(7): each line is a first id, that outside, and
    how many).
    """
    try:
        ranges = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
    except OSError:
        return True
    return any(int(first) <= uid < int(first) + int(count) for first, _, count in ranges)


class LockedDirectory:
    """A directory of the process's own that no second process can claim, from `claim` to `release`.

    `claim` makes it with `mode`, and locks the file `lock` in it. `in_use` is the error for when another process has
    the lock. Where it `fills` the directory, `claim` also sees that this takes files, as its lock may be there already.
    """

    def __init__(
        self,
        path: Path,
        setting: str,
        in_use: SdsAgentError,
        *,
        mode: int = 0o700,
        lock: str = LOCK,
        fills: bool = False,
    ) -> None:
        self.path = path
        self._setting = setting
        self._in_use = in_use
        self._mode = mode
        self._lock_file = path / lock
        self._fills = fills
        self._open = ExitStack()
        self._lock: int | None = None

    def claim(self) -> None:
        """Make the directory if it is missing, and lock it; a lock from before is released.

        Raises `in_use` when another process has the lock, and ConfigurationError, which names the setting, when the
        directory cannot be used at all.
        """
        self.release()
        with _explained(self.path, self._setting, self._in_use):
            warn_shared(self._setting, own_directory(self.path, self._mode))
            if self._fills:
                check_writable(self.path, self.path)
            self._lock = self._open.enter_context(locked(self._lock_file))

    def in_place(self) -> bool:
        """Whether the lock file in the directory is still the one that was locked: it may be removed or replaced."""
        lock = self._lock  # another thread may claim or release the directory meanwhile
        if lock is None:
            return False
        try:
            return os.path.samestat(self._lock_file.lstat(), os.fstat(lock))
        except OSError:
            return False

    def check_in_place(self) -> None:
        """Raise NotLockedError unless the lock is `in_place`: what is in the directory may be another process's."""
        if not self.in_place():
            raise NotLockedError(f"{self._lock_file} is gone, or is not the one that this process has locked")

    def release(self) -> None:
        """Release the lock."""
        self._open.close()
        self._lock = None


@contextmanager
def locked_directory(directory: Path, setting: str, in_use: SdsAgentError) -> Iterator[LockedDirectory]:
    """Claim a directory (0700) within this context. Raises what `LockedDirectory.claim` does."""
    claimed = LockedDirectory(directory, setting, in_use)
    claimed.claim()
    try:
        yield claimed
    finally:
        claimed.release()


def check_lockable_directory(
    directory: Path, setting: str, in_use: SdsAgentError, lock: str = LOCK, *, fills: bool = False
) -> tuple[str, ...]:
    """Check, without a change, what `LockedDirectory.claim` would raise here; returns who else could change what is
    there, in words.
    """
    with _explained(directory, setting, in_use):
        shared = check_directory(directory)
        if fills and directory.exists():
            check_writable(directory, directory)
        check_lock(directory / lock)
        return shared


@contextmanager
def _explained(directory: Path, setting: str, in_use: SdsAgentError) -> Iterator[None]:
    try:
        yield
    except UntrustedDirectoryError as error:
        raise ConfigurationError(f"{setting}: {error}") from error
    except BlockingIOError as error:
        raise in_use from error
    except OSError as error:
        raise ConfigurationError(
            f"{setting}: cannot use {error.filename or directory}: {error.strerror}; {_fix(error)}choose another"
        ) from error


def _fix(error: OSError) -> str:
    """What else can be done about it, before the last resort."""
    if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS}:
        return f"make it writable for the user that runs this (uid {os.geteuid()}), or "
    return "make room there, or " if error.errno in FULL else ""
