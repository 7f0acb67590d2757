"""`sds-agent schema`: print the JSON Schema of the configuration file."""

import argparse

from sds_agent.cli import output


def add_arguments(_parser: argparse.ArgumentParser) -> None:
    """It takes none."""


def run(_arguments: argparse.Namespace) -> int:
    """Print it as an editor takes it."""
    import json  # noqa: PLC0415 - imported by the command that needs it

    from sds_agent.config.schema import json_schema  # noqa: PLC0415 - likewise

    output.write(json.dumps(json_schema(), indent=2))
    return 0
