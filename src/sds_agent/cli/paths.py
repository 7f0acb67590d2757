"""Paths in a call that go on to what takes text alone: gRPC, an Envoy's configuration, JSON."""

import argparse
from pathlib import Path


def as_text(word: str) -> Path:
    """A path that can be written as text. Raises ArgumentTypeError for one with bytes that are no UTF-8."""
    try:
        word.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError("it must be a path in UTF-8") from error
    return Path(word)


def as_socket(word: str) -> Path:
    """The same of a socket, beside which there may be another one. Raises ArgumentTypeError for one without a name."""
    path = as_text(word)
    if not path.name:
        found = "it is a directory" if word else "it is empty"  # as for a variable of the shell that is not set
        raise argparse.ArgumentTypeError(f"it must be the path of a socket such as /run/sds-agent/sds.sock; {found}")
    return path


TYPES = frozenset({Path, as_text, as_socket})
"""The types of all arguments that are paths."""
