"""A directory with a plugged-in CA, read again whenever its content changes.

Neither times nor inodes are looked at: whatever way the files are replaced (in place, by renames, by the swap of a
symlink as Kubernetes does), their content is what counts.
"""

from collections.abc import Mapping
from pathlib import Path

from msgspec import Struct

from sds_agent.errors import ConfigurationError
from sds_agent.pki.cacerts import FILES
from sds_agent.values import Sensitive

LARGEST_FILE = 1 << 20
"""Bytes; a file that is larger is none of a CA's."""
MOST_READINGS = 5
"""How often the files are read until two readings agree; what changes faster is looked at the next time."""


class DirectoryError(ConfigurationError):
    """The directory, or a file in it, cannot be read."""


class Contents(Sensitive, frozen=True):
    """The CA's files by name, all of one moment."""

    files: Mapping[str, bytes]


class Unsettled(Struct, frozen=True):
    """The files changed while they were read."""


def read_directory(directory: Path) -> Contents | Unsettled:
    """The CA's files in `directory` as they were at one moment; files that are not there are left out.

    Two equal readings one after the other prove that moment: each file is the same at its first and its second
    reading, and all of these spans share the instant between the two. Raises DirectoryError.
    """
    before = _read_all(directory)
    for _ in range(MOST_READINGS):
        after = _read_all(directory)
        if after == before:
            return Contents(after)
        before = after
    return Unsettled()


def read_passphrase(file: Path) -> bytes:
    """The passphrase in a file: its content without the line break at its end. Raises DirectoryError."""
    try:
        passphrase = file.read_bytes().removesuffix(b"\n").removesuffix(b"\r")
    except OSError as error:
        raise DirectoryError(
            f"the passphrase cannot be read: {file}: {error.strerror}; name a file that holds it and that this user "
            "may read"
        ) from error
    if not passphrase:
        raise DirectoryError(f"the passphrase file {file} is empty; write the passphrase into it")
    return passphrase


def _read_all(directory: Path) -> dict[str, bytes]:
    if not directory.is_dir():
        raise DirectoryError(f"{directory} is not a directory; name the one that holds the CA's files")
    found = {name: _read(directory / name) for name in FILES}
    return {name: data for name, data in found.items() if data is not None}


def _read(file: Path) -> bytes | None:
    try:
        with file.open("rb") as opened:
            data = opened.read(LARGEST_FILE + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DirectoryError(
            f"cannot read {file}: {error.strerror}; it must be a file that this user may read"
        ) from error
    if len(data) > LARGEST_FILE:
        raise DirectoryError(f"{file} has more than {LARGEST_FILE} bytes; put the CA's own file there")
    return data
