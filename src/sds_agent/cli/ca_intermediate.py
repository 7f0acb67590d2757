"""`sds-agent ca intermediate`: the CA of one cluster, below the root, in Istio's `cacerts` layout."""

import argparse
from datetime import UTC, datetime
from pathlib import Path

from sds_agent.cli import ca_keys, output
from sds_agent.cli.ca_root import trust_domain
from sds_agent.cli.paths import as_path
from sds_agent.hardening import keep_memory_private
from sds_agent.pki.certificates import describe, describe_time
from sds_agent.pki.keyfile import PassphraseError
from sds_agent.pki.keys import KeyType
from sds_agent.signing.hierarchy import create_intermediate, read_root
from sds_agent.signing.signer import Signer

LIFETIME = "730d"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where it goes, the root above it and its limits."""
    parser.add_argument(
        "directory",
        type=as_path,
        metavar="DIR",
        help="where ca-cert.pem, ca-key.pem, root-cert.pem and cert-chain.pem go; nothing is overwritten",
    )
    parser.add_argument("--root", type=as_path, required=True, metavar="ROOTDIR", help="the root's directory")
    parser.add_argument("--name", required=True, metavar="NAME", help="the intermediate's name, such as cluster1")
    parser.add_argument(
        "--constrain",
        metavar="TRUST-DOMAIN",
        help="add a name constraint: below it only SPIFFE IDs of this trust domain are valid",
    )
    parser.add_argument(
        "--root-passphrase-file",
        type=as_path,
        metavar="FILE",
        help="the passphrase of the root's key; without it, it is asked for on the terminal when it is needed",
    )
    ca_keys.add_key_arguments(parser, LIFETIME)


def run(arguments: argparse.Namespace) -> int:
    """Make it. Raises ConfigurationError, HierarchyError and KeyFileError."""
    keep_memory_private()
    output.silence_warnings()
    host = arguments.constrain and trust_domain("--constrain", arguments.constrain)
    made = create_intermediate(
        arguments.directory,
        _root(arguments.root, arguments.root_passphrase_file),
        name=arguments.name,
        key_type=KeyType(arguments.key),
        lifetime=ca_keys.lifetime(arguments),
        now=datetime.now(UTC),
        passphrase=ca_keys.new_passphrase(arguments),
        permitted_host=host,
    )
    output.write(
        f"The intermediate {describe(made)} is in {arguments.directory}, ready to be plugged in and valid until "
        f"{describe_time(made.not_valid_after_utc)}."
    )
    return 0


def _root(directory: Path, passphrase_file: Path | None) -> Signer:
    passphrase = ca_keys.passphrase_in(passphrase_file)
    try:
        return read_root(directory, passphrase)
    except PassphraseError:
        if passphrase is not None:
            raise
    return read_root(directory, ca_keys.ask("Passphrase of the root's key: "))
