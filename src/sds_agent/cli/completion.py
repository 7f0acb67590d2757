"""`sds-agent completion SHELL`: the script by which a shell completes commands, options and file names."""

import argparse
from collections.abc import Iterator

from sds_agent.cli import output
from sds_agent.cli.commands import COMMANDS
from sds_agent.cli.parser import Parser, build
from sds_agent.cli.paths import TYPES

SHELLS = ("bash", "zsh", "fish")
_DIRECTORIES = frozenset({"DIR", "ROOTDIR", "DIRECTORY"})
"""What an argument that is a directory has as its metavar."""

EXIT_CODES = "0 done; 2 a wrong call; 1 any other failure"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The shell."""
    parser.add_argument("shell", choices=SHELLS, help="the shell that reads the script")


def run(arguments: argparse.Namespace) -> int:
    """Print the script. Raises OutputError."""
    output.write(script(arguments.shell))
    return 0


def script(shell: str) -> str:
    """The script of one of SHELLS."""
    import shtab  # noqa: PLC0415 - only here

    whole = build().whole()
    for action in actions(whole):
        if action.type in TYPES:
            is_directory = action.metavar in _DIRECTORIES
            setattr(action, "complete", shtab.DIRECTORY if is_directory else shtab.FILE)  # noqa: B010 - shtab's own name
    for word in actions(whole.commands["help"], below=False):
        if not word.option_strings:
            word.choices = list(COMMANDS)
    made: str = shtab.complete(whole, shell)
    return made.rstrip("\n")


def actions(parser: Parser, *, below: bool = True) -> Iterator[argparse.Action]:
    """The arguments of a parser, and of the commands below it."""
    yield from parser.declarations()
    for command in parser.commands.values() if below else ():
        yield from actions(command)
