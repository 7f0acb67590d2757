"""The command line: import the command, run it, and turn every error of ours into a sentence and an exit code."""

import gc
import sys
from collections.abc import Callable, Sequence

from sds_agent.cli import output
from sds_agent.errors import SdsAgentError, leaves
from sds_agent.rpc import core

INTERRUPTED = 130
"""The exit code of a program that ended by SIGINT."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run `sds-agent` with these arguments (the process's unless given). Returns the exit code.

    0 is good, 2 a wrong call or configuration, any other a failure; each command says in its help what it has. A bug is
    raised and ends the process with its traceback.
    """
    try:
        return guarded(lambda: _run(argv))
    finally:
        output.forget_unsaid()


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
    words = sys.argv[1:] if argv is None else argv
    if words and words[0] == "run":
        from sds_agent.signals import hold_hang_up  # noqa: PLC0415 - of this command alone

        hold_hang_up()
    output.open_closed()
    core.set_up()
    # What imports make stays: to search it for garbage again and again would only delay the start.
    gc.disable()
    try:
        command = _called(words)
    except SystemExit as leaving:  # argparse has written help or the version
        return leaving.code if isinstance(leaving.code, int) else 2
    finally:
        gc.enable()
    return command()


def _called(words: Sequence[str]) -> Callable[[], int]:
    """The command with its arguments. Raises CallError, and SystemExit as argparse does."""
    if words and words[0] == "run":
        from sds_agent.deferral import deferred  # noqa: PLC0415 - for the agent's start alone

        with deferred():
            from sds_agent.cli import run  # noqa: PLC0415 - the command

        plain = run.plain(words[1:])
        if plain is not None:
            return lambda: run.run(plain)
    from sds_agent.cli.parser import build  # noqa: PLC0415 - measured: 6 ms, with what argparse imports and declares

    arguments = build().parse_args(words)
    return lambda: int(arguments.command.run(arguments))
