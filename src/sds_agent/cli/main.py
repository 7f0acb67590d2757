"""The command line: find the command, run it, and turn every error of ours into a sentence and an exit code."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from typing import Protocol, cast

from sds_agent import __version__
from sds_agent.cli import output
from sds_agent.errors import SdsAgentError

INTERRUPTED = 130
"""The exit code of a program that ended by SIGINT."""

COMMANDS = {
    "run": "serve secrets until SIGTERM, SIGINT or SIGHUP",
    "check": "check a configuration and explain what it does",
    "ready": "ask a running agent whether every workload has its certificate",
    "ca": "make, check and serve a certificate hierarchy",
    "schema": "print the configuration file's JSON Schema",
}
"""What each command does. Its module, in this package, has its name."""


class Command(Protocol):
    """What a command's module offers."""

    def add_arguments(self, parser: argparse.ArgumentParser) -> None:
        """Declare the command's arguments."""
        ...

    def run(self, arguments: argparse.Namespace) -> int:
        """Do it; returns the exit code. Raises SdsAgentError."""
        ...


def main(argv: Sequence[str] | None = None) -> int:
    """Run `sds-agent` with these arguments (the process's unless given). Returns the exit code.

    0 is good, 2 a wrong call or configuration, 3 a configuration that cannot be run here (`check`), 1 whatever else of
    ours went wrong; a bug ends with its traceback.
    """
    return guarded(lambda: _run(argv))


def guarded(action: Callable[[], int]) -> int:
    """Do it, and turn every way in which it ends into an exit code."""
    try:
        code = action()
        output.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except output.ReaderGoneError as error:
        return error.exit_code
    except SdsAgentError as error:
        return _report([error])
    except ExceptionGroup as group:  # what a task group makes of the errors of its tasks
        ours, bugs = group.split(SdsAgentError)
        if ours is None or bugs is not None:
            raise
        return _report(list(_leaves(ours)))
    return code


def _report(errors: Sequence[SdsAgentError]) -> int:
    for error in errors:
        output.complain(str(error))
    return errors[0].exit_code


def _leaves(group: ExceptionGroup[SdsAgentError]) -> Iterator[SdsAgentError]:
    for each in group.exceptions:
        if isinstance(each, ExceptionGroup):
            yield from _leaves(each)
        else:
            yield each


def _run(argv: Sequence[str] | None) -> int:
    output.open_closed()
    argv = sys.argv[1:] if argv is None else argv
    try:
        arguments = _parser(argv).parse_args(argv)
    except SystemExit as leaving:  # argparse has had its say: help, the version, or a wrong call
        return leaving.code if isinstance(leaving.code, int) else 2
    command: Command = arguments.command
    return command.run(arguments)


class _Help(argparse.HelpFormatter):
    """Asks how wide the terminal is when there is help to print.

    argparse's own asks whenever an argument is declared, and imports shutil and the compression libraries for it.
    """

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=80)

    def format_help(self) -> str:
        """The help, or the usage alone."""
        import shutil  # noqa: PLC0415 - see above

        self._width = shutil.get_terminal_size().columns - 2
        return super().format_help()


def _parser(argv: Sequence[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="sds-agent",
        description="Gives every Envoy on a machine its mTLS identity over SDS and keeps it fresh.",
        epilog="sds-agent COMMAND --help explains a command and its exit codes: 0 is good, 2 a wrong call or "
        "configuration, 1 any other failure.",
        formatter_class=_Help,
    )
    parser.add_argument("--version", action="version", version=f"sds-agent {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, prog=parser.prog)
    for name, about in COMMANDS.items():
        description = f"{about[0].upper()}{about[1:]}."
        added = commands.add_parser(name, help=about, description=description, formatter_class=_Help)
        if name in argv:  # the others' modules, and all that they import, are not needed to tell that they exist
            command = cast("Command", import_module(f"sds_agent.cli.{name}"))
            command.add_arguments(added)
            added.set_defaults(command=command)
    return parser
