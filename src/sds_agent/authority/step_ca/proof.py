"""What the agent's tokens for step-ca are signed with: a JWK provisioner's key, or a certificate and its key for X5C.

The files are read for every token, as other programs replace them. To decrypt a JWE takes a tenth of a second of
processor time by design, so a key stays decrypted for as long as its file and the password's do not change.
"""

import secrets
from datetime import datetime
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from sds_agent.authority.credentials import Token, as_problem, read_pair, read_password, time_fault
from sds_agent.authority.protocol import AuthorityError, ErrorKind, IssueRequest
from sds_agent.authority.step_ca.jwk import SigningKey, StepCaJwk, StepCaKeyError, read_jwk
from sds_agent.authority.step_ca.settings import StepCaSettings
from sds_agent.authority.step_ca.wire import StepCaProof, claims, jwk_proof, x5c_proof
from sds_agent.errors import Problem
from sds_agent.named_files import NamedFileError, read_named_file
from sds_agent.pki.certificates import extension, read_pem
from sds_agent.values import Sensitive

LARGEST_KEY = 64 << 10
"""Bytes of a JWK's file."""
_CERTIFICATE = "the certificate for the X5C provisioner"


class _Decrypted(Sensitive, frozen=True):
    data: bytes
    password: bytes | None
    jwk: StepCaJwk


class StepCaProofs:
    """Reads what the settings name. Its methods block on the disk, and use one thread at a time."""

    def __init__(self, settings: StepCaSettings) -> None:
        self._settings = settings
        self._decrypted: _Decrypted | None = None

    def read(self, now: datetime) -> StepCaProof:
        """What signs a token now. Raises AuthorityError UNAUTHENTICATED."""
        try:
            return self._jwk() if self._settings.jwk_file is not None else self._x5c(now)
        except _UnusableCredentialError as error:
            raise AuthorityError(ErrorKind.UNAUTHENTICATED, f"{error.file} {error.problem}") from error

    def problems(self, now: datetime) -> list[Problem]:
        """What is wrong with the files now, by their keys."""
        try:
            self.read(now)
        except AuthorityError as error:
            key, cause = "certificate_file" if self._settings.jwk_file is None else "jwk_file", error.__cause__
            return [as_problem(cause.key if isinstance(cause, _UnusableCredentialError) else key, error)]
        return []

    def _jwk(self) -> StepCaProof:
        file, password_file = self._settings.jwk_file, self._settings.password_file
        assert file is not None  # noqa: S101 - for the type checker
        try:
            data = read_named_file(file, "the provisioner's key", LARGEST_KEY)
        except NamedFileError as error:
            raise AuthorityError(ErrorKind.UNAUTHENTICATED, str(error)) from error
        password = None
        if password_file is not None:
            # trimmed as step trims it, which encrypted the key with a password from a file such as this
            shown = read_password(password_file, "the password of the provisioner's key", trimmed=True)
            password = shown.text.encode()
        known = self._decrypted
        if known is None or (known.data, known.password) != (data, password):
            known = _Decrypted(data, password, self._decrypt(file, data, password))
            self._decrypted = known
        return jwk_proof(known.jwk)

    def _decrypt(self, file: Path, data: bytes, password: bytes | None) -> StepCaJwk:
        try:
            return read_jwk(data, password)
        except StepCaKeyError as error:
            key = "password_file" if error.password and password is not None else "jwk_file"
            raise _UnusableCredentialError(key, file, error.problem) from error

    def _x5c(self, now: datetime) -> StepCaProof:
        settings = self._settings
        assert settings.certificate_file is not None  # noqa: S101 - for the type checker
        assert settings.key_file is not None  # noqa: S101 - for the type checker
        pair = read_pair(settings.certificate_file, settings.key_file, _CERTIFICATE)
        chain = read_pem(pair.chain_pem)
        if fault := _x5c_fault(chain[0], now):
            raise _UnusableCredentialError("certificate_file", settings.certificate_file, fault)
        key = load_pem_private_key(pair.private_key_pem, None)
        assert isinstance(key, SigningKey)  # noqa: S101 - read_pair takes no other kind
        return x5c_proof(chain, key, settings.provisioner)


class _UnusableCredentialError(Exception):
    """A credential that was read cannot be used: the key that is to be changed, and the file."""

    def __init__(self, key: str, file: Path, problem: Problem) -> None:
        super().__init__(key)
        self.key = key
        self.file = file
        self.problem = problem


def _x5c_fault(leaf: x509.Certificate, now: datetime) -> Problem | None:
    if (fault := time_fault(leaf, now)) is not None:
        return fault
    usage = extension(leaf, x509.KeyUsage)
    if usage is not None and not usage.digital_signature:
        fix = "step-ca takes none without it for an X5C provisioner: provision another"
        return Problem((), "has a certificate whose key usage lacks digitalSignature", fix)
    return None


def new_token(request: IssueRequest, proof: StepCaProof, *, provisioner: str, host: str, now: datetime) -> Token:
    """A token for one attempt; step-ca takes none a second time."""
    import jwt  # noqa: PLC0415 - measured: 45 ms, for the first token

    said = claims(request, proof, provisioner=provisioner, host=host, jti=secrets.token_hex(32), now=now)
    return Token(jwt.encode(said, proof.key, algorithm=proof.algorithm, headers=dict(proof.headers)))
