"""A directory whose files change all at once, in the way of a Kubernetes volume.

    TARGET/..20260314-150926-1f2e3d4c/cert-chain.pem, key.pem, root-cert.pem     one set, never changed again
    TARGET/..data -> ..20260314-150926-1f2e3d4c                                  the set that counts
    TARGET/cert-chain.pem -> ..data/cert-chain.pem                               and so for each file
    TARGET/..lock                                                                locked by the agent that writes

A new set is written beside the old one, made durable, and then one rename of `..data` puts it in force. A program that
opens `..data` once and reads the files below it has one set; one that opens the files one after another may meet a
renewal in between, and has to check that key and certificate fit, as with any pair of files.
"""

import os
import re
import secrets
import shutil
from collections.abc import Container, Iterable, Mapping
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from msgspec import Struct

from sds_agent import accounts
from sds_agent.directories import LockedDirectory, check_lockable_directory, own_directory
from sds_agent.errors import Problem, ProblemsError, SdsAgentError
from sds_agent.files import create, sync_directory

DATA = "..data"
LOCK = "..lock"
SETTING = "output"
_OURS = re.compile(r"\.\.([0-9]{8}-[0-9]{6}|tmp)-[0-9a-f]{8}")
"""The names of sets, and of links before they have their own."""


MODE = 0o755
"""The directory's: programs of other users may read the certificates in it."""


class OutputInUseError(SdsAgentError):
    """Another agent writes to the directory, or another workload of this one by another path."""


class FileAccess(Struct, frozen=True):
    """Who may read the files of a set: their owner and group, as ids or -1 for the agent's own, and the permission bits
    of a private one. Others have 0644.
    """

    user: int = accounts.UNCHANGED
    group: int = accounts.UNCHANGED
    key_mode: int = 0o600


AGENT_ALONE = FileAccess()


class File(Struct, frozen=True):
    """A file of a set. A `private` one holds a key."""

    content: bytes
    private: bool = False

    def __repr__(self) -> str:
        return "File(...)"


def write_set(target: Path, files: Mapping[str, File], now: datetime, access: FileAccess = AGENT_ALONE) -> None:
    """Put the files in force in `target`, which is made when it is missing, all of them or none.

    Files that lie there under the same names are replaced by links; this first time alone they change one after
    another. A name that only the set before has is removed. That set stays, because a program may be reading it. Raises
    OSError, and UntrustedDirectoryError when another user could replace what is there. The caller has the directory's
    lock: of two processes that write at the same time each would remove the other's unfinished set.
    """
    own_directory(target, MODE)
    before = (target / DATA).readlink().name if (target / DATA).is_symlink() else ""
    made = target / f"..{now:%Y%m%d-%H%M%S}-{secrets.token_hex(4)}"
    try:
        _fill(made, files, access)
        _link(target / DATA, made.name)
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    try:
        for name in files:
            _link(target / name, f"{DATA}/{name}")
        _remove_links(target, files)
        sync_directory(target)
    finally:
        _remove_all_but(target, {made.name, before})


def output_directory(target: Path) -> LockedDirectory:
    """The directory with its lock, for `claim` to take. That raises OutputInUseError when another process has it."""
    in_use = OutputInUseError(
        f"another sds-agent, or another workload of this one, writes to {target}; give each an output of its own"
    )
    return LockedDirectory(target, SETTING, in_use, mode=MODE, lock=LOCK, fills=True)


def check_output(target: Path, setting: str) -> tuple[str, ...]:
    """Check, without a change, that `target` can be written to; returns who else could change it, in words.

    `setting` is the name of the key. Raises ConfigurationError, and OutputInUseError.
    """
    in_use = OutputInUseError(f"{setting}: another sds-agent writes to {target}")
    return check_lockable_directory(target, setting, in_use, LOCK, fills=True)


def access_of(owner: str | None, group: str | None, key_mode: int, setting: str) -> FileAccess:
    """The access that these names of a user and a group mean here. `setting` is the name of the output's key.

    Raises ProblemsError for a name that this machine does not know, or that the agent's user may not give files to.
    """
    user, group_id = accounts.user_id(owner, f"{setting}.owner"), accounts.group_id(group, f"{setting}.group")
    if not accounts.may_give_to_user(user):
        found = f"only root (CAP_CHOWN) can give files to the user {owner}, and this is uid {os.geteuid()}"
        raise ProblemsError([Problem((f"{setting}.owner",), found, f"leave {setting}.owner out")])
    if not accounts.may_give_to_group(group_id):
        found = f"uid {os.geteuid()} is not in the group {group}, and can give files to no other without CAP_CHOWN"
        raise ProblemsError(
            [Problem((f"{setting}.group",), found, "add the agent's user to it, or name one of its own")]
        )
    return FileAccess(user, group_id, key_mode)


def is_whole(target: Path, names: Iterable[str]) -> bool:
    """Whether a reader finds a file under each of these names."""
    return all(os.path.exists(target / name) for name in names)  # noqa: PTH110 - Path.exists raises where it may not look


def _fill(made: Path, files: Mapping[str, File], access: FileAccess) -> None:
    made.mkdir(mode=0o755)
    made.chmod(0o755)  # whatever the process's umask
    for name, file in files.items():
        mode = access.key_mode if file.private else 0o644
        create(made / name, file.content, mode, owner=(access.user, access.group))
    sync_directory(made)
    sync_directory(made.parent)


def _link(link: Path, to: str) -> None:
    """Point `link` there, in one step."""
    if link.is_symlink() and str(link.readlink()) == to:
        return
    temporary = link.with_name(f"..tmp-{secrets.token_hex(4)}")
    temporary.symlink_to(to)
    try:
        temporary.replace(link)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _remove_links(target: Path, staying: Container[str]) -> None:
    """Remove the links to files that no set has any more, such as a trust domain's whose bundle was withdrawn: a
    program that reads all that is there would find nothing behind them. What cannot be removed is left.
    """
    with suppress(OSError):
        for left in [path for path in target.iterdir() if path.is_symlink() and path.name not in staying]:
            if str(left.readlink()) == f"{DATA}/{left.name}":
                left.unlink()


def _remove_all_but(target: Path, staying: set[str]) -> None:
    """Remove old sets, and what a killed agent left unfinished.

    These cost room and nothing else, so what cannot be removed is left for the next time.
    """
    with suppress(OSError):
        for left in [path for path in target.iterdir() if _OURS.fullmatch(path.name) and path.name not in staying]:
            if left.is_symlink():
                left.unlink()
            else:
                shutil.rmtree(left, ignore_errors=True)
