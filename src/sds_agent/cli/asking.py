"""Asks a running agent for its status over its admin socket, for the commands that show it."""

import argparse
import os
import re
import shlex
import socket
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sds_agent.admin.model import Status
from sds_agent.cli.answered import NotStatusError, read_status
from sds_agent.cli.config_file import found, report_passed_over
from sds_agent.cli.paths import as_path, as_socket, filled
from sds_agent.cli.ready import asked, sockets
from sds_agent.config.defaults import admin_socket
from sds_agent.errors import ProblemsError, SdsAgentError
from sds_agent.files import looked_up
from sds_agent.text import one_line

if TYPE_CHECKING:
    import httpx

    from sds_agent.inspection.web import WebAnswer

OK = 200
TIMEOUT = 5.0
"""Seconds for a connection to a socket."""
SILENCE = 45.0
"""Seconds without a line after which /events counts as gone: the agent writes one every 15 s."""
LONGEST_LINE = 1 << 20
"""Bytes of a line of /events: one event has some thousands."""
_LONGEST_WORDS = 300
_URLS = ("http://", "https://")
_VARIABLES = "SDS_AGENT__ADMIN__"
"""What the variables begin with that say where the admin server is."""
_HOST_AND_PORT = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9.-]+):[0-9]{1,5}")


class NoAdminError(SdsAgentError):
    """No agent's admin server answers."""


def add_agent(parser: argparse.ArgumentParser) -> None:
    """Declare how the agent is named: by its configuration, its socket, or its admin server."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--config",
        type=as_path,
        metavar="FILE",
        help="the configuration that the agent runs on; by default ./sds-agent.yaml if there is one, or else the "
        "defaults",
    )
    which.add_argument(
        "--socket", type=as_socket, metavar="PATH", help="the agent's SDS socket; no configuration is read"
    )
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


def named(arguments: argparse.Namespace) -> str:
    """The option that named the agent, as it is added to the call of another command; empty where none did."""
    for option in ("config", "socket", "admin"):
        if (value := getattr(arguments, option)) is not None:
            return f" --{option} {shlex.quote(str(value))}"
    return ""


def place(text: str) -> str:
    """The URL or the path that a user named; `127.0.0.1:9902` is an address and becomes a URL. Raises
    ArgumentTypeError for an empty one.
    """
    scheme, _, rest = text.partition("://")
    if (url := f"{scheme.lower()}://{rest}").startswith(_URLS):  # capitals are no other scheme (RFC 3986, section 3.1)
        return url
    return f"http://{text}" if _HOST_AND_PORT.fullmatch(filled(text)) else text


def places(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Where the admin server may be, the likeliest first: paths and URLs. Raises NoAdminError and ProblemsError."""
    if arguments.admin is not None:
        return (str(arguments.admin),)
    if arguments.socket is not None:
        return (str(admin_socket(arguments.socket)),)
    file = config(arguments)
    from sds_agent.config.loading import load  # noqa: PLC0415 - measured: 55 ms

    loaded = load(file, os.environ)
    if file is None and not any(each.upper().startswith(_VARIABLES) for each in loaded.variables):
        return tuple(str(admin_socket(each)) for each in sockets(None, os.environ))
    chosen = loaded.settings.admin
    known = [str(chosen.socket)] if chosen.socket is not None else []
    known += [f"http://{chosen.address}"] if chosen.address is not None else []
    if not chosen.enabled:
        raise NoAdminError(
            f"the configuration ({loaded.source}) has admin.enabled: false, so its agent shows no status; set it to "
            "true and start the agent again (`sds-agent secret` needs no admin server)"
        )
    if not known:
        raise NoAdminError(
            f"the configuration ({loaded.source}) gives the admin server no place; set admin.socket to a shorter path"
        )
    return tuple(known)


def places_beside(file: Path) -> tuple[str, ...]:
    """Where the admin server of an agent may be that runs on what this file held before: where the file still says, or
    else by default. Empty where it is no file. Raises ProblemsError.
    """
    from sds_agent.config.defaults import without_file  # noqa: PLC0415 - measured: 55 ms
    from sds_agent.config.loading import load  # noqa: PLC0415 - likewise
    from sds_agent.configfile.source import read  # noqa: PLC0415 - likewise

    with suppress(OSError):  # where it cannot be examined, it may be one that the agent's user reads
        found = looked_up(file)
        if found is None or not stat.S_ISREG(found.st_mode):
            return ()
    try:
        document, _ = read(file)
        said = {key: value for key, value in document.tree.items() if key in {"sds", "admin"}}
        document.tree = {**without_file().tree, **said}
        chosen = load(None, os.environ, read=(document, [])).settings.admin
    except ProblemsError:
        return tuple(str(admin_socket(each)) for each in sockets(None, os.environ))
    known = (chosen.socket, None if chosen.address is None else f"http://{chosen.address}")
    return tuple(str(each) for each in known if each is not None) if chosen.enabled else ()


def status(arguments: argparse.Namespace, at: tuple[str, ...] | None = None) -> Status:
    """The agent's status, all of whose texts are printable; `at` are the places where it may be asked, by default those
    of the call. Raises NoAdminError and ProblemsError.
    """
    where, answer = _asked("/status", arguments, at)
    try:
        return read_status(answer.body, where)
    except NotStatusError as error:
        raise NoAdminError(f"{error} (it sent {answer.looks()})" if error.is_other else str(error)) from error


def _asked(path: str, arguments: argparse.Namespace, at: tuple[str, ...] | None = None) -> tuple[str, "WebAnswer"]:
    """The place that answers a GET of that path with 200, and its answer. Raises NoAdminError and ProblemsError."""
    from sds_agent.inspection import web  # noqa: PLC0415 - measured: 120 ms for httpx

    faults = []
    for each in places(arguments) if at is None else at:
        # httpcore leaves a Unix socket open that it could not connect
        if not each.startswith(_URLS) and (reason := unreachable(Path(each))) is not None:
            faults.append(f"{each} ({reason})")
            continue
        try:
            (answer,) = web.get(each, path)
        except web.WebError as error:
            faults.append(f"{each} ({_why(each, error)})")
            continue
        if answer.status == OK:
            return each, answer
        faults.append(f"{each} (it answers {answer.status})")
    raise NoAdminError(
        _no_answer(faults, arguments) if at is None else f"no agent answers at {' nor at '.join(faults)}"
    )


def changes(arguments: argparse.Namespace) -> Iterator[bool]:
    """Follow /events for as long as the agent runs: True each time that the status has changed, also at first, and
    False from time to time in between. Raises NoAdminError when the agent has ended, and ProblemsError.
    """
    import httpx  # noqa: PLC0415 - measured: 120 ms

    answering, _ = _asked("/livez", arguments)
    try:
        with _client(answering, SILENCE) as client, client.stream("GET", "/events") as answer:
            for line in _lines(answer.raise_for_status(), answering):
                if line == b"event: status":
                    yield True
                elif line.startswith(b":"):
                    yield False
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:
        raise NoAdminError(f"the agent at {answering} no longer answers: {_why(answering, error)}") from error
    raise NoAdminError(f"the agent at {answering} has ended")


def _lines(answer: "httpx.Response", where: str) -> Iterator[bytes]:
    """The lines as they come. Raises NoAdminError for one that does not end."""
    begun = b""
    for chunk in answer.iter_raw():
        *whole, begun = (begun + chunk).split(b"\n")
        yield from whole
        if len(begun) > LONGEST_LINE:
            raise NoAdminError(f"what answers at {where} is no agent: a line of its /events does not end")


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


def _client(each: str, timeout: float) -> "httpx.Client":
    import httpx  # noqa: PLC0415 - measured: 120 ms

    is_url = each.startswith(_URLS)
    transport = httpx.HTTPTransport(verify=each.startswith("https://"), uds=None if is_url else each)
    base = each.rstrip("/") if is_url else "http://localhost"
    headers = {"accept-encoding": "identity"}
    return httpx.Client(base_url=base, transport=transport, timeout=timeout, trust_env=False, headers=headers)


def _why(each: str, error: Exception) -> str:
    reason = None if each.startswith(_URLS) else unreachable(Path(each))
    return reason or one_line(str(error), _LONGEST_WORDS) or type(error).__name__


def _no_answer(faults: list[str], arguments: argparse.Namespace) -> str:
    named = arguments.config, arguments.socket, arguments.admin
    if named == (None, None, None):
        report_passed_over(os.environ)
    where = " nor at ".join(faults)
    heard = [] if arguments.admin is not None else [each for each in _served_at(arguments) if not unreachable(each)]
    for each in heard[:1]:
        from sds_agent.rpc.health import NoAgentError  # noqa: PLC0415 - measured with gRPC: 75 of 125 ms

        try:
            asked(each)
        except NoAgentError as error:
            return f"no agent answers at {each}: {error}"
        return (
            f"the agent at {each} serves secrets and no admin server answers at {where}; it may have "
            "admin.enabled: false, or another place for it: name that with --admin or --config"
        )
    return f"no agent answers at {where}; start one with `sds-agent run`, or name it with --config, --socket or --admin"


def _served_at(arguments: argparse.Namespace) -> tuple[Path, ...]:
    return (arguments.socket,) if arguments.socket is not None else sockets(config(arguments), os.environ)
