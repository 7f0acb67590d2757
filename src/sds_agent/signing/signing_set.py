"""A CA that can sign, with all that has to go along with a leaf: what every one of our CAs comes down to."""

from datetime import datetime, timedelta
from typing import Protocol

from cryptography import x509

from sds_agent.errors import SdsAgentError
from sds_agent.pki.keys import PublicKey
from sds_agent.pki.validation.revocation import RevocationList
from sds_agent.signing.signer import Signer
from sds_agent.values import Sensitive

LARGEST_ANSWER = 4 << 20
"""Bytes of an answer that hands out a certificate: gRPC's clients receive no more, unless they are set otherwise."""
ROOM_FOR_LEAF = 64 << 10
"""Bytes of it that are not for intermediates and roots."""


class SigningSet(Sensitive, frozen=True):
    """A signer and its surroundings.

    `intermediates` lead from the signer upwards, the signer's own certificate first unless it is a root.
    `roots` are the trust anchors. `crls` are the revocation lists that came along. `left_out` says of the files that
    it was read from what in them is not used because it cannot be.
    """

    signer: Signer
    intermediates: tuple[x509.Certificate, ...]
    roots: tuple[x509.Certificate, ...]
    crls: tuple[RevocationList, ...] = ()
    left_out: tuple[str, ...] = ()

    def issue(self, public_key: PublicKey, uri: str, now: datetime, ttl: timedelta) -> tuple[x509.Certificate, ...]:
        """A leaf for `uri` and its intermediates, in issuing order and without a root. Raises SignerError."""
        return (self.signer.sign_leaf(public_key, uri, now, ttl), *self.intermediates)


class CaUnavailableError(SdsAgentError):
    """A CA has nothing that it could sign with at present; that passes once someone has fixed what the message says."""


class SigningCa(Protocol):
    """A CA in this process that renews itself, or follows what its operator changes."""

    async def signing(self) -> SigningSet:
        """What signs now, and what to trust. Raises CaUnavailableError."""
        ...
