"""What systemd tells a service by variables, and what the service tells it: sockets handed over, and notifications.

Sources: sd_listen_fds(3), sd_notify(3), sd_watchdog_enabled(3). Other service managers have adopted both protocols. The
libraries for them are either bound to libsystemd or no longer maintained, and each protocol is a few lines.

The variables are for this process alone, so they are taken out of the environment: a hook that it starts must not speak
in its place.
"""

import os
import socket
import stat
import time
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path

from msgspec import Struct

from sds_agent.errors import ConfigurationError
from sds_agent.text import one_line

FIRST = 3
"""The first descriptor that is handed over (SD_LISTEN_FDS_START)."""
MOST = 64
"""Descriptors that are looked at: no unit of ours has more than two."""
MOST_DIGITS = 18
"""Of a number in a variable: of more no length of time can be made, and no descriptor has so many."""
LONGEST_STATUS = 200
"""Characters of a status line: `systemctl status` shows one line."""


class HandedOverSocket(Struct, frozen=True):
    """A Unix stream socket that listens already, by its descriptor, its path, and its name in the unit."""

    descriptor: int
    path: Path
    name: str


def handed_over(environ: MutableMapping[str, str]) -> tuple[HandedOverSocket, ...]:
    """The sockets that a service manager has handed to this process; none where it did not.

    Raises ConfigurationError for a descriptor that is no Unix stream socket with a path: the unit is wrong.
    """
    pid, count, names = (environ.pop(name, "") for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"))
    if pid != str(os.getpid()) or not _is_number(count):
        return ()
    labels = names.split(":") if names else []
    return tuple(
        _listening(FIRST + index, labels[index] if index < len(labels) else "unknown")
        for index in range(min(int(count), MOST))
    )


def _listening(descriptor: int, name: str) -> HandedOverSocket:
    found = _described(descriptor)
    if isinstance(found, str):
        raise ConfigurationError(
            f"the service manager hands over the descriptor {descriptor} ({one_line(name, 60)}), which is {found}; "
            "write ListenStream=PATH into the .socket unit"
        )
    os.set_inheritable(descriptor, False)
    return HandedOverSocket(descriptor, found, name)


def _described(descriptor: int) -> Path | str:
    """The path at which it listens, or in words what it is instead."""
    try:
        if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
            return "no socket"
        with socket.socket(fileno=os.dup(descriptor)) as found:
            if found.family != socket.AF_UNIX or found.type != socket.SOCK_STREAM:
                return "no Unix stream socket"
            if not found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                return "a socket that does not listen"
            address = found.getsockname()
    except OSError as error:
        return f"not usable ({error.strerror or error})"
    return Path(address) if isinstance(address, str) and address else "a socket without a path"


class Notifier:
    """Tells the service manager how this process does. Without one, and where it does not listen, nothing happens."""

    def __init__(self, address: str = "", watchdog: timedelta | None = None) -> None:
        """`address` is a path, or a name in the abstract namespace after an @. `watchdog` is how long the manager waits
        for a sign of life.
        """
        self._address = f"\0{address[1:]}" if address.startswith("@") else address
        self.watchdog = watchdog
        self._owed: tuple[str, ...] = ()  # what the manager waits for, and its full queue did not take

    @property
    def is_there(self) -> bool:
        """Whether there is a service manager to tell."""
        return bool(self._address)

    def ready(self, status: str = "") -> None:
        """The start, or a reload, is done. Where the manager's queue is full, it is said again with a sign of life: a
        manager that does not hear it ends the service.
        """
        self._owed = ("READY=1", *_status(status))
        self._settle()

    def status(self, text: str) -> None:
        """How it does, in one line for people."""
        self._send(*_status(text))

    def reloading(self) -> None:
        """A reload begins; `ready` ends it."""
        self._owed = ()
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self) -> None:
        """The end begins."""
        self._send("STOPPING=1")

    def alive(self) -> None:
        """The sign of life that the watchdog waits for."""
        self._settle()
        self._send("WATCHDOG=1")

    def _settle(self) -> None:
        if self._owed and self._send(*self._owed):
            self._owed = ()

    def _send(self, *lines: str) -> bool:
        """Whether it was taken, or there is no manager."""
        if not self._address or not lines:
            return True
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as connection:
                connection.setblocking(False)  # a manager that does not read must not hold up what it manages
                connection.sendto("\n".join(lines).encode(), self._address)
        except OSError:
            return False
        return True


def notifier(environ: MutableMapping[str, str]) -> Notifier:
    """What tells the service manager of this process, as its variables say."""
    address, micros, pid = (environ.pop(name, "") for name in ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"))
    watched = _is_number(micros) and int(micros) > 0 and pid in {"", str(os.getpid())}
    return Notifier(
        address if address.startswith(("/", "@")) else "", timedelta(microseconds=int(micros)) if watched else None
    )


def _is_number(text: str) -> bool:
    return text.isdecimal() and len(text) <= MOST_DIGITS


def _status(text: str) -> Iterator[str]:
    if text:
        yield f"STATUS={one_line(text, LONGEST_STATUS)}"


def at(path: Path, sockets: Sequence[HandedOverSocket]) -> HandedOverSocket | None:
    """The one of the handed-over sockets that listens at the path; None if none was handed over.

    Raises ConfigurationError if there are some and none is at the path: Envoys would connect where nothing is served.
    """
    if not sockets:
        return None
    for each in sockets:
        if _same(each.path, path):
            return each
    found = ", ".join(str(each.path) for each in sockets)
    raise ConfigurationError(
        f"sds.socket is {path}, and the service manager hands over {found}; write ListenStream={path} into the .socket "
        "unit, or the unit's path into sds.socket"
    )


def _same(one: Path, other: Path) -> bool:
    """Whether two paths lead to one file: /var/run is a link to /run."""
    with suppress(OSError):
        return one.parent.samefile(other.parent) and one.name == other.name
    return one == other
