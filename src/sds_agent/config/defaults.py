"""What the loader adds where the file and the environment say nothing: the places, and without a file one workload.

A service manager or an image that made directories for the agent names them in $RUNTIME_DIRECTORY and $STATE_DIRECTORY
(systemd.exec(5), RuntimeDirectory=). Without these variables root uses the machine's directories, and other users their
own (XDG Base Directory Specification). A user who has none gets a directory below /tmp, which the server uses only if
it belongs to the agent's user.
"""

import os
import pwd
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias

from sds_agent.configfile.document import Document, Origin, working_directory
from sds_agent.configfile.types import UnacceptableError, socket_path

TRUST_DOMAIN = "sds-agent.local"
NAME = "default"

SOCKET_OPTION = "--socket"
"""The option that replaces sds.socket."""

Place: TypeAlias = tuple[Path, Origin]
"""A directory, and what decided it."""
Places: TypeAlias = Mapping[str, Place]
"""Those that were taken for keys that the file leaves out."""
NO_PLACES: Places = MappingProxyType({})

_ORIGIN = Origin("the defaults")
_MACHINES = Path("/run/sds-agent")


def without_file() -> Document:
    """The configuration of an agent that is started with no file."""
    tree = {"trust_domain": TRUST_DOMAIN, "workloads": [{"name": NAME}]}
    return Document(tree=dict(tree), origins={(): _ORIGIN}, base=working_directory())


def absolute(path: Path) -> Path:
    """The path, from the working directory if it is relative. Raises ConfigurationError where that was removed."""
    return path if path.is_absolute() else working_directory() / path


def name_default_workload(document: Document) -> None:
    """Make the first workload's SPIFFE ID, without a file, from the trust domain, which a variable may have changed."""
    match document.tree:
        case {"trust_domain": str(trust_domain), "workloads": [dict(first), *_]}:
            if "spiffe_id" not in first:
                first["spiffe_id"] = f"spiffe://{trust_domain}/{NAME}"
                document.origins["workloads", 0, "spiffe_id"] = document.origin(("trust_domain",))


def type_default_authority(document: Document, name: str) -> None:
    """Let a variable set a key of the embedded CA that there is where the file names none: its type stays embedded."""
    match document.tree.get("authorities"):
        case dict(authorities) if list(authorities) == [name] and document.origin(("authorities",)).is_variable:
            only = authorities[name]
            if isinstance(only, dict) and "type" not in only:
                only["type"] = "embedded"
                document.origins["authorities", name, "type"] = _ORIGIN


def fill_places(
    document: Document, environ: Mapping[str, str], uid: int, before: Places = NO_PLACES
) -> dict[str, Place]:
    """Fill in the socket and the state directory where they are left out; returns the directories that this took.

    Those that were taken `before` are taken again: what a running agent uses does not move.
    """
    taken = dict[str, Place]()
    if "state_dir" not in document.tree:
        directory, origin = taken["state_dir"] = before.get("state_dir") or state_directory(environ, uid)
        document.tree["state_dir"] = str(directory)
        document.origins["state_dir",] = origin
    sds = document.tree.setdefault("sds", {})
    if isinstance(sds, dict) and "socket" not in sds:
        directory, origin = taken["sds.socket"] = before.get("sds.socket") or runtime_directory(environ, uid)
        sds["socket"] = str(directory / "sds.sock")
        document.origins["sds", "socket"] = origin
    _place_admin_socket(document)
    return taken


def replace_socket(document: Document, path: Path) -> None:
    """Put the path of `--socket` in the place of the one that the file and the variables have."""
    if document.tree.get("sds") is None:
        document.tree["sds"] = {}
    sds = document.tree["sds"]
    if isinstance(sds, dict):  # or else the reader reports what it is
        sds["socket"] = str(path)
        document.origins["sds", "socket"] = Origin(SOCKET_OPTION)


def admin_socket(socket: Path) -> Path:
    """The admin server's socket, beside the one that Envoys connect to."""
    return socket.with_name(f"{socket.stem}.admin{socket.suffix}")


def _place_admin_socket(document: Document) -> None:
    match document.tree.get("sds"), document.tree.setdefault("admin", {}):
        case {"socket": str(socket)}, dict(admin) if "socket" not in admin and Path(socket).name:
            path = str(admin_socket(Path(socket)))
            # the reader says what is wrong with sds.socket; one beside it may be too long
            with suppress(UnacceptableError):
                for each in (socket, path):
                    socket_path(each, document.base)
                admin["socket"] = path
                document.origins["admin", "socket"] = document.origin(("sds", "socket"))


def runtime_directory(environ: Mapping[str, str], uid: int) -> Place:
    """Where the socket goes, and the variable that decided it."""
    if made := _first(environ.get("RUNTIME_DIRECTORY", "")):
        return made, _from("RUNTIME_DIRECTORY")
    if uid == 0:
        return _MACHINES, _ORIGIN
    given = environ.get("XDG_RUNTIME_DIR", "")
    if _usable(given):
        return Path(given, "sds-agent"), _from("XDG_RUNTIME_DIR")
    return _last_resort(uid), _ORIGIN


def runtime_directories(environ: Mapping[str, str], uid: int) -> tuple[Path, ...]:
    """Where the socket of an agent may be that runs on the defaults, the likeliest first.

    A service manager or an image sets a variable for the agent that the shell of the person who calls this does not
    have. In /tmp any user could pose as the agent: a directory there counts only if it is the user's own.
    """
    own, _ = runtime_directory(environ, uid)
    given = environ.get("XDG_RUNTIME_DIR", "")
    users = (Path(given, "sds-agent"),) if Path(given).is_absolute() else ()
    places = dict.fromkeys((own, _MACHINES, *users, _last_resort(uid)))
    return tuple(each for each in places if each != _last_resort(uid) or _is_of(uid, each))


def _is_of(uid: int, directory: Path) -> bool:
    try:
        return directory.lstat().st_uid == uid
    except OSError:
        return False


def state_directory(environ: Mapping[str, str], uid: int) -> Place:
    """Where state goes, and the variable that decided it."""
    if made := _first(environ.get("STATE_DIRECTORY", "")):
        return made, _from("STATE_DIRECTORY")
    if uid == 0:
        return Path("/var/lib/sds-agent"), _ORIGIN
    given = environ.get("XDG_STATE_HOME", "")
    if Path(given).is_absolute():
        return Path(given, "sds-agent"), _from("XDG_STATE_HOME")
    home = environ.get("HOME", "")
    if _usable(home):
        return Path(home, ".local/state/sds-agent"), _from("HOME")
    home = _home_of(uid)
    if _usable(home):
        return Path(home, ".local/state/sds-agent"), _ORIGIN
    return _last_resort(uid) / "state", _ORIGIN


def _last_resort(uid: int) -> Path:
    return Path(f"/tmp/sds-agent-{uid}")  # noqa: S108 - the server refuses it unless it belongs to the agent's user


def _first(listed: str) -> Path | None:
    """The first of the directories that systemd lists, with colons between them; None if that one is relative."""
    first = Path(listed.partition(":")[0])
    return first if first.is_absolute() else None


def _from(variable: str) -> Origin:
    return Origin(f"${variable}", is_variable=True)


def _usable(directory: str) -> bool:
    """Whether to use a directory that a variable names.

    The specification ignores relative paths, and in services and containers the variable may name no directory.
    """
    return Path(directory).is_absolute() and os.access(directory, os.W_OK | os.X_OK)


def _home_of(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_dir
    except KeyError:  # a container's user without an account
        return ""
