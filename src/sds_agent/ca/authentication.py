"""Which proof a call brings, and whom it proves: the certificate of its connection, or else its bearer token.

The module is anyio's: neither gRPC nor a transport is in it.
"""

from collections.abc import Sequence
from datetime import datetime
from weakref import WeakKeyDictionary

import anyio
from msgspec import Struct

from sds_agent.ca.acceptor import Peer
from sds_agent.ca.anchors import Anchors, Revocations, anchors_of
from sds_agent.ca.callers import Caller, check_chain_times, from_chain, from_join_token
from sds_agent.ca.jwt import TokenCallers, TrustedIssuer
from sds_agent.ca.refusal import unauthenticated
from sds_agent.ca.together import Together
from sds_agent.ca.tokens import PREFIX, JoinTokens, Record
from sds_agent.pki.keys import PublicKey
from sds_agent.pki.validation.rules import Chain
from sds_agent.signing.signing_set import SigningSet
from sds_agent.tasks import in_thread

TIMEOUT = 5.0
"""Seconds for the disk with the join tokens to answer."""
MOST_TOGETHER = 64
"""Join tokens that are read, or spent, in one thread: the first of them waits for the last."""


class Proven(Struct, frozen=True):
    """A caller, and the join token that has to be spent before it gets a certificate."""

    caller: Caller
    token: Record | None = None


class _CertificateCallers:
    """The caller that each connection's certificate proves, and the path by which it is trusted.

    A connection's certificate stays the same, so a later call judges it again only where the signing set has changed.
    """

    def __init__(self) -> None:
        self._judges: tuple[SigningSet, Anchors, Revocations] | None = None
        self._making = anyio.Lock()
        self._known: WeakKeyDictionary[Peer, tuple[SigningSet, Chain, Caller]] = WeakKeyDictionary()

    async def of(self, peer: Peer, signing: SigningSet, trust_domain: str, now: datetime) -> Caller:
        """The caller that the connection's certificate proves at `now`. Raises RefusalError."""
        anchors, revocations = await self._judges_for(signing)
        path = anchors.path(peer.chain, now)
        caller = from_chain(path, revocations.first_of(path), trust_domain)
        self._known[peer] = (signing, path, caller)
        check_chain_times(path, now)
        return caller

    def known(self, peer: Peer, signing: SigningSet, now: datetime) -> Caller | None:
        """The same, where the connection's certificate was judged with this signing set before; else None."""
        known = self._known.get(peer)
        if known is None or known[0] is not signing:
            return None
        _, path, caller = known
        check_chain_times(path, now)
        return caller

    async def _judges_for(self, signing: SigningSet) -> tuple[Anchors, Revocations]:
        async with self._making:
            if self._judges is None or self._judges[0] is not signing:
                self._judges = (signing, *await in_thread(_judges_of, signing))
            return self._judges[1:]


def _judges_of(signing: SigningSet) -> tuple[Anchors, Revocations]:
    return anchors_of(signing), Revocations(signing.crls)


class Authentication:
    """The ways to prove an identity that the configuration allows."""

    def __init__(
        self, trust_domain: str, issuers: Sequence[TrustedIssuer], mtls: bool, tokens: JoinTokens | None
    ) -> None:
        self.trust_domain = trust_domain
        self.issuers = issuers
        self.mtls = mtls
        self.tokens = tokens
        self._certificate_callers = _CertificateCallers()
        self._token_callers = TokenCallers(issuers, trust_domain)
        if tokens is not None:
            self._finding = Together(tokens.find_all, TIMEOUT, MOST_TOGETHER)
            self._spending = Together(tokens.spend_all, TIMEOUT, MOST_TOGETHER)

    def known(
        self, peer: Peer, metadata: Sequence[tuple[str, str | bytes]], signing: SigningSet, now: datetime
    ) -> Proven | None:
        """Who calls, where that was proven before by the same certificate or token; else None, and `prove` finds out.

        Nothing is waited for. Raises RefusalError.
        """
        if self.mtls and peer.chain:
            caller = self._certificate_callers.known(peer, signing, now)
        else:
            token = _bearer(metadata)
            caller = None if token is None else self._token_callers.known(token, now)
        return None if caller is None else Proven(caller)

    async def prove(
        self, peer: Peer, metadata: Sequence[tuple[str, str | bytes]], signing: SigningSet, now: datetime
    ) -> Proven:
        """Who calls. Where a call brings a certificate and a token, the certificate counts, as with istiod.

        Raises RefusalError, and NoThreadError where a disk has to be read and no thread can be started.
        """
        if self.mtls and peer.chain:
            return Proven(await self._certificate_callers.of(peer, signing, self.trust_domain, now))
        token = _bearer(metadata)
        if token is None:
            raise unauthenticated(f"the call brings no proof of who it is from: {self._wanted()}")
        if token.startswith(PREFIX):
            return await self._joining(token, now)
        if not self.issuers:
            raise unauthenticated("this CA takes no JSON Web Tokens: no issuer is configured in callers.jwt")
        return Proven(await self._token_callers.of(token, now))

    async def spend(self, proven: Proven, key: PublicKey) -> None:
        """Bind the join token to this key, where one was the proof. Raises RefusalError and NoThreadError."""
        if proven.token is not None and self.tokens is not None:
            with self.tokens.translated(spending=True):
                await self._spending.call((proven.token, key))

    def _wanted(self) -> str:
        return f"send a token as `authorization: Bearer`{', or a client certificate' if self.mtls else ''}"

    async def _joining(self, token: str, now: datetime) -> Proven:
        if self.tokens is None:
            raise unauthenticated("this CA takes no join tokens: callers.join_tokens is not configured")
        with self.tokens.translated():
            record = await self._finding.call(token)
        return Proven(from_join_token(record.spiffe_id, record.expires, self.trust_domain, now), record)


def _bearer(metadata: Sequence[tuple[str, str | bytes]]) -> str | None:
    """The bearer token (RFC 6750 section 2.1), if there is one. Raises RefusalError where there are several headers."""
    found = [value for key, value in metadata if key == "authorization"]
    if len(found) > 1:
        raise unauthenticated("the call has more than one authorization header")
    if not found or not isinstance(found[0], str):
        return None
    scheme, _, token = found[0].strip().partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None
