"""`sds-agent ca root`: an offline root."""

import argparse
from datetime import UTC, datetime

from sds_agent.cli import ca_keys, output
from sds_agent.cli.paths import as_path
from sds_agent.errors import ConfigurationError
from sds_agent.hardening import keep_memory_private
from sds_agent.identity.spiffe import SpiffeIdError, TrustDomain
from sds_agent.pki.certificates import describe, describe_time
from sds_agent.pki.keys import KeyType
from sds_agent.signing.hierarchy import create_root

LIFETIME = "3650d"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where it goes and what it is for."""
    parser.add_argument(
        "directory", type=as_path, metavar="DIR", help="where root-cert.pem and root-key.pem go; nothing is overwritten"
    )
    parser.add_argument("--trust-domain", required=True, metavar="NAME", help="the trust domain, which is its name")
    ca_keys.add_key_arguments(parser, LIFETIME)


def run(arguments: argparse.Namespace) -> int:
    """Make it. Raises ConfigurationError and HierarchyError."""
    keep_memory_private()
    made = create_root(
        arguments.directory,
        organization=trust_domain("--trust-domain", arguments.trust_domain),
        key_type=KeyType(arguments.key),
        lifetime=ca_keys.lifetime(arguments),
        now=datetime.now(UTC),
        passphrase=ca_keys.new_passphrase(arguments),
    )
    output.write(
        f"The root {describe(made)} is in {arguments.directory} and valid until "
        f"{describe_time(made.not_valid_after_utc)}.\nKeep root-key.pem off line: only `sds-agent ca intermediate` "
        "needs it."
    )
    return 0


def trust_domain(option: str, text: str) -> str:
    """The trust domain that `option` gives. Raises ConfigurationError."""
    try:
        return str(TrustDomain.parse(text))
    except SpiffeIdError as error:
        raise ConfigurationError(f"{option}: {error}") from error
