"""The roots of a CA that signs in process, without its key: what those who must trust it are given."""

from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from cryptography import x509
from msgspec import Struct

from sds_agent.pki.certificates import CertificateError, describe, describe_time, read_bundle, unique
from sds_agent.signing.cacerts import CERT_MANAGER, ISTIO
from sds_agent.signing.directory import DirectoryError, read_file
from sds_agent.signing.self_signed import ROOTS


class CaRoots(Struct, frozen=True):
    """The roots that a file holds and that have not expired, in its order, and what was left out of them, in words."""

    file: Path
    certificates: tuple[x509.Certificate, ...]
    left_out: tuple[str, ...]


def read_roots(directory: Path, now: datetime) -> CaRoots:
    """The roots of the CA in the directory: a self-signed one, one in a plugged-in layout, or `ca root`'s.

    No key is parsed, and what is returned has none. Raises DirectoryError.
    """
    file = _file(directory)
    data = read_file(file)
    if data is None:
        raise DirectoryError(
            f"{directory} holds no CA's roots",
            f"name one with {ROOTS}, {ISTIO.roots} or {CERT_MANAGER.roots}; an embedded or a self-signed CA makes its "
            "own when it first runs",
        )
    try:
        bundle = read_bundle(data)
    except CertificateError as error:
        raise DirectoryError(f"{file} cannot be read: {error}", "put the CA's own file there") from error
    valid = tuple(each for each in unique(bundle.certificates) if now < each.not_valid_after_utc)
    left_out = (*bundle.left_out, *_expired(bundle.certificates, now))
    if not valid:
        causes = "; ".join(left_out) or "there is no certificate in it"
        raise DirectoryError(
            f"{file} has no root that is valid: {causes}", "put the CA's own file there, or a new root"
        )
    return CaRoots(file, valid, left_out)


def _file(directory: Path) -> Path:
    if _is_there(directory / ROOTS):
        return directory / ROOTS
    layout = CERT_MANAGER if _is_there(directory / CERT_MANAGER.signer) else ISTIO
    return directory / layout.roots


def _is_there(file: Path) -> bool:
    """Whether the file is there, as far as this user may see that: the attempt to read it reports the rest."""
    with suppress(OSError):
        return file.exists()
    return False


def _expired(certificates: tuple[x509.Certificate, ...], now: datetime) -> Iterator[str]:
    for each in certificates:
        if each.not_valid_after_utc <= now:
            yield f"{describe(each)} expired at {describe_time(each.not_valid_after_utc)}"
