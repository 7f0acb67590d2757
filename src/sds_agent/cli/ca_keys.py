"""What the commands that make a CA have in common: the kind of its key, its lifetime, and passphrases."""

import argparse
import getpass
import sys
from datetime import timedelta
from pathlib import Path

from sds_agent.cli.paths import as_path
from sds_agent.configfile.durations import parse
from sds_agent.errors import ConfigurationError
from sds_agent.pki.keys import KeyType
from sds_agent.signing.directory import read_passphrase

KEY_TYPES = tuple(each.value for each in KeyType)
LONGEST = timedelta(days=30 * 365)


def add_key_arguments(parser: argparse.ArgumentParser, lifetime: str) -> None:
    """The key's kind, the lifetime (by default `lifetime`) and the new key's passphrase."""
    parser.add_argument("--key", choices=KEY_TYPES, default=KEY_TYPES[0], help=f"the kind of key ({KEY_TYPES[0]})")
    parser.add_argument(
        "--lifetime", default=lifetime, metavar="DURATION", help=f"how long it is valid, such as 90d ({lifetime})"
    )
    passphrase = parser.add_mutually_exclusive_group()
    passphrase.add_argument(
        "--passphrase-file", type=as_path, metavar="FILE", help="encrypt the new key with the passphrase in this file"
    )
    passphrase.add_argument(
        "--ask-passphrase", action="store_true", help="encrypt the new key with a passphrase asked for on the terminal"
    )


def lifetime(arguments: argparse.Namespace) -> timedelta:
    """The lifetime that was asked for. Raises ConfigurationError."""
    read = parse(arguments.lifetime)
    if read is None or not timedelta(seconds=1) <= read <= LONGEST:
        raise ConfigurationError(f"--lifetime: it must be a duration such as 12h or 730d, from 1s to {LONGEST.days}d")
    return read


def new_passphrase(arguments: argparse.Namespace) -> bytes | None:
    """The passphrase for the new key, or None. Raises ConfigurationError."""
    if arguments.ask_passphrase:
        passphrase = ask("Passphrase for the new key: ")
        if ask("The same once more: ") != passphrase:
            raise ConfigurationError("the two passphrases differ; start again")
        return passphrase
    return passphrase_in(arguments.passphrase_file)


def passphrase_in(file: Path | None) -> bytes | None:
    """The passphrase in a file or a pipe, or None without one. Raises DirectoryError."""
    return None if file is None else read_passphrase(file, waits=True)


def ask(prompt: str) -> bytes:
    """A passphrase from the terminal, which does not show it. Raises ConfigurationError."""
    if sys.stdin is None or not sys.stdin.isatty():
        raise ConfigurationError("a passphrase is needed and there is no terminal to ask for it; give it in a file")
    try:
        passphrase = getpass.getpass(prompt).encode()
    except EOFError as error:
        raise ConfigurationError("no passphrase was given; start again, or give it in a file") from error
    except UnicodeError:  # without its cause: that holds what was typed
        raise ConfigurationError(
            "the passphrase is not in the terminal's encoding; start again in a terminal with UTF-8, or give it in a "
            "file"
        ) from None
    if not passphrase:
        raise ConfigurationError("the passphrase is empty; start again, or leave out --ask-passphrase")
    return passphrase
