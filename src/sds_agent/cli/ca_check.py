"""`sds-agent ca check`: whether a directory, made by whatever tool, can be plugged in as a CA."""

import argparse
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from sds_agent.cli import ca_keys, output
from sds_agent.errors import Problem, ProblemsError
from sds_agent.hardening import keep_memory_private
from sds_agent.signing.cacerts import fault_of_revocation, read_signing_set
from sds_agent.signing.description import lines
from sds_agent.signing.directory import DirectoryError, Unsettled, read_directory
from sds_agent.signing.istiod import refused_by_istiod, spelled_otherwise
from sds_agent.signing.signing_set import SigningSet

UNUSABLE = 2
"""The exit code for a directory that cannot be plugged in."""

EXIT_CODES = "0 it can be plugged in; 2 it cannot, or cannot be read, or the call is wrong; 1 any other failure"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The directory, and how to read its key."""
    parser.add_argument("directory", type=Path, metavar="DIR", help="the directory with the CA's files")
    parser.add_argument("--passphrase-file", type=Path, metavar="FILE", help="the passphrase of the CA's key")


def run(arguments: argparse.Namespace) -> int:
    """Say it on standard output: 0 if it can, 2 if not. Raises DirectoryError where nothing can be read."""
    keep_memory_private()
    output.silence_warnings()
    directory: Path = arguments.directory
    contents = read_directory(directory)
    if isinstance(contents, Unsettled):
        raise DirectoryError(f"the files in {directory} change all the time", "try again when they are complete")
    passphrase = ca_keys.passphrase_in(arguments.passphrase_file)
    now = datetime.now(UTC)
    judged = _judge(contents.files, now, passphrase)
    if isinstance(judged, tuple):
        output.write(f"{directory} cannot be plugged in:")
        _list(judged)
        code = UNUSABLE
    else:
        output.write(f"{directory} can be plugged in.")
        for line in lines(contents.files, judged, now):
            output.write(f"  {line}")
        code = 0
    names = () if isinstance(judged, tuple) else spelled_otherwise(judged)
    if refused := (*refused_by_istiod(contents.files), *names):
        output.write("istiod itself would not take it as it is:" if code == 0 else "Besides, for istiod:")
        _list(refused)
    return code


def _judge(files: Mapping[str, bytes], now: datetime, passphrase: bytes | None) -> SigningSet | tuple[Problem, ...]:
    try:
        signing = read_signing_set(files, now, passphrase=passphrase)
    except ProblemsError as error:
        return error.problems
    revocation = fault_of_revocation(signing)
    return (revocation,) if revocation else signing


def _list(problems: Iterable[Problem]) -> None:
    for problem in problems:
        output.write(f"  - {problem}")
