"""`sds-agent install systemd`: the files that make the agent a service, on standard output or in place."""

import argparse
import os
import shutil
import stat
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from sds_agent.authority import registry
from sds_agent.cli import output
from sds_agent.cli.config_file import add_file, chosen
from sds_agent.config.loading import load
from sds_agent.config.settings import Settings
from sds_agent.errors import ConfigurationError
from sds_agent.units import NAME, UnitFile, UnitPlan, files

FILE = Path("/etc/sds-agent/sds-agent.yaml")
_RUN, _STATE = Path("/run"), Path("/var/lib")
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
    parser.add_argument("--user", default=NAME, metavar="NAME", help=f"the account to run as; by default {NAME}")
    parser.add_argument(
        "--root", type=Path, metavar="DIRECTORY", default=Path("/"), help="for packages: write below this directory"
    )
    parser.add_argument("--replace", action="store_true", help="with --write: also replace files that were changed")


def run(arguments: argparse.Namespace) -> int:
    """Print or write the files. Raises ProblemsError and ConfigurationError."""
    made = files(_plan(arguments), with_socket=arguments.socket_unit)
    if not arguments.write:
        for each in made:
            output.write(f"# {each.path}\n{each.text}")
        return 0
    for path in _write(made, arguments.root, replace=arguments.replace):
        output.write(f"wrote {path}")
    output.write(_next_steps(made, arguments.user))
    return 0


def _plan(arguments: argparse.Namespace) -> UnitPlan:
    places = {"RUNTIME_DIRECTORY": str(_RUN / NAME), "STATE_DIRECTORY": str(_STATE / NAME)}
    file = Path(os.path.abspath(chosen(arguments) or FILE))  # noqa: PTH100 - a link to the file may lead to its next version
    settings = load(file, {**os.environ, **places}).settings
    if settings.sds.owner is not None:
        raise ConfigurationError(
            f"sds.owner is {settings.sds.owner}, and a service without capabilities cannot give its socket to another "
            "user; leave it out, and let Envoys in by sds.group"
        )
    command = _command()
    return UnitPlan(
        command=str(command),
        file=file,
        socket=settings.sds.socket,
        mode=str(settings.sds.mode),
        user=arguments.user,
        group=settings.sds.group,
        runtime=_below(settings.sds.socket.parent, _RUN),
        state=_below(settings.state_dir, _STATE),
        credentials=_credentials(settings),
        writable=tuple(_writable(settings)),
        at_home=any(_is_in(each, home) for each in (command, file, Path(sys.executable)) for home in _HOMES),
    )


def _command() -> Path:
    """The program that this process runs, by its absolute path."""
    called = shutil.which(sys.argv[0]) or shutil.which(NAME)
    if called is None:
        raise ConfigurationError(f"{NAME} is not on PATH, so no unit can name it; install it for the whole machine")
    return Path(os.path.abspath(called))  # noqa: PTH100 - a link such as /usr/bin/sds-agent is the stable name


def _below(directory: Path, above: Path) -> str | None:
    """The directory's name below another one, as RuntimeDirectory= and StateDirectory= have it."""
    return str(directory.relative_to(above)) if directory != above and directory.is_relative_to(above) else None


def _is_in(path: Path, directory: Path) -> bool:
    return path.is_relative_to(directory) or path.resolve().is_relative_to(directory)


def _writable(settings: Settings) -> Iterator[Path]:
    """The directories that the agent writes to and systemd does not make for it."""
    if _below(settings.sds.socket.parent, _RUN) is None:
        yield settings.sds.socket.parent
    if _below(settings.state_dir, _STATE) is None:
        yield settings.state_dir
    yield from (each.output.directory for each in settings.workloads if each.output is not None)


def _credentials(settings: Settings) -> Mapping[str, Path]:
    """The secret files that root alone can read now, by the variable that sets the key which names each."""
    named = {
        f"authorities.{name}.{key}": path
        for name, chosen in settings.authorities.items()
        for key, path in registry.kind_of(chosen).files(chosen).items()
        if key in registry.kind_of(chosen).secrets
    }
    if settings.state_encryption is not None and settings.state_encryption.key_file is not None:
        named["state_encryption.key_file"] = settings.state_encryption.key_file
    variables = {f"SDS_AGENT__{key.upper().replace('.', '__')}": path for key, path in named.items()}
    return {name: path for name, path in variables.items() if _is_name(name) and _is_for_root_alone(path)}


def _is_name(variable: str) -> bool:
    """Whether an environment can have it: the name of an authority may have other characters."""
    return variable.isascii() and variable.replace("_", "a").isalnum()


def _is_for_root_alone(path: Path) -> bool:
    try:
        found = path.stat()
    except OSError:
        return False
    return found.st_uid == 0 and not stat.S_IMODE(found.st_mode) & (stat.S_IRGRP | stat.S_IROTH)


def _write(made: tuple[UnitFile, ...], root: Path, *, replace: bool) -> Iterator[Path]:
    """Write all of them, or none where one would be lost; yields each place. Raises ConfigurationError."""
    places = {root / each.path.relative_to("/"): each.text for each in made}
    try:
        changed = [path for path, text in places.items() if path.exists() and path.read_text() != text]
    except (OSError, UnicodeError) as error:
        raise ConfigurationError(f"cannot read what is there already: {error}; remove it first") from error
    if changed and not replace:
        names = " and ".join(map(str, changed))
        raise ConfigurationError(f"{names}: there already, with another content; --replace writes it anew")
    for path, text in places.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            path.chmod(0o644)
            yield path
        except OSError as error:
            raise ConfigurationError(
                f"cannot write {path}: {error.strerror}; run this as root, or leave --write out and copy what it prints"
            ) from error


def _next_steps(made: tuple[UnitFile, ...], user: str) -> str:
    started = " ".join(each.path.name for each in made if each.path.suffix in {".socket", ".service"})
    return (
        f"\nNext:\n"
        f"  systemd-sysusers                        # makes the account {user}\n"
        f"  systemctl daemon-reload\n"
        f"  systemctl enable --now {started}\n"
        f"  systemctl status {NAME}"
    )
