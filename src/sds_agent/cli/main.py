"""The command line: import the command, run it, and turn every error of ours into a sentence and an exit code."""

import argparse
import gc
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sds_agent import __version__
from sds_agent.cli import output
from sds_agent.cli.commands import COMMANDS, Command, Group
from sds_agent.errors import SdsAgentError, leaves

INTERRUPTED = 130
"""The exit code of a program that ended by SIGINT."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `sds-agent` with these arguments (the process's unless given). Returns the exit code.

    0 is good, 2 a wrong call or configuration, 3 a configuration that cannot be run here (`check`), 1 any other error
    of ours. A bug is raised and ends the process with its traceback.
    """
    return guarded(lambda: _run(argv))


def guarded(action: Callable[[], int]) -> int:
    """Do it, and turn its result or its error into an exit code. A bug is raised."""
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
        errors = list(leaves(group))
        ours = [each for each in errors if isinstance(each, SdsAgentError)]
        if len(ours) < len(errors):
            raise
        return _report(ours)
    return code


def _report(errors: Sequence[SdsAgentError]) -> int:
    for error in errors:
        output.report(str(error))
    return errors[0].exit_code


def _run(argv: Sequence[str] | None) -> int:
    output.open_closed()
    # gRPC's core writes to standard error on its own account, and reads this once, when it is imported
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")
    # What imports make stays: to search it for garbage again and again would only delay the start.
    gc.disable()
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as leaving:  # argparse has written help, the version, or what is wrong with the call
        return leaving.code if isinstance(leaving.code, int) else 2
    finally:
        gc.enable()
    code: int = arguments.command.run(arguments)
    return code


class _Help(argparse.HelpFormatter):
    """Asks for the terminal's width only when there is help to print.

    argparse's own asks whenever an argument is declared, and imports shutil and the compression libraries for that.
    """

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=80)

    def format_help(self) -> str:
        """The help, or the usage alone."""
        import shutil  # noqa: PLC0415 - measured: 2 ms of every start

        self._width = shutil.get_terminal_size().columns - 2
        return super().format_help()


class _Parser(argparse.ArgumentParser):
    """A parser whose arguments are declared by `declare`, once it has something to parse.

    So only the command that is called is imported. To know the others takes their names alone.
    """

    def __init__(self, *, declare: "Callable[[_Parser], None]", **options: Any) -> None:
        super().__init__(formatter_class=_Help, **options)
        self._declare: Callable[[_Parser], None] | None = declare

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, which calls this for the parser of a command too."""
        declare, self._declare = self._declare, None
        if declare is not None:
            declare(self)
        return super().parse_known_args(args, namespace)


def _parser() -> _Parser:
    def declare(parser: _Parser) -> None:
        parser.add_argument("--version", action="version", version=f"sds-agent {__version__}")
        _add_commands(parser, COMMANDS)

    return _Parser(
        declare=declare,
        prog="sds-agent",
        description="Gives every Envoy on a machine its mTLS identity over SDS and keeps it fresh.",
        epilog="sds-agent COMMAND --help explains a command and its exit codes: 0 is good, 2 a wrong call or "
        "configuration, 1 any other failure.",
    )


def _add_commands(parser: _Parser, commands: Mapping[str, Command | Group], *group: str) -> None:
    """Add commands to the parser of the program, or to that of the group of this name."""
    added = parser.add_subparsers(metavar="COMMAND", required=True, prog=parser.prog)
    for word, chosen in commands.items():

        def declare(below: _Parser, chosen: Command | Group = chosen, name: tuple[str, ...] = (*group, word)) -> None:
            if isinstance(chosen, Group):
                _add_commands(below, chosen.commands, *name)
                return
            module, exit_codes = chosen.load()
            below.epilog = f"Exit codes: {exit_codes}."
            below.set_defaults(command=module, name=" ".join(name))
            module.add_arguments(below)

        about = chosen.about
        added.add_parser(word, declare=declare, help=about, description=f"{about[0].upper()}{about[1:]}.")
