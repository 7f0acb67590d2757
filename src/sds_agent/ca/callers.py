"""Who asks: from what a caller proved to the SPIFFE ID that it gets a certificate for.

The cryptographic proof (a token's signature, a certificate's chain and key) comes before. These functions decide what
it means at `now`, and raise RefusalError when it proves no caller.
"""

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import TypeAlias

from cryptography import x509
from msgspec import Struct

from sds_agent.ca.refusal import unauthenticated
from sds_agent.identity.spiffe import SpiffeId, SpiffeIdError, covers
from sds_agent.pki.certificates import (
    describe,
    describe_name,
    describe_time,
    is_ca,
    serial_hex,
    subject_alternative_uris,
)
from sds_agent.pki.validation.rules import Chain

Claims: TypeAlias = Mapping[str, object]

SKEW = timedelta(seconds=30)
"""How far the clock of a token's issuer may be ahead of ours. Nothing is added to `exp`."""

_SERVICE_ACCOUNT = "system:serviceaccount:"


class Proof(StrEnum):
    """How a caller proved who it is."""

    CERTIFICATE = "certificate"
    JWT = "jwt"
    JOIN_TOKEN = "join-token"  # noqa: S105 - the name of a kind of proof


class Caller(Struct, frozen=True):
    """A caller whose identity is proven. `detail` says in the audit log by which certificate or token."""

    identity: SpiffeId
    proof: Proof
    detail: str


class ClaimRule(Struct, frozen=True):
    """What a token of one issuer must say.

    `claim` names the claim that holds the SPIFFE ID; None takes `sub` for a Kubernetes service account. The issuer may
    name what one of the patterns in `allow` covers; without any, every workload of the trust domain.
    """

    issuer: str
    audience: str
    claim: str | None = None
    allow: tuple[str, ...] = ()


def from_claims(claims: Claims, rule: ClaimRule, trust_domain: str, now: datetime) -> Caller:
    """The caller that a token with a good signature speaks for (RFC 7519 section 4.1)."""
    if claims.get("iss") != rule.issuer:
        raise unauthenticated("the token is from an issuer that this CA does not know")
    if rule.audience not in _audiences(claims):
        raise unauthenticated(f"the token is not for this CA: its audience must be {describe_name(rule.audience)}")
    check_claimed_times(claims, now)
    named = _service_account(claims, trust_domain) if rule.claim is None else _claimed(claims, rule.claim)
    identity = _ours(named, trust_domain, "token")
    if rule.allow and not covers(rule.allow, str(identity)):
        raise unauthenticated(f"the token names {describe_name(identity)}, which its issuer may not name")
    return Caller(identity, Proof.JWT, f"issuer {rule.issuer}")


def check_chain_times(chain: Chain, now: datetime) -> None:
    """Whether a client's certificate and all above it are valid at `now`: a connection can outlive each of them."""
    certificate = chain[0]
    if now < certificate.not_valid_before_utc:
        raise unauthenticated(f"the client certificate with serial number {serial_hex(certificate)} is not valid yet")
    for each in chain:
        if now > each.not_valid_after_utc:
            ended = describe_time(each.not_valid_after_utc)
            raise unauthenticated(f"{_in_chain(each, certificate)} expired on {ended}: come with a token")


def from_chain(chain: Chain, gone: x509.Certificate | None, trust_domain: str) -> Caller:
    """The caller that holds the key of a certificate of ours (X509-SVID section 5.2: exactly one URI).

    `chain` is the certificate, then each certificate's issuer up to and with the anchor; `gone` is the one of them that
    is revoked, if any. Its times are for check_chain_times.
    """
    certificate = chain[0]
    if gone is not None:
        raise unauthenticated(f"{_in_chain(gone, certificate)} with serial number {serial_hex(gone)} is revoked")
    if is_ca(certificate):
        raise unauthenticated("the client certificate is a CA's, not a workload's")
    uris = subject_alternative_uris(certificate)
    if len(uris) != 1:
        raise unauthenticated(f"the client certificate has {len(uris)} URIs; a workload's has exactly one")
    identity = _ours(uris[0], trust_domain, "client certificate")
    return Caller(identity, Proof.CERTIFICATE, f"serial {serial_hex(certificate)}")


def _in_chain(certificate: x509.Certificate, leaf: x509.Certificate) -> str:
    return "the client certificate" if certificate is leaf else f"the CA {describe(certificate)} above the client's"


def from_join_token(spiffe_id: str, expires: datetime, trust_domain: str, now: datetime) -> Caller:
    """The caller that knows a join token."""
    if now >= expires:
        raise unauthenticated(f"the join token expired on {describe_time(expires)}: make a new one")
    return Caller(_ours(spiffe_id, trust_domain, "join token"), Proof.JOIN_TOKEN, f"expires {describe_time(expires)}")


def _audiences(claims: Claims) -> list[object]:
    """One audience may be written without a list (RFC 7519 section 4.1.3)."""
    audience = claims.get("aud")
    return audience if isinstance(audience, list) else [audience]


def check_claimed_times(claims: Claims, now: datetime) -> None:
    """Whether a token is valid at `now` by its claims exp and nbf. Raises RefusalError."""
    expires, not_before = _time(claims, "exp"), _time(claims, "nbf")
    if expires is None:
        raise unauthenticated("the token never expires: it must have the claim exp")
    if now >= expires:
        raise unauthenticated(f"the token expired on {describe_time(expires)}")
    if not_before is not None and now + SKEW < not_before:
        raise unauthenticated(f"the token is valid only from {describe_time(not_before)}")


def _time(claims: Claims, name: str) -> datetime | None:
    """A NumericDate (RFC 7519 section 2): seconds since 1970, perhaps with a fraction."""
    value = claims.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise unauthenticated(f"the token's claim {name} is not a time")
    try:
        return datetime.fromtimestamp(value, UTC)
    except (ValueError, OverflowError, OSError) as error:  # infinite, or beyond the year 9999
        raise unauthenticated(f"the token's claim {name} is not a time that can be") from error


def _service_account(claims: Claims, trust_domain: str) -> str:
    """As Istio maps it: `system:serviceaccount:NS:SA` is `spiffe://TRUST_DOMAIN/ns/NS/sa/SA`."""
    subject = claims.get("sub")
    parts = subject.removeprefix(_SERVICE_ACCOUNT).split(":") if isinstance(subject, str) else []
    if not isinstance(subject, str) or not subject.startswith(_SERVICE_ACCOUNT) or len(parts) != 2:
        raise unauthenticated(
            "the token's claim sub is not that of a Kubernetes service account, system:serviceaccount:NAMESPACE:NAME"
        )
    namespace, name = parts
    if "/" in subject:  # or else the name could go on as a path of its own
        raise unauthenticated("the token's claim sub holds a slash, which no service account has")
    return f"spiffe://{trust_domain}/ns/{namespace}/sa/{name}"


def _claimed(claims: Claims, name: str) -> str:
    value = claims.get(name)
    if not isinstance(value, str):
        raise unauthenticated(f"the token has no claim {describe_name(name)} with a SPIFFE ID")
    return value


def _ours(uri: str, trust_domain: str, where: str) -> SpiffeId:
    try:
        identity = SpiffeId.parse(uri)
    except SpiffeIdError as error:
        raise unauthenticated(f"the {where} does not name a SPIFFE ID: {error}") from error
    if str(identity.trust_domain) != trust_domain or not identity.is_workload:
        raise unauthenticated(f"the {where} names {describe_name(uri)}, which is no workload of {trust_domain}")
    return identity
