"""Which chain an Envoy builds from what a peer sends and a bundle, and whether that one is good.

Envoy does not ask whether there is a good chain. BoringSSL (X509_verify_cert, crypto/x509/x509_vfy.cc) goes up from the
leaf without checking a signature, prefers an anchor to what was sent, and goes on among the anchors to one that is
self-signed or has no issuer there. It never turns back: where the one chain that it has built is bad, it refuses the
peer, though another chain would have been good.

Where names and AuthorityKeyIdentifiers fit several anchors, it takes the last of the bundle up to Envoy 1.37 and the
first from 1.38; in a long bundle it takes any, since it sorts them by an algorithm that does not keep the order of
equals (std::sort). No order is good for all Envoys, so each anchor that one of them may take has to be good.
"""

from collections.abc import Iterable, Iterator
from datetime import datetime
from typing import TypeAlias

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from sds_agent.pki.certificates import describe, describe_time, extension, serial_hex
from sds_agent.pki.names import CanonicalName, is_self_issued, issuer_of, subject_of
from sds_agent.pki.validation.policies import fault_of_policies
from sds_agent.pki.validation.rules import (
    Chain,
    Times,
    fault_of_identifiers,
    fault_of_names,
    fault_of_times,
    fault_of_use,
)
from sds_agent.pki.validation.signatures import fault_of_pss, fault_of_signature

CaIdentity: TypeAlias = tuple[CanonicalName, bytes]
"""A CA by its name and its public key (DER)."""
MOST_CHOICES = 64
"""Chains judged, each for a signature or two: the bound on the time that many anchors of one name and key cost."""

LONGEST = 32
"""Certificates of a chain. Envoy's own limit is a hundred; the way through anchors that issued each other, and do not
say by which key, could lead through all of them.
"""


def current(anchors: Iterable[x509.Certificate], now: datetime) -> Chain:
    """The anchors without those that would only do harm now, unless all would.

    Those are the expired, and those that are not valid yet beside a valid one of the same name and key, as a root's
    renewal leaves them: Envoy may choose just that one, and then refuses every certificate below, and neither kind
    vouches for anything. If all are of that kind they stay: without an anchor Envoy refuses the whole secret, and this
    machine's clock may be what is wrong.
    """
    given = tuple(anchors)
    if len(given) == 1:
        return given
    unexpired = [each for each in given if now < each.not_valid_after_utc]
    early = [each for each in unexpired if now < each.not_valid_before_utc]
    valid = {ca_identity(each) for each in unexpired if each not in early} if early else set()
    return tuple(each for each in unexpired if each not in early or ca_identity(each) not in valid) or given


def moments(anchors: Iterable[x509.Certificate]) -> Iterator[datetime]:
    """When what is `current` of them may change."""
    for anchor in anchors:
        yield anchor.not_valid_before_utc
        yield anchor.not_valid_after_utc


def ca_identity(certificate: x509.Certificate) -> CaIdentity:
    """One name and one key make one CA."""
    key = certificate.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    return subject_of(certificate), key


class Bundle:
    """The anchors that an Envoy has, by name."""

    def __init__(self, anchors: Iterable[x509.Certificate]) -> None:
        self._by_name: dict[CanonicalName, list[x509.Certificate]] = {}
        given = tuple(anchors)
        self._only = given[0] if len(given) == 1 else None
        for anchor in given:
            self._by_name.setdefault(subject_of(anchor), []).append(anchor)

    def leaves_no_choice(self, chain: Chain, anchor: x509.Certificate) -> bool:
        """Whether every Envoy builds just that: the leaf, and this anchor, which was found to have issued it."""
        is_only = anchor is self._only or anchor == self._only  # to compare two takes as long as to parse one
        return len(chain) == 1 and is_only and not _seems_self_signed(chain[0])

    def fault_of_choice(self, chain: Chain, times: Times) -> str | None:
        """What is wrong with a chain that an Envoy may build in place of `chain`, which is good up to an anchor."""
        sent = self._sent_part(chain)
        for number, path in enumerate(self._built(sent)):
            if number == MOST_CHOICES:
                return f"more than {MOST_CHOICES} chains can be built to the trust anchors, which have one name"
            if len(path) >= LONGEST:
                return (
                    f"a chain of {LONGEST} certificates and more can be built among the trust anchors, which issued "
                    "each other: remove those that are not needed, or issue them anew with an AuthorityKeyIdentifier"
                )
            if fault := _fault_of_path(path, len(sent), times):
                return fault
        return None

    def _sent_part(self, chain: Chain) -> Chain:
        """The part of `chain` that Envoy takes from the peer: up to where an anchor comes next."""
        built, rest = [chain[0]], list(chain[1:])
        while not _seems_self_signed(built[-1]) and not self._issuers(built[-1]):
            issuer = next((each for each in rest if seems_issued(built[-1], each)), None)
            if issuer is None:
                break
            rest.remove(issuer)
            built.append(issuer)
        return tuple(built)

    def _built(self, path: Chain) -> Iterator[Chain]:
        """Every continuation among the anchors; none is taken twice in one chain."""
        issuers = [] if _seems_self_signed(path[-1]) else self._issuers(path[-1])
        further = [each for each in issuers if each not in path]
        if not further or len(path) >= LONGEST:
            yield path
            return
        for issuer in further:
            yield from self._built((*path, issuer))

    def _issuers(self, certificate: x509.Certificate) -> list[x509.Certificate]:
        namesakes = self._by_name.get(issuer_of(certificate), [])
        return [each for each in namesakes if seems_issued(certificate, each)]


def seems_issued(certificate: x509.Certificate, issuer: x509.Certificate) -> bool:
    """X509_check_issued: by name, AuthorityKeyIdentifier and KeyUsage."""
    return (
        issuer_of(certificate) == subject_of(issuer)
        and fault_of_identifiers(issuer, certificate) is None
        and _may_sign(issuer)
    )


def _seems_self_signed(certificate: x509.Certificate) -> bool:
    """What BoringSSL takes for self-signed without checking the signature (EXFLAG_SS in x509v3_cache_extensions)."""
    return (
        is_self_issued(certificate)
        and fault_of_identifiers(certificate, certificate) is None
        and _may_sign(certificate)
    )


def _may_sign(certificate: x509.Certificate) -> bool:
    usage = extension(certificate, x509.KeyUsage)
    return usage is None or usage.key_cert_sign


def _fault_of_path(path: Chain, sent: int, times: Times) -> str | None:
    """What Envoy asks of a chain beyond its first `sent` certificates, which the search in `path` has found good."""
    if len(path) == sent:
        return (
            f"Envoy takes {describe(path[-1])} for self-signed, and goes no further up: it must be issued "
            "anew with an AuthorityKeyIdentifier"
        )
    for number, anchor in enumerate(path[sent:], start=sent):
        below = path[:number]
        fault = (
            fault_of_times(anchor, times)
            or fault_of_use(anchor)
            or fault_of_signature(below[-1], anchor)
            or fault_of_pss(below[-1], anchor)
            or fault_of_names(anchor, below)
        )
        if fault:
            return _chosen(anchor, below[-1], fault)
    return fault_of_policies(path)


def _chosen(anchor: x509.Certificate, below: x509.Certificate, fault: str) -> str:
    return (
        f"as the issuer of {describe(below)} Envoy may choose the trust anchor {describe(anchor)} with serial number "
        f"{serial_hex(anchor)}, valid until {describe_time(anchor.not_valid_after_utc)}, and then {fault}: "
        "remove that anchor, or issue what is below it anew with an AuthorityKeyIdentifier that leads to another"
    )
