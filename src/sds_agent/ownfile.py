"""A file in the state directory that one process writes, and writes again when it is lost."""

import os
import threading
from pathlib import Path

from sds_agent.directories import own_directory
from sds_agent.errors import SdsAgentError
from sds_agent.files import read_own, replace_private, sync_directory


class ReplacedError(SdsAgentError):
    """Another process has replaced the file. The message is a clause that follows its path."""


class OwnFile:
    """A file of this process's own, and the content that the process last read or wrote.

    Its methods block on the disk, and may be called in any thread.
    """

    def __init__(self, path: Path, most: int) -> None:
        self.path = path
        self._most = most
        self._left: bytes | None = None
        self._lock = (
            threading.RLock()
        )  # from a write until its content is noted: in between the file looks like another process's

    def read(self) -> tuple[bytes, int]:
        """The content, or its first `most` bytes and one more, and the permission bits. Raises what `read_own` does."""
        with self._lock:
            self._left, mode = read_own(self.path, self._most)
            return self._left, mode

    def write(self, content: bytes) -> None:
        """Put the content there, as `write_private` does. Raises OSError."""
        with self._lock:
            replace_private(self.path, content)
            self._left = content  # it is there, even where the directory cannot be synchronized
            sync_directory(self.path.parent)

    def renew(self, content: bytes) -> None:
        """As `write`, but not over what another process wrote. Raises OSError, ForeignFileError and ReplacedError."""
        with self._lock:
            self.is_there()
            self.write(content)

    def forget(self) -> None:
        """Do not write again what was read: it is good for nothing."""
        with self._lock:
            self._left = None

    def is_there(self) -> bool:
        """Whether the file is there, unchanged.

        Raises OSError, ForeignFileError, and ReplacedError for another content.
        """
        with self._lock:
            try:
                content, _ = read_own(self.path, self._most)
            except FileNotFoundError:
                return False
            if self._left is not None and content != self._left:
                raise ReplacedError("holds something else than this process wrote")
            return True

    def put_back(self) -> Path | None:
        """Write the content again if the file is gone; returns the path if so.

        Raises OSError and UntrustedDirectoryError.
        """
        with self._lock:
            if self._left is None or os.path.lexists(self.path):
                return None
            own_directory(self.path.parent, 0o700)
            self.write(self._left)
            return self.path
