"""`sds-agent ready`: ask a running agent over its own socket, for health checks of containers and service managers."""

import argparse
import os
import socket
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from sds_agent.cli import output
from sds_agent.cli.config_file import add_file, chosen, chosen_or_found, report_passed_over
from sds_agent.files import looked_up
from sds_agent.text import visible

if TYPE_CHECKING:
    from sds_agent.rpc.health import Answer

NOT_READY = 1
TIMEOUT = 2.0
"""Seconds that the agent may take to answer."""

EXIT_CODES = (
    "0 every workload has a certificate that is valid; 1 one has none, which is named with the reason, or "
    "no agent answers; 2 a wrong call, or a configuration that cannot be used"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The file, or the socket itself."""
    add_file(
        parser,
        "the configuration that the agent runs on; by default ./sds-agent.yaml if there is one, or else the defaults",
        socket_about="the agent's socket; no configuration is read",
    )


def run(arguments: argparse.Namespace) -> int:
    """Exit code 0 when the agent is ready, 1 when it is not or does not answer. Raises ProblemsError."""
    file = None if arguments.socket else chosen_or_found(arguments, os.environ)
    places = [arguments.socket] if arguments.socket else sockets(file, os.environ)
    path = next((each for each in places if is_socket(each)), places[0])
    if (fault := unreachable(path)) is not None:
        output.report(f"no agent answers at {path}: {fault}")
        if not arguments.socket and not file and chosen(arguments) is None:
            report_passed_over(os.environ)
        if not arguments.socket and not file:
            others = ", ".join(str(each) for each in places if each != path)
            nor = f"nor is there one at {others}; " if others else ""
            output.report(f"{nor}name the agent's FILE, or its socket with --socket")
        return NOT_READY
    return _ask(path)


def sockets(file: Path | None, environ: Mapping[str, str]) -> tuple[Path, ...]:
    """The paths that the agent's socket may have, the likeliest first. Raises ProblemsError.

    Without a file, the agent may run as another user or with other variables than this command.
    """
    # a health check runs this command every few seconds, with --socket without a configuration
    from sds_agent.config.defaults import runtime_directories  # noqa: PLC0415 - measured: 55 ms
    from sds_agent.config.loading import load  # noqa: PLC0415 - measured: likewise

    loaded = load(file, environ)
    chosen = loaded.settings.sds.socket
    usual = tuple(each / chosen.name for each in runtime_directories(environ, os.geteuid()))
    is_default = file is None and "SDS_AGENT__SDS__SOCKET" not in map(str.upper, environ)
    return tuple(dict.fromkeys((chosen, *usual))) if is_default else (chosen,)


def is_socket(path: Path) -> bool:
    """Whether there is a socket, as far as this user may see that."""
    try:
        found = looked_up(path)
    except OSError:  # this user may not enter the directory: the attempt to connect reports it
        return True
    return found is not None and stat.S_ISSOCK(found.st_mode)


def unreachable(path: Path) -> str | None:
    """Why nothing can be connected to, which gRPC does not say."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as attempt:
        attempt.settimeout(TIMEOUT)
        try:
            attempt.connect(str(path))
        except FileNotFoundError:
            return "there is no socket; is it running, and on this configuration?"
        except ConnectionRefusedError:
            if not path.is_socket():
                return "that is no socket; name the agent's"
            return "its socket is there and no process listens at it; it was killed, start it again"
        except PermissionError:
            return "this user may not connect to it; ask as the agent's user, in its group, or as root"
        except OSError as error:
            return f"{error.strerror or error}; is this the agent's socket?"
    return None


def asked(path: Path) -> "Answer":
    """What the process that listens at a socket says of itself. Raises NoAgentError where it is none of ours."""
    import asyncio  # noqa: PLC0415 - measured with gRPC: 75 of 125 ms

    from sds_agent.rpc.health import check  # noqa: PLC0415 - measured: likewise

    return asyncio.run(check(f"unix:{quote(str(path))}", TIMEOUT))


def _ask(path: Path) -> int:
    from sds_agent.rpc.health import NoAgentError  # noqa: PLC0415 - measured with gRPC: 75 of 125 ms

    try:
        answer = asked(path)
    except NoAgentError as error:
        output.report(f"no agent answers at {path}: {error}")
        return NOT_READY
    if answer.ready:
        output.write("ready")
        return 0
    output.report(f"the agent at {path} is not ready; its log has more:")
    for reason in answer.reasons or ("it does not say why",):
        output.report(visible(reason))  # whoever listens there wrote it
    return NOT_READY
