"""Standard output and standard error of the commands. A reader that has left causes no traceback."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from sds_agent.errors import SdsAgentError

_LEFT = "the reader of standard output has left"


class OutputError(SdsAgentError):
    """Standard output cannot be written to."""


class ReaderGoneError(OutputError):
    """The reader of standard output has left, as `head` does. The exit code is that of a program ended by SIGPIPE."""

    exit_code = 141


def silence_warnings() -> None:
    """Keep libraries from warning of each odd certificate and key that they read; the commands report those."""
    warnings.filterwarnings("ignore", module="sds_agent|cryptography|jwt")


def open_closed() -> None:
    """Open the null device for each standard stream that was closed. The next file or socket would have its descriptor,
    and get what a library, or a program that this one starts, writes to standard error.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest that is free, so this one
    if sys.stderr is None:
        from pathlib import Path  # noqa: PLC0415 - for this alone

        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - stays open for as long as the program runs


def write(text: str) -> None:
    """Write a line, or several, to standard output. Raises OutputError."""
    if sys.stdout is None:
        return
    encoding = getattr(sys.stdout, "encoding", None) or "ascii"
    with _translated():
        print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def takes(text: str) -> bool:
    """Whether standard output has every character of the text; `write` escapes others as Python does, which no other
    program reads.
    """
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def flush() -> None:
    """Write what argparse left in standard output's buffer. Raises OutputError."""
    if sys.stdout is not None:
        with _translated():
            sys.stdout.flush()


def look_for_reader() -> None:
    """Notice that the reader of standard output has left, as the next write would. Raises ReaderGoneError."""
    import select  # noqa: PLC0415 - for a command that waits between two writes

    poll = select.poll()
    with suppress(OSError, ValueError, AttributeError):  # none, or one without a descriptor
        poll.register(sys.stdout.fileno(), 0)
    # a pipe has POLLERR, a socket POLLHUP
    if any(found & (select.POLLERR | select.POLLHUP) for _, found in poll.poll(0)):
        _abandon(sys.stdout)
        raise ReaderGoneError(_LEFT)


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        _abandon(sys.stdout)
        if isinstance(error, BrokenPipeError):
            raise ReaderGoneError(_LEFT) from error
        raise OutputError(
            f"cannot write to standard output: {error.strerror}; make room or send it elsewhere"
        ) from error


def report(text: str) -> None:
    """Write a line, or several, to standard error, each with the program's name before it. What is not printable is
    escaped: names and words in it may be another program's.
    """
    with suppress(OSError):
        for line in text.rstrip("\n").split("\n"):
            print(f"sds-agent: {line if line.isprintable() else _visible(line)}", file=sys.stderr)


def _visible(line: str) -> str:
    from sds_agent.text import visible  # noqa: PLC0415 - `--help` needs no msgspec

    return visible(line)


def forget_unsaid() -> None:
    """Drop what `report` wrote and standard error did not take. Python tries it once more when it ends, and then ends
    with 120, whatever the command's exit code is.
    """
    if sys.stderr is None:
        return
    try:
        sys.stderr.flush()
    except OSError:
        _abandon(sys.stderr)


def _abandon(stream: TextIO) -> None:
    """Send the rest of a standard stream to the null device: Python flushes it once more when it ends."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
