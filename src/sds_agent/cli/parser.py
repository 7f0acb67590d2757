"""The parser of the command line. It answers a wrong call in one sentence, with the word that was perhaps meant."""

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from sds_agent import __version__
from sds_agent.cli import output
from sds_agent.cli.commands import COMMANDS, Command, Group
from sds_agent.errors import SdsAgentError

LONGEST_QUOTE = 60
"""Characters of a wrong word that are repeated."""


class CallError(SdsAgentError):
    """The command does not exist, or was called with arguments that it does not take."""

    exit_code = 2


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


class Parser(argparse.ArgumentParser):
    """A parser whose arguments are declared by `declare`, once it has something to parse or to show.

    So only the command that is called is imported. To know the others takes their names alone. `commands` are the
    parsers of the commands below it, after `declared`; `default` is put before arguments that name none of them.
    `reordered` may change the arguments before they are parsed.
    """

    def __init__(self, *, declare: "Callable[[Parser], None]", **options: Any) -> None:
        super().__init__(formatter_class=_Help, **options)
        self._declare: Callable[[Parser], None] | None = declare
        self.commands: Mapping[str, Parser] = {}
        self.default: str | None = None
        self.reordered: Callable[[list[str]], list[str]] | None = None

    def declared(self) -> "Parser":
        """This parser, with its arguments."""
        declare, self._declare = self._declare, None
        if declare is not None:
            declare(self)
        return self

    def whole(self) -> "Parser":
        """This parser, with its arguments and those of every command below it: each command is imported."""
        for command in self.declared().commands.values():
            command.whole()
        return self

    def declarations(self) -> tuple[argparse.Action, ...]:
        """What is declared on this parser itself."""
        return tuple(self._actions)

    def below(self, word: str) -> "Parser":
        """The parser of a command below this one, with its arguments. Raises CallError."""
        if word not in self.declared().commands:
            raise self._no_command(word)
        return self.commands[word].declared()

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, which calls this for the parser of a command too; none is left over. Raises CallError."""
        given = sys.argv[1:] if args is None else list(args)
        self.declared()
        if self.default is not None and given and given[0] not in {*self.commands, *self._options()}:
            given = [self.default, *given]
        if self.reordered is not None:
            given = self.reordered(given)
        if self.commands:
            self._check_options(given)
        found, surplus = super().parse_known_args(given, namespace)
        if surplus:
            raise self._surplus(surplus[0])
        return found, surplus

    def error(self, message: str) -> NoReturn:
        """What argparse calls for a wrong call. Raises CallError."""
        raise self._wrong(message.removeprefix("argument "))

    def _print_message(self, message: str, _file: Any = None) -> None:
        """As argparse's, which loses an error of the output. Raises OutputError."""
        output.write(message.rstrip("\n"))

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """As argparse's, whose own sentence lists every command there is."""
        if action.choices is None or value in action.choices:
            return
        if self.commands:
            raise self._no_command(value)
        known = [str(each) for each in action.choices]
        hint = _meant(str(value), known)
        raise argparse.ArgumentError(action, f"{_quoted(str(value))} is not one of {', '.join(known)}{hint}")

    def _check_options(self, given: Sequence[str]) -> None:
        """Refuse an unknown option before the command: what follows it would be taken for the command."""
        for word in given:
            if not word.startswith("-") or word in {"-", "--"}:
                return
            if not any(known.startswith(word.partition("=")[0]) for known in self._options()):
                raise self._surplus(word)

    def _options(self) -> list[str]:
        return [each for action in self.declarations() for each in action.option_strings]

    def _surplus(self, word: str) -> CallError:
        if not word.startswith("-"):
            return self._wrong(f"{_quoted(word)} is one argument too many")
        name = word.partition("=")[0]
        hint = _meant(name, [each for each in self._options() if each.startswith("--")])
        if not hint and self.commands:
            hint = "; the options of a command stand after it"
        return self._wrong(f"there is no option {_quoted(name)}{hint}", is_solved=bool(hint))

    def _no_command(self, word: str) -> CallError:
        hint = _meant(word, self.commands)
        if not self.commands:
            return self._wrong(f"there is no command {_quoted(word)} below it")
        return self._wrong(f"{_quoted(word)} is no command{hint or f'; {self.prog} --help lists them'}", is_solved=True)

    def _wrong(self, what: str, *, is_solved: bool = False) -> CallError:
        command = self.prog.partition(" ")[2]
        place = f"{command}: " if command else ""
        return CallError(f"{place}{what}" + ("" if is_solved else f"; {self.prog} --help explains the call"))


class Shown:
    """In place of a command, for a call that names none: prints help."""

    def __init__(self, parser: Parser) -> None:
        self._parser = parser

    def run(self, _arguments: argparse.Namespace) -> int:
        """Print it to standard output. Raises OutputError."""
        output.write(self._parser.declared().format_help().rstrip("\n"))
        return 0


def build() -> Parser:
    """The program's parser."""

    def declare(parser: Parser) -> None:
        parser.add_argument("-V", "--version", action="version", version=f"sds-agent {__version__}")
        _add_commands(parser, COMMANDS)

    return Parser(
        declare=declare,
        prog="sds-agent",
        description="Gives every Envoy on a machine its mTLS identity over SDS and keeps it fresh.",
        epilog="sds-agent COMMAND --help, or sds-agent help COMMAND, explains a command and its exit codes: 0 is good, "
        "2 a wrong call or configuration, any other a failure. Without a command this help is printed, with 0.",
    )


def _add_commands(parser: Parser, commands: Mapping[str, Command | Group], *group: str) -> None:
    """Add commands to the parser of the program, or to that of the group of this name."""
    added = parser.add_subparsers(metavar="COMMAND", prog=parser.prog)
    parser.set_defaults(command=Shown(parser))
    for word, chosen in commands.items():

        def declare(below: Parser, chosen: Command | Group = chosen, name: tuple[str, ...] = (*group, word)) -> None:
            if isinstance(chosen, Group):
                _add_commands(below, chosen.commands, *name)
                below.default = chosen.default
                return
            module, exit_codes = chosen.load()
            below.epilog = f"Exit codes: {exit_codes}."
            below.set_defaults(command=module, name=" ".join(name))
            module.add_arguments(below)

        about = chosen.about
        added.add_parser(word, declare=declare, help=about, description=f"{about[0].upper()}{about[1:]}.")
    parser.commands = added.choices


def _meant(word: str, known: Iterable[str]) -> str:
    """A question that names the known word that was perhaps meant, after a semicolon; nothing where none is near."""
    import difflib  # noqa: PLC0415 - measured: 3 ms, for a wrong call alone

    listed = list(known)
    begun = [each for each in listed if len(word.lstrip("-")) > 1 and each.startswith(word)]
    near = begun[:1] or difflib.get_close_matches(word[:LONGEST_QUOTE].lower(), listed, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def _quoted(word: str) -> str:
    """The word between quotes, in ASCII, without control characters and of a bounded length."""
    return ascii(word if len(word) <= LONGEST_QUOTE else f"{word[:LONGEST_QUOTE]}...")
