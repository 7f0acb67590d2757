"""`sds-agent secret`: what the SDS socket serves, asked as an Envoy asks, or what an Envoy has really loaded."""

import argparse
import os
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from sds_agent.cli import asking, output
from sds_agent.cli.config_file import report_passed_over
from sds_agent.cli.formats import add_format, coloured, document, table
from sds_agent.cli.ready import is_socket, sockets
from sds_agent.errors import SdsAgentError
from sds_agent.text import quoted, visible

if TYPE_CHECKING:
    from sds_agent.inspection.secrets import InspectedSecret

TIMEOUT = 5.0
LONGEST = 3600
"""Seconds to wait for a secret: of some billions gRPC makes a time that is past."""
MOST_NAMES = 20
"""Names of an Envoy's secrets in a message."""

EXIT_CODES = (
    "0 every secret is there, and with --diff the same on both sides; 1 one is missing or differs, or nobody answers; "
    "2 a wrong call, or a configuration that cannot be used"
)


class SecretError(SdsAgentError):
    """What was to be shown cannot be had."""


class SecretCallError(SecretError):
    """The options do not fit each other."""

    exit_code = 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The names, where they are asked, and the format."""
    parser.add_argument(
        "names",
        nargs="*",
        type=_name,
        metavar="NAME",
        help="a resource name; without one all that the agent serves",
    )
    asking.add_agent(parser)
    parser.add_argument(
        "--envoy",
        type=asking.place,
        metavar="URL|PATH",
        help="read what this Envoy has loaded, from its admin address such as http://127.0.0.1:9901, or its socket",
    )
    parser.add_argument("--diff", action="store_true", help="with --envoy: hold it against what the agent serves")
    parser.add_argument(
        "--timeout",
        type=_seconds,
        default=TIMEOUT,
        metavar="SECONDS",
        help="how long to wait for secrets that are not issued yet, all together; by default 5",
    )
    add_format(parser, "pem")


def _name(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise argparse.ArgumentTypeError("a resource name is text in UTF-8") from error
    return text


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0
    if not 0 < seconds <= LONGEST:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is no number of seconds above 0, and up to {LONGEST}")
    return seconds


def run(arguments: argparse.Namespace) -> int:
    """Show them. Raises SecretError, NoAdminError and ProblemsError."""
    output.silence_warnings()
    if arguments.diff and arguments.envoy is None:
        raise SecretCallError("--diff compares the agent with an Envoy: name its admin address with --envoy")
    if arguments.diff and arguments.format == "pem":
        raise SecretCallError("--diff shows no certificates: leave out -o pem")
    if arguments.diff:
        return _compare(arguments)
    found = _of_envoy(arguments) if arguments.envoy is not None else _of_agent(arguments, arguments.names)
    _show(found, arguments.format)
    if not found and arguments.envoy is not None:
        output.report(
            f"the Envoy at {arguments.envoy} has asked for no secret over SDS; `sds-agent doctor --envoy "
            f"{shlex.quote(arguments.envoy)}{asking.named(arguments)}` examines its configuration"
        )
    return 0 if found and all(each.state == "ACTIVE" for each in found) else 1


def _show(found: Sequence["InspectedSecret"], form: str) -> None:
    from sds_agent.inspection import istioctl  # noqa: PLC0415 - measured: 25 ms for cryptography

    if form == "pem":
        output.write("".join(each.pem.decode("ascii", "replace") for each in found).rstrip("\n"))
    elif form == "table":
        output.write(table(istioctl.HEAD, istioctl.rows(found, datetime.now(UTC))))
    else:
        output.write(document(istioctl.dump(found), form))
    for each in found:
        if each.detail:
            output.report(f"{each.name}: {each.detail}")


def _of_envoy(arguments: argparse.Namespace) -> Sequence["InspectedSecret"]:
    from sds_agent.inspection.envoy_admin import EnvoyAdmin, EnvoyAdminError  # noqa: PLC0415 - measured: 120 ms

    try:
        found = EnvoyAdmin(arguments.envoy).secrets()
    except EnvoyAdminError as error:
        raise SecretError(str(error)) from error
    names = arguments.names
    missing = [name for name in names if name not in {each.name for each in found}]
    if missing:
        known = ", ".join(each.name for each in found[:MOST_NAMES]) or "none"
        raise SecretError(f"this Envoy has no secret named {', '.join(missing)}; it has {known}")
    return [each for each in found if not names or each.name in names]


def _of_agent(arguments: argparse.Namespace, names: Sequence[str]) -> Sequence["InspectedSecret"]:
    import asyncio  # noqa: PLC0415 - measured with gRPC: 75 ms

    from sds_agent.inspection.sds_client import UnreachableError, ask  # noqa: PLC0415 - measured: likewise

    socket = _socket(arguments)
    if (fault := asking.unreachable(socket)) is not None:
        if (arguments.config, arguments.socket, arguments.admin) == (None, None, None):
            report_passed_over(os.environ)
        raise SecretError(
            f"no agent answers at {socket}: {fault}; start one with `sds-agent run`, or name it with --config or "
            "--socket"
        )
    try:
        return asyncio.run(ask(socket, names or _all_names(arguments), arguments.timeout))
    except UnreachableError as error:
        raise SecretError(f"{socket} serves no secrets ({error}); name the agent's socket with --socket") from error


def _socket(arguments: argparse.Namespace) -> Path:
    """Where the agent serves. Raises NoAdminError and ProblemsError."""
    if arguments.socket is not None:
        return Path(arguments.socket)
    if arguments.admin is not None:
        return Path(asking.status(arguments).agent.socket)
    found = sockets(asking.config(arguments), os.environ)
    return next((each for each in found if is_socket(each)), found[0])


def _all_names(arguments: argparse.Namespace) -> Sequence[str]:
    """The first name of each secret: from the agent's status, or else from the configuration."""
    try:
        status = asking.status(arguments)
    except asking.NoAdminError as error:
        if arguments.socket is not None or arguments.admin is not None:
            raise SecretError(f"the names are not known: {error}; give one or more of them") from error
        from sds_agent.config.loading import load  # noqa: PLC0415 - measured: 55 ms

        settings = load(asking.config(arguments), os.environ).settings
        return [*(each.name for each in settings.workloads), settings.bundle_names[0]]
    served = [each.names for each in status.identities] + [each.names for each in status.bundles]
    return [name for names in served for name in names[:1]]


def _compare(arguments: argparse.Namespace) -> int:
    from sds_agent.inspection.secrets import difference  # noqa: PLC0415 - measured: 25 ms for cryptography

    loaded = {each.name: each for each in _of_envoy(arguments)}
    comparable = [name for name, each in loaded.items() if each.kind is not None or each.state != "ACTIVE"]
    served = _of_agent(arguments, arguments.names or comparable)
    found = [difference(each, loaded.get(each.name)) for each in served]
    if arguments.format in {"json", "yaml"}:
        output.write(document(found, arguments.format))
    else:
        for each in found:
            mark = coloured("same", "good") if each.same else coloured("differs", "bad")
            output.write(f"{visible(each.name)}: {mark}; {each.text}")
    return 0 if all(each.same for each in found) else 1
