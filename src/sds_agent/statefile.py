"""A file of the state with a format: what cannot be used is put aside, and never used, overwritten or fatal.

The content is JSON, an object with the number `format` (1 where it has none), sealed if there is a key. A file that no
version of this agent will be able to use here is renamed: NAME becomes NAME.unusable, in place of an earlier one. One
that is sealed with another key may be good again as soon as the operator names that key. It stays, and is put aside
only when there is something to write in its place.
"""

import os
import re
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Generic, TypeVar

import msgspec
from msgspec import Struct

from sds_agent.errors import SdsAgentError
from sds_agent.files import ForeignFileError, sync_directory
from sds_agent.ownfile import OwnFile
from sds_agent.sealing import OVERHEAD, NewerSealError, OtherKeyError, Seal, SealError, is_sealed
from sds_agent.text import escaped

T = TypeVar("T")

FORMAT = 2
"""The format that is written. 1 is that of the versions before, whose files have no such number."""
ASIDE = ".unusable"
MOST_ASIDE = 16
"""Files that stay put aside in one directory."""
LONGEST_REASON = 300
"""Characters of what is said about a damaged file."""


class UnusableFileError(SdsAgentError):
    """A file of the state cannot be used. The message says which, why, what became of it, and what to do."""


class Stored(Struct, Generic[T], frozen=True):
    """What was read, and whether `write` would store it otherwise: sealed now, or in a newer format."""

    content: T
    outdated: bool


class _Format(Struct):
    format: int = 1


class StateFile:
    """One file of the state, of at most `most` bytes of content.

    `purpose` is what it is for; it is sealed with that. `instead` is a clause that says what the agent does without
    the file. Nobody may have the permission bits `forbidden` on it.
    """

    def __init__(self, path: Path, most: int, *, seal: Seal | None, purpose: str, instead: str, forbidden: int) -> None:
        self.path = path
        self._own = OwnFile(path, most + OVERHEAD)
        self._most = most
        self._seal = seal
        self._purpose = purpose
        self._instead = instead
        self._forbidden = forbidden
        self._another_keys = False

    @property
    def aside(self) -> Path:
        """Where the file goes if it cannot be used."""
        return self.path.with_name(self.path.name + ASIDE)

    def load(self, decode: Callable[[bytes], T]) -> Stored[T] | None:
        """The content of the file, or None if there is none. `decode` may raise what a decoder raises, and errors of
        this package. Blocks on the disk. Raises UnusableFileError.
        """
        try:
            data, mode = self._own.read()
        except FileNotFoundError:
            return None
        except ForeignFileError as error:
            raise self.put_aside(str(error)) from error
        except OSError as error:
            raise UnusableFileError(
                f"cannot read {self.path}: {error.strerror}; {self._instead}; see that the agent's user (uid "
                f"{os.geteuid()}) can read it"
            ) from error
        if mode & self._forbidden:
            raise self.put_aside(f"may be read or written by others (mode {mode:04o})")
        plain = self._opened(data)
        try:
            number = _format_of(plain)
            if number > FORMAT:
                raise self._of_newer(f"has the format {number}, and this version of the agent knows {FORMAT}")
            return Stored(decode(plain), number < FORMAT or (self._seal is not None and not is_sealed(data)))
        except UnusableFileError:
            raise
        except (msgspec.MsgspecError, ValueError, OverflowError, RecursionError, OSError, SdsAgentError) as error:
            # an OSError, too, is what Python raises for a number that is no time
            raise self.put_aside(f"is damaged ({escaped(str(error), LONGEST_REASON)})") from error

    def write(self, content: bytes) -> None:
        """Put the content there, all of it or nothing, with mode 0600. Blocks on the disk. Raises OSError."""
        self._own.write(self.prepared(content))

    def prepared(self, content: bytes) -> bytes:
        """What is to be written to `path` for this content, now: the way is clear. Blocks on the disk. Raises OSError.

        For who writes many such files at once (`files.replace_all_private`), and so has no need of `put_back`.
        """
        data = sealed(content, self._seal, self._purpose)
        if self._another_keys:
            with suppress(FileNotFoundError):
                self.path.rename(self.aside)
            self._another_keys = False
        return data

    @property
    def holds_another_keys(self) -> bool:
        """Whether the file was found to be encrypted with another key: it is renamed before another is written."""
        return self._another_keys

    def put_back(self) -> Path | None:
        """Write again a file that is gone; returns its path if it was. Raises OSError and UntrustedDirectoryError."""
        return self._own.put_back()

    def put_aside(self, reason: str, fix: str = "") -> UnusableFileError:
        """Rename the file, for this reason, a clause that follows its path; returns the error to raise."""
        self._own.forget()
        said = f"{self.path} {reason}; it is not used, and {self._instead}"
        fix = fix or "remove it, or restore a good copy while the agent is stopped"
        try:
            self.path.rename(self.aside)
            sync_directory(self.path.parent)
        except OSError as error:
            return UnusableFileError(f"{said}; it cannot be renamed to {self.aside.name} ({error.strerror}): {fix}")
        return UnusableFileError(f"{said}; it was renamed to {self.aside.name}: {fix}")

    def _opened(self, data: bytes) -> bytes:
        if len(data) > self._most + OVERHEAD:
            raise self.put_aside("is damaged (it is larger than any that the agent writes)")
        if not is_sealed(data):
            return data
        if self._seal is None:
            raise self._of_another_key("is encrypted, and state_encryption names no key")
        try:
            return self._seal.open(data, self._purpose)
        except OtherKeyError as error:
            raise self._of_another_key(str(error)) from error
        except NewerSealError as error:
            raise self._of_newer(str(error)) from error
        except SealError as error:
            raise self.put_aside(str(error)) from error

    def _of_another_key(self, reason: str) -> UnusableFileError:
        self._another_keys = True
        return UnusableFileError(
            f"{self.path} {reason}; it is not used, and {self._instead}; it stays until there is another to write, "
            f"and is then renamed to {self.aside.name}: to use it, stop the agent and name the key that it was "
            "encrypted with"
        )

    def _of_newer(self, reason: str) -> UnusableFileError:
        return self.put_aside(
            reason, f"to use it, stop the agent, rename it to {self.path.name} and start the newer one"
        )


def sealed(content: bytes, seal: Seal | None, purpose: str) -> bytes:
    """The content as it is in a file with that purpose, where there is none that must be put aside first."""
    return content if seal is None else seal.seal(content, purpose)


def _format_of(content: bytes) -> int:
    """The format of a content. Raises a decoder's errors."""
    read = msgspec.json.decode(content, type=_Format | list[msgspec.Raw])
    return read.format if isinstance(read, _Format) else 1


def remove_aside(directory: Path, name: str, *, most: int = MOST_ASIDE) -> None:
    """Remove files that were put aside, but not the newest `most` of them. What cannot be removed stays.

    `name` is a regular expression for the names that they had. Raises no error.
    """
    with suppress(OSError):
        aside = [each for each in directory.iterdir() if each.name.endswith(ASIDE)]
        found = [each for each in aside if re.fullmatch(name, each.name.removesuffix(ASIDE))]
        for each in sorted(found, key=lambda path: path.lstat().st_ctime, reverse=True)[most:]:
            with suppress(OSError):
                each.unlink()
