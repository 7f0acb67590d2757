"""`sds-agent install systemd`: the files that make the agent a service, on standard output or in place."""

import argparse
import itertools
import os
import pwd
import re
import shlex
import shutil
import stat
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import sds_agent
from sds_agent.authority import registry
from sds_agent.cli import output
from sds_agent.cli.config_file import add_file, chosen
from sds_agent.cli.paths import as_path
from sds_agent.config.defaults import absolute
from sds_agent.config.loading import load
from sds_agent.config.settings import Settings
from sds_agent.configfile import environment
from sds_agent.configfile.phrases import KeyPath, render
from sds_agent.directories import ABOVE, make_directory
from sds_agent.errors import ConfigurationError
from sds_agent.files import create, fix_of, looked_up
from sds_agent.text import quoted
from sds_agent.units import NAME, UnitFile, UnitPlan, files

FILE = Path("/etc/sds-agent/sds-agent.yaml")
_ROOT = Path("/")
_RUN, _STATE = (Path("/run"), Path("/var/run")), (Path("/var/lib"),)
_ACCOUNT = re.compile("[A-Za-z_][A-Za-z0-9_.-]{0,30}")
_READ, _ENTER = stat.S_IRGRP | stat.S_IROTH, stat.S_IXGRP | stat.S_IXOTH
"""What users beside the owner need to read a file, and to enter a directory."""
_HOMES = (Path("/home"), Path("/root"), Path("/run/user"))

EXIT_CODES = (
    "0 the files were printed or written; 2 a wrong call, a configuration that cannot be used, or a place that cannot "
    "be written; nothing is written then"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The configuration, and where the files go."""
    add_file(parser, f"the agent's configuration; by default {FILE}")
    parser.add_argument("--write", action="store_true", help="write the files to their places, and say what comes next")
    parser.add_argument(
        "--socket-unit",
        action="store_true",
        help="with a .socket unit: systemd listens, and Envoys that connect while the agent restarts wait",
    )
    parser.add_argument(
        "--user", type=_account, default=NAME, metavar="NAME", help=f"the account to run as; by default {NAME}"
    )
    parser.add_argument(
        "--root",
        type=as_path,
        metavar="DIRECTORY",
        default=_ROOT,
        help="for packages: with --write, below this directory",
    )
    parser.add_argument("--replace", action="store_true", help="with --write: also replace files that were changed")


def _account(text: str) -> str:
    if not _ACCOUNT.fullmatch(text):
        raise argparse.ArgumentTypeError(f"{quoted(text)} is no name of an account")
    return text


def run(arguments: argparse.Namespace) -> int:
    """Print or write the files. Raises ProblemsError and ConfigurationError."""
    if not arguments.write and (arguments.replace or arguments.root != _ROOT):
        raise ConfigurationError("--replace and --root are about files that are written; add --write")
    plan = _plan(arguments)
    made = files(plan, with_socket=arguments.socket_unit)
    if not arguments.write:
        for each in made:
            output.write(f"# {each.path}\n{each.text}")
        return 0
    written = _write(made, arguments.root, replace=arguments.replace)
    output.write("\n".join(f"wrote {path}" for path in written))  # not one by one: nobody may read any more
    output.write(_next_steps(made, plan))
    return 0


def _plan(arguments: argparse.Namespace) -> UnitPlan:
    places = {"RUNTIME_DIRECTORY": str(_RUN[0] / NAME), "STATE_DIRECTORY": str(_STATE[0] / NAME)}
    file = Path(
        os.path.normpath(absolute(chosen(arguments) or FILE))
    )  # a link to the file may lead to its next version
    settings = load(file, {**os.environ, **places}).settings
    if settings.sds.owner is not None:
        raise ConfigurationError(
            f"sds.owner is {settings.sds.owner}, and a service without capabilities cannot give its socket to another "
            "user; leave it out, and let Envoys in by sds.group"
        )
    for index, each in enumerate(settings.workloads):
        if each.output is not None and each.output.owner not in {None, arguments.user}:
            raise ConfigurationError(
                f"workloads[{index}].output.owner is {each.output.owner}, and a service without capabilities cannot "
                f"give files to another user; leave it out, and put {arguments.user} into the group of output.group"
            )
    command = _command()
    program = (command, Path(sys.executable), Path(sds_agent.__file__))
    for line in (*out_of_reach(program, arguments.user), *unreadable(settings, file, arguments.user)):
        output.report(line)
    return UnitPlan(
        command=str(command),
        file=file,
        socket=settings.sds.socket,
        mode=str(settings.sds.mode),
        user=arguments.user,
        group=settings.sds.group,
        runtime=_below(settings.sds.socket.parent, _RUN),
        state=_below(settings.state_dir, _STATE),
        credentials=dict(credentials(settings, arguments.user)),
        state_credential=None if settings.state_encryption is None else settings.state_encryption.credential,
        writable=tuple(_writable(settings)),
        at_home=any(_is_in(each, home) for each in (*program, file) for home in _HOMES),
    )


def _command() -> Path:
    """The program that this process runs, by its absolute path."""
    called = shutil.which(sys.argv[0]) or shutil.which(NAME)
    if called is None:
        raise ConfigurationError(f"{NAME} is not on PATH, so no unit can name it; install it for the whole machine")
    return Path(os.path.abspath(called))  # noqa: PTH100 - a link such as /usr/bin/sds-agent is the stable name


def out_of_reach(program: Sequence[Path], user: str) -> Iterator[str]:
    """A line where that account cannot run the program, as where it was installed for one user: the service would not
    start.
    """
    for path in program:
        shut = next((each for way in (path, path.resolve()) for each in _shut(way, user)), None)
        if shut is not None:
            yield (
                f"the account {user} cannot enter {shut}, and so cannot run {path}; install {NAME} where every user "
                f"can run it, such as in /opt/{NAME}, and make the unit with that one"
            )
            return


def _shut(path: Path, user: str) -> Iterator[Path]:
    """The directories on the way to a file that this account cannot enter; one that is not made yet has no groups. An
    access control list may let it in, which the mode does not show.
    """
    try:
        account = pwd.getpwnam(user)
        own, groups = account.pw_uid, os.getgrouplist(user, account.pw_gid)
    except KeyError:
        own, groups = -1, []
    for each in reversed(path.parents):
        found = each.stat()
        needed = stat.S_IXUSR if found.st_uid == own else stat.S_IXGRP if found.st_gid in groups else stat.S_IXOTH
        if own != 0 and not found.st_mode & needed and not _has_list(each):
            yield each


def _has_list(path: Path) -> bool:
    try:
        return "system.posix_acl_access" in os.listxattr(path)
    except OSError:  # the file system has none
        return False


def _below(directory: Path, above: Sequence[Path]) -> str | None:
    """The directory's name below another one, as RuntimeDirectory= and StateDirectory= have it."""
    plain = Path(os.path.normpath(directory))
    return next((str(plain.relative_to(each)) for each in above if each in plain.parents), None)


def _is_in(path: Path, directory: Path) -> bool:
    return path.is_relative_to(directory) or path.resolve().is_relative_to(directory)


def _writable(settings: Settings) -> Iterator[Path]:
    """The directories that the agent writes to, each once, but for those that systemd makes and what is in them: the
    service does not start where one of the others is missing.
    """
    runtime, state = settings.sds.socket.parent, settings.state_dir
    wanted = [runtime, state, *(each.output.directory for each in settings.workloads if each.output is not None)]
    if settings.admin.enabled and settings.admin.socket is not None:
        wanted.append(settings.admin.socket.parent)
    made = [each for each, above in ((runtime, _RUN), (state, _STATE)) if _below(each, above) is not None]
    plain = [Path(os.path.normpath(each)) for each in made]
    yield from dict.fromkeys(
        each for each in wanted if not any(Path(os.path.normpath(each)).is_relative_to(above) for above in plain)
    )


def credentials(settings: Settings, user: str, *, root: int = 0) -> Iterator[tuple[str, Path]]:
    """The secret files that root alone can read now, each with the variable that sets the key which names it. Reports
    those that no variable can name.
    """
    named = {key: path for key, path, is_credential in _provided(settings) if is_credential}
    if settings.state_encryption is not None and settings.state_encryption.key_file is not None:
        named["state_encryption", "key_file"] = settings.state_encryption.key_file
    if settings.telemetry is not None and settings.telemetry.headers_file is not None:
        named["telemetry", "headers_file"] = settings.telemetry.headers_file
    for key, path in named.items():
        if next(_kept(path, root), None) is None:
            continue
        variable = environment.variable(key)
        if environment.leads_to(variable, key, settings.authorities):
            yield variable, path
        else:
            output.report(
                f"{render(key)}: only root can read {path}, and no variable can have this key's name, so the service "
                f"gets no credential for it; let {user} read the file, or give the authority another name"
            )


def _provided(settings: Settings) -> Iterator[tuple[KeyPath, Path, bool]]:
    """What the authorities name, by its key, and whether it is a secret that systemd may read at each start.

    Where a program writes a certificate with its key, each renewal would have a certificate of another key than that. A
    join token serves once and is removed then, and systemd starts no service whose credential is gone.
    """
    for name, authority in settings.authorities.items():
        kind = registry.kind_of(authority)
        stays = not kind.supplies and kind.spends(authority) is None
        for key, path in kind.files(authority).items():
            yield ("authorities", name, *key.split(".")), path, stays and key in kind.secrets


def unreadable(settings: Settings, file: Path, user: str, *, root: int = 0) -> Iterator[str]:
    """Lines that name what root alone can read now, and no credential replaces: without it the service does not do its
    work.
    """
    if user == "root":
        return
    for key, needed, path in _kept_from_others(settings, file, root):
        does, fix = "read", f"let it read that (chown {user} {path})"
        if path in needed.parents:  # its owner could read all that is in it, such as in /root
            does, fix = "enter", f"put {needed} where that can read it, such as in {FILE.parent}"
        place = f"{key}: " if key else ""
        yield f"{place}only root can {does} {path}, and the service runs as {user}; {fix}"


def kept_from_others(settings: Settings, file: Path, *, root: int = 0) -> Iterator[tuple[str, Path]]:
    """The configuration, what the authorities name beside secrets, and the files of directories among it, as far as
    root alone can read them, or enter a directory above; each with its key.
    """
    return ((key, kept) for key, _, kept in _kept_from_others(settings, file, root))


def _kept_from_others(settings: Settings, file: Path, root: int) -> Iterator[tuple[str, Path, Path]]:
    """The same, with what is needed between the key and what root keeps to itself."""
    for key, needed in _needed(settings, file):
        for kept in itertools.islice(_kept(needed, root), 1):
            yield key, needed, kept


def _needed(settings: Settings, file: Path) -> Iterator[tuple[str, Path]]:
    """The configuration, and what the authorities name that does not become a credential, each with its key."""
    yield "", file
    yield from ((render(key), path) for key, path, is_credential in _provided(settings) if not is_credential)


def _kept(path: Path, root: int) -> Iterator[Path]:
    """What root alone can enter or read on the way to a file, or to the files of a directory, the outermost first."""
    is_directory = os.path.isdir(path)  # noqa: PTH112 - Path raises for one that may not be reached
    entered = [*reversed(path.parents), *([path] if is_directory else [])]
    yield from (each for each in entered if _is_alone(each, root, _ENTER))
    read = sorted(path.glob("*")) if is_directory else [path]
    yield from (each for each in read if _is_alone(each, root, _READ))


def _is_alone(path: Path, user: int, others: int) -> bool:
    """Whether it belongs to this user, and no other one can read it, or enter it."""
    try:
        found = path.stat()
    except OSError:
        return False
    return found.st_uid == user and not stat.S_IMODE(found.st_mode) & others


def _write(made: tuple[UnitFile, ...], root: Path, *, replace: bool) -> Sequence[Path]:
    """Write all of them, or none where one would be lost; returns the places. Raises ConfigurationError."""
    places = {root / each.path.relative_to("/"): each.text for each in made}
    changed = [path for path, text in places.items() if _is_changed(path, text)]
    if changed and not replace:
        names = " and ".join(map(str, changed))
        raise ConfigurationError(f"{names}: there already, with another content; --replace writes it anew")
    staged = {path: path.with_name(f".{path.name}.{os.urandom(4).hex()}") for path in places}
    path = root
    try:
        for path, temporary in staged.items():
            _make_directories(path.parent)
            create(temporary, places[path].encode(), 0o644)
        for path, temporary in staged.items():
            temporary.replace(path)  # a link there, as of a unit that is masked, and not what it leads to
    except OSError as error:
        fix = fix_of(error, "run this as root, or leave --write out and copy what it prints")
        raise ConfigurationError(f"cannot write {path}: {error.strerror}; {fix}") from error
    finally:
        for temporary in staged.values():
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
    return tuple(staged)


def _make_directories(directory: Path) -> None:
    """Make what is missing with the usual mode, whatever the umask: a package brings it to other machines. Raises
    OSError.
    """
    for each in (*reversed(directory.parents), directory):
        if not each.exists():
            make_directory(each, ABOVE)


def _is_changed(path: Path, text: str) -> bool:
    """Whether something else than this text is there already. Raises ConfigurationError."""
    try:
        return path.is_symlink() if looked_up(path) is None else path.read_bytes() != text.encode()
    except OSError as error:
        raise ConfigurationError(
            f"cannot read what is at {path} already: {error.strerror}; run this as a user that may, or remove it"
        ) from error


def _next_steps(made: tuple[UnitFile, ...], plan: UnitPlan) -> str:
    missing = "".join(_step_for(each, plan.user) for each in plan.writable)
    started = " ".join(each.path.name for each in made if each.path.suffix in {".socket", ".service"})
    return (
        f"\nNext:\n"
        f"  systemd-sysusers                        # makes the account {plan.user}\n"
        f"{missing}"
        f"  systemctl daemon-reload\n"
        f"  systemctl enable --now {started}\n"
        f"  systemctl status {NAME}"
    )


def _step_for(directory: Path, user: str) -> str:
    """The line that makes a directory which the service needs; none where it is there."""
    try:
        if looked_up(directory) is not None:
            return ""
    except OSError as error:
        return f"  # see that {directory} is there and belongs to {user} ({error.strerror})\n"
    return f"  install -d -o {user} {shlex.quote(str(directory))}\n"
