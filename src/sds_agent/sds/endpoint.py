"""The Unix socket as a file: who may have its path, and with which rights it appears.

gRPC's own way with a path is unsafe: it removes whatever socket is there, a live one of another server too, and the
new one is open to all until somebody changes its mode. So the server binds a temporary name in the same directory,
with no rights for anybody else; the socket gets its owner and mode and is then renamed to its place, which is atomic
and leaves connections unharmed. A lock file beside the socket keeps two agents apart while they do so.
"""

import errno
import grp
import os
import pwd
import secrets
import socket
import stat
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

from msgspec import Struct

from sds_agent.directories import UntrustedDirectoryError, note_shared, own_directory
from sds_agent.errors import ConfigurationError, SdsAgentError
from sds_agent.files import locked

LONGEST_PATH = 107
"""Bytes of a path that fit a Unix socket's address (sockaddr_un, without its final zero)."""


class SocketInUseError(SdsAgentError):
    """Somebody else serves at the path."""


class SocketFile(Struct, frozen=True):
    """Where the socket is to be, with which mode (permission bits), owner and group (names or ids; None leaves the
    process's).
    """

    path: Path
    mode: int = 0o660
    owner: str | None = None
    group: str | None = None


class Endpoint:
    """A claimed socket path. Made by `claim`, which holds the lock for as long as its context lasts."""

    def __init__(self, file: SocketFile, owner: int, group: int) -> None:
        self.path = file.path
        self._mode = file.mode
        self._owner = owner
        self._group = group
        self._temporary = file.path.with_name(f".{secrets.token_hex(3)}")
        self._ours: int | None = None  # a descriptor of the socket's file: while it is open its inode is not used again

    @property
    def address(self) -> str:
        """The gRPC address to bind first; `appear` moves it to its place. gRPC decodes percent signs, so they are
        quoted.
        """
        return f"unix:{quote(str(self._temporary))}"

    @property
    def public_address(self) -> str:
        """The gRPC address that clients use."""
        return f"unix:{quote(str(self.path))}"

    @contextmanager
    def private_umask(self) -> Iterator[None]:
        """Bind inside this: until its rights are set the socket is nobody else's."""
        before = os.umask(0o177)
        try:
            yield
        finally:
            os.umask(before)

    def appear(self) -> None:
        """Give the bound socket its rights and its name. Raises ConfigurationError."""
        try:
            os.chown(self._temporary, self._owner, self._group)
            self._temporary.chmod(self._mode)
            self._ours = os.open(self._temporary, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
            self._temporary.rename(self.path)
        except OSError as error:
            raise ConfigurationError(
                f"sds.socket: cannot give {self.path} its owner and mode: {error.strerror}; "
                f"run the agent as a user that may, or change sds.owner, sds.group and sds.mode"
            ) from error

    def refusal(self) -> ConfigurationError:
        """Why nothing can be bound here, asked of the kernel."""
        reason = "nobody says why"
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as attempt:
            try:
                attempt.bind(str(self._temporary))
                self._temporary.unlink()
            except OSError as error:
                reason = error.strerror or reason
        return ConfigurationError(
            f"sds.socket: cannot make a socket in {self.path.parent}: {reason}; "
            f"make the directory writable for the agent's user (uid {os.geteuid()}) or choose another"
        )

    def in_place(self) -> bool:
        """Whether the socket that appeared is still what is at its path."""
        if self._ours is None:
            return False
        try:
            return os.path.samestat(self.path.lstat(), os.fstat(self._ours))
        except OSError:
            return False

    def disappear(self) -> None:
        """Remove the socket, if what is at its path is still ours, and what was bound and never appeared."""
        with suppress(OSError):
            self._temporary.unlink(missing_ok=True)
        if self._ours is None:
            return
        if self.in_place():
            with suppress(OSError):  # a directory that is read-only by now keeps a dead socket, which is no harm
                self.path.unlink()
        os.close(self._ours)
        self._ours = None


@contextmanager
def claim(file: SocketFile) -> Iterator[Endpoint]:
    """Make sure that the path may be served at, and keep other agents away from it.

    Raises ConfigurationError for a path, directory, owner or group that cannot be used, and SocketInUseError when a
    live server has the path.
    """
    directory = file.path.parent
    _check_length(file.path)
    _prepare_directory(directory)
    owner = _user_id(file.owner) if file.owner is not None else -1
    group = _group_id(file.group) if file.group is not None else -1
    with _locked(file.path):
        _check_free(file.path)
        endpoint = Endpoint(file, owner, group)
        try:
            yield endpoint
        finally:
            endpoint.disappear()


def _check_length(path: Path) -> None:
    longest = max(len(os.fsencode(path)), len(os.fsencode(path.parent)) + 8)  # a slash and the temporary name
    if longest > LONGEST_PATH:
        raise ConfigurationError(
            f"sds.socket: {path} is too long for a Unix socket: {longest} bytes (with the temporary name beside it), "
            f"{LONGEST_PATH} are possible; choose a shorter directory"
        )


def _prepare_directory(directory: Path) -> None:
    try:
        note_shared("sds.socket", own_directory(directory, 0o755))
    except UntrustedDirectoryError as error:
        raise ConfigurationError(f"sds.socket: {error}") from error
    except OSError as error:
        raise ConfigurationError(f"sds.socket: cannot use the directory {directory}: {error.strerror}") from error


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    lock = path.with_name(f"{path.name}.lock")
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(lock))
        except BlockingIOError as error:
            raise SocketInUseError(
                f"another sds-agent serves at {path} (it holds {lock}); "
                f"stop it first, or give this one another sds.socket"
            ) from error
        except OSError as error:
            raise ConfigurationError(f"sds.socket: cannot open the lock file {lock}: {error.strerror}") from error
        yield


def _check_free(path: Path) -> None:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise ConfigurationError(f"sds.socket: {path} is there and is not a socket; remove it or choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1)
        try:
            probe.connect(str(path))
        except OSError as error:
            if error.errno in {errno.ECONNREFUSED, errno.ENOENT}:
                return  # left behind by a server that was killed
            raise SocketInUseError(
                f"cannot tell whether a server is alive at {path} ({error.strerror or error}); "
                f"it is left as it is: stop that server or remove the socket"
            ) from error
    raise SocketInUseError(f"another server answers at {path}; stop it first, or give this agent another sds.socket")


def _user_id(name: str) -> int:
    try:
        return int(name) if name.isdecimal() else pwd.getpwnam(name).pw_uid
    except KeyError as error:
        raise ConfigurationError(
            f"sds.owner: there is no user {name!r} on this machine; name one, or give a uid"
        ) from error


def _group_id(name: str) -> int:
    try:
        return int(name) if name.isdecimal() else grp.getgrnam(name).gr_gid
    except KeyError as error:
        raise ConfigurationError(
            f"sds.group: there is no group {name!r} on this machine; name one, or give a gid"
        ) from error
