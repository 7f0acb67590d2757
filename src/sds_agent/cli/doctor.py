"""`sds-agent doctor`: the configuration, this machine, the agent, its CAs and its Envoys, each with the way out."""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

from sds_agent import __version__
from sds_agent.admin.model import Status, served_names
from sds_agent.cli import asking, output
from sds_agent.cli.check import CheckResult, checked, probes
from sds_agent.cli.config_file import WHY_PASSED_OVER, passed_over
from sds_agent.cli.config_file import found as found_file
from sds_agent.cli.formats import add_format, coloured, document
from sds_agent.clock import SystemClock
from sds_agent.config.loading import Loaded, load
from sds_agent.doctor.agents import judged, of_agent, of_file, worst
from sds_agent.doctor.diagnosis import Diagnosis, bad, good, warning
from sds_agent.errors import ConfigurationError, ProblemsError, SdsAgentError
from sds_agent.text import cut, visible

EXIT_CODES = "0 nothing is bad; 1 something is; 2 a wrong call"
_MARKS = {"good": "good   ", "warning": "warning", "bad": "bad    "}
_LONGEST = 2000
"""Characters of a line."""
RUNS = "another sds-agent"
"""What an obstacle says that is the running agent itself."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The agent, its Envoys, and whether to ask the CAs."""
    asking.add_agent(parser)
    parser.add_argument(
        "--envoy",
        action="append",
        type=asking.place,
        default=[],
        metavar="URL|PATH",
        help="examine this Envoy too, by its admin address such as http://127.0.0.1:9901, or its socket",
    )
    parser.add_argument(
        "--probe",
        action="store_true",
        help="ask each authority of the configuration for a certificate that is thrown away, as check does",
    )
    add_format(parser)


def run(arguments: argparse.Namespace) -> int:
    """Examine everything and print what was found. Raises ConfigurationError for a wrong call."""
    output.silence_warnings()
    if arguments.probe and (arguments.socket is not None or arguments.admin is not None):
        raise ConfigurationError(
            "--probe asks the authorities of a configuration, and none is read with --socket or --admin; name the "
            "agent by --config"
        )
    diagnoses = list(_examined(arguments))
    if arguments.format != "table":
        output.write(document(diagnoses, arguments.format))
    for each in diagnoses if arguments.format == "table" else ():
        # an Envoy's names and a CA's words are theirs: no control character of them reaches the terminal
        line = visible(cut(f"{each.subject}: {each.text}", _LONGEST, count=True))
        output.write(f"{coloured(_MARKS[each.condition], each.condition)}  {line}")
    return 1 if worst(diagnoses) else 0


def _examined(arguments: argparse.Namespace) -> Iterator[Diagnosis]:
    """Everything in the order in which a fault spreads: the file, the machine, the CAs, the agent, its Envoys."""
    loaded, problems = _loaded(arguments)
    yield from problems
    status = None
    try:
        status = _status_beside_unusable(arguments) if problems and loaded is None else asking.status(arguments)
    except SdsAgentError as error:
        yield bad("agent", str(error))
    if loaded is not None:
        yield from _of_configuration(checked(loaded), runs=status is not None)
        yield from _of_socket(loaded.settings.sds.socket if status is None else Path(status.agent.socket))
        yield from _of_authorities(loaded, probe=arguments.probe)
    elif arguments.socket is not None:
        yield from _of_socket(arguments.socket)
    elif problems and status is not None:
        yield from _of_socket(Path(status.agent.socket))
    if status is not None:
        yield from of_agent(status, __version__, asking.named(arguments))
    if status is not None and loaded is not None and loaded.file is not None:
        yield from of_file({each.name: each.spiffe_id for each in loaded.settings.workloads}, status)
    for place in arguments.envoy:
        yield from _of_envoy(place, arguments.socket, status, loaded)


def _status_beside_unusable(arguments: argparse.Namespace) -> Status | None:
    """That of the agent which goes on with what the file held before it could not be used; None where none answers."""
    file = arguments.config or found_file(os.environ)
    try:
        return None if file is None else asking.status(arguments, asking.places_beside(file))
    except SdsAgentError:  # that no agent runs on such a file is no fault beside those of the file
        return None


def _loaded(arguments: argparse.Namespace) -> tuple[Loaded | None, list[Diagnosis]]:
    """The configuration, where the agent is known by one, and what is wrong with it."""
    if arguments.socket is not None or arguments.admin is not None:
        return None, []
    file = arguments.config or found_file(os.environ)
    try:
        loaded = load(file, os.environ)
    except ProblemsError as error:
        return None, [bad("configuration", str(each)) for each in error.problems]
    ignored = passed_over(os.environ) if file is None else None
    passed = [] if ignored is None else [warning("configuration", f"{ignored} is not used: {WHY_PASSED_OVER}")]
    return loaded, [good("configuration", f"it comes from {loaded.source}"), *passed]


def _of_configuration(result: CheckResult, *, runs: bool) -> Iterator[Diagnosis]:
    for each in result.obstacles:
        if not (runs and (RUNS in each or "another server answers" in each)):
            yield bad("machine", each)
    yield from (warning("machine", each) for each in (*result.shortfalls, *result.hidden, *result.warnings))


def _of_socket(path: Path) -> Iterator[Diagnosis]:
    """Whether Envoys are answered: the admin server may answer while the socket is gone, or is another program's."""
    from sds_agent.cli.ready import asked, unreachable  # noqa: PLC0415 - the neighbour
    from sds_agent.rpc.health import NoAgentError  # noqa: PLC0415 - measured with gRPC: 75 of 125 ms

    if (fault := unreachable(path)) is not None:
        yield bad("socket", f"no Envoy can connect to {path}: {fault}")
        return
    try:
        asked(path)
    except NoAgentError as error:
        yield bad("socket", f"no agent answers Envoys at {path}: {error}")
    else:
        yield good("socket", f"{path} answers")


def _of_authorities(loaded: Loaded, *, probe: bool) -> Iterator[Diagnosis]:
    """Reachability and clocks, and with `probe` whether each issues."""
    from sds_agent.doctor.reach import of_place, places  # noqa: PLC0415 - measured: 120 ms for httpx

    settings = loaded.settings
    tried = {
        name: [of_place(name, place, SystemClock().now()) for place in places(chosen)]
        for name, chosen in settings.authorities.items()
    }
    chains = [settings.authorities_of(each) for each in settings.workloads]
    yield from judged(tried, chains)
    if probe:
        for each in probes(loaded.settings, spend=False):
            subject = f"authority {each.authority}"
            yield bad(subject, f"does not issue: {each.said}") if each.good is False else good(subject, each.said)


def _of_envoy(place: str, named: Path | None, status: Status | None, loaded: Loaded | None) -> Iterator[Diagnosis]:
    from sds_agent.doctor.envoys import of_dump  # noqa: PLC0415 - only where it is asked for
    from sds_agent.inspection.envoy_admin import EnvoyAdmin, EnvoyAdminError  # noqa: PLC0415 - measured: 120 ms

    served: list[str] = []
    socket = "" if named is None else str(named)
    if status is not None:
        served = served_names(status)
        socket = status.agent.socket
    elif loaded is not None:
        socket = str(loaded.settings.sds.socket)
    try:
        yield from of_dump(EnvoyAdmin(place).config(), place, socket, served)
    except EnvoyAdminError as error:
        yield bad(f"Envoy {place}", str(error))
    except RecursionError:
        yield bad(f"Envoy {place}", "what answers /config_dump is no Envoy (it is nested too deep)")
