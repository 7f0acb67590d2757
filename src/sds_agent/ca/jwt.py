"""JSON Web Tokens as callers' credentials: this module checks the signature, and `callers` what the token says.

The CA takes RS256, ES256 and EdDSA, each with a key made for it. `none` and the HMAC algorithms, which would take an
issuer's public key for a shared secret, are refused before a key is chosen.
"""

import json
from collections.abc import Sequence
from datetime import datetime

from msgspec import Struct

from sds_agent.ca.callers import Caller, ClaimRule, Claims, from_claims
from sds_agent.ca.jwks import IssuerKeys, Jwk
from sds_agent.ca.refusal import RefusalError, unauthenticated

LONGEST_TOKEN = 16 << 10
"""Bytes."""
_ALGORITHMS = frozenset({"RS256", "ES256", "EdDSA"})


class TrustedIssuer(Struct, frozen=True):
    """An issuer whose tokens the CA takes: what they must say, and the keys that sign them."""

    rule: ClaimRule
    keys: IssuerKeys


class _Header(Struct, frozen=True):
    algorithm: str
    kid: str | None


async def caller_of(token: str, issuers: Sequence[TrustedIssuer], trust_domain: str, now: datetime) -> Caller:
    """The caller that a token proves, by the first issuer of its name that accepts it. Raises RefusalError."""
    header, claims = _unverified(token)
    refusal = unauthenticated("the token is from an issuer that this CA does not know")
    for issuer in issuers:
        if claims.get("iss") != issuer.rule.issuer:
            continue
        try:
            await _verify(token, header, issuer.keys)
            return from_claims(claims, issuer.rule, trust_domain, now)
        except RefusalError as error:
            refusal = error
    raise refusal


def _unverified(token: str) -> tuple[_Header, Claims]:
    """Header and claims as they are written. Nothing but the choice of a key may rest on them."""
    import jwt  # noqa: PLC0415 - measured: 45 ms, for a CA that takes tokens

    if len(token) > LONGEST_TOKEN:
        raise unauthenticated(f"the token has more than {LONGEST_TOKEN} characters")
    try:
        parts = jwt.PyJWS().decode_complete(token, options={"verify_signature": False})
        claims = json.loads(parts["payload"])
    except (jwt.PyJWTError, ValueError, RecursionError) as error:
        raise unauthenticated("the token is neither a JSON Web Token nor a join token") from error
    header, kid = parts["header"], parts["header"].get("kid")
    algorithm = header.get("alg")
    if not isinstance(algorithm, str) or algorithm not in _ALGORITHMS or "crit" in header:
        raise unauthenticated("the token is not signed by RS256, ES256 or EdDSA")
    if not isinstance(claims, dict):
        raise unauthenticated("the token holds no claims")
    return _Header(algorithm, kid if isinstance(kid, str) else None), claims


async def _verify(token: str, header: _Header, keys: IssuerKeys) -> None:
    for find in (keys.find, keys.renewed):
        if any(_is_signed(token, each) for each in await find(header.kid, header.algorithm)):
            return
    raise unauthenticated("the token is not signed with a key of its issuer")


def _is_signed(token: str, key: Jwk) -> bool:
    import jwt  # noqa: PLC0415 - measured: 45 ms, for a CA that takes tokens

    try:
        jwt.PyJWS().decode(token, key.key, algorithms=[key.algorithm])
    except jwt.PyJWTError:
        return False
    return True
