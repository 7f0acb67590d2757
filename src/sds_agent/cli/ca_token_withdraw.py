"""`sds-agent ca token withdraw`: take back every join token for an identity."""

import argparse

from sds_agent.ca.settings import load
from sds_agent.cli import output
from sds_agent.cli.ca_token import identity_of, of_ca, withdraw, written
from sds_agent.cli.config_file import add_file, required

EXIT_CODES = "0 done, also where there was none; 2 a wrong call, or a configuration or a directory that cannot be used"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The CA's configuration and the identity."""
    add_file(parser, "the CA's configuration, which names the directory", required=True)
    parser.add_argument("spiffe_id", metavar="SPIFFE-ID", help="the identity that the tokens stand for")


def run(arguments: argparse.Namespace) -> int:
    """Withdraw them. Raises ProblemsError and ConfigurationError."""
    file = required(arguments)
    settings = load(file)
    tokens = of_ca(settings, file)
    with written():
        output.report(withdraw(tokens, identity_of(arguments.spiffe_id, settings)))
    return 0
