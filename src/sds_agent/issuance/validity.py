"""From when until when peers accept a chain: pure, with the time as an argument.

A peer checks the times of every certificate up to the trust anchor, the anchor's own among them (RFC 5280 section
6.1.3, step a.2; Envoy does so for roots too). So a leaf is good only while all that is above it is. Of several anchors
that vouch for a chain, as where a root was renewed, each peer may use any: the chain is good while one of them is.
"""

from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta

from cryptography import x509
from msgspec import Struct

from sds_agent.pki.certificates import times_of
from sds_agent.pki.names import issuer_of, subject_of
from sds_agent.pki.validation.path import has_path
from sds_agent.pki.validation.rules import Chain

SKEW = timedelta(seconds=60)
"""How far in the future a NotBefore may lie: the CA's clock and ours are never quite the same."""

RECHECK = timedelta(minutes=1)
"""The longest time between two checks of the anchors' times, so that those of a new anchor are noticed."""


class Validity(Struct, frozen=True):
    """A chain is valid from `begin` until `end`; `ends_with` is the certificate that ends first, the leaf or a CA.

    A CA that ends together with the leaf counts as what ends: the leaf's end was fitted to it. `anchor` is the trust
    anchor above it that ends last, one of those that are `vouching` for it.
    """

    begin: datetime
    end: datetime
    ends_with: x509.Certificate
    anchor: x509.Certificate
    vouching: Chain = ()


def validity(
    chain: Sequence[x509.Certificate], anchors: Iterable[x509.Certificate], now: datetime, *, proven: Chain = ()
) -> Validity | None:
    """When the chain (a leaf, then its intermediates) is valid below one of the anchors; None if below none of them.

    Only anchors that vouch for it at `now`, give or take SKEW, count. `end` may lie before `begin`: then there is no
    such time. Those `proven` are known to vouch for it at `now`.
    """
    vouching = [each for each in _above(chain, anchors) if each in proven or vouches(each, chain, now)]
    if not vouching:
        return None
    first, *later = sorted(vouching, key=_begin)
    last = first
    for anchor in later:  # a pause between two anchors is an end
        if _end(last) >= _begin(anchor) and _end(anchor) > _end(last):
            last = anchor
    begin = max(map(_begin, (first, *chain)))
    ends_with = min((last, *reversed(chain)), key=_end)
    return Validity(begin, _end(ends_with), ends_with, last, tuple(vouching))


def vouches(anchor: x509.Certificate, chain: Sequence[x509.Certificate], now: datetime) -> bool:
    """Whether the leaf that `chain` begins with is valid below the anchor."""
    return has_path(chain[0], chain[1:], (anchor,), now, skew=SKEW)


def _above(chain: Sequence[x509.Certificate], anchors: Iterable[x509.Certificate]) -> list[x509.Certificate]:
    """The anchors that may have issued one of the chain, by their names: no other signatures need to be verified."""
    issuers = {issuer_of(certificate) for certificate in chain}
    return [anchor for anchor in anchors if subject_of(anchor) in issuers]


def _begin(certificate: x509.Certificate) -> datetime:
    return times_of(certificate)[0]


def _end(certificate: x509.Certificate) -> datetime:
    return times_of(certificate)[1]


def next_check(now: datetime, moments: Iterable[datetime]) -> datetime:
    """When to check anchors' times again: at the first of the moments at which something changes, or after RECHECK."""
    recheck = now + RECHECK
    return min((moment for moment in moments if now < moment < recheck), default=recheck)
