"""Vault's HTTP API as values: the requests, and how answers are read. No I/O.

An answer is JSON: `data` (or `auth` for a login) and `warnings`, or `errors`. Certificates are PEM without a final
newline, and an answer's `ca_chain` may hold the root, or be missing altogether.
"""

import re
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import TypeVar

import msgspec
from msgspec import Struct

from sds_agent.authority import answers
from sds_agent.authority.answers import decoded
from sds_agent.authority.credentials import Token
from sds_agent.authority.protocol import AuthorityError, ErrorKind, IssueRequest
from sds_agent.authority.vault.lease import TokenLease
from sds_agent.authority.vault.settings import VaultSettings
from sds_agent.values import Sensitive

MOST_WARNINGS = 10
MOST_ISSUERS = 100
"""Issuers of one mount; each one's certificate takes a request."""

LOOK_UP = "auth/token/lookup-self"
RENEW = "auth/token/renew-self"

T = TypeVar("T")


class VaultCall(Sensitive, frozen=True):
    """One request: the path below /v1/, the body's JSON, and the token to show. `proof` is the secret in the body."""

    path: str
    body: bytes = b""
    token: Token | None = None
    proof: Token | None = None
    post: bool = True

    @property
    def method(self) -> str:
        """The HTTP method."""
        return "POST" if self.post else "GET"

    @property
    def secrets(self) -> list[Token]:
        """What the server must not be quoted with, should it send it back."""
        return [each for each in (self.token, self.proof) if each is not None]


class VaultSigned(Struct, frozen=True):
    """A signed certificate with its chain (PEM, in any order, with the root perhaps); `issuer` signed it."""

    chain: bytes
    issuer: bytes
    warnings: tuple[str, ...]


def sign_call(chosen: VaultSettings, request: IssueRequest, token: Token) -> VaultCall:
    """Ask the role for a certificate.

    The identity stands in the CSR and in `uri_sans`: a role uses one of the two (`use_csr_sans`) and ignores the other
    without a word.
    """
    body = {
        "csr": request.csr_pem.decode("ascii"),
        "uri_sans": str(request.identity),
        "ttl": f"{max(1, int(request.ttl.total_seconds()))}s",
        "format": "pem",
        "exclude_cn_from_sans": True,
    }
    return VaultCall(f"{chosen.mount}/sign/{chosen.role}", msgspec.json.encode(body), token)


def list_call(chosen: VaultSettings) -> VaultCall:
    """Ask for the IDs of the mount's issuers, which takes no token."""
    return VaultCall(f"{chosen.mount}/issuers?list=true", post=False)


def issuer_call(chosen: VaultSettings, issuer: str) -> VaultCall:
    """Ask for an issuer's certificate, which takes no token. What an ID names never changes."""
    return VaultCall(f"{chosen.mount}/issuer/{issuer}/json", post=False)


def crl_call(chosen: VaultSettings, issuer: str) -> VaultCall:
    """Ask for an issuer's complete revocation list (PEM), which takes no token."""
    return VaultCall(f"{chosen.mount}/issuer/{issuer}/crl/pem", post=False)


class _SignData(Struct):
    certificate: str
    issuing_ca: str = ""
    ca_chain: list[str] | None = None


class _SignReply(Struct):
    data: _SignData
    warnings: list[str] | None = None


class _KeysData(Struct):
    keys: list[str]


class _KeysReply(Struct):
    data: _KeysData


class _IssuerData(Struct):
    certificate: str


class _IssuerReply(Struct):
    data: _IssuerData


class _AuthData(Sensitive, frozen=True):
    client_token: str
    lease_duration: int = 0
    renewable: bool = False


class _AuthReply(Sensitive, frozen=True):
    auth: _AuthData


class _TokenData(Struct):
    ttl: int = 0
    renewable: bool = False


class _TokenReply(Struct):
    data: _TokenData


class _ErrorReply(Struct):
    errors: list[str]


def read_signed(body: bytes, *secrets: Token) -> VaultSigned:
    """The answer to `sign_call`, with its warnings as `words`. Raises AuthorityError INVALID."""
    reply = _decoded(body, _SignReply, "a signed certificate")
    data = reply.data
    chain = [data.certificate, data.issuing_ca, *(data.ca_chain or ())]
    warnings = tuple(answers.words(each, *secrets) for each in (reply.warnings or ())[:MOST_WARNINGS])
    return VaultSigned("\n".join(filter(None, chain)).encode() + b"\n", data.issuing_ca.strip().encode(), warnings)


def read_ids(body: bytes) -> list[str]:
    """The answer to `list_call`. Raises AuthorityError INVALID."""
    ids = _decoded(body, _KeysReply, "a list of issuers").data.keys
    if len(ids) > MOST_ISSUERS or not all(re.fullmatch("[A-Za-z0-9_.-]{1,253}", each) for each in ids):
        raise AuthorityError(
            ErrorKind.INVALID,
            f"the server named {len(ids)} issuers, and 1 to {MOST_ISSUERS} with plain IDs are read; delete those of "
            "the mount that are no longer needed, or name the roots in roots_file",
        )
    return ids


def read_issuer(body: bytes) -> bytes:
    """The certificate (PEM) in the answer to `issuer_call`. Raises AuthorityError INVALID."""
    return _decoded(body, _IssuerReply, "an issuer").data.certificate.strip().encode()


def read_login(body: bytes, now: datetime) -> tuple[Token, TokenLease]:
    """The token that a login or a renewal gives. Raises AuthorityError INVALID."""
    auth = _decoded(body, _AuthReply, "a token").auth
    if not re.fullmatch("[!-~]{1,16384}", auth.client_token):
        raise AuthorityError(ErrorKind.INVALID, "the server answered the login without a usable token")
    return Token(auth.client_token), TokenLease(now, _span(auth.lease_duration), auth.renewable)


def read_looked_up(body: bytes, now: datetime) -> TokenLease:
    """The answer to LOOK_UP. Raises AuthorityError INVALID."""
    data = _decoded(body, _TokenReply, "what it knows of the token").data
    return TokenLease(now, _span(data.ttl), data.renewable)


def words(body: bytes, secrets: Iterable[Token] = ()) -> str:
    """What the server says of a failure, on one short line without these secrets."""
    reply = decoded(body, _ErrorReply)
    return answers.words(body if reply is None else "; ".join(reply.errors), *secrets)


def is_policys_denial(said: str) -> bool:
    """Whether a 403 comes from a policy, to a token that the server knows.

    A token that it does not know gets plain `permission denied` from OpenBao and older Vaults, and a second error,
    `invalid token`, beside it from newer ones.
    """
    return said.startswith("1 error occurred:") and "invalid token" not in said


def _span(seconds: int) -> timedelta | None:
    """Vault says 0 of a token that does not end."""
    return timedelta(seconds=min(seconds, 10**9)) if seconds > 0 else None


def _decoded(body: bytes, kind: type[T], what: str) -> T:
    if (reply := decoded(body, kind)) is not None:
        return reply
    raise AuthorityError(
        ErrorKind.INVALID,
        f"the server's answer is not {what}; check that url and mount lead to the PKI engine of a Vault or OpenBao",
    )
