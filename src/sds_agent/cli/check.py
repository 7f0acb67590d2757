"""`sds-agent check`: what is wrong with a configuration, or in plain sentences what the agent would do with it."""

import argparse
import os
import textwrap
from collections.abc import Iterator

from sds_agent import preflight, sources
from sds_agent.cli import output
from sds_agent.cli.config_file import add_file, chosen_or_found
from sds_agent.cli.explanation import explain, warnings
from sds_agent.clock import SystemClock
from sds_agent.config.loading import load
from sds_agent.config.settings import Settings

CANNOT_START = 3
"""The exit code for a configuration that is good, on a machine where `run` would refuse it."""

EXIT_CODES = (
    "0 the configuration is good and the agent can start here; 2 it cannot be used; 3 it is good, but the "
    "agent cannot start here and now as this user, or cannot write an output: a group that is not there, a directory "
    "that cannot be used, an agent that runs on it already. Nothing is made or changed to find out. With --probe it is "
    "also 3 where an authority does not issue. Warnings change no exit code"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The file."""
    add_file(parser, "the configuration; by default ./sds-agent.yaml if there is one, or else the defaults")
    parser.add_argument(
        "--probe",
        action="store_true",
        help="ask each authority for a certificate of one minute, for one of its workloads, and throw it away",
    )
    parser.add_argument(
        "--spend-token",
        action="store_true",
        help="with --probe: ask also where that spends a join token, which serves once",
    )


def run(arguments: argparse.Namespace) -> int:
    """Explain the configuration on standard output; report on standard error what keeps the agent from starting here.

    Warnings go there too. Raises ProblemsError.
    """
    output.silence_warnings()
    loaded = load(chosen_or_found(arguments, os.environ), os.environ)
    for paragraph in explain(loaded):
        output.write(textwrap.fill(paragraph, 100, break_long_words=False, break_on_hyphens=False) + "\n")
    found = list(warnings(loaded.settings))
    for warning in (*found, *_about_machine(loaded.settings), *_about_credentials(loaded.settings, found)):
        output.report(f"warning: {warning}")
    unfit = _report_obstacles(loaded.settings)
    if arguments.probe:
        unfit = _probe(loaded.settings, spend=arguments.spend_token) or unfit
    return CANNOT_START if unfit else 0


def _probe(settings: Settings, *, spend: bool) -> bool:
    """Ask the CAs; what they issue goes to standard output, refusals to standard error. Returns whether one refused."""
    import asyncio  # noqa: PLC0415 - measured with gRPC: 150 ms, which no other check needs

    from sds_agent import log, probe  # noqa: PLC0415 - measured: likewise

    log.configure(settings.log.format, "error")

    findings = asyncio.run(probe.probe(settings, SystemClock(), spend=spend))
    for each in findings:
        if each.good is False:
            output.report(f"the authority {each.authority} does not issue: {each.said}")
        else:
            output.write(f"The authority {each.authority}{' is good' if each.good else ''}: {each.said}.")
    return any(each.good is False for each in findings)


def _about_machine(settings: Settings) -> Iterator[str]:
    """What works on this machine and is perhaps not meant."""
    yield from preflight.unreachable(settings)
    yield from preflight.shared(settings)
    yield from (f"{key}: {cause}" for key, cause in sources.find_shared(preflight.sources(settings)))


def _about_credentials(settings: Settings, found: list[str]) -> Iterator[str]:
    """What is wrong with them, except for files of which a warning that was `found` says that they are not there."""
    missing = {each.partition(":")[0] for each in found if " does not exist; " in each}
    for warning in preflight.credentials(settings, SystemClock()):
        if warning.partition(":")[0] not in missing:
            yield warning


def _report_obstacles(settings: Settings) -> bool:
    obstacles = list(preflight.obstacles(settings, SystemClock()))
    shortfalls = list(preflight.shortfalls(settings))
    for what, errors in (("start here", obstacles), ("write every output here", shortfalls)):
        if errors:
            output.report(f"the configuration is good, but the agent cannot {what} as uid {os.geteuid()}:")
        for each in errors:
            output.report(str(each))
    return bool(obstacles or shortfalls)
