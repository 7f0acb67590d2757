"""What of a CA's answer to accept. Nothing is served that has not passed here.

A CA's success proves nothing: there are CAs that drop the SAN and say 200, templates that add names, and clocks that
are wrong. What is checked: the leaf is for our key, its only name is the SPIFFE ID asked for, it is a leaf, it serves
clients and servers, it is valid now or in a moment, and an unbroken chain leads from it to a trust anchor (RFC 5280
section 6).

Accepted is not servable: `schedule` waits until Envoys accept it too, from `Accepted.not_before`.
"""

from contextlib import suppress
from datetime import datetime
from functools import lru_cache

from cryptography import x509
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from msgspec import Struct

from sds_agent.authority.protocol import AuthorityError, ErrorKind, Issuance
from sds_agent.identity.spiffe import SpiffeId
from sds_agent.issuance.validity import SKEW, Validity, validity
from sds_agent.pki.certificates import (
    CertificateError,
    ParsedBundle,
    describe,
    extended_key_usages,
    extension,
    has_key,
    is_ca,
    is_self_signed,
    read_bundle,
    san_values,
    times_of,
    unique,
    write_pem,
)
from sds_agent.pki.keys import PublicKey
from sds_agent.pki.validation.path import PathError, find_path
from sds_agent.pki.validation.rules import Chain
from sds_agent.text import quoted

LONGEST_NAME = 200
"""Characters of a name that the CA put in."""
LARGEST_CHAIN = 42_000
"""Bytes of a chain in PEM. BoringSSL writes a peer's chain into each of two session tickets of TLS 1.3, and does not
write more than 64 KiB at once: with more than 32 KiB in DER an Envoy ends the connection by an internal error.
"""
MOST_BUNDLES, LONGEST_BUNDLE = 8, 65_536
"""Texts of trust anchors whose reading is remembered, and bytes of such a one."""
_TIME = "%Y-%m-%dT%H:%M:%SZ"
_MUST_STAPLE = [x509.TLSFeatureType.status_request]
"""The TLS features that Envoy knows: it compares the whole extension, so beside another one this asks for nothing."""
_USAGES = {ExtendedKeyUsageOID.SERVER_AUTH: "serverAuth", ExtendedKeyUsageOID.CLIENT_AUTH: "clientAuth"}


class NotYetValidError(AuthorityError):
    """The certificate is the one that was asked for and begins later: this machine's clock is behind, or the CA's is
    ahead. The next request may have the same key, and some tokens are good for no other.
    """


class Accepted(Struct, frozen=True):
    """A checked answer: the leaf and its intermediates in issuing order without roots, also in PEM, the anchors without
    repetitions, and when all of the chain is valid below one of them. `left_out` says what was wrong with the anchors
    that could not be used.
    """

    chain: Chain
    chain_pem: bytes
    anchors: Chain
    validity: Validity
    warnings: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    @property
    def leaf(self) -> x509.Certificate:
        """The workload's own certificate."""
        return self.chain[0]

    @property
    def not_before(self) -> datetime:
        """From when Envoys accept it."""
        return self.validity.begin

    @property
    def not_after(self) -> datetime:
        """Until when Envoys accept it."""
        return self.validity.end


def accept(
    answer: Issuance,
    *,
    identity: SpiffeId,
    public_key: PublicKey,
    anchors: Chain,
    now: datetime,
    beside: Chain = (),
) -> Accepted:
    """Check an answer. `anchors` count when the CA sent none with it; `beside` are those of other CAs in the bundle.

    Raises AuthorityError: MISMATCH when something else was issued than was asked for, INVALID when the answer cannot
    be used.
    """
    received = _read(answer.chain_pem, "the certificate chain")
    known = ParsedBundle(anchors) if answer.anchors_pem is None else _read_anchors(answer.anchors_pem)
    advertised = unique(known.certificates)
    leaf = _our_leaf(received, public_key)
    _check_names(leaf, identity)
    _check_usage(leaf)
    _check_own(leaf)
    _check_times(leaf, now)
    if not advertised:
        raise AuthorityError(
            ErrorKind.INVALID,
            "the CA sent no trust anchors and none are configured, so its certificate proves nothing",
        )
    try:
        chain = _chain(leaf, received.certificates, advertised, beside, now)
    except PathError as error:
        left_out = (*received.left_out, *known.left_out)
        besides = f" (left out: {'; '.join(left_out)})" if left_out else ""
        found = f"no chain leads from the certificate to a trust anchor: {error}{besides}"
        raise AuthorityError(ErrorKind.INVALID, found) from error
    # the one anchor there is was found to vouch for the chain, by the same rules
    times = _validity(chain, advertised, now, advertised if len(advertised) == 1 and not beside else ())
    ignored = tuple(f"left out of the chain: {each}" for each in received.left_out)
    warnings = (*answer.warnings, *ignored, *_clock_warning(times, now), *_end_warning(times, chain))
    chain_pem = write_pem(chain)
    if len(chain_pem) > LARGEST_CHAIN:
        raise AuthorityError(
            ErrorKind.INVALID,
            f"the certificate chain has {len(chain_pem)} bytes, and over TLS 1.3 Envoys take no peer with more than "
            f"{LARGEST_CHAIN}: have its CAs issued anew, with fewer names in them",
        )
    return Accepted(chain, chain_pem, advertised, times, warnings, known.left_out)


def _read(pem: bytes, what: str) -> ParsedBundle:
    try:
        return read_bundle(pem)
    except CertificateError as error:
        raise AuthorityError(ErrorKind.INVALID, f"cannot read {what} that the CA sent: {error}") from error


def _read_anchors(pem: bytes) -> ParsedBundle:
    """The anchors, remembered: a CA sends the same ones with each certificate."""
    return _remembered(pem) if len(pem) <= LONGEST_BUNDLE else _read(pem, "the trust anchors")


@lru_cache(maxsize=MOST_BUNDLES)
def _remembered(pem: bytes) -> ParsedBundle:
    return _read(pem, "the trust anchors")


def _our_leaf(received: ParsedBundle, public_key: PublicKey) -> x509.Certificate:
    for certificate in received.certificates:
        if has_key(certificate, public_key):
            return certificate
    if received.left_out:
        found = f"cannot use the certificates that the CA sent: {'; '.join(received.left_out)}"
        raise AuthorityError(ErrorKind.INVALID, found)
    if not received.certificates:
        raise AuthorityError(ErrorKind.INVALID, "the CA answered without a certificate")
    raise AuthorityError(
        ErrorKind.MISMATCH,
        f"none of the {len(received.certificates)} certificates that the CA sent is for our private key",
    )


def _check_names(leaf: x509.Certificate, identity: SpiffeId) -> None:
    names = san_values(leaf)
    if len(names) == 1 and isinstance(names[0], x509.UniformResourceIdentifier) and names[0].value == str(identity):
        return
    found = ", ".join(f"{type(name).__name__} {quoted(str(name.value), LONGEST_NAME)}" for name in names[:5]) or "none"
    raise AuthorityError(
        ErrorKind.MISMATCH,
        f"the certificate's subject alternative names must be exactly the URI {identity}; the CA put in: {found}",
    )


def _check_usage(leaf: x509.Certificate) -> None:
    if is_ca(leaf):
        raise AuthorityError(ErrorKind.MISMATCH, "the CA issued a CA certificate, which a workload must not hold")
    usages = extended_key_usages(leaf)
    missing = [name for oid, name in _USAGES.items() if oid not in usages]
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


def _check_own(leaf: x509.Certificate) -> None:
    """What else an Envoy that is called refuses in a certificate of its own, though it may take it from a peer.

    It has no OCSP staple from the agent, and it needs the first common name, if there is one, for its session IDs
    (source/common/tls/server_context_impl.cc).
    """
    features = extension(leaf, x509.TLSFeature)
    if features is not None and list(features) == _MUST_STAPLE:
        raise AuthorityError(
            ErrorKind.MISMATCH,
            "the certificate demands an OCSP staple (must-staple: its TLS feature extension lists status_request), and "
            "an Envoy without one refuses it: change the CA's profile or template",
        )
    common_names = leaf.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    if common_names and not common_names[0].value:
        raise AuthorityError(
            ErrorKind.MISMATCH,
            "the certificate's subject has an empty common name, with which an Envoy refuses it: have the CA leave it "
            "out, or fill it in",
        )


def _check_times(leaf: x509.Certificate, now: datetime) -> None:
    begin, end = times_of(leaf)
    if end <= now:
        raise AuthorityError(
            ErrorKind.INVALID,
            f"the certificate expired at {end:{_TIME}}, before it came (it is {now:{_TIME}} here): "
            f"compare this machine's clock with the CA's",
        )
    if begin > now + SKEW:
        raise NotYetValidError(
            ErrorKind.INVALID,
            f"the certificate is valid only from {begin:{_TIME}} (it is {now:{_TIME}} here): "
            f"compare this machine's clock with the CA's",
        )


def _validity(chain: Chain, anchors: Chain, now: datetime, proven: Chain) -> Validity:
    times = validity(chain, anchors, now, proven=proven)
    if times is None or times.end <= max(times.begin, now):
        raise AuthorityError(
            ErrorKind.INVALID,
            "there is no time at which the whole chain, from the certificate to a trust anchor, is valid: compare this "
            "machine's clock with the CA's",
        )
    return times


def _clock_warning(times: Validity, now: datetime) -> tuple[str, ...]:
    ahead = (times.begin - now).total_seconds()
    if ahead <= 0:
        return ()
    return (f"the certificate is valid only in {ahead:.0f} s: the CA's clock is ahead of this one",)


def _end_warning(times: Validity, chain: Chain) -> tuple[str, ...]:
    """A warning if a CA ends before the leaf or with it: all that is below it ends then, renewed or not."""
    leaf, ends = chain[0], times.ends_with
    if ends is leaf:
        return ()
    what = "the intermediate CA" if ends in chain else "the trust anchor"
    return (
        f"{what} {describe(ends)} ends at {times.end:{_TIME}}; no Envoy accepts the certificate after that, which by "
        f"itself is valid until {leaf.not_valid_after_utc:{_TIME}}: renew the CA",
    )


def _chain(
    leaf: x509.Certificate,
    received: Chain,
    anchors: Chain,
    beside: Chain,
    now: datetime,
) -> Chain:
    bundle = (*anchors, *beside) if beside else None
    # An intermediate may be an anchor here and unknown to a peer that trusts only its root, which needs it.
    roots = tuple(anchor for anchor in anchors if is_self_signed(anchor))
    if roots and len(roots) < len(anchors):
        with suppress(PathError):  # then only the pinned intermediate vouches for the leaf
            return find_path(leaf, (*received, *anchors), roots, now, skew=SKEW, bundle=bundle or anchors)
    return find_path(leaf, received, anchors, now, skew=SKEW, bundle=bundle)
