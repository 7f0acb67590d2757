"""The configuration file that a command is called with: its argument FILE, or `--config FILE`."""

import argparse
from pathlib import Path


def add_file(
    parser: argparse.ArgumentParser, about: str, *, required: bool = False, socket_about: str | None = None
) -> None:
    """Declare FILE and `--config FILE`, and with `socket_about` also `--socket PATH`: one of them may be given."""
    which = parser.add_mutually_exclusive_group(required=required)
    which.add_argument("file", nargs="?", type=Path, metavar="FILE", help=about)
    which.add_argument("--config", type=Path, metavar="FILE", help="the same as FILE")
    if socket_about is not None:
        which.add_argument("--socket", type=Path, metavar="PATH", help=socket_about)


def chosen(arguments: argparse.Namespace) -> Path | None:
    """The file that was named; None where none was."""
    named: Path | None = arguments.file if arguments.config is None else arguments.config
    return named


def required(arguments: argparse.Namespace) -> Path:
    """The file, for a command that declares it as required."""
    named: Path = arguments.file if arguments.config is None else arguments.config
    return named
