"""Names that stand for files, as Istio has them: `file-cert:CERTIFICATE~KEY` and `file-root:ROOTS`.

Here a name is judged by itself. That it leads below an allowed directory as it is written says nothing about what is
there: a symlink may lead out. That is judged by what was opened (`files.read_below`).
"""

import os.path
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from msgspec import Struct

LONGEST_NAME = 4096
"""Characters."""
_SEPARATOR = "~"


class CertificateFiles(Struct, frozen=True):
    """A certificate and its key, and the allowed directory that the certificate is in."""

    directory: Path
    certificate: Path
    key: Path

    @property
    def paths(self) -> tuple[Path, ...]:
        """The files, each once: one may hold both."""
        return tuple(dict.fromkeys((self.certificate, self.key)))


class RootsFile(Struct, frozen=True):
    """Roots, and the allowed directory that they are in."""

    directory: Path
    roots: Path

    @property
    def paths(self) -> tuple[Path, ...]:
        """The file."""
        return (self.roots,)


FileName: TypeAlias = CertificateFiles | RootsFile


def parsed(name: str, directories: Sequence[Path]) -> FileName | None:
    """What a name stands for; None for one of another form, and for one that does not lead below `directories`."""
    if len(name) > LONGEST_NAME or not name.isprintable():
        return None
    kind, _, text = name.partition(":")
    places = [_place(each, directories) for each in text.split(_SEPARATOR)]
    match kind, places:
        case "file-cert", [(certificate, directory), (key, _)]:
            return CertificateFiles(directory, certificate, key)
        case "file-root", [(roots, directory)]:
            return RootsFile(directory, roots)
    return None


def _place(text: str, directories: Sequence[Path]) -> tuple[Path, Path] | None:
    """The path, and the directory that it is below as it is written."""
    path = Path(text)
    if not path.is_absolute() or ".." in path.parts:
        return None
    for directory in directories:
        if Path(os.path.normpath(directory)) in path.parents:
            return path, directory
    return None
