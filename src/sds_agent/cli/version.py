"""`sds-agent version`: the versions of the program and of what it stands on, for a report of a fault."""

import argparse
import platform
from importlib import metadata

from sds_agent import __version__
from sds_agent.cli import output
from sds_agent.cli.formats import add_format, document, table

EXIT_CODES = "0 done; 2 a wrong call; 1 any other failure"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The format."""
    add_format(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print them. Raises OutputError."""
    found = versions()
    shown = table(("PART", "VERSION"), found.items()) if arguments.format == "table" else None
    output.write(shown or document(found, arguments.format))
    return 0


def versions() -> dict[str, str]:
    """The version of each part. `openssl` is the one that makes and checks certificates, in cryptography."""
    from cryptography.hazmat.backends.openssl import backend  # noqa: PLC0415 - measured: 25 ms, not for `--help`

    return {
        "version": __version__,
        "python": platform.python_version(),
        "grpc": metadata.version("grpcio"),
        "cryptography": metadata.version("cryptography"),
        "openssl": backend.openssl_version_text().removeprefix("OpenSSL "),
    }
