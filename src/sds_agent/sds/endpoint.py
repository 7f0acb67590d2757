"""The Unix socket as a file: which agent may have its path, and with which owner and mode it is published.

gRPC itself handles a path unsafely: it removes any socket that is there, also the live one of another server, and every
user can connect to the new one until its mode is changed. So gRPC binds a temporary name in the same directory, with no
rights for others, and the name is removed: after that only this process reaches the socket. The socket for the peers is
bound in the same manner, gets its owner and mode, and is then renamed to its path, which is atomic. A lock file beside
the socket keeps two agents apart while they do so.
"""

import errno
import grp
import os
import pwd
import re
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from urllib.parse import quote

from msgspec import Struct

from sds_agent import accounts
from sds_agent.directories import UntrustedDirectoryError, check_directory, own_directory, walk, warn_shared
from sds_agent.errors import ConfigurationError, Problem, ProblemsError, SdsAgentError
from sds_agent.files import (
    DESCRIPTORS,
    LONGEST_SOCKET_PATH,
    MOUNT_PROC,
    check_lock,
    check_writable,
    fix_of,
    has_descriptors,
    locked,
    socket_path_size,
)

ABANDONED_AFTER = 60.0
"""Seconds after which a socket with a temporary name is left over: an agent publishes its own within milliseconds."""
_TEMPORARY_NAME = r"\.[0-9a-f]{6}"
"""The names of sockets before they are published."""
_NO_DESCRIPTOR = {
    errno.EMFILE: "raise the process's limit on open files (ulimit -n, systemd's LimitNOFILE), or close some",
    errno.ENFILE: "the system's descriptors are used up; raise fs.file-max (sysctl)",
}
"""The fix where the cause is not the path."""


class SocketInUseError(SdsAgentError):
    """Another process serves at the path."""


class SocketFile(Struct, frozen=True):
    """Where the socket is published, with which mode (permission bits), owner and group.

    Owner and group are names or ids; None leaves those of the process. `section` is that of the configuration, for
    messages.
    """

    path: Path
    mode: int = 0o660
    owner: str | None = None
    group: str | None = None
    section: str = "sds"

    @property
    def key(self) -> str:
        """The configuration's key for the path."""
        return f"{self.section}.socket"


class Access(Struct, frozen=True):
    """Who may connect to a socket: its mode as octal digits, and its owner and group by name where they have one.

    None where that is not known.
    """

    mode: str | None = None
    owner: str | None = None
    group: str | None = None


def access(path: Path) -> Access:
    """Who may connect to the socket at the path. Raises OSError."""
    found = path.lstat()
    try:
        owner = pwd.getpwuid(found.st_uid).pw_name
    except KeyError:
        owner = str(found.st_uid)
    try:
        group = grp.getgrgid(found.st_gid).gr_name
    except KeyError:
        group = str(found.st_gid)
    return Access(f"{stat.S_IMODE(found.st_mode):04o}", owner, group)


class Endpoint:
    """A claimed socket path. `claim` makes it, and keeps its lock for as long as its context lasts."""

    def __init__(self, file: SocketFile, owner: int, group: int) -> None:
        self.path = file.path
        self._key = file.key
        self._mode = file.mode
        self._owner = owner
        self._group = group
        self.temporary = file.path.with_name(f".{os.urandom(3).hex()}")
        self._ours: int | None = None  # opened on the published socket: until it is closed no other file gets the inode

    @property
    def address(self) -> str:
        """The address for gRPC to bind, until `hide` removes its name. Quoted, because gRPC decodes percent signs."""
        return f"unix:{quote(str(self.temporary))}"

    @property
    def public_address(self) -> str:
        """The gRPC address that clients use."""
        return f"unix:{quote(str(self.path))}"

    @contextmanager
    def private_umask(self) -> Iterator[None]:
        """Bind inside this: no other user can connect to the socket until its mode is set."""
        before = os.umask(0o177)
        try:
            yield
        finally:
            os.umask(before)

    def hide(self) -> int:
        """Remove the name of the socket that gRPC has bound. The descriptor leads to it, by way of /proc/self/fd.

        Raises ConfigurationError.
        """
        with ExitStack() as unless_hidden:
            try:
                descriptor = os.open(self.temporary, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
                unless_hidden.callback(os.close, descriptor)
                self.temporary.unlink()
            except OSError as error:
                raise self._no_socket(error) from error
            unless_hidden.pop_all()
        return descriptor

    def listen(self, backlog: int) -> socket.socket:
        """A socket that listens where only this user can connect, until `publish` moves it to its path.

        Raises ConfigurationError.
        """
        with ExitStack() as unless_listening:
            try:
                listener = unless_listening.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
                with self.private_umask():
                    listener.bind(str(self.temporary))
                listener.listen(backlog)
            except OSError as error:
                raise self._no_socket(error) from error
            unless_listening.pop_all()
        return listener

    def publish(self) -> None:
        """Give the bound socket its owner, mode and path. Raises ConfigurationError."""
        try:
            os.chown(self.temporary, -1, self._group)
            self.temporary.chmod(self._mode)
            os.chown(self.temporary, self._owner, -1)  # last, as in `files.create`
            self._ours = os.open(self.temporary, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
            self.temporary.rename(self.path)
        except OSError as error:
            raise _unusable(
                self._key,
                f"cannot give {self.path} its owner and mode: {error.strerror}",
                _fix(
                    error, f"run the agent as a user that may, or change the owner, group and mode beside {self._key}"
                ),
            ) from error

    def refusal(self) -> ConfigurationError:
        """Why nothing can be bound here, as the kernel says."""
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as attempt:
                attempt.bind(str(self.temporary))
                self.temporary.unlink()
        except OSError as error:
            return self._no_socket(error)
        return self._no_socket(OSError())

    def _no_socket(self, error: OSError) -> ConfigurationError:
        reason = error.strerror or "the system gives no reason"
        found = f"cannot make a socket in {self.path.parent}: {reason}"
        return _unusable(self._key, found, _fix(error, _make_writable()))

    def in_place(self) -> bool:
        """Whether the published socket is still at its path."""
        if self._ours is None:
            return False
        try:
            return os.path.samestat(self.path.lstat(), os.fstat(self._ours))
        except OSError:
            return False

    def remove(self) -> None:
        """Remove the socket if ours is still at its path, and one that was bound and never published."""
        with suppress(OSError):
            self.temporary.unlink(missing_ok=True)
        if self._ours is None:
            return
        if self.in_place():
            with suppress(OSError):  # a directory that is read-only by now keeps a dead socket, which does no harm
                self.path.unlink()
        os.close(self._ours)
        self._ours = None


class HandedOverEndpoint(Endpoint):
    """A socket path at which a service manager listens, which has handed over its socket and stays its owner.

    The manager decided who may connect. The socket stays where it is when the agent ends: Envoys that connect then
    wait in its queue for the next agent.
    """

    def __init__(self, file: SocketFile, listening: int) -> None:
        super().__init__(file, -1, -1)
        self._listening = listening

    def listen(self, _backlog: int) -> socket.socket:
        """A duplicate of the manager's socket, whose backlog the unit decides. Raises ConfigurationError."""
        try:
            return socket.socket(fileno=os.dup(self._listening))
        except OSError as error:
            raise self._no_socket(error) from error

    def publish(self) -> None:
        """It is at its path. Raises ConfigurationError if it is not any more."""
        try:
            self._ours = os.open(self.path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError as error:
            raise _unusable(
                self._key,
                f"the service manager listens at {self.path}, where there is no socket any more: {error.strerror}",
                _fix(error, "restart the .socket unit"),
            ) from error

    def remove(self) -> None:
        """Leave the socket to the manager."""
        if self._ours is not None:
            os.close(self._ours)
            self._ours = None


@contextmanager
def inherit(file: SocketFile, listening: int) -> Iterator[HandedOverEndpoint]:
    """Take the socket that a service manager listens on, by its descriptor, and keep other agents away from its path.

    Its directory has to be writable for the agent: gRPC's own socket is bound there. Raises ConfigurationError, also
    where every user may connect, and SocketInUseError.
    """
    with suppress(OSError):  # it is gone, which `publish` reports
        if file.path.stat().st_mode & stat.S_IWOTH:
            raise _unusable(
                file.key,
                f"is {file.path}, at which the service manager lets every user connect and read private keys",
                "write SocketMode=0660 and SocketGroup= into the .socket unit",
            )
    _check_way_to_grpc(file)
    with ExitStack() as stack:
        with _directory_explained(file):
            warn_shared(file.key, own_directory(file.path.parent, 0o755))
        with _lock_explained(file):
            stack.enter_context(locked(_lock_of(file.path)))
        _remove_left(file.path.parent, time.time())
        endpoint = HandedOverEndpoint(file, listening)
        stack.callback(endpoint.remove)
        yield endpoint


@contextmanager
def claim(file: SocketFile) -> Iterator[Endpoint]:
    """Make sure that the path may be served at, and keep other agents away from it.

    Raises ConfigurationError for a path, directory, owner or group that cannot be used, and SocketInUseError when a
    live server has the path.
    """
    for refusal in refusals(file):
        raise refusal
    with ExitStack() as stack:
        with _directory_explained(file):
            warn_shared(file.key, own_directory(file.path.parent, 0o755))
        with _lock_explained(file):
            stack.enter_context(locked(_lock_of(file.path)))
        _check_free(file)  # again, with the lock: from here on no other agent can take it
        _remove_left(file.path.parent, time.time())
        endpoint = Endpoint(file, _owner(file), _group(file))
        try:
            yield endpoint
        finally:
            endpoint.remove()


def _remove_left(directory: Path, now: float) -> None:
    """Remove sockets that were bound and never published, because their agent was killed in between.

    A recent one may belong to an agent that is starting, with another socket in the directory.
    """
    with suppress(OSError):
        for path in directory.iterdir():
            if path.name.startswith(".") and re.fullmatch(_TEMPORARY_NAME, path.name):
                found = path.lstat()
                if stat.S_ISSOCK(found.st_mode) and now - found.st_mtime > ABANDONED_AFTER:
                    path.unlink()


def blocked_directories(file: SocketFile) -> Iterator[str]:
    """The directories that the socket's own `owner` or `group` cannot pass on the way to it, in words.

    They cannot reach the socket then, whatever its mode. Raises what `refusals` gives, and OSError.
    """
    steps, _ = walk(file.path.parent)
    user, group = _owner(file), _group(file)
    for step in steps:
        others = bool(step.mode & stat.S_IXOTH)
        if user > 0 and not (step.mode & stat.S_IXUSR if step.owner == user else others):
            yield f"the user {file.owner} cannot pass {step.path}, which has the mode {step.mode:04o} (chmod o+x)"
        if group != -1 and not (step.mode & stat.S_IXGRP if step.group == group else others):
            yield f"the group {file.group} cannot pass {step.path}, which has the mode {step.mode:04o} (chmod o+x)"


def refusals(file: SocketFile) -> Iterator[ConfigurationError | SocketInUseError]:
    """Every reason for which `claim` would refuse the path here and now. Changes nothing."""
    checks: tuple[Callable[[SocketFile], None], ...] = (
        _check_length,
        _check_owner,
        _check_group,
        _check_place,
        _check_way_to_grpc,
    )
    for check in checks:
        try:
            check(file)
        except (ConfigurationError, SocketInUseError) as error:
            yield error


def _check_place(file: SocketFile) -> None:
    with _directory_explained(file):
        check_directory(file.path.parent)
        if file.path.parent.exists():
            check_writable(file.path.parent, file.path)
    with _lock_explained(file):
        check_lock(_lock_of(file.path))
    _check_free(file)


def _check_way_to_grpc(file: SocketFile) -> None:
    if not has_descriptors():
        found = f"the agent reaches its own server by {DESCRIPTORS}, which is not there"
        raise _unusable(file.key, found, MOUNT_PROC)


def _check_length(file: SocketFile) -> None:
    path, longest = file.path, socket_path_size(file.path)
    if longest > LONGEST_SOCKET_PATH:
        size = f"{longest} bytes (with the temporary name beside it), {LONGEST_SOCKET_PATH} are possible"
        raise _unusable(file.key, f"{path} is too long for a Unix socket: {size}", "choose a shorter directory")


@contextmanager
def _directory_explained(file: SocketFile) -> Iterator[None]:
    try:
        yield
    except UntrustedDirectoryError as error:
        raise ConfigurationError(f"{file.key}: {error}") from error
    except OSError as error:
        found = f"cannot use the directory {file.path.parent}: {error.strerror}"
        otherwise = "choose another" if error.errno == errno.ENOTDIR else _make_writable()
        raise _unusable(file.key, found, _fix(error, otherwise)) from error


def _lock_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")


@contextmanager
def _lock_explained(file: SocketFile) -> Iterator[None]:
    try:
        yield
    except BlockingIOError as error:
        raise SocketInUseError(
            f"another sds-agent serves at {file.path} (it has locked {_lock_of(file.path)}); "
            f"stop it first, or give this one another {file.key}"
        ) from error
    except OSError as error:
        found = f"cannot open the lock file {_lock_of(file.path)}: {error.strerror}"
        raise _unusable(file.key, found, _fix(error, _make_writable())) from error


@contextmanager
def _place_explained(file: SocketFile) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        found = f"cannot find out what is at {file.path}: {error.strerror}"
        raise _unusable(file.key, found, _fix(error, _make_writable())) from error


def _check_free(file: SocketFile) -> None:
    path = file.path
    with _place_explained(file):
        try:
            found = path.lstat()
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(found.st_mode):
            raise _unusable(file.key, f"{path} is not a socket", "remove that file or choose another path")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1)
            try:
                probe.connect(str(path))
            except OSError as error:
                if error.errno in {errno.ECONNREFUSED, errno.ENOENT}:
                    return  # left behind by a server that was killed
                if error.errno == errno.EACCES and _was_given_away(file, found):
                    return  # likewise: nobody has the lock
                raise SocketInUseError(
                    f"cannot tell whether a server is alive at {path} ({error.strerror or error}); "
                    f"stop that server, or remove the socket if there is none"
                ) from error
    raise SocketInUseError(f"another server answers at {path}; stop it first, or give this agent another {file.key}")


def _was_given_away(file: SocketFile, found: os.stat_result) -> bool:
    """Whether the socket is as an agent with this configuration publishes its own, for another user. Without
    CAP_DAC_OVERRIDE this one may not connect to it.
    """
    same_group = _group(file) in {accounts.UNCHANGED, found.st_gid}
    return found.st_uid == _owner(file) and same_group and stat.S_IMODE(found.st_mode) == file.mode


def _check_owner(file: SocketFile) -> None:
    if not accounts.may_give_to_user(_owner(file)):
        raise _unusable(
            "sds.owner",
            f"only root (CAP_CHOWN) can give the socket to the user {file.owner}, and this is uid {os.geteuid()}",
            "leave sds.owner out, and let Envoys in by sds.group",
        )


def _check_group(file: SocketFile) -> None:
    group = _group(file)
    if group == _inherited_group(file.path.parent) or accounts.may_give_to_group(group):
        return
    raise _unusable(
        "sds.group",
        f"uid {os.geteuid()} is not in the group {file.group}, and without CAP_CHOWN can give the socket to no other",
        "add the agent's user to it, or name one of its own",
    )


def _inherited_group(directory: Path) -> int | None:
    """The group that a new file in the directory gets, where that is not the process's."""
    try:
        found = directory.stat()
    except OSError:
        return None
    return found.st_gid if found.st_mode & stat.S_ISGID else None


def _owner(file: SocketFile) -> int:
    return accounts.user_id(file.owner, "sds.owner")


def _group(file: SocketFile) -> int:
    return accounts.group_id(file.group, "sds.group")


def _unusable(key: str, found: str, fix: str) -> ConfigurationError:
    return ProblemsError([Problem((key,), found, fix)])


def _fix(error: OSError, otherwise: str) -> str:
    return _NO_DESCRIPTOR.get(error.errno or 0) or fix_of(error, otherwise)


def _make_writable() -> str:
    return f"make the directory writable for the agent's user (uid {os.geteuid()}) or choose another"
