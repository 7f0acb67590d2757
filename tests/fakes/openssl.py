"""Runs the real `openssl` command: an oracle for what we accept, and a source of certificates that we did not make."""

import subprocess
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

from cryptography import x509

from sds_agent.pki.certificates import write_pem


def openssl(directory: Path, *arguments: str, given: bytes = b"") -> str:
    """The output of the command, run in `directory`; it has to succeed."""
    done = subprocess.run(["openssl", *arguments], cwd=directory, input=given, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def verifies(
    directory: Path,
    leaf: x509.Certificate,
    candidates: Sequence[x509.Certificate],
    anchors: Sequence[x509.Certificate],
    now: datetime,
) -> bool:
    """Whether OpenSSL accepts the leaf for TLS servers and clients. It trusts each anchor, self-signed or not."""
    (directory / "leaf.pem").write_bytes(write_pem([leaf]))
    (directory / "candidates.pem").write_bytes(write_pem(candidates))
    (directory / "anchors.pem").write_bytes(write_pem(anchors))
    files = ["-CAfile", "anchors.pem", *(["-untrusted", "candidates.pem"] if candidates else []), "leaf.pem"]
    return all(_verifies_as(directory, purpose, now, files) for purpose in ("sslserver", "sslclient"))


def _verifies_as(directory: Path, purpose: str, now: datetime, files: Sequence[str]) -> bool:
    options = ["-no-CApath", "-no-CAstore", "-partial_chain", "-purpose", purpose, "-attime", f"{now.timestamp():.0f}"]
    done = subprocess.run(["openssl", "verify", *options, *files], cwd=directory, capture_output=True, check=False)
    assert done.returncode == 0 or b"verification failed" in done.stderr, done.stderr.decode()
    return done.returncode == 0
