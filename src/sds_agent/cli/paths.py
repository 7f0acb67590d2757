"""Paths in a call. One that is empty names the working directory to Python: it is refused, since it comes from a
variable of the shell that is not set.
"""

import argparse
import stat
from pathlib import Path

from sds_agent.errors import ConfigurationError


def filled(word: str) -> str:
    """The word. Raises ArgumentTypeError for an empty one."""
    if not word:
        raise argparse.ArgumentTypeError("it is empty; is a variable of the shell not set?")
    return word


def as_path(word: str) -> Path:
    """A path. Raises ArgumentTypeError for an empty one."""
    return Path(filled(word))


def as_text(word: str) -> Path:
    """The same of what goes on to gRPC, an Envoy's configuration or JSON, which take text alone. Raises
    ArgumentTypeError for one with bytes that are no UTF-8, too.
    """
    try:
        word.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError("it must be a path in UTF-8") from error
    return as_path(word)


def as_socket(word: str) -> Path:
    """The same of a socket, beside which there may be another one. Raises ArgumentTypeError for one without a name."""
    if not word or not as_text(word).name:
        found = "it is a directory" if word else "it is empty"
        raise argparse.ArgumentTypeError(f"it must be the path of a socket such as /run/sds-agent/sds.sock; {found}")
    return Path(word)


def is_directory(path: Path) -> bool:
    """Whether a path that a user named is a directory and no configuration; one that this user may not look at counts
    as a directory. Raises ConfigurationError where nothing is there.
    """
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ConfigurationError(f"there is no {path}; name the directory of a CA, or a configuration") from error
    except OSError:
        return True


TYPES = frozenset({as_path, as_text, as_socket})
"""The types of all arguments that are paths."""
