"""`sds-agent ca token`: make a join token, for a machine that has no other proof of who it is, or withdraw them."""

import argparse
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sds_agent.ca.settings import CaSettings, load
from sds_agent.ca.tokens import JoinTokens
from sds_agent.cli import output
from sds_agent.cli.config_file import add_file_before_others
from sds_agent.cli.paths import as_path
from sds_agent.cli.public_file import check_place, not_written
from sds_agent.configfile.durations import parse
from sds_agent.errors import ConfigurationError
from sds_agent.files import fix_of, remove_unfinished, write_private
from sds_agent.hardening import keep_memory_private
from sds_agent.identity.spiffe import SpiffeId, SpiffeIdError

DEFAULT_TTL = "1h"
LONGEST_HOURS = 24


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The CA's configuration, the identity, and where the token goes."""
    add_file_before_others(parser, "the CA's configuration, which names the directory")
    parser.add_argument("spiffe_id", metavar="SPIFFE-ID", help="the identity that the token stands for")
    parser.add_argument(
        "--ttl",
        metavar="DURATION",
        help=f"how long it can be used, such as 10m; {LONGEST_HOURS}h at most, by default {DEFAULT_TTL}",
    )
    parser.add_argument(
        "--output", type=as_path, metavar="PATH", help="write it to this file (0600), not to the terminal"
    )
    parser.add_argument(
        "--withdraw",
        action="store_true",
        help="make none, and take back every token for that identity, also one that was used already",
    )


def run(arguments: argparse.Namespace) -> int:
    """Make a token, or withdraw those of an identity. Raises ProblemsError and ConfigurationError."""
    keep_memory_private()
    if arguments.withdraw and (arguments.ttl is not None or arguments.output is not None):
        raise ConfigurationError("--withdraw makes no token: leave out --ttl and --output")
    settings = load(arguments.file)
    tokens = of_ca(settings, arguments.file)
    identity = identity_of(arguments.spiffe_id, settings)
    with written():
        output.report(withdraw(tokens, identity) if arguments.withdraw else _make(tokens, identity, arguments))
    return 0


def of_ca(settings: CaSettings, file: Path) -> JoinTokens:
    """The CA's tokens. Raises ConfigurationError where it takes none."""
    directory = settings.callers.join_tokens
    if directory is None:
        raise ConfigurationError(f"{file}: callers.join_tokens names no directory; give it one for tokens")
    return JoinTokens(directory)


@contextmanager
def written() -> Iterator[None]:
    """Say of an error of the disk's who has to act. Raises ConfigurationError."""
    try:
        yield
    except OSError as error:
        raise ConfigurationError(
            f"cannot write {error.filename or 'the directory of tokens'}: {error.strerror}; "
            f"{fix_of(error, 'run this as a user that may')}"
        ) from error


def _make(tokens: JoinTokens, identity: str, arguments: argparse.Namespace) -> str:
    expires = datetime.now(UTC) + _ttl(arguments.ttl or DEFAULT_TTL)
    check_place(arguments.output)
    tokens.prepare(for_its_owner=True)
    tokens.tidy()
    token = tokens.make(identity, expires)
    with ExitStack() as lost:  # a token that nobody gets would be listed, and be good, until it ends
        lost.callback(tokens.forget, token)
        _hand_over(token, arguments.output)
        lost.pop_all()
    return f"the token is for {identity}, until {expires:%Y-%m-%d %H:%M:%S} UTC, and for one key only"


def withdraw(tokens: JoinTokens, identity: str) -> str:
    """Take back every token for the identity; returns that in words. Raises ConfigurationError and OSError."""
    tokens.prepare(for_its_owner=True)
    tokens.tidy()
    taken = tokens.withdraw(identity)
    return (
        f"tokens withdrawn for {identity}: {taken}; certificates that it got go on renewing themselves unless "
        "callers.deny_file lists it"
    )


def _ttl(written: str) -> timedelta:
    ttl = parse(written)
    if ttl is None or not timedelta(seconds=1) <= ttl <= timedelta(hours=LONGEST_HOURS):
        raise ConfigurationError(f"--ttl {written!a} is not between 1s and {LONGEST_HOURS}h: write it like 10m or 2h")
    return ttl


def identity_of(text: str, settings: CaSettings) -> str:
    """The identity, which must be one of the CA's trust domain. Raises ConfigurationError."""
    trust_domain = settings.trust_domain
    try:
        identity = SpiffeId.parse(text)
    except SpiffeIdError as error:
        raise ConfigurationError(str(error)) from error
    if str(identity.trust_domain) != trust_domain or not identity.is_workload:
        raise ConfigurationError(f"{identity} is no workload of {trust_domain}: begin it with spiffe://{trust_domain}/")
    return str(identity)


def _hand_over(token: str, path: Path | None) -> None:
    if path is None:
        output.write(token)
        return
    # those of a killed command: one that runs beside this one writes its file within a minute
    remove_unfinished(path.parent, re.escape(path.name), idle=60)
    try:
        write_private(path, f"{token}\n".encode())
    except OSError as error:  # which names a file beside it, that was to become it
        raise not_written(path, error) from error
