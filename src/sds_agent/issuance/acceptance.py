"""What of a CA's answer to accept. Nothing is served that has not passed here.

A CA's success proves nothing: there are CAs that drop the SAN and say 200, templates that add names, and clocks that
are wrong. What is checked: the leaf is for our key, its only name is the SPIFFE ID asked for, it is a leaf, it serves
clients and servers, it is valid now, and an unbroken chain leads from it to a trust anchor (RFC 5280 section 6).
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from datetime import datetime, timedelta

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID
from msgspec import Struct

from sds_agent.authority.protocol import AuthorityError, ErrorKind, Issuance
from sds_agent.identity.spiffe import SpiffeId
from sds_agent.pki.certificates import (
    CertificateError,
    extended_key_usages,
    extension,
    has_key,
    is_ca,
    is_self_signed,
    read_pem,
    san_values,
    unique,
)
from sds_agent.pki.keys import PublicKey
from sds_agent.pki.path import PathError, find_path, has_path

SKEW = timedelta(seconds=60)
"""How far in the future a NotBefore may lie: the CA's clock and ours are never quite the same."""

_TIME = "%Y-%m-%dT%H:%M:%SZ"
_USAGES = {ExtendedKeyUsageOID.SERVER_AUTH: "serverAuth", ExtendedKeyUsageOID.CLIENT_AUTH: "clientAuth"}


class Accepted(Struct, frozen=True):
    """A checked answer: the leaf and its intermediates in issuing order without roots, the anchors without
    repetitions.
    """

    chain: tuple[x509.Certificate, ...]
    anchors: tuple[x509.Certificate, ...]
    warnings: tuple[str, ...] = ()

    @property
    def leaf(self) -> x509.Certificate:
        """The workload's own certificate."""
        return self.chain[0]

    @property
    def not_after(self) -> datetime:
        """When the first certificate of the chain expires."""
        return min(certificate.not_valid_after_utc for certificate in self.chain)


def accept(
    answer: Issuance,
    *,
    identity: SpiffeId,
    public_key: PublicKey,
    anchors: tuple[x509.Certificate, ...],
    now: datetime,
) -> Accepted:
    """Check an answer. `anchors` count when the CA did not tell its own.

    Raises AuthorityError: MISMATCH when something else was issued than was asked for, INVALID when the answer cannot
    be used.
    """
    received = _read(answer.chain_pem, "the certificate chain")
    told = anchors if answer.anchors_pem is None else unique(_read(answer.anchors_pem, "the trust anchors"))
    leaf = _our_leaf(received, public_key)
    _check_names(leaf, identity)
    _check_usage(leaf)
    _check_times(leaf, now)
    if not told:
        raise AuthorityError(
            ErrorKind.INVALID,
            "the CA tells no trust anchors and none are configured, so its certificate proves nothing",
        )
    chain = _chain(leaf, received, told, now)
    return Accepted(chain, told, (*answer.warnings, *_clock_warning(leaf, now)))


def vouch(anchors: Iterable[x509.Certificate], chain: Sequence[x509.Certificate], now: datetime) -> bool:
    """Whether the leaf that `chain` begins with is valid below one of the anchors."""
    return has_path(chain[0], chain[1:], anchors, now, skew=SKEW)


def _read(pem: bytes, what: str) -> tuple[x509.Certificate, ...]:
    try:
        return read_pem(pem)
    except CertificateError as error:
        raise AuthorityError(ErrorKind.INVALID, f"cannot read {what} that the CA sent: {error}") from error


def _our_leaf(received: tuple[x509.Certificate, ...], public_key: PublicKey) -> x509.Certificate:
    if not received:
        raise AuthorityError(ErrorKind.INVALID, "the CA answered without a certificate")
    for certificate in received:
        if has_key(certificate, public_key):
            return certificate
    raise AuthorityError(
        ErrorKind.MISMATCH,
        f"none of the {len(received)} certificates that the CA sent is for the key of our request",
    )


def _check_names(leaf: x509.Certificate, identity: SpiffeId) -> None:
    names = san_values(leaf)
    if len(names) == 1 and isinstance(names[0], x509.UniformResourceIdentifier) and names[0].value == str(identity):
        return
    found = ", ".join(f"{type(name).__name__} {str(name.value)[:200]!r}" for name in names[:5]) or "none"
    raise AuthorityError(
        ErrorKind.MISMATCH,
        f"the certificate's subject alternative names must be exactly the URI {identity}; the CA put in: {found}",
    )


def _check_usage(leaf: x509.Certificate) -> None:
    if is_ca(leaf):
        raise AuthorityError(ErrorKind.MISMATCH, "the CA issued a CA certificate, which a workload must not hold")
    missing = [name for oid, name in _USAGES.items() if oid not in extended_key_usages(leaf)]
    if missing:
        raise AuthorityError(
            ErrorKind.MISMATCH,
            f"the certificate's extended key usage lacks {' and '.join(missing)}; "
            f"an Envoy needs serverAuth and clientAuth: change the CA's profile or template",
        )
    usage = extension(leaf, x509.KeyUsage)
    if usage is not None and not usage.digital_signature:
        raise AuthorityError(
            ErrorKind.MISMATCH,
            "the certificate's key usage lacks digitalSignature, without which TLS refuses it",
        )


def _check_times(leaf: x509.Certificate, now: datetime) -> None:
    begin, end = leaf.not_valid_before_utc, leaf.not_valid_after_utc
    if end <= now:
        raise AuthorityError(
            ErrorKind.INVALID,
            f"the certificate expired at {end:{_TIME}}, before it came (it is {now:{_TIME}} here): "
            f"compare this machine's clock with the CA's",
        )
    if begin > now + SKEW:
        raise AuthorityError(
            ErrorKind.INVALID,
            f"the certificate is valid only from {begin:{_TIME}} (it is {now:{_TIME}} here): "
            f"compare this machine's clock with the CA's",
        )


def _clock_warning(leaf: x509.Certificate, now: datetime) -> tuple[str, ...]:
    ahead = (leaf.not_valid_before_utc - now).total_seconds()
    if ahead <= 0:
        return ()
    return (f"the certificate is valid only in {ahead:.0f} s: the CA's clock is ahead of this one",)


def _chain(
    leaf: x509.Certificate,
    received: tuple[x509.Certificate, ...],
    anchors: tuple[x509.Certificate, ...],
    now: datetime,
) -> tuple[x509.Certificate, ...]:
    # An intermediate may be an anchor here and unknown to a peer that trusts only its root, which needs it.
    roots = tuple(anchor for anchor in anchors if is_self_signed(anchor))
    if roots and len(roots) < len(anchors):
        with suppress(PathError):  # then only the pinned intermediate vouches for the leaf
            return find_path(leaf, (*received, *anchors), roots, now, skew=SKEW)
    try:
        return find_path(leaf, received, anchors, now, skew=SKEW)
    except PathError as error:
        raise AuthorityError(
            ErrorKind.INVALID, f"no chain leads from the certificate to a trust anchor: {error}"
        ) from error
