"""Files that must never be seen half-written or by the wrong eyes."""

import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from sds_agent.errors import ConfigurationError, SdsAgentError


class UntrustedDirectoryError(SdsAgentError):
    """Somebody else could put a file of theirs in the place of ours."""


def write_private(path: Path, data: bytes) -> None:
    """Put `data` at `path` with mode 0600, all of it or nothing, and on disk when this returns.

    Whoever reads `path` sees the old content or the new, also after a power cut. Raises OSError.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def read_at_once(file: Path, most: int) -> bytes:
    """The file's content, or its first `most` bytes and one more. A pipe is not waited for. Raises OSError."""
    data = b""
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        while len(data) <= most and (more := os.read(descriptor, most + 1 - len(data))):
            data += more
    finally:
        os.close(descriptor)
    return data


def sync_directory(directory: Path) -> None:
    """Make the directory's entries durable. Raises OSError."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def own_directory(directory: Path, mode: int, *, of_anybody: bool = False) -> None:
    """Make the directory with `mode` if it is missing, and make sure that nobody else may replace what is in it.

    With `of_anybody` its owner may do so, whoever that is. Raises UntrustedDirectoryError, and OSError.
    """
    directory.mkdir(mode=mode, parents=True, exist_ok=True)
    found = directory.stat()
    if found.st_mode & stat.S_IWOTH:
        raise UntrustedDirectoryError(
            f"anybody may write to {directory}, so anybody could put a file in the place of the agent's; "
            f"use a directory that only the agent may write to (chmod o-w {directory})"
        )
    if not of_anybody and found.st_uid not in {0, os.geteuid()}:
        raise UntrustedDirectoryError(
            f"{directory} belongs to uid {found.st_uid}, who could replace the agent's files; "
            f"use a directory of the agent's own user (uid {os.geteuid()}) or of root"
        )


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock file `path` (made when missing, left when done).

    The kernel releases it with the process, however that ends. Raises BlockingIOError when another process holds it,
    and OSError.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


@contextmanager
def held_directory(directory: Path, setting: str, in_use: SdsAgentError) -> Iterator[None]:
    """Hold a directory (0700) that no second process may use at the same time.

    Raises `in_use` when one does, and ConfigurationError, which names the `setting`, when it cannot be used at all.
    """
    with ExitStack() as stack:
        try:
            own_directory(directory, 0o700)
            stack.enter_context(locked(directory / "lock"))
        except UntrustedDirectoryError as error:
            raise ConfigurationError(f"{setting}: {error}") from error
        except BlockingIOError as error:
            raise in_use from error
        except OSError as error:
            raise ConfigurationError(
                f"{setting}: cannot use {error.filename or directory}: {error.strerror}; make it writable for the user "
                f"that runs this (uid {os.geteuid()}), or choose another"
            ) from error
        yield
