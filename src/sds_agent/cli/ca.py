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


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The subcommands."""
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, command, about in COMMANDS:
        added = commands.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.")
        command.add_arguments(added)
        added.set_defaults(ca_command=command)


def run(arguments: argparse.Namespace) -> int:
    """Run the subcommand. Raises what it raises."""
    code: int = arguments.ca_command.run(arguments)
    return code
