"""`sds-agent run`: the agent itself."""

import gc
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING

from msgspec import structs

from sds_agent import log
from sds_agent.cli import output
from sds_agent.cli.config_file import add_file, chosen, chosen_or_found, report_passed_over
from sds_agent.config.defaults import NO_PLACES, Places, absolute
from sds_agent.config.loading import Loaded, load
from sds_agent.deferral import deferred
from sds_agent.hardening import keep_memory_private
from sds_agent.text import visible

if TYPE_CHECKING:
    import argparse

    from sds_agent.cli.config_file import Arguments
    from sds_agent.config.settings import Settings
    from sds_agent.live.origin import ConfigSource

LOG = logging.getLogger(__name__)

FORMATS = ("auto", "text", "json")
LEVELS = ("debug", "info", "warning", "error")


EXIT_CODES = (
    "0 ended in order, by a signal; 2 the configuration, or what it names on this machine, cannot be used "
    "and a person has to act; 1 another agent or server has the socket or the state directory, or the agent failed; "
    "130 interrupted before it served"
)


def add_arguments(parser: "argparse.ArgumentParser") -> None:
    """The file and what overrides its `log` section."""
    from sds_agent.cli.paths import as_socket  # noqa: PLC0415 - for what argparse reads alone

    add_file(parser, "the configuration; by default ./sds-agent.yaml if there is one, or else the defaults, for a try")
    parser.add_argument(
        "--socket",
        type=as_socket,
        metavar="PATH",
        help="the SDS socket, in place of sds.socket; admin.socket follows it",
    )
    parser.add_argument("--log-format", choices=FORMATS, help="text, json, or auto: text on a terminal, json elsewhere")
    parser.add_argument("--log-level", choices=LEVELS, help="the least level that is written")


def plain(words: Sequence[str]) -> "Arguments | None":
    """What the parser makes of no argument, of FILE or of `--config FILE`, as a service manager calls this command.

    None for any other call: argparse, which takes 6 ms of the way to the first secret, has to read it.
    """
    match words:
        case []:
            file, config = None, None
        case [str(name)]:
            file, config = name, None
        case ["--config", str(name)]:
            file, config = None, name
        case _:
            return None
    if any(not each or each.startswith("-") for each in (file, config) if each is not None):
        return None
    return SimpleNamespace(
        file=None if file is None else Path(file),
        config=None if config is None else Path(config),
        socket=None,
        log_format=None,
        log_level=None,
    )


def run(arguments: "Arguments") -> int:
    """Serve until a signal. Raises ProblemsError and what `app.run` raises."""
    gc.disable()  # what the imports below make stays, as in `main`
    output.silence_warnings()
    loaded = _load(arguments, chosen_or_found(arguments, os.environ))
    logging_to = loaded.settings.log
    log.configure(arguments.log_format or logging_to.format, arguments.log_level or logging_to.level)
    if not keep_memory_private():
        log.event(LOG, "dumpable", level=logging.WARNING)
    _announce(loaded, is_found=chosen(arguments) is None)
    with deferred():
        import asyncio  # noqa: PLC0415 - measured with gRPC: 60 ms before a wrong configuration is reported

        from sds_agent import app  # noqa: PLC0415 - likewise

    origin = config_source(loaded, arguments)
    loaded = structs.replace(loaded, content=b"")  # it may be large, and nobody needs it any more
    gc.freeze()
    try:
        with _shown_once_ready(loaded, arguments.log_format or logging_to.format):
            asyncio.run(app.run(loaded.settings, origin))
    finally:
        gc.enable()
    return 0


def _shown_once_ready(loaded: Loaded, form: log.Format) -> AbstractContextManager[None]:
    """The next steps, for a person."""
    if sys.stderr is None or not sys.stderr.isatty():
        return nullcontext()
    from sds_agent.cli.next_steps import shown_once_ready  # noqa: PLC0415 - measured: 0.2 ms, for a terminal alone

    return shown_once_ready(loaded, form)


def _load(arguments: "Arguments", file: Path | None, *, waits: bool = True, places: Places = NO_PLACES) -> Loaded:
    socket = arguments.socket and absolute(arguments.socket)
    with deferred():
        return load(file, os.environ, socket=socket, waits=waits, places=places)


def config_source(loaded: Loaded, arguments: "Arguments") -> "ConfigSource | None":
    """What the configuration can be read from once more; None where it was made without a file, or came by a pipe."""
    from sds_agent.digest import sha256  # noqa: PLC0415 - with `app`
    from sds_agent.live.origin import ConfigSource  # noqa: PLC0415 - likewise

    file = loaded.file
    if file is None or _comes_once(file):
        return None

    def relog(chosen: log.LogSettings) -> None:
        log.change(arguments.log_format or chosen.format, arguments.log_level or chosen.level)

    places = loaded.places  # and no more of what was loaded: it may be large

    def again() -> "Settings":
        return _load(arguments, file, waits=False, places=places).settings

    return ConfigSource(file, again, relog, sha256(loaded.content))


def _comes_once(file: Path) -> bool:
    """Whether it is no file that can be read again, but a pipe or a terminal."""
    try:
        return file.exists() and not file.is_file()
    except OSError:  # it was removed, and may come again
        return False


def _tell(line: str) -> None:
    """Write a line for a person as `output.report` does, and wait for no reader of the log, which goes there too."""
    log.aside(f"sds-agent: {visible(line)}\n")


def _announce(loaded: Loaded, *, is_found: bool) -> None:
    settings = loaded.settings
    ignored = None
    if loaded.file is None:
        ignored = report_passed_over(os.environ, _tell)
        names = ", ".join(f"{each.name} ({each.spiffe_id})" for each in settings.workloads)
        _tell(
            f"no configuration file: serving {names} on the socket {settings.sds.socket}, "
            f"with state in {settings.state_dir}"
        )
    elif is_found:
        _tell(f"no FILE is named: using {loaded.file}, which is in the working directory")
    log.event(
        LOG,
        "configured",
        source=loaded.source,
        socket=str(settings.sds.socket),
        state_dir=str(settings.state_dir),
        trust_domain=settings.trust_domain,
        ignored=None if ignored is None else str(ignored),
        workloads=[each.name for each in settings.workloads],
    )
