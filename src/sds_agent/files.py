"""Files that other processes never see half-written, and that other users cannot read or replace."""

import errno
import fcntl
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from sds_agent.errors import SdsAgentError

GLANCE = 0.05
"""Seconds from one attempt to take a lock to the next. `check_lock` of another process has it for less, unless the
machine is busy.
"""
ATTEMPTS = 10
"""How often a lock is tried that another process has."""


LONGEST_SOCKET_PATH = 107
"""Bytes of a path that fit a Unix socket's address (sockaddr_un in unix(7), without its final zero)."""
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
"""The errors of a disk without room."""
DESCRIPTORS = "/proc/self/fd"
"""Where Linux has a process's open files (proc_pid_fd(5)): the way to a socket, and to a file, that has no name."""
MOUNT_PROC = "mount proc at /proc, in a container or a chroot too"
"""What to do where they are not there."""
TEMPORARY_SOCKET = 7
"""Bytes of the name that a socket has until it has its own."""


class ForeignFileError(SdsAgentError):
    """Another user may have replaced a file of the agent's own. The message is a clause that follows its path."""


class OutsideError(SdsAgentError):
    """A path leads to what must not be read by it. The message is a clause that follows the path."""


def fix_of(error: OSError, otherwise: str) -> str:
    """What to do about an error of writing: make room where the disk is full, and `otherwise` where it is not."""
    return "make room on its disk" if error.errno in FULL else otherwise


def create(path: Path, data: bytes, mode: int = 0o600, *, owner: tuple[int, int] | None = None) -> None:
    """Make the file `path`, with these permission bits whatever the umask, and its content on disk when this returns.

    What is there under this name stays, a link too: FileExistsError. A failure leaves nothing behind, and a kill may
    leave a part. The name itself is on disk after `sync_directory`. `owner` is a user and a group id. Raises OSError.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            # the user last: it takes CAP_FOWNER, and not only CAP_CHOWN, to set the mode of a file of another user
            if owner is not None:
                os.fchown(descriptor, -1, owner[1])
            os.fchmod(descriptor, mode)
            if owner is not None:
                os.fchown(descriptor, owner[0], -1)
            file.write(data)
            file.flush()
            os.fsync(descriptor)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def write_private(path: Path, data: bytes) -> None:
    """Put `data` at `path` with mode 0600, all of it or nothing, and on disk when this returns.

    A reader of `path` sees the old content or the new, also after a power cut. Raises OSError; where the directory
    caused that, the new content is there, and a power cut may bring the old one back.
    """
    replace_private(path, data)
    sync_directory(path.parent)


def replace_private(path: Path, data: bytes) -> None:
    """As `write_private`, but a power cut may bring the old content back until the directory is synchronized.

    Raises OSError, and then nothing has changed.
    """
    temporary = path.with_name(f".{path.name}.{os.urandom(4).hex()}")
    create(temporary, data)
    try:
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def replace_all_private(directory: Path, files: Sequence[tuple[str, bytes]]) -> list[OSError | None]:
    """As `replace_private` for each of these in the directory, by its name; returns for each what it would raise.

    All are written before the first is waited for: what a file system writes for one of them it then writes for most.
    Raises OSError where the directory cannot be opened.
    """
    # names alone, and few calls: another thread may keep this one from running for 5 ms after each
    first = int.from_bytes(os.urandom(4))
    temporary = [f".{name}.{(first + number) % 2**32:08x}" for number, (name, _) in enumerate(files)]
    folder = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        opened = [_begun(folder, mark, data) for mark, (_, data) in zip(temporary, files, strict=True)]
        return [
            each if isinstance(each, OSError) else _finished(folder, each, mark, name)
            for each, mark, (name, _) in zip(opened, temporary, files, strict=True)
        ]
    finally:
        os.close(folder)


def _begun(folder: int, temporary: str, data: bytes) -> int | OSError:
    """The descriptor of a temporary file with the content, which is not on disk yet."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        descriptor = os.open(temporary, flags, 0o600, dir_fd=folder)
    except OSError as error:
        return error
    try:
        os.fchmod(descriptor, 0o600)
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    except OSError as error:
        _abandon(folder, descriptor, temporary)
        return error
    return descriptor


def _finished(folder: int, descriptor: int, temporary: str, name: str) -> OSError | None:
    try:
        os.fsync(descriptor)
        os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    except OSError as error:
        _abandon(folder, descriptor, temporary)
        return error
    os.close(descriptor)
    return None


def _abandon(folder: int, descriptor: int, temporary: str) -> None:
    os.close(descriptor)
    with suppress(OSError):
        os.unlink(temporary, dir_fd=folder)


def remove_unfinished(directory: Path, name: str, *, idle: float = 0) -> None:
    """Remove the temporary files that a killed `write_private` left in `directory`, once unchanged for `idle` seconds.

    `name` is a regular expression for the names of the files that were to be written. The caller makes sure that no
    other process writes them now, by a lock or by waiting. What cannot be removed stays. Raises no error.
    """
    unfinished = rf"\.(?:{name})\.[0-9a-f]{{8}}"
    with suppress(OSError), os.scandir(directory) as entries:
        for entry in entries:
            if not (entry.name.startswith(".") and re.fullmatch(unfinished, entry.name)):
                continue
            with suppress(OSError):
                found = entry.stat(follow_symlinks=False)
                # where no other process writes, its age does not matter: it may be from before the clock was set back
                if stat.S_ISREG(found.st_mode) and (not idle or time.time() - found.st_mtime >= idle):
                    os.unlink(entry.path)  # noqa: PTH108 - the entry has no Path


def read_own(file: Path, most: int, *, also: int | None = None) -> tuple[bytes, int]:
    """The content of a file of the agent's own, or its first `most` bytes and one more; and its permission bits.

    Raises ForeignFileError where the opened file is not a regular one of root, of this user or of the user `also`, and
    OSError.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError as error:
        if file.is_symlink():
            raise ForeignFileError("is not a regular file") from error
        raise
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ForeignFileError("is not a regular file")
        _check_owner(found, also)
        return _read(descriptor, most), stat.S_IMODE(found.st_mode)
    finally:
        os.close(descriptor)


def read_own_link(path: Path, *, also: int | None = None) -> str | None:
    """The text of a symbolic link of the agent's own, which is not followed; None where something else is there.

    Raises ForeignFileError where it is another user's, as `read_own` does, and OSError.
    """
    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        found = os.fstat(descriptor)
        if not stat.S_ISLNK(found.st_mode):
            return None
        _check_owner(found, also)
        return os.readlink("", dir_fd=descriptor)  # of the link that was looked at, not of one in its place
    finally:
        os.close(descriptor)


def _check_owner(found: os.stat_result, also: int | None) -> None:
    if found.st_uid not in {0, os.geteuid(), also}:
        raise ForeignFileError(f"belongs to uid {found.st_uid} and not to the agent's user (uid {os.geteuid()})")


def read_at_once(file: Path, most: int) -> bytes:
    """The file's content, or its first `most` bytes and one more. Raises OSError.

    It is one for a pipe too: what a pipe gives may be the beginning of what it is to give, and comes only once.
    """
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if stat.S_ISFIFO(os.fstat(descriptor).st_mode):
            raise OSError(errno.ESPIPE, "it is a pipe, and not a file", str(file))
        return _read(descriptor, most)
    finally:
        os.close(descriptor)


def read_below(file: Path, directories: Iterable[Path], most: int) -> bytes:
    """As `read_at_once`, of a file that lies below one of the directories, wherever symlinks on its path lead.

    No process can exchange the file between the check and the reading: the check asks the kernel where the opened file
    is, and that one is read. A file elsewhere, or of another kind than a regular one, is not opened for reading.
    Raises OutsideError, and OSError, which it is too where /proc is not mounted.
    """
    found = os.open(file, os.O_PATH | os.O_CLOEXEC)
    try:
        place = _place(found)
        if not any(place.is_relative_to(each) and place != each for each in map(_place_of, directories)):
            raise OutsideError("a symlink leads to another place than below the directories that are allowed")
        if not stat.S_ISREG(os.fstat(found).st_mode):
            raise OutsideError("is not a regular file")
        descriptor = os.open(_link(found), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    finally:
        os.close(found)
    try:
        return _read(descriptor, most)
    finally:
        os.close(descriptor)


def _place_of(directory: Path) -> Path:
    found = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return _place(found)
    finally:
        os.close(found)


def _place(descriptor: int) -> Path:
    """Where the kernel says that the opened file is (proc_pid_fd(5)), without symlinks on the way."""
    return Path(os.readlink(_link(descriptor)))  # noqa: PTH115 - as it is, not as a Path's text


def _link(descriptor: int) -> str:
    return f"{DESCRIPTORS}/{descriptor}"


def _read(descriptor: int, most: int) -> bytes:
    data = b""
    while len(data) <= most and (more := os.read(descriptor, most + 1 - len(data))):
        data += more
    return data


def has_descriptors() -> bool:
    """Whether this process finds its DESCRIPTORS."""
    return os.access(DESCRIPTORS, os.X_OK)


def sync_directory(directory: Path) -> None:
    """Have the directory's names on disk when this returns. Raises OSError.

    A file system that has no such operation for directories keeps them as it does; fsync(2) fails there with EINVAL.
    """
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    finally:
        os.close(descriptor)


def looked_up(path: Path) -> os.stat_result | None:
    """What is at the path, where links lead; None where nothing is. Raises OSError where that cannot be seen.

    `Path.exists` and its like say of that, from Python 3.14 on, that nothing is there.
    """
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None


def check_writable(directory: Path, entry: Path) -> None:
    """Raise the OSError of making `entry` in a directory that is there, as far as can be known without making it."""
    if not may_access(directory, os.W_OK | os.X_OK):
        read_only = os.statvfs(directory).f_flag & os.ST_RDONLY
        reason = errno.EROFS if read_only else errno.EACCES
        raise OSError(reason, os.strerror(reason), str(entry))


def may_access(path: Path, mode: int) -> bool:
    """Whether this process may do that (os.R_OK and its like) with what is at the path, as its effective user.

    Docker before 20.10 lets no container ask that: its filter denies faccessat2(2), which glibc takes for the answer. A
    process that is of one user alone asks by the older call then.
    """
    if os.access(path, mode, effective_ids=True):
        return True
    one_user = os.getuid() == os.geteuid() and os.getgid() == os.getegid()
    return one_user and os.access(path, mode)


@contextmanager
def locked(path: Path) -> Iterator[int]:
    """Lock the file `path` within this context; yields its descriptor. The file is made when missing, and stays; its
    owner can open it again whatever the umask was.

    The kernel releases the lock with the process, however that ends. Raises BlockingIOError when another process has
    it, and OSError.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        found = os.fstat(descriptor)
        if found.st_mode & 0o600 != 0o600 and found.st_uid == os.geteuid():
            os.fchmod(descriptor, 0o600)
        _lock(descriptor)
        yield descriptor
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    for _ in range(ATTEMPTS - 1):
        with suppress(BlockingIOError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        time.sleep(GLANCE)
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def check_lock(path: Path) -> None:
    """Check, without a change, what `locked` would raise here."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        if path.parent.exists():
            check_writable(path.parent, path)
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    finally:
        os.close(descriptor)


def socket_path_size(path: Path) -> int:
    """Bytes of a Unix socket's path, or of its temporary one in the same directory if that is longer.

    At most LONGEST_SOCKET_PATH can be used.
    """
    return max(len(os.fsencode(path)), len(os.fsencode(path.parent)) + 1 + TEMPORARY_SOCKET)
