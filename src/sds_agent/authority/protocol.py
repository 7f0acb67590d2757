"""What every upstream CA looks like to the rest of the agent.

An adapter carries a CSR to one CA and returns the CA's answer unchanged. It does not check the answer, order the chain,
retry or wait between attempts: `issuance` does that, once for all CAs. Beyond the transport an adapter has one duty: it
says of a failure who can fix it, as an `ErrorKind`. No code decides on the text of an error.

Most CAs sign: they are an `Authority`. Where something else makes the certificates and their keys, as SPIRE does and a
program that writes files, the adapter is a `Supplier`. The other protocols are what either may offer beside that.
"""

from collections.abc import Mapping
from datetime import timedelta
from enum import Enum
from typing import Protocol, runtime_checkable

from msgspec import Struct

from sds_agent.errors import SdsAgentError
from sds_agent.identity.spiffe import SpiffeId
from sds_agent.pki.keys import PublicKey
from sds_agent.values import Sensitive


class ErrorKind(Enum):
    """Why a CA did not issue, in terms of what to do next."""

    TRANSIENT = "transient"
    """Unreachable, overloaded, timed out, not ready: ask again soon."""
    THROTTLED = "throttled"
    """The CA asks for fewer requests, perhaps with a delay (`retry_after`)."""
    PENDING = "pending"
    """The CA accepted the request and waits for an approval: ask again with the same CSR."""
    UNAUTHENTICATED = "unauthenticated"
    """The CA refused our credentials. They are read for every attempt, so this ends when they are renewed."""
    DENIED = "denied"
    """The CA knows us and refuses: its policy has to change."""
    INVALID = "invalid"
    """The CA calls the request malformed, or its answer could not be used."""
    MISMATCH = "mismatch"
    """The CA issued another certificate than the request asks for."""

    @property
    def refused(self) -> bool:
        """Whether a person has to act before another attempt can succeed."""
        return self not in {ErrorKind.TRANSIENT, ErrorKind.THROTTLED, ErrorKind.PENDING}

    @property
    def ends_request(self) -> bool:
        """Whether the next attempt makes another request, with another key. Where our credentials were at fault it is
        the same one: it may have been approved, or be what a token of one use was spent on.
        """
        return self.refused and self is not ErrorKind.UNAUTHENTICATED


class AuthorityError(SdsAgentError):
    """A CA issued no usable certificate.

    `retry_after` is in seconds, and None unless the CA named a delay.
    """

    def __init__(self, kind: ErrorKind, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.kind = kind
        self.retry_after = retry_after


class CurrentIdentity(Sensitive, frozen=True):
    """The workload's current certificate and its key, both in PEM: some CAs renew over mTLS with them."""

    chain_pem: bytes
    private_key_pem: bytes


class IssueRequest(Struct, frozen=True):
    """A request for one certificate.

    `csr_pem` is a PKCS#10 request (PEM) with an empty subject and the SPIFFE ID as its one SAN, critical.
    `request_id` is the same for all attempts of one request and differs between requests: it is the idempotency key for
    CAs that take one.
    """

    identity: SpiffeId
    csr_pem: bytes
    ttl: timedelta
    request_id: str
    current: CurrentIdentity | None = None


class Issuance(Struct, frozen=True):
    """The CA's answer, unchecked.

    `chain_pem` holds the leaf and all other certificates of the answer: PEM blocks in any order, with any text between
    them. `anchors_pem` holds the trust anchors that the CA advertises, None where its protocol has no place for them.
    `warnings` are the CA's own words, such as that it shortened the TTL.
    """

    chain_pem: bytes
    anchors_pem: bytes | None = None
    warnings: tuple[str, ...] = ()


class Supplied(Sensitive, frozen=True):
    """A certificate that was made with its key: the answer, unchecked, and the key, unencrypted PKCS#8 in PEM."""

    issuance: Issuance
    private_key_pem: bytes


@runtime_checkable
class Authority(Protocol):
    """An upstream CA that signs requests."""

    async def issue(self, request: IssueRequest) -> Issuance:
        """Ask the CA once. Raises AuthorityError.

        The caller enforces its deadline by cancellation; `tasks.time_given` says it to who has to divide the time.
        """
        ...


@runtime_checkable
class CertifiesKeys(Protocol):
    """An authority whose CA signs in this process, and which takes the word of its caller that the key is its own.

    A CSR proves possession of its key to a CA that somebody else asks (RFC 2986 section 3). This one is asked by the
    code that has just made the key. No key that came from outside the process may be put to it: the CA server, which
    is asked by others, has each of them prove theirs.
    """

    async def certify(self, identity: SpiffeId, public_key: PublicKey, ttl: timedelta) -> Issuance:
        """As `Authority.issue`, of a key whose private half the caller has."""
        ...


@runtime_checkable
class Supplier(Protocol):
    """A source of certificates that makes their keys itself."""

    async def supply(self, identity: SpiffeId, held: bytes | None) -> Supplied:
        """The newest certificate of this identity, as soon as there is one whose chain is not `held` (PEM).

        `held` is the chain of the last answer that was given to this caller, byte for byte, or None. Waits for as long
        as there is nothing else; the caller ends that by cancellation. Raises AuthorityError at once when the source
        gives none: what is served stays in use until it has ended, and the caller asks again later.
        """
        ...


@runtime_checkable
class AdvertisesAnchors(Protocol):
    """An authority that can say its trust anchors without issuing a certificate."""

    refresh_every: timedelta
    """How often the agent asks for them when it requests no certificate."""

    async def anchors(self) -> bytes:
        """The anchors that the CA advertises at present, in PEM. Raises AuthorityError."""
        ...


@runtime_checkable
class AnnouncesAnchors(AdvertisesAnchors, Protocol):
    """An authority that knows when its anchors change: the agent then asks for them before `refresh_every` is over."""

    async def anchors_changed(self) -> None:
        """Return when `anchors` may give something else than at its last call. Raises nothing but a cancellation."""
        ...


class AdvertisedLists(Struct, frozen=True):
    """Revocation lists, unchecked: each item one list in DER, or any number in PEM.

    `issuers_pem` holds certificates of the CAs that signed them, as far as the authority tells these too.
    """

    lists: tuple[bytes, ...]
    issuers_pem: bytes = b""


@runtime_checkable
class AdvertisesLists(AdvertisesAnchors, Protocol):
    """An authority that can say which certificates its CAs have revoked."""

    revocation_lists: bool
    """Whether the configuration asks for that. If not, `lists` is not called."""

    async def lists(self) -> AdvertisedLists:
        """The list of every CA that signs, or has signed, for this authority. Raises AuthorityError.

        One that is left out has every certificate of its CA refused, so where one of them cannot be read that is an
        error.
        """
        ...


@runtime_checkable
class AdvertisesFederation(Protocol):
    """An authority that knows the trust anchors of other trust domains. Each is served under the name `spiffe://NAME`,
    and never in the bundle of the agent's own trust domain.
    """

    async def federated_anchors(self) -> Mapping[str, bytes]:
        """The anchors, in PEM, by the bare names of the trust domains, such as `other.example`. Raises AuthorityError.

        Called after each `anchors`.
        """
        ...
