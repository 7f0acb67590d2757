"""The ways in which programs replace a set of files. Each is used several times in a row."""

import itertools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

Replace = Callable[[Mapping[str, bytes]], None]
"""Puts these contents in the place of the last ones, by name."""

_numbers = itertools.count(1)


def _filled(directory: Path, files: Mapping[str, bytes]) -> Path:
    directory.mkdir(parents=True)
    for name, content in files.items():
        (directory / name).write_bytes(content)
    return directory


def _swap(link: Path, to: Path | str) -> None:
    """Put a symlink in the place of another by one step."""
    new = link.with_name(f".new{next(_numbers)}")
    new.symlink_to(to)
    new.rename(link)


def in_place(root: Path) -> tuple[Path, Replace]:
    """Each file is opened and written anew."""
    directory = root / "live"
    directory.mkdir()

    def replace(files: Mapping[str, bytes]) -> None:
        for name, content in files.items():
            (directory / name).write_bytes(content)

    return directory, replace


def renamed_over(root: Path) -> tuple[Path, Replace]:
    """Each file is replaced by one step."""
    directory = root / "live"
    directory.mkdir()

    def replace(files: Mapping[str, bytes]) -> None:
        for name, content in files.items():
            new = directory / f".{name}.new"
            new.write_bytes(content)
            new.rename(directory / name)

    return directory, replace


def removed_and_made(root: Path) -> tuple[Path, Replace]:
    """All files are removed, and then made again."""
    directory = root / "live"
    directory.mkdir()

    def replace(files: Mapping[str, bytes]) -> None:
        for name in files:
            (directory / name).unlink(missing_ok=True)
        for name, content in files.items():
            (directory / name).write_bytes(content)

    return directory, replace


def certbot(root: Path) -> tuple[Path, Replace]:
    """Each file is a symlink into an archive, and is made anew for each version."""
    directory = root / "live"
    directory.mkdir()

    def replace(files: Mapping[str, bytes]) -> None:
        version = _filled(root / "archive" / str(next(_numbers)), files)
        for name in files:
            (directory / name).unlink(missing_ok=True)
            (directory / name).symlink_to(f"../archive/{version.name}/{name}")

    return directory, replace


def kubernetes(root: Path) -> tuple[Path, Replace]:
    """A mounted Secret: each file is a symlink through ..data, and that symlink is swapped; the old version goes."""
    directory = root / "live"
    directory.mkdir()

    def replace(files: Mapping[str, bytes]) -> None:
        before = (directory / "..data").resolve() if (directory / "..data").is_symlink() else None
        version = _filled(directory / f"..version{next(_numbers)}", files)
        _swap(directory / "..data", version.name)
        for name in files:
            if not (directory / name).is_symlink():
                (directory / name).symlink_to(f"..data/{name}")
        if before is not None:
            shutil.rmtree(before)

    return directory, replace


def link_above(root: Path) -> tuple[Path, Replace]:
    """A symlink two levels above the files is swapped, and is absolute."""

    def replace(files: Mapping[str, bytes]) -> None:
        version = root / f"version{next(_numbers)}"
        _filled(version / "sub" / "live", files)
        _swap(root / "current", version)

    return root / "current" / "sub" / "live", replace


def directory_exchanged(root: Path) -> tuple[Path, Replace]:
    """Another directory takes the place of the one above the files, as a new mount does."""

    def replace(files: Mapping[str, bytes]) -> None:
        version = root / f"version{next(_numbers)}"
        _filled(version / "live", files)
        if (root / "top").exists():
            (root / "top").rename(root / f"old{next(_numbers)}")
        version.rename(root / "top")

    return root / "top" / "live", replace


WAYS = [in_place, renamed_over, removed_and_made, certbot, kubernetes, link_above, directory_exchanged]
"""Each makes what it needs below a directory, and returns the directory of the files, and how to replace them."""
