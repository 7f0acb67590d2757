"""`sds-agent ca schema`: print the JSON Schema of the CA's configuration file."""

import argparse

from sds_agent.cli import schema

EXIT_CODES = schema.EXIT_CODES


def add_arguments(_parser: argparse.ArgumentParser) -> None:
    """It takes none."""


def run(_arguments: argparse.Namespace) -> int:
    """Print it as an editor takes it."""
    from sds_agent.ca.schema import json_schema  # noqa: PLC0415 - imported by the command that needs it

    schema.show(json_schema())
    return 0
