"""`sds-agent ca serve`: the CA as a server, in Istio's certificate protocol."""

import argparse
import logging

import anyio

from sds_agent import log
from sds_agent.ca import server
from sds_agent.ca.settings import load
from sds_agent.cli import output
from sds_agent.cli.config_file import add_file, required
from sds_agent.hardening import keep_memory_private
from sds_agent.tasks import NonBlockingLookups

LOG = logging.getLogger(__name__)

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
    if not keep_memory_private():
        log.event(LOG, "dumpable", level=logging.WARNING)
    anyio.run(server.run, settings, backend_options={"loop_factory": NonBlockingLookups})
    return 0
