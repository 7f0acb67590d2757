"""A directory whose files change all at once, in the way of a Kubernetes volume.

    TARGET/..20260314-150926-1f2e3d4c/cert-chain.pem, key.pem, root-cert.pem     one set, never changed again
    TARGET/..data -> ..20260314-150926-1f2e3d4c                                  the set that counts
    TARGET/cert-chain.pem -> ..data/cert-chain.pem                               and so for each file

A new set is written beside the old one, made durable, and then one rename of `..data` puts it in force. Whoever opens
`..data` once and reads the files below it has one set; a program that opens the files one after another may meet a
renewal in between and has to check that key and certificate fit, as with any pair of files.
"""

import os
import re
import secrets
import shutil
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from msgspec import Struct

from sds_agent.directories import own_directory
from sds_agent.files import sync_directory

DATA = "..data"
_OURS = re.compile(r"\.\.([0-9]{8}-[0-9]{6}|tmp)-[0-9a-f]{8}")
"""The names of sets, and of links before they have their own."""


class File(Struct, frozen=True):
    """A file of a set. A `private` one has the mode 0600, another 0644."""

    content: bytes
    private: bool = False

    def __repr__(self) -> str:
        return "File(...)"


def write_set(target: Path, files: Mapping[str, File], now: datetime) -> None:
    """Put the files in force in `target`, which is made when it is missing, all of them or none.

    Files that lie there under the same names are replaced by links; this first time alone they change one after
    another. The set before stays, since somebody may be reading it. Raises OSError, and UntrustedDirectoryError when
    somebody else could replace what is there.
    """
    own_directory(target, 0o755)
    before = (target / DATA).readlink().name if (target / DATA).is_symlink() else ""
    made = target / f"..{now:%Y%m%d-%H%M%S}-{secrets.token_hex(4)}"
    try:
        _fill(made, files)
        _link(target / DATA, made.name)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    try:
        for name in files:
            _link(target / name, f"{DATA}/{name}")
        sync_directory(target)
    finally:
        _remove_all_but(target, {made.name, before})


def _fill(made: Path, files: Mapping[str, File]) -> None:
    made.mkdir(mode=0o755)
    made.chmod(0o755)  # whatever the process's umask
    for name, file in files.items():
        mode = 0o600 if file.private else 0o644
        descriptor = os.open(made / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        with os.fdopen(descriptor, "wb") as opened:
            opened.write(file.content)
            os.fchmod(opened.fileno(), mode)
            opened.flush()
            os.fsync(opened.fileno())
    sync_directory(made)
    sync_directory(made.parent)


def _link(link: Path, to: str) -> None:
    """Let `link` lead there, in one step."""
    if link.is_symlink() and str(link.readlink()) == to:
        return
    temporary = link.with_name(f"..tmp-{secrets.token_hex(4)}")
    temporary.symlink_to(to)
    try:
        temporary.replace(link)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _remove_all_but(target: Path, kept: set[str]) -> None:
    """Remove old sets, and what was left by an agent that was killed in between.

    What stays behind costs room and nothing else, so what cannot be removed is left for the next time.
    """
    with suppress(OSError):
        for left in [path for path in target.iterdir() if _OURS.fullmatch(path.name) and path.name not in kept]:
            if left.is_symlink():
                left.unlink()
            else:
                shutil.rmtree(left, ignore_errors=True)
