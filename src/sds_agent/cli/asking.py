"""Asks a running agent for its status over its admin socket, for the commands that show it."""

import argparse
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from sds_agent.admin.model import Status
from sds_agent.cli.config_file import found
from sds_agent.cli.ready import sockets
from sds_agent.config.defaults import admin_socket
from sds_agent.errors import SdsAgentError

if TYPE_CHECKING:
    import httpx

TIMEOUT = 5.0
"""Seconds that the agent may take to answer."""
SILENCE = 45.0
"""Seconds without a line after which /events counts as gone: the agent writes one every 15 s."""
_URLS = ("http://", "https://")
_HOST_AND_PORT = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+):[0-9]{1,5}")


class NoAdminError(SdsAgentError):
    """No agent's admin server answers."""


def add_agent(parser: argparse.ArgumentParser) -> None:
    """Declare how the agent is named: by its configuration, its socket, or its admin server."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="the configuration that the agent runs on; by default ./sds-agent.yaml if there is one, or else the "
        "defaults",
    )
    which.add_argument("--socket", type=Path, metavar="PATH", help="the agent's SDS socket; no configuration is read")
    which.add_argument(
        "--admin",
        type=place,
        metavar="PATH|URL",
        help="the admin server's socket, or its address such as http://127.0.0.1:9902",
    )


def config(arguments: argparse.Namespace) -> Path | None:
    """The configuration that the agent runs on: the one that was named, or found where no socket was named. Raises
    ConfigurationError.
    """
    if arguments.socket is not None or arguments.admin is not None:
        return None
    named: Path | None = arguments.config
    return found(os.environ) if named is None else named


def place(text: str) -> str:
    """The URL or the path that a user named; `127.0.0.1:9902` is an address and becomes a URL."""
    return f"http://{text}" if _HOST_AND_PORT.fullmatch(text) else text


def places(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Where the admin server may be, the likeliest first: paths and URLs. Raises NoAdminError and ProblemsError."""
    if arguments.admin is not None:
        return (str(arguments.admin),)
    if arguments.socket is not None:
        return (str(admin_socket(arguments.socket)),)
    file = config(arguments)
    if file is None:
        return tuple(str(admin_socket(each)) for each in sockets(None, os.environ))
    from sds_agent.config.loading import load  # noqa: PLC0415 - measured: 55 ms

    chosen = load(file, os.environ).settings.admin
    known = [str(chosen.socket)] if chosen.socket is not None else []
    known += [f"http://{chosen.address}"] if chosen.address is not None else []
    if not chosen.enabled:
        raise NoAdminError(
            f"{file} has admin.enabled: false, so its agent shows no status; set it to true and start the "
            "agent again (`sds-agent secret` needs no admin server)"
        )
    if not known:
        raise NoAdminError(f"{file} gives the admin server no place; set admin.socket to a shorter path")
    return tuple(known)


def status(arguments: argparse.Namespace) -> Status:
    """The agent's status. Raises NoAdminError and ProblemsError."""
    data = get("/status", arguments)
    try:
        return msgspec.json.decode(data, type=Status)
    except msgspec.MsgspecError as error:
        raise NoAdminError(f"what answers is no admin server of this version of sds-agent: {error}") from error


def get(path: str, arguments: argparse.Namespace) -> bytes:
    """What the admin server answers to a GET of that path. Raises NoAdminError and ProblemsError."""
    import httpx  # noqa: PLC0415 - measured: 120 ms

    tried = places(arguments)
    faults = []
    for each in tried:
        # httpcore leaves a Unix socket open that it could not connect
        if not each.startswith(_URLS) and (reason := unreachable(Path(each))) is not None:
            faults.append(f"{each} ({reason})")
            continue
        try:
            with _client(each, TIMEOUT) as client:
                answer = client.get(path)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            faults.append(f"{each} ({_why(each, error)})")
            continue
        if answer.status_code == httpx.codes.OK:
            return answer.content
        faults.append(f"{each} (it answers {answer.status_code})")
    raise NoAdminError(_no_answer(faults, arguments))


def changes(arguments: argparse.Namespace) -> Iterator[bool]:
    """Follow /events for as long as the agent runs: True each time that the status has changed, also at first, and
    False from time to time in between. Raises NoAdminError when the agent has ended, and ProblemsError.
    """
    import httpx  # noqa: PLC0415 - measured: 120 ms

    answering = next((each for each in places(arguments) if _answers(each)), None)
    if answering is None:
        get("/livez", arguments)  # raises with the reason
        return
    try:
        with _client(answering, SILENCE) as client, client.stream("GET", "/events") as answer:
            for line in answer.raise_for_status().iter_lines():
                if line == "event: status":
                    yield True
                elif line.startswith(":"):
                    yield False
    except httpx.HTTPError as error:
        raise NoAdminError(f"the agent at {answering} no longer answers: {_why(answering, error)}") from error
    raise NoAdminError(f"the agent at {answering} has ended")


def unreachable(path: Path) -> str | None:
    """Why nothing can be connected to at a Unix socket, in words; None if a process listens there."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as attempt:
        attempt.settimeout(TIMEOUT)
        try:
            attempt.connect(str(path))
        except FileNotFoundError:
            return "there is no such socket"
        except ConnectionRefusedError:
            return "no process listens there"
        except PermissionError:
            return "this user may not connect to it: ask as the agent's user, in its group, or as root"
        except OSError as error:
            return str(error.strerror or error)
    return None


def _answers(each: str) -> bool:
    """Whether something listens at a path; of a URL the request itself tells."""
    return each.startswith(_URLS) or unreachable(Path(each)) is None


def _client(each: str, timeout: float) -> "httpx.Client":
    import httpx  # noqa: PLC0415 - measured: 120 ms

    is_url = each.startswith(_URLS)
    transport = httpx.HTTPTransport(uds=None if is_url else each)
    base = each.rstrip("/") if is_url else "http://localhost"
    return httpx.Client(base_url=base, transport=transport, timeout=timeout, trust_env=False)


def _why(each: str, error: Exception) -> str:
    reason = None if each.startswith(_URLS) else unreachable(Path(each))
    return reason or str(error) or type(error).__name__


def _no_answer(faults: list[str], arguments: argparse.Namespace) -> str:
    where = " nor at ".join(faults)
    serving = [] if arguments.admin is not None else [each for each in _served_at(arguments) if not unreachable(each)]
    if serving:
        return (
            f"the agent at {serving[0]} serves secrets and no admin server answers at {where}; it may have "
            "admin.enabled: false, or another place for it: name that with --admin or --config"
        )
    return f"no agent answers at {where}; start one with `sds-agent run`, or name it with --config, --socket or --admin"


def _served_at(arguments: argparse.Namespace) -> tuple[Path, ...]:
    return (arguments.socket,) if arguments.socket is not None else sockets(config(arguments), os.environ)
