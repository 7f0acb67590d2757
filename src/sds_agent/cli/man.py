"""The manual page sds-agent(1), made from the parser: one section for each command, in man(7)'s macros."""

import argparse
import textwrap
from collections.abc import Iterator

from sds_agent import __version__
from sds_agent.cli.completion import actions
from sds_agent.cli.parser import Parser

_DESCRIPTION = (
    "sds-agent gives every Envoy on a machine its mTLS identity over the Secret Discovery Service (SDS) and keeps it "
    "fresh. For each workload it makes a private key, asks a CA for a certificate, checks the answer, serves key, "
    "certificate chain and roots on a Unix domain socket, and renews the certificate before it expires."
)
_ENVIRONMENT = (
    ("SDS_AGENT__SECTION__KEY", "Sets a key of the configuration, such as SDS_AGENT__SDS__SOCKET for sds.socket."),
    ("CA_ADDR", "Without a configuration that is named, Istio's variables are the configuration."),
    ("RUNTIME_DIRECTORY, STATE_DIRECTORY", "Where the socket and the state go, as systemd sets them."),
    ("XDG_RUNTIME_DIR, XDG_STATE_HOME", "Where they go without these, for a user that is not root."),
    ("CREDENTIALS_DIRECTORY", "Where systemd puts the key of the state that state_encryption.credential names."),
    ("SDS_AGENT_DUMPABLE", "With 1, core dumps and debuggers of the same user are allowed, which see private keys."),
    ("NO_COLOR", "If it is not empty, no colours are written."),
)
_FILES = (
    ("./sds-agent.yaml", "The configuration of commands that name none, if no other user could have written it."),
    ("/etc/sds-agent/sds-agent.yaml", "The configuration of the service that sds-agent install systemd makes."),
    ("/run/sds-agent/sds.sock", "The SDS socket of root's agent; sds.admin.sock beside it is the admin server's."),
    ("/var/lib/sds-agent", "The state of root's agent."),
)


def page(whole: Parser) -> str:
    """The page, for a parser that has everything declared."""
    return "\n".join(_lines(whole)) + "\n"


def _lines(whole: Parser) -> Iterator[str]:
    yield '.\\" Made by scripts/gen-man from the commands: change their help there.'
    yield f'.TH SDS\\-AGENT 1 "" "sds\\-agent {__version__}" "User Commands"'
    yield ".SH NAME"
    yield "sds\\-agent \\- give every Envoy on a machine its mTLS identity"
    yield ".SH SYNOPSIS"
    yield ".B sds\\-agent\n.I COMMAND\n[\n.I argument\n\\&... ]"
    yield ".SH DESCRIPTION"
    yield _paragraph(_DESCRIPTION)
    yield ".SH OPTIONS"
    yield from _arguments(whole)
    yield ".SH COMMANDS"
    for command in whole.commands.values():
        yield from _command(command)
    yield ".SH EXIT STATUS"
    yield _paragraph(
        "0 is good, 2 a wrong call or configuration, any other a failure: 130 is an interrupt (SIGINT), 141 a reader "
        "of the output that has left. Each command says above what else it has."
    )
    for heading, entries in (("ENVIRONMENT", _ENVIRONMENT), ("FILES", _FILES)):
        yield f".SH {heading}"
        for name, meaning in entries:
            yield f".TP\n.B {_text(name)}\n{_paragraph(meaning)}"


def _command(parser: Parser) -> Iterator[str]:
    """The section of a command, or those of the commands of a group."""
    for command in parser.commands.values():
        yield from _command(command)
    if parser.commands:
        return
    yield f'.SS "{_text(" ".join((parser.prog, *_operands(parser))))}"'
    yield _paragraph(parser.description or "")
    yield from _arguments(parser)
    yield f".PP\n{_paragraph(parser.epilog or '')}"


def _operands(parser: Parser) -> Iterator[str]:
    """The arguments of a command that are no options, as a synopsis has them."""
    yield "[option ...]"
    for each in actions(parser, below=False):
        if not each.option_strings:
            name = _value(each)
            yield {None: name, "?": f"[{name}]", "*": f"[{name} ...]"}[each.nargs]  # type: ignore[index]


def _arguments(parser: Parser) -> Iterator[str]:
    for each in actions(parser, below=False):
        if each.nargs == argparse.PARSER or (each.dest == "help" and parser.prog.count(" ")):
            continue  # the commands have sections, and --help is among the program's options
        value = "" if each.nargs == 0 else _value(each)
        names = [f"{name} {value}".rstrip() for name in each.option_strings] or [value]
        yield f".TP\n.B {_text(', '.join(names))}\n{_paragraph(each.help or '')}"


def _value(action: argparse.Action) -> str:
    if action.metavar is not None:
        return str(action.metavar)
    return "|".join(map(str, action.choices)) if action.choices is not None else action.dest.upper()


def _paragraph(text: str) -> str:
    """The text in lines that roff fills, none of which it takes for a request."""
    lines = textwrap.wrap(_text(text), 79, break_long_words=False, break_on_hyphens=False)
    return "\n".join(f"\\&{line}" if line.startswith((".", "'")) else line for line in lines)


def _text(text: str) -> str:
    """The text on one line, so that roff prints each character as it is."""
    return " ".join(text.split()).replace("\\", "\\e").replace("-", "\\-").replace('"', "\\(dq")
