"""What the agent authenticates with: the files that an auth method takes, the login made of them, and their faults."""

from collections.abc import Iterator
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.x509.oid import NameOID

from sds_agent.authority.credentials import (
    Token,
    as_problem,
    client_certificate_problems,
    leaf_of,
    read_client_certificate,
    read_token,
    token_fault,
)
from sds_agent.authority.protocol import AuthorityError, CurrentIdentity
from sds_agent.authority.vault.settings import (
    VaultAppRoleAuth,
    VaultAuth,
    VaultCertAuth,
    VaultJwtAuth,
    VaultKubernetesAuth,
    VaultSettings,
    VaultTokenAuth,
)
from sds_agent.authority.vault.wire import VaultCall
from sds_agent.errors import Problem


def read_login_call(auth: VaultAuth) -> VaultCall:
    """The login of a method that has one, with what its file holds now. Blocks on the disk.

    Raises AuthorityError UNAUTHENTICATED.
    """
    secret: Token | None = None
    body: dict[str, str | None] = {}
    match auth:
        case VaultKubernetesAuth() | VaultJwtAuth():
            secret = read_token(auth.jwt_file, "the token of auth.jwt_file")
            body = {"role": auth.role, "jwt": secret.text}
        case VaultAppRoleAuth():
            if auth.secret_id_file is not None:
                secret = read_token(auth.secret_id_file, "the secret ID")
            body = {"role_id": auth.role_id, "secret_id": None if secret is None else secret.text}
        case VaultCertAuth():
            body = {"name": auth.role}
    content = {key: value for key, value in body.items() if value is not None}
    return VaultCall(f"auth/{getattr(auth, 'mount', '')}/login", msgspec.json.encode(content), proof=secret)


def certificate_mark(auth: VaultAuth, certificate: CurrentIdentity | None) -> str:
    """What identifies the certificate that a token of the method cert belongs to; empty for other methods."""
    if not isinstance(auth, VaultCertAuth) or certificate is None:
        return ""
    leaf = leaf_of(certificate)
    return "" if leaf is None else leaf.fingerprint(SHA256()).hex()


def faults(chosen: VaultSettings, now: datetime) -> Iterator[Problem]:
    """What is wrong with the credentials in the files, found without the server. Blocks on the disk."""
    match chosen.auth:
        case VaultTokenAuth(token_file=file):
            yield from _token_faults(file)
        case VaultKubernetesAuth(jwt_file=file) | VaultJwtAuth(jwt_file=file):
            yield from _jwt_faults(file, now)
        case VaultAppRoleAuth(secret_id_file=Path() as file):
            try:
                read_token(file, "the secret ID")
            except AuthorityError as error:
                yield as_problem("auth.secret_id_file", error)
    yield from client_certificate_problems(chosen.certificate_file, chosen.key_file, now)
    if isinstance(chosen.auth, VaultCertAuth):
        yield from _name_faults(chosen)


def _token_faults(file: Path) -> Iterator[Problem]:
    place = ("auth", "token_file")
    try:
        token = read_token(file)
    except AuthorityError as error:
        yield as_problem(".".join(place), error)
        return
    if _claims(token) is not None:
        fix = "it is no token of Vault's: log in with it by auth.type jwt or kubernetes, and jwt_file"
        yield Problem(place, "names a file that holds a JWT", fix)
    elif token.text.startswith("{"):
        fix = "have the token itself written there: leave wrap_ttl and dh_type out of that sink of Vault Agent's"
        yield Problem(place, "names a file that holds JSON, as of a wrapped or encrypted token", fix)


def _jwt_faults(file: Path, now: datetime) -> Iterator[Problem]:
    place = ("auth", "jwt_file")
    try:
        token = read_token(file)
    except AuthorityError as error:
        yield as_problem(".".join(place), error)
        return
    if _claims(token) is None:
        yield Problem(place, "names a file that holds no JWT", "put the JWT there that the auth method checks")
        return
    if (fault := token_fault(token, now)) is not None:
        yield fault.within(*place)


def _name_faults(chosen: VaultSettings) -> Iterator[Problem]:
    with suppress(AuthorityError):  # which is a problem of its own
        shown = read_client_certificate(chosen.certificate_file, chosen.key_file)
        leaf = None if shown is None else leaf_of(shown)
        if leaf is not None and not leaf.subject.get_attributes_for_oid(NameOID.COMMON_NAME):
            fix = "the auth method cert names the caller by it: use another certificate, or another auth.type"
            yield Problem(("certificate_file",), "has a certificate without a common name", fix)


def _claims(token: Token) -> dict[str, object] | None:
    """The claims of a JWT, unverified; None for what is none."""
    import jwt  # noqa: PLC0415 - measured: 26 ms, which no request of a certificate waits for

    try:
        claims: dict[str, object] = jwt.decode(token.text, options={"verify_signature": False, "verify_exp": False})
    except (jwt.PyJWTError, ValueError):
        return None
    return claims
