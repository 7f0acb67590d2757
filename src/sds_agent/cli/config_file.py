"""The configuration file that a command is called with: its argument FILE, `--config FILE`, or the one that lies here.

Without a name the agent's commands use `sds-agent.yaml` or `sds-agent.yml` in the working directory, all of them, so
that `run` starts the agent that `status` asks. A file that another user put there could give this user's agent any
identity and program to run, so such a file is refused, as is one that another user could replace. What was judged is
what is read: a name that leads to no file is not read a moment later, when another user may have made one.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from sds_agent.cli import output
from sds_agent.errors import ConfigurationError

if TYPE_CHECKING:
    import argparse
    from types import SimpleNamespace

    Arguments: TypeAlias = argparse.Namespace | SimpleNamespace

NAMES = ("sds-agent.yaml", "sds-agent.yml")
"""The file that is found in the working directory has one of these names."""

WHY_PASSED_OVER = (
    "no FILE is named and CA_ADDR is set, so Istio's variables are the configuration; name the file, or unset CA_ADDR"
)
_FIX = "remove it, or name a file with --config"


def add_file(
    parser: "argparse.ArgumentParser", about: str, *, required: bool = False, socket_about: str | None = None
) -> None:
    """Declare FILE and `--config FILE`, and with `socket_about` also `--socket PATH`: one of them may be given."""
    from sds_agent.cli.paths import as_path, as_socket  # noqa: PLC0415 - for what argparse reads alone

    which = parser.add_mutually_exclusive_group(required=required)
    which.add_argument("file", nargs="?", type=as_path, metavar="FILE", help=about)
    which.add_argument("--config", type=as_path, metavar="FILE", help="the same as FILE")
    if socket_about is not None:
        which.add_argument("--socket", type=as_socket, metavar="PATH", help=socket_about)


def add_file_before_others(parser: Any, about: str) -> None:
    """Declare FILE as required, with `--config FILE` in its place, for a `Parser` that takes other arguments after it.

    argparse cannot leave out the first of several arguments between which options may stand. So the option is put where
    FILE stands before it sees them.
    """
    from sds_agent.cli.paths import as_path  # noqa: PLC0415 - for what argparse reads alone

    parser.add_argument("file", type=as_path, metavar="FILE", help=about)
    parser.add_argument("--config", type=as_path, metavar="FILE", help="the same as FILE, which is then left out")
    parser.reordered = _config_first


def _config_first(given: list[str]) -> list[str]:
    for place, word in enumerate(given):
        if word == "--":
            break
        name, equals, value = word.partition("=")
        if name == "--config" and (equals or place + 1 < len(given)):
            rest = given[place + 1 :] if equals else given[place + 2 :]
            return [value if equals else given[place + 1], *given[:place], *rest]
    return given


def chosen(arguments: "Arguments") -> Path | None:
    """The file that was named; None where none was."""
    named: Path | None = arguments.file if arguments.config is None else arguments.config
    return named


def required(arguments: "Arguments") -> Path:
    """The file, for a command that declares it as required."""
    named: Path = arguments.file if arguments.config is None else arguments.config
    return named


def chosen_or_found(arguments: "Arguments", environ: Mapping[str, str]) -> Path | None:
    """The file that was named, or else the one that was found. Raises ConfigurationError."""
    named = chosen(arguments)
    return found(environ) if named is None else named


def found(environ: Mapping[str, str]) -> Path | None:
    """The file in the working directory, by its absolute path; None where there is none, or Istio's variables count.

    `report_passed_over` says the latter. Raises ConfigurationError for one that another user owns or could replace, for
    one that leads to no file, and where there are two.
    """
    names = [each for each in NAMES if os.path.lexists(each)]
    if not names:
        return None
    from sds_agent.config.loading import ISTIO_SWITCH  # noqa: PLC0415 - measured: 55 ms

    if environ.get(ISTIO_SWITCH):
        return None
    if len(names) > 1:
        raise ConfigurationError(
            f"{Path.cwd()} has {' and '.join(names)}; remove one of them, or name one with --config"
        )
    path = Path.cwd() / names[0]
    causes = list(who_could_change(path, os.geteuid()))
    if causes:
        raise ConfigurationError(
            f"{path} is not used unless it is named: {'; '.join(causes)}. Call this with --config {path.name} if you "
            "trust it, or in another directory"
        )
    return path


def passed_over(environ: Mapping[str, str]) -> Path | None:
    """The file in the working directory that is not used, because Istio's variables count; None where that is not so.

    For a command that was called without a file.
    """
    names = [each for each in NAMES if os.path.lexists(each)]
    if not names:
        return None
    from sds_agent.config.loading import ISTIO_SWITCH  # noqa: PLC0415 - measured: 55 ms

    return Path.cwd() / names[0] if environ.get(ISTIO_SWITCH) else None


def report_passed_over(environ: Mapping[str, str], report: Callable[[str], None] = output.report) -> Path | None:
    """Say so to a person who called a command without a file; returns that file."""
    path = passed_over(environ)
    if path is not None:
        report(f"{path} is not used: {WHY_PASSED_OVER}")
    return path


def who_could_change(path: Path, user: int) -> Iterator[str]:
    """Who else could change what the file says, for an agent that runs as `user`, in words.

    Raises ConfigurationError where the path leads to no file.
    """
    from sds_agent.directories import walk  # noqa: PLC0415 - for a file that is found alone
    from sds_agent.sources import judge  # noqa: PLC0415 - likewise

    try:
        steps, missing = walk(path, or_file=True)
    except OSError as error:
        raise ConfigurationError(f"{path} leads to no file ({error.strerror}); {_FIX}") from error
    if missing is not None:  # removed in this moment
        raise ConfigurationError(f"{path} does not exist any more; {_FIX}")
    for step in steps:
        cause = judge(step, path, user)
        if cause is None and step.owner is None and step.path in {path, path.parent}:
            cause = f"{step.path} belongs to a user of another namespace"
        if cause is not None:
            yield cause
