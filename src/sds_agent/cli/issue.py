"""`sds-agent issue`: one certificate to files and an exit code, for init containers, cron and first tries of a CA."""

import argparse
import os
from datetime import timedelta
from pathlib import Path

import msgspec

from sds_agent import log
from sds_agent.cli import output
from sds_agent.cli.config_file import add_file, chosen, chosen_or_found, report_passed_over
from sds_agent.cli.paths import as_text
from sds_agent.configfile import durations
from sds_agent.hardening import keep_memory_private
from sds_agent.text import ascii_json

NOWHERE = Path("-")
"""In place of a directory: nothing is written."""
LONGEST = timedelta(hours=1)
INTERRUPTED = 130
"""The exit code after a signal."""

EXIT_CODES = (
    "0 the certificate was issued and written; 1 it was not issued in time: the last line has the CA's words; 2 the "
    "call or the configuration cannot be used; 3 the output cannot be written, which is found before the CA is asked "
    "as far as it can be; 130 a signal ended it before"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The file, the workload, where to and how soon."""
    add_file(parser, "the configuration; by default ./sds-agent.yaml if there is one, or else the defaults")
    parser.add_argument("--workload", metavar="NAME", help="for which workload; may be left out where there is one")
    parser.add_argument(
        "--output",
        type=as_text,
        required=True,
        metavar="DIR",
        help="the directory for cert-chain.pem, key.pem and root-cert.pem; - writes nothing and forgets the key",
    )
    parser.add_argument(
        "--timeout",
        type=_timeout,
        default=timedelta(seconds=30),
        metavar="TIME",
        help="how long to try, such as 10s or 5m; 30s unless given",
    )
    parser.add_argument(
        "--log-level",
        choices=("debug", "info", "warning", "error"),
        default="error",
        help="the least level of the log on standard error; error unless given",
    )


def run(arguments: argparse.Namespace) -> int:
    """Issue; write what was issued, as one JSON object, to standard output. Raises SdsAgentError."""
    output.silence_warnings()
    keep_memory_private()
    from sds_agent.config.loading import load  # noqa: PLC0415 - measured: 55 ms, of which `--help` needs nothing

    settings = load(chosen_or_found(arguments, os.environ), os.environ).settings
    if chosen(arguments) is None:
        report_passed_over(os.environ)
    log.configure(settings.log.format, arguments.log_level)
    import asyncio  # noqa: PLC0415 - measured with gRPC: 150 ms before a wrong configuration is reported

    from sds_agent import once, preflight  # noqa: PLC0415 - measured: likewise
    from sds_agent.clock import SystemClock  # noqa: PLC0415 - measured: likewise
    from sds_agent.signals import until_signalled  # noqa: PLC0415 - measured: likewise

    directory = None if arguments.output == NOWHERE else arguments.output
    request = once.OnceRequest(once.chosen_workload(settings, arguments.workload), directory, arguments.timeout)
    for warning in preflight.credentials(once.narrowed(settings, request.workload), SystemClock()):
        output.report(f"warning: {warning}")

    async def issue() -> once.Summary | None:
        async with until_signalled():
            return await once.issue(settings, request, SystemClock())
        return None

    if (issued := asyncio.run(issue())) is None:
        output.report("interrupted before a certificate was issued")
        return INTERRUPTED
    output.write(ascii_json(msgspec.to_builtins(issued)))
    return 0


def _timeout(text: str) -> timedelta:
    read = durations.parse(text)
    if read is None or not timedelta() < read <= LONGEST:
        raise argparse.ArgumentTypeError("it must be a duration such as 10s or 5m, at most 1h")
    return read
