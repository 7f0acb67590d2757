"""The hierarchy on disk: an offline root, and an intermediate for each cluster in Istio's `cacerts` layout.

A directory is written whole or not at all, and no file is ever overwritten.
"""

import os
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat

from sds_agent.directories import ABOVE, make_directory
from sds_agent.errors import ProblemsError, SdsAgentError
from sds_agent.files import create, sync_directory
from sds_agent.pki.certificates import CertificateError, describe, has_key, read_bundle, write_pem
from sds_agent.pki.forms import without_certificate
from sds_agent.pki.keyfile import LONGEST_PASSPHRASE, KeyFileError, read_private_key
from sds_agent.pki.keys import KeyType, PrivateKey, generate
from sds_agent.pki.validation.signatures import fault_of_signature
from sds_agent.signing.cacerts import CHAIN_FILE, FILES, ISTIO, read_signing_set
from sds_agent.signing.directory import DirectoryError, read_file
from sds_agent.signing.signer import Signer, SignerError, make_intermediate, make_root

ROOT_CERTIFICATE = ISTIO.roots
ROOT_KEY = "root-key.pem"

_PRIVATE, _PUBLIC = 0o600, 0o644
_ROOT = "the root's certificate"


class HierarchyError(SdsAgentError):
    """A part of the hierarchy cannot be made or read."""

    exit_code = 2


def create_root(
    directory: Path,
    *,
    organization: str,
    key_type: KeyType,
    lifetime: timedelta,
    now: datetime,
    passphrase: bytes | None = None,
) -> x509.Certificate:
    """Make a root in `directory`, its key encrypted where there is a passphrase; returns its certificate.

    Raises HierarchyError.
    """
    _refuse_taken(directory, (ROOT_CERTIFICATE, ROOT_KEY))
    try:
        root = make_root(generate(key_type), organization, now, lifetime)
    except SignerError as error:
        raise HierarchyError(f"the root cannot be made: {error}") from error
    _write_whole(directory, {ROOT_KEY: _key_pem(root.key, passphrase), ROOT_CERTIFICATE: write_pem([root.certificate])})
    return root.certificate


def create_intermediate(
    directory: Path,
    root: Signer,
    *,
    name: str,
    key_type: KeyType,
    lifetime: timedelta,
    now: datetime,
    passphrase: bytes | None = None,
    permitted_host: str | None = None,
) -> x509.Certificate:
    """Make an intermediate below `root` in `directory`, ready to be plugged in; returns its certificate.

    Raises HierarchyError.
    """
    _refuse_taken(directory, FILES)
    try:
        made = make_intermediate(root, generate(key_type), name, now, lifetime, permitted_host=permitted_host)
    except SignerError as error:
        raise HierarchyError(f"the intermediate cannot be made: {error}") from error
    files = {
        ISTIO.key: _key_pem(made.key, passphrase),
        ISTIO.signer: write_pem([made.certificate]),
        CHAIN_FILE: write_pem([made.certificate, root.certificate]),
        ISTIO.roots: write_pem([root.certificate]),
    }
    _refuse_useless(files, now, passphrase, permitted_host)
    _write_whole(directory, files)
    return made.certificate


def read_root(directory: Path, passphrase: bytes | None = None) -> Signer:
    """The root in `directory`. Raises HierarchyError, and PassphraseError where the key's is missing or wrong."""
    certificate_file, key_file = directory / ROOT_CERTIFICATE, directory / ROOT_KEY
    pem, data = _part_of_root(certificate_file), _part_of_root(key_file)
    try:
        reading = read_bundle(pem)
    except CertificateError as error:
        raise HierarchyError(f"{certificate_file}: {error}; put {_ROOT} there") from error
    if not reading.certificates:
        raise HierarchyError(str(without_certificate(pem, _ROOT).within(str(certificate_file))))
    try:
        key = read_private_key(data, passphrase)
    except KeyFileError as error:
        raise type(error)(error.problem.within(str(key_file))) from error
    for certificate in reading.certificates:
        if has_key(certificate, key.public_key()):
            return _as_root(certificate, key, certificate_file)
    left_out = "".join(f" ({each})" for each in reading.left_out)
    raise HierarchyError(
        f"{key_file}: is not the key of a certificate in {certificate_file}{left_out}; put the right one there"
    )


def _part_of_root(file: Path) -> bytes:
    try:
        data = read_file(file)
    except DirectoryError as error:
        raise HierarchyError(f"the root cannot be read: {error}") from error
    if data is None:
        raise HierarchyError(
            f"the root cannot be read: {file} is missing; name a directory that holds {ROOT_CERTIFICATE} and "
            f"{ROOT_KEY}, as `sds-agent ca root` makes it"
        )
    return data


def _as_root(certificate: x509.Certificate, key: PrivateKey, file: Path) -> Signer:
    if certificate.issuer != certificate.subject:
        raise HierarchyError(f"{file}: {describe(certificate)} is not self-signed, so it is no root; name the root's")
    if fault := fault_of_signature(certificate, certificate):
        raise HierarchyError(
            f"{file}: {fault}; `openssl x509 -in {ROOT_CERTIFICATE} -signkey {ROOT_KEY} -sha256 -days 3650` signs the "
            "root anew, under its old name"
        )
    try:
        return Signer(certificate, key)
    except SignerError as error:
        raise HierarchyError(f"{file}: {error}") from error


def _refuse_useless(
    files: Mapping[str, bytes], now: datetime, passphrase: bytes | None, permitted_host: str | None
) -> None:
    """A root made by another tool may allow no CA below it, or none that could sign for this host."""
    try:
        read_signing_set(files, now, passphrase=passphrase, trust_domain=permitted_host)
    except ProblemsError as error:
        raise HierarchyError(
            f"below this root the intermediate could not be used: {'; '.join(each.found for each in error.problems)}; "
            "take another root or another name constraint"
        ) from error


def _key_pem(key: PrivateKey, passphrase: bytes | None) -> bytes:
    if passphrase is not None and not 0 < len(passphrase) <= LONGEST_PASSPHRASE:
        raise HierarchyError(f"the passphrase has {len(passphrase)} bytes; 1 to {LONGEST_PASSPHRASE} can be used")
    encryption = NoEncryption() if passphrase is None else BestAvailableEncryption(passphrase)
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption)


def _refuse_taken(directory: Path, names: tuple[str, ...]) -> None:
    if taken := [name for name in names if os.path.lexists(directory / name)]:
        raise HierarchyError(
            f"{directory} holds {', '.join(taken)} already, and no file is ever overwritten; choose another directory"
        )


def _write_whole(directory: Path, files: Mapping[str, bytes]) -> None:
    """All the files, or none, and the directory only with them. What ends in `-key.pem` has mode 0600.

    The root's certificate comes last: a process that is killed before leaves a directory that no reader accepts.
    """
    # Path.exists raises where a directory above may not be searched; make_directory reports that
    missing = [each for each in (directory, *directory.parents) if not os.path.exists(each)]  # noqa: PTH110 - see above
    written: list[Path] = []
    try:
        for each in reversed(missing):
            make_directory(each, 0o700 if each == directory else ABOVE)
        for name, data in files.items():
            create(directory / name, data, _PRIVATE if name.endswith("-key.pem") else _PUBLIC)
            written.append(directory / name)
        sync_directory(directory)
    except BaseException as error:
        for file in written:
            file.unlink(missing_ok=True)
        with suppress(OSError):  # another process has put something there since
            for each in missing:
                each.rmdir()
        if isinstance(error, OSError):
            raise HierarchyError(
                f"cannot write {error.filename or directory}: {error.strerror}; nothing was left behind"
            ) from error
        raise
