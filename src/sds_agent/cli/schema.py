"""`sds-agent schema` and `sds-agent ca schema`: print the JSON Schema of a configuration file."""

import argparse
import json

from sds_agent.ca import schema as ca_schema
from sds_agent.cli import output
from sds_agent.config import schema as agent_schema

EXIT_CODES = "0 done; 2 a wrong call; 1 any other failure"

_SCHEMAS = {"schema": agent_schema.json_schema, "ca schema": ca_schema.json_schema}
"""Each command's, by the command's name."""


def add_arguments(_parser: argparse.ArgumentParser) -> None:
    """It takes none."""


def run(arguments: argparse.Namespace) -> int:
    """Print it, indented, as editors take it."""
    output.write(json.dumps(_SCHEMAS[arguments.name](), indent=2))
    return 0
