"""`sds-agent ca token list`: the join tokens that a CA has, and never a token itself."""

import argparse
from datetime import UTC, datetime

from sds_agent.ca.settings import load
from sds_agent.cli import output
from sds_agent.cli.ca_token import of_ca
from sds_agent.cli.config_file import add_file, required
from sds_agent.cli.formats import add_format, document, left, table

EXIT_CODES = "0 done, also where there is none; 2 a wrong call, or a configuration or a directory that cannot be used"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The CA's configuration, and the format."""
    add_file(parser, "the CA's configuration, which names the directory", required=True)
    add_format(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print them, the next to expire first. Raises ProblemsError and ConfigurationError."""
    file = required(arguments)
    found = sorted(of_ca(load(file), file).listed(), key=lambda each: (each.expires, each.spiffe_id))
    if arguments.format != "table":
        output.write(document(found, arguments.format))
        return 0
    now = datetime.now(UTC)
    rows = [
        (
            each.spiffe_id,
            left(each.made, now),
            left(each.expires, now),
            "" if each.used is None else left(each.used, now),
        )
        for each in found
    ]
    output.write(table(("SPIFFE ID", "MADE", "EXPIRES", "USED"), rows) if rows else "There is no join token.")
    return 0
