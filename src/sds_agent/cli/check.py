"""`sds-agent check`: what is wrong with a configuration, or in plain sentences what the agent would do with it."""

import argparse
import os
from pathlib import Path

from sds_agent.cli import output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The file."""
    parser.add_argument(
        "file", nargs="?", type=Path, metavar="FILE", help="the configuration; without one the defaults"
    )


def run(arguments: argparse.Namespace) -> int:
    """Explain on standard output and warn on standard error. Raises ConfigError with all that is wrong."""
    import textwrap  # noqa: PLC0415 - imported by the command that needs it

    from sds_agent.cli.explanation import explain, warnings  # noqa: PLC0415 - likewise
    from sds_agent.config.loading import load  # noqa: PLC0415 - likewise

    loaded = load(arguments.file, os.environ)
    for paragraph in explain(loaded):
        output.write(textwrap.fill(paragraph, 100, break_long_words=False, break_on_hyphens=False) + "\n")
    for warning in warnings(loaded.settings):
        output.complain(f"warning: {warning}")
    return 0
