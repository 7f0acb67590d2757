"""`sds-agent ca serve`: the CA as a server, in Istio's certificate protocol."""

import argparse
import os
from pathlib import Path

from sds_agent.cli import output

EXIT_CODES = (
    "0 ended in order, by a signal; 2 the configuration, or what it names on this machine, cannot be used and a person "
    "has to act; 1 any other failure"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The file."""
    parser.add_argument("file", type=Path, metavar="FILE", help="the CA's configuration")


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal. Raises ConfigError and what `server.run` raises."""
    # gRPC's core writes to standard error on its own account, and reads this once, when it is imported
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    output.silence_warnings()
    import logging  # noqa: PLC0415 - imported by the command that needs it

    import anyio  # noqa: PLC0415 - likewise

    from sds_agent import log  # noqa: PLC0415 - likewise
    from sds_agent.ca import server  # noqa: PLC0415 - imports gRPC, which has to see the variable above
    from sds_agent.ca.settings import load  # noqa: PLC0415 - imported by the command that needs it
    from sds_agent.hardening import keep_memory_private  # noqa: PLC0415 - likewise
    from sds_agent.tasks import NonBlockingLookups  # noqa: PLC0415 - likewise

    settings = load(arguments.file)
    log.configure(settings.log.format, settings.log.level)
    if not keep_memory_private():
        log.event(logging.getLogger(__name__), "dumpable", level=logging.WARNING)
    anyio.run(server.run, settings, backend_options={"loop_factory": NonBlockingLookups})
    return 0
