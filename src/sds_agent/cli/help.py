"""`sds-agent help [COMMAND...]`: the help of the program, or of a command."""

import argparse

from sds_agent.cli.parser import Shown, build

EXIT_CODES = "0 done; 2 there is no such command; 1 any other failure"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's words."""
    parser.add_argument("words", nargs="*", metavar="COMMAND", help="the command, such as run or ca root")


def run(arguments: argparse.Namespace) -> int:
    """Print it to standard output. Raises CallError and OutputError."""
    parser = build()
    for word in arguments.words:
        parser = parser.below(word)
    return Shown(parser).run(arguments)
