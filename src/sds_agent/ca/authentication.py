"""Which proof a call brings, and whom it proves: the certificate of its connection, or else its bearer token."""

from collections.abc import Sequence
from datetime import datetime
from weakref import WeakKeyDictionary

import anyio.to_thread
import msgspec
from msgspec import Struct

from sds_agent.ca.acceptor import Peer
from sds_agent.ca.callers import Caller, check_chain_times, from_chain, from_join_token
from sds_agent.ca.jwt import Issuer, caller_of
from sds_agent.ca.refusal import unauthenticated
from sds_agent.ca.tokens import PREFIX, JoinTokens, Record
from sds_agent.pki.path import PathError, find_path
from sds_agent.pki.revocation import RevocationList
from sds_agent.pki.rules import Chain
from sds_agent.pki.signing import SigningSet


class Proven(Struct, frozen=True):
    """A caller, and the join token that is to be spent before it gets anything."""

    caller: Caller
    token: Record | None = None


class Authentication(Struct, frozen=True):
    """The ways to prove an identity that the configuration allows."""

    trust_domain: str
    issuers: Sequence[Issuer]
    mtls: bool
    tokens: JoinTokens | None
    _holders: WeakKeyDictionary[Peer, tuple[tuple[RevocationList, ...], Caller]] = msgspec.field(
        default_factory=WeakKeyDictionary
    )

    async def prove(
        self, peer: Peer, metadata: Sequence[tuple[str, str | bytes]], signing: SigningSet, now: datetime
    ) -> Proven:
        """Who calls. Where a certificate and a token are given the certificate counts, as with istiod.

        Raises RefusalError.
        """
        if self.mtls and peer.chain:
            _check_anchor(peer.chain, signing, now)
            check_chain_times(peer.chain, now)
            return Proven(self._holder(peer, signing.crls))
        token = _bearer(metadata)
        if token is None:
            raise unauthenticated(f"the call brings no proof of who it is from: {self._wanted()}")
        if token.startswith(PREFIX):
            return await self._joining(token, now)
        if not self.issuers:
            raise unauthenticated("this CA takes no JSON Web Tokens: no issuer is configured in callers.jwt")
        return Proven(await caller_of(token, self.issuers, self.trust_domain, now))

    def _holder(self, peer: Peer, crls: tuple[RevocationList, ...]) -> Caller:
        """Whose certificate the connection showed: as it stays the same, only other revocation lists are a reason to
        read it again for a later call.
        """
        known = self._holders.get(peer)
        if known is None or known[0] is not crls:
            known = self._holders[peer] = (crls, from_chain(peer.chain, crls, self.trust_domain))
        return known[1]

    def _wanted(self) -> str:
        return f"send a token as `authorization: Bearer`{', or a client certificate' if self.mtls else ''}"

    async def _joining(self, token: str, now: datetime) -> Proven:
        if self.tokens is None:
            raise unauthenticated("this CA takes no join tokens: callers.join_tokens is not configured")
        record = await anyio.to_thread.run_sync(self.tokens.find, token)
        return Proven(from_join_token(record.spiffe_id, record.expires, self.trust_domain, now), record)


def _check_anchor(chain: Chain, signing: SigningSet, now: datetime) -> None:
    """The handshake checked the chain. If its anchor was withdrawn since, it has to lead to one that is left."""
    client, *above = chain
    if chain[-1] in signing.roots:
        return
    try:
        find_path(client, (*above, *signing.intermediates), signing.roots, now)
    except PathError as error:
        raise unauthenticated(f"the client certificate is no longer trusted: {error}; come with a token") from error


def _bearer(metadata: Sequence[tuple[str, str | bytes]]) -> str | None:
    """The token (RFC 6750 section 2.1). Raises RefusalError where there are several headers."""
    found = [value for key, value in metadata if key == "authorization"]
    if len(found) > 1:
        raise unauthenticated("the call has more than one authorization header")
    if not found or not isinstance(found[0], str):
        return None
    scheme, _, token = found[0].strip().partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None
