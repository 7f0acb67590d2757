"""Asks a running agent for its status over its admin socket, for the commands that show it."""

import argparse
import os
from pathlib import Path

import msgspec

from sds_agent.admin.model import Status
from sds_agent.cli.ready import sockets
from sds_agent.config.defaults import admin_socket
from sds_agent.errors import SdsAgentError

TIMEOUT = 5.0
"""Seconds that the agent may take to answer."""


class NoAdminError(SdsAgentError):
    """No agent's admin server answers."""


def add_agent(parser: argparse.ArgumentParser) -> None:
    """Declare how the agent is named: by its configuration, its socket, or its admin server."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="the configuration that the agent runs on; without one the agent that runs on the defaults is asked",
    )
    which.add_argument("--socket", type=Path, metavar="PATH", help="the agent's SDS socket; no configuration is read")
    which.add_argument(
        "--admin", metavar="PATH|URL", help="the admin server's socket, or its address such as http://127.0.0.1:9902"
    )


def places(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Where the admin server may be, the likeliest first: paths and URLs. Raises ProblemsError."""
    if arguments.admin is not None:
        return (str(arguments.admin),)
    if arguments.socket is not None:
        return (str(admin_socket(arguments.socket)),)
    if arguments.config is None:
        return tuple(str(admin_socket(each)) for each in sockets(None, os.environ))
    from sds_agent.config.loading import load  # noqa: PLC0415 - measured: 55 ms

    chosen = load(arguments.config, os.environ).settings.admin
    found = [str(chosen.socket)] if chosen.socket is not None else []
    return (*found, *([f"http://{chosen.address}"] if chosen.address is not None else []))


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
    for place in tried:
        socket = None if place.startswith("http") else place
        transport = httpx.HTTPTransport(uds=socket)
        try:
            with httpx.Client(transport=transport, timeout=TIMEOUT, trust_env=False) as client:
                answer = client.get(f"{'http://localhost' if socket else place.rstrip('/')}{path}")
        except httpx.HTTPError as error:
            faults.append(f"{place} ({str(error) or type(error).__name__})")
            continue
        if answer.status_code == httpx.codes.OK:
            return answer.content
        faults.append(f"{place} (it answers {answer.status_code})")
    raise NoAdminError(
        f"no agent answers at {' nor at '.join(faults)}; start one with `sds-agent run`, or name it with --config, "
        "--socket or --admin"
    )
