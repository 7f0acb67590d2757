"""`sds-agent ca ...`: the certificate hierarchy. One module a subcommand, of the same kind as the commands."""

import argparse
from typing import Any

from sds_agent.cli import ca_check, ca_intermediate, ca_root, ca_schema, ca_serve, ca_token

COMMANDS: tuple[tuple[str, Any, str], ...] = (
    ("root", ca_root, "make an offline root"),
    ("intermediate", ca_intermediate, "make an intermediate below a root, ready to be plugged in"),
    ("check", ca_check, "say whether a directory can be plugged in, and what is wrong with it"),
    ("serve", ca_serve, "sign for others, in Istio's certificate protocol, until SIGTERM, SIGINT or SIGHUP"),
    ("token", ca_token, "make a join token for a machine that has no other proof of who it is"),
    ("schema", ca_schema, "print the JSON Schema of the CA server's configuration file"),
)
"""Each subcommand's name, its module and what it does. A new one is a new line."""

MADE = (
    "0 done; 2 a wrong call, or something that the command needs cannot be used: nothing is made; 1 any other failure"
)
"""The exit codes of a subcommand that has none of its own."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommands."""
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, command, about in COMMANDS:
        description, codes = f"{about[0].upper()}{about[1:]}.", getattr(command, "EXIT_CODES", MADE)
        added = commands.add_parser(name, help=about, description=description, epilog=f"Exit codes: {codes}.")
        command.add_arguments(added)
        added.set_defaults(ca_command=command)


def run(arguments: argparse.Namespace) -> int:
    """Run the subcommand. Raises what it raises."""
    code: int = arguments.ca_command.run(arguments)
    return code
