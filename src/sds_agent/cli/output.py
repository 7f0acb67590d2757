"""Standard output and standard error, for commands: a reader that has left is no reason for a traceback."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sds_agent.errors import SdsAgentError


class OutputError(SdsAgentError):
    """Standard output does not take what a command has to say."""


class ReaderGoneError(OutputError):
    """The reader of standard output has left, as `head` does. The exit code is that of a program ended by SIGPIPE."""

    exit_code = 141


def silence_warnings() -> None:
    """Keep libraries from warning of oddities in other people's certificates and keys, whenever they read one."""
    warnings.filterwarnings("ignore", module="sds_agent|cryptography|jwt")


def open_closed() -> None:
    """Let a closed standard error go nowhere: argparse writes to it without looking."""
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - stays open for as long as the program runs


def write(text: str) -> None:
    """Write a line, or several, to standard output. Raises OutputError."""
    if sys.stdout is None:
        return
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    with _translated():
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def flush() -> None:
    """Write what others left in standard output's buffer. Raises OutputError."""
    if sys.stdout is not None:
        with _translated():
            sys.stdout.flush()


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        _abandon()
        if isinstance(error, BrokenPipeError):
            raise ReaderGoneError("the reader of standard output has left") from error
        raise OutputError(
            f"cannot write to standard output: {error.strerror}; make room or send it elsewhere"
        ) from error


def complain(text: str) -> None:
    """Write a line to standard error, each with the program's name before it."""
    with suppress(OSError):
        for line in text.splitlines():
            print(f"sds-agent: {line}", file=sys.stderr)


def _abandon() -> None:
    """Python flushes standard output once more when it ends; let what is left go nowhere."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
