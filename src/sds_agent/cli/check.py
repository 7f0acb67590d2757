"""`sds-agent check`: what is wrong with a configuration, or in plain sentences what the agent would do with it."""

import argparse
import os
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from msgspec import Struct, structs

from sds_agent import preflight, sources
from sds_agent.cli import output
from sds_agent.cli.config_file import add_file, chosen, chosen_or_found, report_passed_over
from sds_agent.cli.explanation import explain, warnings
from sds_agent.cli.formats import add_format, write
from sds_agent.clock import SystemClock
from sds_agent.config.loading import Loaded, load
from sds_agent.config.settings import Settings
from sds_agent.configfile import environment
from sds_agent.configfile.declarations import keys_of
from sds_agent.errors import ConfigurationError, ProblemsError

if TYPE_CHECKING:
    from sds_agent.probe import Finding

CANNOT_START = 3
"""The exit code for a configuration that is good, on a machine where `run` would refuse it."""

EXIT_CODES = (
    "0 the configuration is good and the agent can start here; 2 it cannot be used; 3 it is good, but the agent cannot "
    "start here and now as this user, cannot write an output, or cannot show its status: a group that is not there, a "
    "directory or an address that cannot be used, an agent that runs on it already. Nothing is made or changed to find "
    "out. With --probe it is also 3 where an authority does not issue. Warnings change no exit code"
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
    add_format(parser)


class CheckResult(Struct, frozen=True, kw_only=True):
    """What was found, for programs: `problems` make the configuration unusable (exit code 2); `obstacles` keep the
    agent from starting here, `shortfalls` from writing an output, `hidden` from showing its status, and an authority
    whose probe is not good from issuing (3).
    """

    source: str
    problems: "tuple[dict[str, Any], ...]" = ()
    explanation: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    obstacles: tuple[str, ...] = ()
    shortfalls: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    probes: "tuple[Finding, ...]" = ()

    @property
    def unfit(self) -> bool:
        """Whether an agent could not do here what the configuration says."""
        return bool(self.obstacles or self.shortfalls or self.hidden) or any(each.good is False for each in self.probes)


def run(arguments: argparse.Namespace) -> int:
    """Explain the configuration on standard output; report on standard error what keeps the agent from starting here.

    Warnings go there too. Raises ProblemsError, but for programs, which get the problems as a value, and
    ConfigurationError for a wrong call.
    """
    output.silence_warnings()
    if arguments.spend_token and not arguments.probe:
        raise ConfigurationError("--spend-token is a part of --probe, without which no authority is asked; add --probe")
    file = chosen_or_found(arguments, os.environ)
    if chosen(arguments) is None:
        report_passed_over(os.environ)
    try:
        loaded = load(file, os.environ)
    except ProblemsError as error:
        if arguments.format == "table":
            raise
        write(
            CheckResult(source=str(file or "the defaults"), problems=tuple(each._asdict() for each in error.problems)),
            arguments.format,
        )
        return error.exit_code
    result = checked(loaded)
    if arguments.format == "table":
        _show(result)
    if arguments.probe:
        result = structs.replace(result, probes=probes(loaded.settings, spend=arguments.spend_token))
    if arguments.format == "table":
        _showprobes(result)
    else:
        write(result, arguments.format)
    return CANNOT_START if result.unfit else 0


def checked(loaded: Loaded) -> CheckResult:
    """What is found without asking an authority."""
    settings = loaded.settings
    found = [*_overlooked(), *warnings(settings)]
    obstacles = tuple(map(str, preflight.obstacles(settings, SystemClock())))
    return CheckResult(
        source=loaded.source,
        explanation=tuple(explain(loaded)),
        warnings=(*found, *_about_machine(settings), *_about_credentials(settings, found)),
        obstacles=obstacles,
        shortfalls=tuple(map(str, preflight.shortfalls(settings))),
        # an agent that cannot start shows nothing for that reason already, often the same one
        hidden=() if obstacles else tuple(map(str, preflight.hidden(settings))),
    )


def _show(result: CheckResult) -> None:
    for paragraph in result.explanation:
        output.write(textwrap.fill(paragraph, 100, break_long_words=False, break_on_hyphens=False) + "\n")
    for warning in result.warnings:
        output.report(f"warning: {warning}")
    for what, errors in (
        ("start here", result.obstacles),
        ("write every output here", result.shortfalls),
        ("show its status here", result.hidden),
    ):
        if errors:
            output.report(f"the configuration is good, but the agent cannot {what} as uid {os.geteuid()}:")
        for each in errors:
            output.report(each)


def probes(settings: Settings, *, spend: bool) -> "tuple[Finding, ...]":
    """Ask the CAs."""
    import asyncio  # noqa: PLC0415 - measured with gRPC: 150 ms, which no other check needs

    from sds_agent import log, probe  # noqa: PLC0415 - measured: likewise

    log.configure(settings.log.format, "error")
    return tuple(asyncio.run(probe.probe(settings, SystemClock(), spend=spend)))


def _showprobes(result: CheckResult) -> None:
    """What they issue goes to standard output, refusals to standard error."""
    for each in result.probes:
        if each.good is False:
            output.report(f"the authority {each.authority} does not issue: {each.said}")
        else:
            output.write(f"The authority {each.authority}{' is good' if each.good else ''}: {each.said}.")


def _overlooked() -> Iterator[str]:
    for name, meant in environment.overlooked(os.environ, keys_of(Settings)):
        yield f"${name} sets nothing: two underscores stand behind SDS_AGENT, as in ${meant}"


def _about_machine(settings: Settings) -> Iterator[str]:
    """What works on this machine and is perhaps not meant."""
    yield from preflight.of_services(settings)
    yield from preflight.unreachable(settings)
    yield from preflight.shared(settings)
    yield from (f"{key}: {cause}" for key, cause in sources.find_shared(preflight.sources(settings)))


def _about_credentials(settings: Settings, found: list[str]) -> Iterator[str]:
    """What is wrong with them, except for files of which a warning that was `found` says that they are not there."""
    missing = {each.partition(":")[0] for each in found if " does not exist; " in each}
    for warning in preflight.credentials(settings, SystemClock()):
        if warning.partition(":")[0] not in missing:
            yield warning
