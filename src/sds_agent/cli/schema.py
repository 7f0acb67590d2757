"""`sds-agent schema`: print the JSON Schema of the configuration file."""

import argparse
from collections.abc import Mapping

from sds_agent.cli import output

EXIT_CODES = "0 done; 2 a wrong call; 1 any other failure"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """It takes none."""
    parser.epilog = f"Exit codes: {EXIT_CODES}."


def run(_arguments: argparse.Namespace) -> int:
    """Print it as an editor takes it."""
    from sds_agent.config.schema import json_schema  # noqa: PLC0415 - imported by the command that needs it

    show(json_schema())
    return 0


def show(schema: Mapping[str, object]) -> None:
    """Print a schema."""
    import json  # noqa: PLC0415 - imported by the command that needs it

    output.write(json.dumps(schema, indent=2))
