"""`sds-agent ca bundle`: the roots of a CA that signs in process, without its key, for those who must trust it."""

import argparse
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from sds_agent.ca import settings as ca_settings
from sds_agent.cli import output
from sds_agent.cli.config_file import found, report_passed_over
from sds_agent.cli.paths import as_path, is_directory
from sds_agent.cli.public_file import check_place, write_public
from sds_agent.config.loading import load
from sds_agent.config.settings import Settings
from sds_agent.configfile import source
from sds_agent.errors import ConfigurationError
from sds_agent.hardening import keep_memory_private
from sds_agent.pki.certificates import unique, write_pem
from sds_agent.signing.bundle import CaRoots, read_roots
from sds_agent.signing.cacerts import FILES
from sds_agent.signing.hierarchy import ROOT_KEY
from sds_agent.signing.self_signed import ROOTS

EXIT_CODES = (
    "0 the roots were printed or written; 2 a wrong call, or a directory or a configuration that cannot be used; 1 any "
    "other failure"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The CA, and where the roots go."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "path",
        nargs="?",
        type=as_path,
        metavar="PATH",
        help="a CA's directory, the CA server's configuration, or the agent's; by default ./sds-agent.yaml if there is "
        "one, or else the agent that runs on the defaults",
    )
    which.add_argument("--config", type=as_path, metavar="FILE", help="the same as PATH, for a configuration")
    parser.add_argument("--output", type=as_path, metavar="FILE", help="write them to this file (0644)")


def run(arguments: argparse.Namespace) -> int:
    """Print or write the roots. Raises ProblemsError and ConfigurationError."""
    keep_memory_private()  # the file of a self-signed CA has its key too
    output.silence_warnings()
    now = datetime.now(UTC)
    read = [read_roots(each, now) for each in _directories(arguments)]
    for roots in read:
        for cause in roots.left_out:
            output.report(f"warning: {roots.file}: left out: {cause}")
    pem = write_pem(unique(certificate for roots in read for certificate in roots.certificates))
    if arguments.output is None:
        output.write(pem.decode("ascii").rstrip("\n"))
        return 0
    _check_target(arguments.output, read)
    write_public(arguments.output, pem)
    return 0


def _directories(arguments: argparse.Namespace) -> Iterable[Path]:
    """The directories of the CAs. Raises ProblemsError and ConfigurationError."""
    path: Path | None = arguments.path if arguments.config is None else arguments.config
    if path is not None and arguments.config is None and is_directory(path):
        return (path,)
    read = None if path is None else source.read(path)
    if path is not None and read is not None and "signer" in read[0].tree:
        signer = ca_settings.load(path, read).signer
        return [each for each in (signer.cacerts, signer.self_signed) if each is not None]
    file = found(os.environ) if path is None else path
    if path is None:
        report_passed_over(os.environ)
    settings = load(file, os.environ, read=read).settings
    directories = list(_of_agent(settings))
    if not directories:
        raise ConfigurationError(
            f"{file}: every CA of this agent is elsewhere; `sds-agent secret {settings.bundle_names[0]} -o pem` shows "
            "the roots that it serves"
        )
    return directories


def _of_agent(settings: Settings) -> Iterator[Path]:
    """The directories of the authorities that sign inside the agent."""
    for name, chosen in settings.authorities.items():
        match chosen.__struct_config__.tag:
            case "embedded":
                yield settings.state_dir / "authorities" / name
            case "cacerts":
                yield chosen.directory  # type: ignore[attr-defined]  # its type belongs to the kind


def _check_target(target: Path, read: Iterable[CaRoots]) -> None:
    """Refuse to write over a file of the CA: one of them has its key. Raises ConfigurationError."""
    check_place(target)
    own = [roots.file.with_name(name) for roots in read for name in (*FILES, ROOTS, ROOT_KEY)]
    with suppress(OSError):  # as in `check_place`
        if target.exists() and any(target.samefile(each) for each in own if each.exists()):
            raise ConfigurationError(f"--output: {target} is the CA's own file; name another")
