"""Programs that can start no further thread: a real limit on processes, which applies to every user but root."""

import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

USER = 4711 if os.geteuid() == 0 else os.geteuid()

_AS_USER = f"""
import importlib, os, resource, signal, sys
for module in {{modules!r}}:
    importlib.import_module(module)  # files below a directory of root's cannot be read later
if os.geteuid() == 0:
    os.setgroups([])
    os.setgid({USER})
    os.setuid({USER})
soft, hard = resource.getrlimit(resource.RLIMIT_NPROC)
signal.signal(signal.SIGUSR1, lambda *_: resource.setrlimit(resource.RLIMIT_NPROC, (0, hard)))
signal.signal(signal.SIGUSR2, lambda *_: resource.setrlimit(resource.RLIMIT_NPROC, (soft, hard)))
"""


def as_user(program: str, *, modules: Sequence[str]) -> list[str]:
    """The command that runs a Python program as a user who is not root, with these modules imported before."""
    return [sys.executable, "-c", _AS_USER.format(modules=[*modules]) + program]


@contextmanager
def users_directory() -> Iterator[Path]:
    """A directory that belongs to that user, inside this context: pytest's directories are below one of root's."""
    with tempfile.TemporaryDirectory() as name:
        os.chown(name, USER, -1)
        yield Path(name)


@contextmanager
def no_further_thread(process: int) -> Iterator[None]:
    """Inside this context the system starts no thread for a process that was started as `as_user` says.

    The process limits itself: root in a container may not do so to another user's.
    """
    os.kill(process, signal.SIGUSR1)
    try:
        yield
    finally:
        os.kill(process, signal.SIGUSR2)
