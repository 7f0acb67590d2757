"""`sds-agent schema` and `sds-agent ca schema`: print the JSON Schema of a configuration file."""

import argparse
import json
from typing import Any

from sds_agent.cli import output

EXIT_CODES = "0 done; 2 a wrong call; 1 any other failure"


def add_arguments(_parser: argparse.ArgumentParser) -> None:
    """It takes none."""


def run(arguments: argparse.Namespace) -> int:
    """Print the schema that belongs to the command's name, indented, as editors take it."""
    schema = _ca_server() if arguments.name == "ca schema" else _agent()
    output.write(json.dumps(schema, indent=2))
    return 0


def _agent() -> dict[str, Any]:
    from sds_agent.config.schema import json_schema  # noqa: PLC0415 - measured: 100 ms for the CA server's beside it

    return json_schema()


def _ca_server() -> dict[str, Any]:
    from sds_agent.ca.schema import json_schema  # noqa: PLC0415 - measured: likewise

    return json_schema()
