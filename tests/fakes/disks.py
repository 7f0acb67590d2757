"""Disks that are full, and disks that do not answer."""

import errno
import os
import resource
import signal
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """Limit every file of this process to so many bytes inside this context."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)


class SmallDisk:
    """A stand-in for a small disk on a directory, by what the system's calls say: it has `room` bytes for its files.

    As on a real one a write takes what there is room for, and fails where there is none.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, directory: Path, room: int) -> None:
        self.room = room
        self._directory = directory
        self._write, self._allocate = os.write, os.posix_fallocate
        monkeypatch.setattr(os, "write", self.write)
        monkeypatch.setattr(os, "posix_fallocate", self.allocate)

    @property
    def free(self) -> int:
        """Bytes that are left."""
        return self.room - sum(path.stat().st_size for path in self._directory.iterdir())

    def write(self, descriptor: int, data: bytes) -> int:
        """As os.write."""
        if not self._holds(descriptor):
            return self._write(descriptor, data)
        if self.free <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self._write(descriptor, data[: self.free])

    def allocate(self, descriptor: int, offset: int, length: int) -> None:
        """As os.posix_fallocate."""
        if self._holds(descriptor) and offset + length - os.fstat(descriptor).st_size > self.free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self._allocate(descriptor, offset, length)

    def _holds(self, descriptor: int) -> bool:
        return Path(f"/proc/self/fd/{descriptor}").readlink().parent == self._directory


@contextmanager
def forgetful_directories() -> Iterator[None]:
    """A stand-in for a disk that cannot keep a directory's names, by what fsync(2) says of one (EIO).

    The real thing takes a device of the kernel's that fails on demand, and root.
    """
    fsync = os.fsync

    def refuse(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", refuse)
        yield


@contextmanager
def late_full_disk() -> Iterator[None]:
    """A stand-in for a full disk that says so once a file is to be durable, as one of the network does (fsync(2))."""

    def refuse(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "fsync", refuse)
        yield


class DeadDisk:
    """A stand-in for a network disk that does not answer, by what the system's call does: fsync does not return.

    Until `revive` is called, whatever makes a file durable waits.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked = threading.Event()
        """Set once a call waits."""
        self._alive = threading.Event()
        self._fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self.fsync)

    def fsync(self, descriptor: int) -> None:
        """As os.fsync."""
        self.asked.set()
        self._alive.wait()
        self._fsync(descriptor)

    def revive(self) -> None:
        """End the waiting calls."""
        self._alive.set()
