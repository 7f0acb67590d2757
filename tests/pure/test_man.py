"""The manual page has every command and option, and shows each character of their help as it is."""

import re
from collections.abc import Iterator
from functools import cache

from sds_agent.cli.completion import actions
from sds_agent.cli.man import page
from sds_agent.cli.parser import Parser, build


@cache
def whole() -> Parser:
    return build().whole()


def section(command: str) -> str:
    """What the page says of a command, as a reader sees its characters."""
    found = re.search(
        rf'^\.SS "{re.escape(escaped(command))} (.*?)(?=^\.S[SH] )', page(whole()), re.MULTILINE | re.DOTALL
    )
    assert found is not None, command
    return found[1].replace("\\-", "-").replace("\\(dq", '"').replace("\\&", "")


def leaves(parser: Parser) -> Iterator[Parser]:
    """The commands that do something, those of groups too."""
    for below in parser.commands.values():
        yield from leaves(below)
    if not parser.commands:
        yield parser


def escaped(text: str) -> str:
    return text.replace("-", "\\-")


def test_every_command_has_a_section_with_its_options_and_exit_codes() -> None:
    for parser in leaves(whole()):
        shown = section(parser.prog)
        assert "\nExit codes: 0 " in shown
        for action in actions(parser, below=False):
            for option in action.option_strings if action.dest != "help" else ():
                assert re.search(rf"^\.B .*{option}\b", shown, re.MULTILINE), (parser.prog, option)


def test_no_text_of_the_help_is_taken_for_a_request_of_roff() -> None:
    lines = page(whole()).splitlines()
    requests = {line.split()[0] for line in lines if line.startswith((".", "'"))}
    assert requests == {'.\\"', ".TH", ".SH", ".SS", ".B", ".I", ".TP", ".PP"}
    assert not any(re.search(r"\\(?![-&(])", line) for line in lines[1:])


def test_a_line_of_help_that_begins_with_a_dot_is_shown() -> None:
    def declare(parser: Parser) -> None:
        parser.add_argument("file", help=f"{'in ' * 26}.hidden is 'that' and C:\\x \"y\"")

    made = page(Parser(declare=declare, prog="sds-agent").declared())
    assert "\n\\&.hidden is 'that' and C:\\ex \\(dqy\\(dq\n" in made


def test_an_option_keeps_its_hyphens_for_a_search_and_a_copy() -> None:
    """An unescaped one may be shown as another character, or broken at the end of a line."""
    assert not re.search(r"(?<!\\)-", page(whole()).partition(".TH")[2])
