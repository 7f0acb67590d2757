"""Whom the certificates of callers may chain to, and by which path one does.

In the handshake OpenSSL builds a chain, and takes every certificate among the roots for an anchor: also a server's
certificate that was pinned there by mistake, or a version 1 certificate, whose holder could sign for every workload. So
certificates that are no CA's are taken out beforehand, and so are CAs that one of the lists beside them revokes. Each
caller's certificate then has one path, with an anchor at its end, and everything is judged by that path: whether the
certificate is trusted, whether it is revoked, and until when.
"""

import itertools
from collections.abc import Iterator
from datetime import datetime

from cryptography import x509
from msgspec import Struct

from sds_agent.ca.refusal import unauthenticated
from sds_agent.pki.certificates import describe, unique
from sds_agent.pki.validation.path import PathError, find_path
from sds_agent.pki.validation.revocation import RevocationList, revoked
from sds_agent.pki.validation.rules import Chain, fault_of_ca
from sds_agent.pki.validation.signatures import fault_of_signature
from sds_agent.signing.signing_set import SigningSet

MOST_JUDGED = 1000
"""Certificates whose serial number is listed, of which it is cached whether they are revoked."""


class Anchors(Struct, frozen=True):
    """The anchors of callers in a signing set, and the CAs below them.

    `left_out` says of each other root why it is no anchor.
    """

    usable: tuple[x509.Certificate, ...]
    intermediates: tuple[x509.Certificate, ...]
    left_out: tuple[str, ...]

    def path(self, shown: Chain, now: datetime) -> Chain:
        """From the client's certificate up to and with an anchor, so at least two. Raises RefusalError.

        `shown` is the path that the handshake verified, the client's certificate first. It is returned as it is while
        its end is an anchor; after that, another path to an anchor is searched for.
        """
        client, *above = shown
        if above and above[-1] in self.usable:
            return shown
        try:
            path = find_path(client, (*above, *self.intermediates), self.usable, now, envoys=False)
        except PathError as error:
            raise unauthenticated(f"the client certificate is no longer trusted: {error}; come with a token") from error
        signed = (anchor for anchor in self.usable if fault_of_signature(path[-1], anchor) is None)
        return (*path, max(signed, key=lambda anchor: anchor.not_valid_after_utc))


class Revocations:
    """Which certificates the lists revoke, answered fast: a list may have a hundred thousand entries.

    To make one takes up to a second for such a list, and so may the first question about a certificate whose serial
    number is listed.
    """

    def __init__(self, crls: tuple[RevocationList, ...]) -> None:
        self._lists = [(crl, frozenset(entry.serial_number for entry in crl)) for crl in crls]
        self._judged: dict[Chain, bool] = {}

    def first_of(self, path: Chain) -> x509.Certificate | None:
        """The first certificate of a path that is revoked, or None."""
        return next((pair[0] for pair in itertools.pairwise(path) if self._is_revoked(pair)), None)

    def _is_revoked(self, pair: Chain) -> bool:
        if pair not in self._judged:
            listing = [crl for crl, numbers in self._lists if pair[0].serial_number in numbers]
            if not listing:
                return False
            if len(self._judged) >= MOST_JUDGED:
                self._judged.clear()
            self._judged[pair] = revoked(pair, listing) is not None
        return self._judged[pair]


def anchors_of(signing: SigningSet) -> Anchors:
    """What callers' certificates may chain to."""
    known = unique((*signing.roots, *signing.intermediates))
    faults = {root: fault_of_ca(root) or _fault_of_revocation(root, known, signing.crls) for root in signing.roots}
    usable = tuple(root for root, fault in faults.items() if fault is None)
    left_out = tuple(fault for fault in faults.values() if fault is not None)
    return Anchors(usable, signing.intermediates, left_out)


def _fault_of_revocation(
    root: x509.Certificate, known: tuple[x509.Certificate, ...], crls: tuple[RevocationList, ...]
) -> str | None:
    """Whether one of the known CAs revokes this root, or a CA above it."""
    gone = _revoked_above(root, known, crls, ()) if crls else None
    if gone is None:
        return None
    which = describe(root) if gone == root else f"{describe(root)} is below {describe(gone)}, which"
    return f"{which} is revoked by a list in ca-crl.pem"


def _revoked_above(
    certificate: x509.Certificate, known: tuple[x509.Certificate, ...], crls: tuple[RevocationList, ...], below: Chain
) -> x509.Certificate | None:
    """The certificate where a list revokes it, or else a revoked CA above it where every path up has one."""
    issuers = list(_issuers(certificate, known, below))
    if any(revoked((certificate, issuer), crls) is not None for issuer in issuers):
        return certificate
    gone = [_revoked_above(issuer, known, crls, (*below, certificate)) for issuer in issuers]
    return gone[0] if gone and None not in gone else None


def _issuers(
    certificate: x509.Certificate, known: tuple[x509.Certificate, ...], below: Chain
) -> Iterator[x509.Certificate]:
    for each in known:
        if each != certificate and each not in below and fault_of_signature(certificate, each) is None:
            yield each
