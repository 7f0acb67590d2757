"""What every upstream CA looks like to the rest of the agent.

An adapter carries a CSR to one CA and brings back what the CA said, as it said it. It does not judge the answer,
order the chain, retry or wait between attempts: that is `issuance`'s, once for all CAs. Its one duty beyond the
transport is to say of a failure who can fix it, as an `ErrorKind`; nothing decides on the text of an error.
"""

from datetime import timedelta
from enum import Enum
from typing import Protocol, runtime_checkable

from msgspec import Struct

from sds_agent.errors import SdsAgentError
from sds_agent.identity.spiffe import SpiffeId
from sds_agent.values import Sensitive


class ErrorKind(Enum):
    """Why a CA did not issue, in terms of what to do next."""

    TRANSIENT = "transient"
    """Unreachable, overloaded, timed out, not ready: ask again soon."""
    THROTTLED = "throttled"
    """Asked to slow down, perhaps with a time (`retry_after`)."""
    PENDING = "pending"
    """Taken, but an approval is outstanding: ask again with the same CSR."""
    UNAUTHENTICATED = "unauthenticated"
    """Our credentials were not taken. They are read anew for every attempt, so this heals when they are renewed."""
    DENIED = "denied"
    """The CA knows us and refuses: its policy has to change."""
    INVALID = "invalid"
    """The CA calls the request malformed, or its answer could not be used."""
    MISMATCH = "mismatch"
    """The CA issued something else than was asked for."""

    @property
    def refused(self) -> bool:
        """Whether somebody has to act before another attempt can succeed."""
        return self not in {ErrorKind.TRANSIENT, ErrorKind.THROTTLED, ErrorKind.PENDING}


class AuthorityError(SdsAgentError):
    """A CA did not issue a certificate that can be used.

    `retry_after` is in seconds and set only when the CA named a time.
    """

    def __init__(self, kind: ErrorKind, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.retry_after = retry_after


class CurrentIdentity(Sensitive, frozen=True):
    """The certificate now held, for CAs that renew over mTLS with it."""

    chain_pem: bytes
    private_key_pem: bytes


class IssueRequest(Struct, frozen=True):
    """One certificate asked of a CA.

    `csr_pem` is a PKCS#10 request (PEM) with an empty subject and the SPIFFE ID as its one SAN, critical.
    `request_id` is the same for the retries of one request and different for every other; CAs that take an
    idempotency key get it.
    """

    identity: SpiffeId
    csr_pem: bytes
    ttl: timedelta
    request_id: str
    current: CurrentIdentity | None = None


class Issuance(Struct, frozen=True):
    """What the CA answered, unjudged.

    `chain_pem` holds the leaf and whatever else the CA sent, PEM blocks in any order and with any text between them.
    `anchors_pem` holds the trust anchors, or None where the CA's contract does not tell them. `warnings` are the CA's
    own words (a TTL it clamped, say).
    """

    chain_pem: bytes
    anchors_pem: bytes | None = None
    warnings: tuple[str, ...] = ()


class Authority(Protocol):
    """An upstream CA."""

    async def issue(self, request: IssueRequest) -> Issuance:
        """Ask the CA once. Raises AuthorityError; the caller sets the deadline by cancelling."""
        ...


@runtime_checkable
class TellsTrust(Protocol):
    """An authority that knows its trust anchors without issuing anything."""

    refresh_every: timedelta
    """How often to ask it for them while nothing is issued."""

    async def anchors(self) -> bytes:
        """The anchors the CA tells now, as PEM. Raises AuthorityError."""
        ...
