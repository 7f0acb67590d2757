"""Room on a disk, reserved for what must be written when the disk is full.

The reserve is a file beside the one that is written to. Its blocks are taken beforehand and given back to the disk
piece by piece: another program that fills the disk takes at most one piece before the next line is written.
"""

import errno
import os
import stat
from pathlib import Path

SIZE = 4 << 20
"""Bytes: some ten thousand lines of the audit log."""
PIECE = 64 << 10


class Reserve:
    """The reserve of one file, which `fill` makes. `whole` says whether all of it is there.

    Where `file` is a link, it is beside what that leads to now: on another disk it would make no room.
    """

    def __init__(self, file: Path) -> None:
        file = file.resolve()
        self._path = file.with_name(f".{file.name}.reserve")
        self.whole = False

    def fill(self) -> None:
        """Make it whole. Raises OSError, for example without room for all of it; then a part may be there."""
        self.whole = False
        descriptor = self._open(os.O_CREAT)
        try:
            os.posix_fallocate(descriptor, 0, SIZE)
        finally:
            os.close(descriptor)
        self.whole = True

    def give(self) -> bool:
        """Give a piece of it back to the disk; returns whether there was one. Raises OSError."""
        self.whole = False
        try:
            descriptor = self._open()
        except FileNotFoundError:
            return False
        try:
            left = os.fstat(descriptor).st_size
            os.ftruncate(descriptor, max(0, left - PIECE))
        finally:
            os.close(descriptor)
        return left > 0

    def _open(self, more: int = 0) -> int:
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        descriptor = os.open(self._path, flags | more, 0o600)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OSError(errno.EINVAL, "it is no regular file", str(self._path))
        return descriptor
