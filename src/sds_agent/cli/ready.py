"""`sds-agent ready`: ask a running agent over its own socket, for health checks of containers and service managers."""

import argparse
import os
from pathlib import Path
from urllib.parse import quote

from sds_agent.cli import output

NOT_READY = 1
PATIENCE = 2.0
"""Seconds that the agent may take to answer."""


EXIT_CODES = (
    "Exit codes: 0 every workload has a certificate that is valid; 1 one has none, or no "
    "agent answers; 2 a wrong call, or a configuration that cannot be used."
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The file."""
    parser.epilog = EXIT_CODES
    parser.add_argument("file", nargs="?", type=Path, metavar="FILE", help="the configuration that the agent runs on")


def run(arguments: argparse.Namespace) -> int:
    """Exit code 0 when the agent is ready, 1 when it is not or does not answer. Raises ConfigError."""
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    import asyncio  # noqa: PLC0415 - imported by the command that needs it

    from sds_agent.config.loading import load  # noqa: PLC0415 - imported by the command that needs it
    from sds_agent.sds.health import NoAnswerError, check  # noqa: PLC0415 - has to see the variable above

    socket = load(arguments.file, os.environ).settings.sds.socket
    try:
        ready = asyncio.run(check(f"unix:{quote(str(socket))}", PATIENCE))
    except NoAnswerError as error:
        output.complain(f"{socket}: {error}")
        return NOT_READY
    if not ready:
        output.complain(f"the agent at {socket} is not ready: a workload has no certificate yet; its log tells why")
        return NOT_READY
    output.write("ready")
    return 0
