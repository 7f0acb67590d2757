"""From a file and the environment to settings, or to everything that is wrong with them."""

import os
from collections.abc import Mapping
from pathlib import Path

from msgspec import Struct

from sds_agent.config import defaults
from sds_agent.config.conflicts import conflicts
from sds_agent.config.defaults import NO_PLACES, SOCKET_OPTION, Places
from sds_agent.config.settings import ONLY_AUTHORITY, Settings
from sds_agent.configfile import environment, reading
from sds_agent.configfile.document import Document
from sds_agent.errors import Problem, ProblemsError

ISTIO_SWITCH = "CA_ADDR"
"""Without a file and with this variable the configuration is the one that Istio's variables make."""


class Loaded(Struct, frozen=True):
    """Settings, and what they were made from: the file, if any, the names of the variables that set a key, and options
    of the command; what the file held; and the directories that keys have which nobody has set.
    """

    settings: Settings
    file: Path | None
    variables: tuple[str, ...]
    options: tuple[str, ...] = ()
    content: bytes = b""
    places: Places = NO_PLACES

    @property
    def source(self) -> str:
        """What they were made from, for people: `agent.yaml and $SDS_AGENT__LOG__LEVEL`."""
        first = "the defaults" if self.file is None else str(self.file)
        *most, last = [first, *(f"${name}" for name in self.variables), *self.options]
        return f"{', '.join(most)} and {last}" if most else last


def load(
    path: Path | None,
    environ: Mapping[str, str],
    *,
    uid: int | None = None,
    socket: Path | None = None,
    read: tuple[Document, list[Problem]] | None = None,
    waits: bool = True,
    places: Places = NO_PLACES,
) -> Loaded:
    """Read the file, or without one Istio's variables or the defaults, with the environment's overrides.

    `uid` is the agent's user; `socket`, an absolute path, is that of the option `--socket`; `read` is the file as
    `source.read` gave it, for a command that has read it already: a pipe gives its content once. For a command that
    `waits` it may be a pipe. `places` are those of what was loaded before, for a running agent.

    Relative paths start from the file's directory, without a file from the working directory. Raises ProblemsError with
    every problem there is.
    """
    document, problems = _document(path, environ, waits=waits) if read is None else read
    problems += environment.apply(document, environ)
    if socket is not None:
        defaults.replace_socket(document, socket)
    # after the variables, which may have changed what the defaults are made from
    if path is None:
        defaults.name_default_workload(document)
    defaults.type_default_authority(document, ONLY_AUTHORITY)
    places = defaults.fill_places(document, environ, os.geteuid() if uid is None else uid, places)
    settings, found = reading.read(Settings, document)
    # although `found` may say that values are UNREAD: the user sees the problems of both at once
    problems += [document.place(problem) for problem in (*found, *conflicts(settings))]
    if problems and path is not None and _is_of_the_ca_server(document):
        fix = "name the agent's file; `sds-agent ca check` and `sds-agent ca serve` read this one"
        raise ProblemsError([Problem((str(path),), "this is a configuration of the CA server", fix)])
    if problems:
        raise ProblemsError(problems)
    options = () if socket is None else (SOCKET_OPTION,)
    return Loaded(settings, path, tuple(document.variables), options, document.content, places)


def _is_of_the_ca_server(document: Document) -> bool:
    """Whether it has that one's sections, and none of what the agent needs: each key of it is unknown here."""
    return "workloads" not in document.tree and not {"signer", "callers"}.isdisjoint(document.tree)


def _document(path: Path | None, environ: Mapping[str, str], *, waits: bool) -> tuple[Document, list[Problem]]:
    if path is None:
        if environ.get(ISTIO_SWITCH):
            from sds_agent.config import istio_environment  # noqa: PLC0415 - measured: 3 ms

            return istio_environment.document(environ)
        return defaults.without_file(), []
    from sds_agent.configfile import source  # noqa: PLC0415 - measured: 33 ms, for PyYAML

    return source.read(path, waits=waits)
