"""`sds-agent ca serve`: the CA as a server, in Istio's certificate protocol."""

import argparse
import logging

import anyio

from sds_agent import log
from sds_agent.ca.cores import usable
from sds_agent.ca.settings import CaSettings, load
from sds_agent.ca.system import check_system
from sds_agent.cli import ca_worker, output
from sds_agent.cli.config_file import add_file, required
from sds_agent.hardening import keep_memory_private
from sds_agent.tasks import NonBlockingLookups

LOG = logging.getLogger(__name__)

_OPTIONS = {"loop_factory": NonBlockingLookups}

EXIT_CODES = (
    "0 ended in order, by a signal; 2 the configuration, or what it names on this machine, cannot be used and a person "
    "has to act; 1 any other failure"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The file."""
    add_file(parser, "the CA's configuration", required=True)


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal. Raises ProblemsError and what `server.run` raises."""
    output.silence_warnings()
    settings = load(required(arguments))
    log.configure(settings.log.format, settings.log.level)
    check_system()
    if not keep_memory_private():
        log.event(LOG, "dumpable", level=logging.WARNING)
    workers = settings.workers or usable()
    if workers == 1:
        _serve_alone(settings)
    else:
        _serve_together(settings, workers)
    return 0


def _serve_alone(settings: CaSettings) -> None:
    from sds_agent.ca import server  # noqa: PLC0415 - gRPC, which a parent of workers does not need

    anyio.run(server.run, settings, backend_options=_OPTIONS)


def _serve_together(settings: CaSettings, workers: int) -> None:
    from sds_agent.ca.workers import parent  # noqa: PLC0415 - for servers with workers

    anyio.run(parent.run, settings, workers, ca_worker.command, backend_options=_OPTIONS)
