"""JSON Web Tokens as callers' credentials: this module checks the signature, and `callers` what the token says.

The CA takes RS256, ES256 and EdDSA, each with a key made for it. `none` and the HMAC algorithms, which would take an
issuer's public key for a shared secret, are refused before a key is chosen.
"""

import functools
import hashlib
import json
import operator
from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING

from msgspec import Struct

from sds_agent.ca.callers import Caller, ClaimRule, Claims, check_claimed_times, from_claims
from sds_agent.ca.jwks import Jwk, KnownKeys
from sds_agent.ca.refusal import RefusalError, unauthenticated

if TYPE_CHECKING:
    import jwt

LONGEST_TOKEN = 16 << 10
"""Bytes."""
MOST_KNOWN = 1000
"""Tokens whose callers are remembered."""
_ALGORITHMS = frozenset({"RS256", "ES256", "EdDSA"})
_TIMES = ("exp", "nbf")


class TrustedIssuer(Struct, frozen=True):
    """An issuer whose tokens the CA takes: what they must say, and the keys that sign them."""

    rule: ClaimRule
    keys: KnownKeys


class _Token(Struct, frozen=True):
    """A token taken apart. Nothing but the choice of a key may rest on it until its signature is verified."""

    algorithm: str
    kid: str | None
    claims: Claims
    signed: bytes
    signature: bytes


class _Known(Struct, frozen=True):
    """What a good token proves, as long as the key sets of the issuers are these and its times hold."""

    key_sets: tuple[tuple[Jwk, ...], ...]
    times: Claims
    caller: Caller


class TokenCallers:
    """The callers that tokens prove, by the issuers that the CA trusts.

    A caller brings one token again and again, an agent for each of its workloads. The CA verifies its signature once
    for each reading of the issuers' key sets, and checks at each call what the passing of time can change.
    """

    def __init__(self, issuers: Sequence[TrustedIssuer], trust_domain: str) -> None:
        self._issuers = issuers
        self._trust_domain = trust_domain
        self._known: dict[bytes, _Known] = {}  # by a hash: a token is a secret

    def known(self, token: str, now: datetime) -> Caller | None:
        """The caller of a token that was verified before, at once. Raises RefusalError where it is over by now."""
        known = self._known.get(_mark(token))
        if known is None or not all(map(operator.is_, known.key_sets, self._key_sets())):
            return None
        check_claimed_times(known.times, now)
        return known.caller

    async def of(self, token: str, now: datetime) -> Caller:
        """The caller that a token proves, by the first issuer of its name that accepts it. Raises RefusalError."""
        read, key_sets = _unverified(token), self._key_sets()
        refusal = unauthenticated("the token is from an issuer that this CA does not know")
        for issuer in self._issuers:
            if read.claims.get("iss") != issuer.rule.issuer:
                continue
            try:
                await _verify(read, issuer.keys)
                caller = from_claims(read.claims, issuer.rule, self._trust_domain, now)
            except RefusalError as error:
                refusal = error
                continue
            times = {name: read.claims[name] for name in _TIMES if name in read.claims}
            self._remember(_mark(token), _Known(key_sets, times, caller))
            return caller
        raise refusal

    def _key_sets(self) -> tuple[tuple[Jwk, ...], ...]:
        return tuple([issuer.keys.current for issuer in self._issuers])

    def _remember(self, mark: bytes, known: _Known) -> None:
        self._known.pop(mark, None)
        if len(self._known) >= MOST_KNOWN:
            del self._known[next(iter(self._known))]
        self._known[mark] = known


def _mark(token: str) -> bytes:
    return hashlib.sha256(token.encode(errors="surrogatepass")).digest()


@functools.cache
def _jws() -> "jwt.PyJWS":
    import jwt  # noqa: PLC0415 - measured: 45 ms, for a CA that takes tokens

    return jwt.PyJWS()


def _unverified(token: str) -> _Token:
    """The token taken apart (RFC 7515 section 7.1). Raises RefusalError."""
    import jwt  # noqa: PLC0415 - measured: as above

    if len(token) > LONGEST_TOKEN:
        raise unauthenticated(f"the token has more than {LONGEST_TOKEN} characters")
    try:
        parts = _jws().decode_complete(token, options={"verify_signature": False})
        claims = json.loads(parts["payload"])
    except (jwt.PyJWTError, ValueError, RecursionError) as error:
        raise unauthenticated("the token is neither a JSON Web Token nor a join token") from error
    header, kid = parts["header"], parts["header"].get("kid")
    algorithm = header.get("alg")
    if not isinstance(algorithm, str) or algorithm not in _ALGORITHMS or "crit" in header:
        raise unauthenticated("the token is not signed by RS256, ES256 or EdDSA")
    if not isinstance(claims, dict):
        raise unauthenticated("the token holds no claims")
    signed = token.rpartition(".")[0].encode()
    return _Token(algorithm, kid if isinstance(kid, str) else None, claims, signed, parts["signature"])


async def _verify(token: _Token, keys: KnownKeys) -> None:
    for find in (keys.find, keys.renewed):
        if any(_is_signed(token, each) for each in await find(token.kid, token.algorithm)):
            return
    raise unauthenticated("the token is not signed with a key of its issuer")


def _is_signed(token: _Token, key: Jwk) -> bool:
    """Whether that key signed it, by the one algorithm that the key is for, which is the token's."""
    return _jws().get_algorithm_by_name(key.algorithm).verify(token.signed, key.key, token.signature)
