"""A CA that can sign, with all that goes out beside a leaf: what each of our CAs comes down to."""

from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Protocol

from cryptography import x509

from sds_agent.errors import SdsAgentError
from sds_agent.pki.keys import PublicKey
from sds_agent.signing.signer import Signer
from sds_agent.values import Sensitive

if TYPE_CHECKING:
    from sds_agent.pki.validation.revocation import RevocationList

LARGEST_ANSWER = 4 << 20
"""Bytes of an answer with a certificate: gRPC's clients receive no more, unless they are set otherwise."""
ROOM_FOR_LEAF = 64 << 10
"""Bytes of it that intermediates and roots must leave free."""


class SigningSet(Sensitive, frozen=True):
    """A signer, and what its leaves need.

    `intermediates` lead from the signer upwards, the signer's own certificate first unless it is a root. `roots` are
    the trust anchors. `crls` are the revocation lists that were plugged in with it. `left_out` says, for each
    certificate or list in its files that cannot be used, why not.
    """

    signer: Signer
    intermediates: tuple[x509.Certificate, ...]
    roots: tuple[x509.Certificate, ...]
    crls: "tuple[RevocationList, ...]" = ()
    left_out: tuple[str, ...] = ()

    def issue(self, public_key: PublicKey, uri: str, now: datetime, ttl: timedelta) -> tuple[x509.Certificate, ...]:
        """A leaf for `uri` and its intermediates, in issuing order and without a root. Raises SignerError."""
        return (self.signer.sign_leaf(public_key, uri, now, ttl), *self.intermediates)


class CaUnavailableError(SdsAgentError):
    """A CA has nothing to sign with at present; it has again when the operator has fixed what the message says."""


class SigningCa(Protocol):
    """A CA in this process that renews its own root, or follows the files that its operator changes."""

    async def signing(self) -> SigningSet:
        """What signs now, and the anchors. Raises CaUnavailableError."""
        ...
