"""What the operator provides, such as a CA's directory, roots and tokens: who else could change what is read from it,
and whether every user can read the secrets in it.

The agent and the CA read it all the same, and warn. In a container, files of the host belong to the user that they have
there, who often does not exist inside, and only the operator knows whether that user is meant.
"""

import logging
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from sds_agent import log
from sds_agent.directories import ROOT, Role, Step, walk
from sds_agent.tasks import NoThreadError, in_thread

LOG = logging.getLogger(__name__)

MOST_FILES = 100
"""Files of one directory that are checked."""

Source = tuple[str, Path]
"""The name of a setting, and the file or directory that it names."""


async def warn(sources: Sequence[Source]) -> None:
    """Log for each source who else could change it (`source_shared`)."""
    with suppress(NoThreadError):  # a disk of the network may take its time, and nothing waits for this
        report_shared(await in_thread(find_shared, sources))


async def warn_of_readers(secrets: Sequence[Source]) -> None:
    """Log for each file with a secret that every user can read it (`credential_unusable`)."""
    with suppress(NoThreadError):  # as above
        report_credentials(await in_thread(find_readable, secrets))


def report_shared(found: Iterable[tuple[str, str]]) -> None:
    """Log who else could change a source, from `find_shared`."""
    for setting, cause in found:
        log.event(LOG, "source_shared", level=logging.WARNING, setting=setting, cause=cause)


def report_credentials(causes: Iterable[str]) -> None:
    """Log what is wrong with credentials, in lines that begin with the setting."""
    for cause in causes:
        log.event(LOG, "credential_unusable", level=logging.WARNING, cause=cause)


def find_readable(secrets: Iterable[Source]) -> list[str]:
    """The files with a secret that every user can read, in lines that begin with the setting: of a directory those that
    are named as private keys are. A missing file is left out.
    """
    files = [(setting, file) for setting, path in secrets for file in _files(path) if file == path or _names_key(file)]
    return [f"{setting}: {cause}" for setting, file in files if (cause := who_could_read(file))]


def _names_key(file: Path) -> bool:
    """Whether it is named as a private key is: `ca-key.pem` in Istio's layout, `tls.key` in cert-manager's."""
    return file.name.endswith(("key.pem", ".key"))


def who_could_read(path: Path) -> str | None:
    """That every user could read the secret in the file, in words; None where that is not so, or there is no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    if not stat.S_ISREG(found.st_mode) or not found.st_mode & stat.S_IROTH:
        return None
    return f"every user can read the secret in {path} (chmod o-r {path})"


def find_shared(sources: Iterable[Source]) -> list[tuple[str, str]]:
    """Each setting, and in words who else could change what it names. A missing file is left out."""
    return [(setting, cause) for setting, path in sources for cause in who_could_change(path)]


def who_could_change(path: Path) -> tuple[str, ...]:
    """Other users who could change what is read from the file, or from those in the directory, in words."""
    return tuple(dict.fromkeys(cause for file in _files(path) for cause in _causes(file, path)))


def _files(path: Path) -> Iterator[Path]:
    """The path, and what lies in it if it is a directory; names with a dot are a Kubernetes volume's own."""
    yield path
    with suppress(OSError):
        names = sorted(each for each in os.listdir(path) if not each.startswith("."))  # noqa: PTH208 - for their names
        yield from (path / name for name in names[:MOST_FILES])


def _causes(file: Path, path: Path) -> Iterator[str]:
    try:
        steps, missing = walk(file, or_file=True)
    except OSError:
        return
    if missing is None:
        yield from (cause for step in steps if (cause := judge(step, path, os.geteuid())))


def judge(step: Step, target: Path, user: int) -> str | None:
    """Who could change what is read from `target` by this step on the way there, for an agent that runs as `user`."""
    does = f"could change what is read from {target}"
    if step.owner not in {ROOT, user, None}:
        return f"uid {step.owner} {does}: {step.path} belongs to that user"
    # in a directory with the sticky bit a file is changed by its owner alone, and each file's owner is checked
    if step.role in {Role.LINK, Role.SOCKET} or (step.role is not Role.FILE and step.mode & stat.S_ISVTX):
        return None
    if step.mode & stat.S_IWOTH:
        return f"every user {does}: others may write to {step.path} (chmod o-w {step.path})"
    if step.mode & stat.S_IWGRP:
        return f"the group {step.group} {does}: it may write to {step.path} (chmod g-w {step.path})"
    return None
