"""`sds-agent ca check`: whether a directory, made by whatever tool, can be plugged in as a CA."""

import argparse
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from pathlib import Path

from sds_agent.cli import ca_keys, output
from sds_agent.hardening import keep_memory_private
from sds_agent.pki.certificates import describe, describe_name, describe_time
from sds_agent.pki.validation.revocation import overdue, peculiarity
from sds_agent.pki.validation.rules import fault_of_ca
from sds_agent.signing.cacerts import (
    CaFilesError,
    Finding,
    describe_key,
    fault_of_revocation,
    reach,
    read_signing_set,
    refused_by_istiod,
    spelled_otherwise,
)
from sds_agent.signing.directory import DirectoryError, Unsettled, read_directory
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
        raise DirectoryError(f"the files in {directory} change all the time; try again when they are complete")
    passphrase = ca_keys.passphrase_in(arguments.passphrase_file)
    now = datetime.now(UTC)
    judged = _judge(contents.files, now, passphrase)
    if isinstance(judged, tuple):
        output.write(f"{directory} cannot be plugged in:")
        _list(judged)
        code = UNUSABLE
    else:
        output.write(f"{directory} can be plugged in.")
        _describe(judged, now)
        output.write(f"  trust domains: {reach(contents.files, judged, now)}")
        code = 0
    names = () if isinstance(judged, tuple) else spelled_otherwise(judged)
    if refused := (*refused_by_istiod(contents.files), *names):
        output.write("istiod itself would not take it as it is:" if code == 0 else "Besides, for istiod:")
        _list(refused)
    return code


def _judge(files: Mapping[str, bytes], now: datetime, passphrase: bytes | None) -> SigningSet | tuple[Finding, ...]:
    try:
        signing = read_signing_set(files, now, passphrase=passphrase)
    except CaFilesError as error:
        return error.findings
    revocation = fault_of_revocation(signing)
    return (revocation,) if revocation else signing


def _list(findings: Iterable[Finding]) -> None:
    for finding in findings:
        output.write(f"  - {finding}")


def _describe(signing: SigningSet, now: datetime) -> None:
    for title, certificates in (
        ("signer", (signing.signer.certificate,)),
        ("above it", signing.intermediates[1:]),
        ("root", signing.roots),
    ):
        for each in certificates:
            end = describe_time(each.not_valid_after_utc)
            fault = "it has expired" if now > each.not_valid_after_utc else "it is no CA" if fault_of_ca(each) else ""
            fix = fault and f"; {fault}: remove it"
            output.write(f"  {title}: {describe(each)}, {describe_key(each)}, valid until {end}{fix}")
    late = overdue(signing.crls, now)
    for crl in signing.crls:
        end = "" if crl.next_update_utc is None else f", valid until {describe_time(crl.next_update_utc)}"
        fix = "; it is overdue: have it issued anew" if crl in late else ""
        kind = f" ({found})" if (found := peculiarity(crl)) else ""
        size = f"{len(crl)} {'entry' if len(crl) == 1 else 'entries'}"
        output.write(f"  revocation list: {describe_name(crl.issuer)}, {size}{kind}{end}{fix}")
    for cause in signing.left_out:
        output.write(f"  left out: {cause}; remove it, or have its CA issue it anew")
