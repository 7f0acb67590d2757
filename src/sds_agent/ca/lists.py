"""Revocation lists over time: what was revoked stays revoked, though a file is cut off, lost, or put back as it was.

A directory shows which lists it holds at one moment, and any moment may be a bad one: a file that is being written, a
volume that is being swapped, a copy from a backup. So a list that disappears stays in force for another while (SETTLE),
and a list that is older than its predecessor takes nothing away. All this is known only since the start of the process.
How long is measured by `Clock.passed`: a wall clock that was set ahead would let in what was revoked.
"""

from collections.abc import Iterable, Sequence
from datetime import timedelta
from enum import Enum

from cryptography import x509
from msgspec import Struct

from sds_agent.pki.names import same_name
from sds_agent.pki.validation.revocation import RevocationList, extension_of, is_signed_by

SETTLE = timedelta(hours=1)
"""How long a list stays in force after it has disappeared: time for its operator to see that, and to put it back."""

Certificates = Sequence[x509.Certificate]


class Notice(Enum):
    """What became of a list, as far as an operator should know."""

    GONE = "revocation_list_gone"
    """It has disappeared, and stays in force for SETTLE."""
    OLDER = "revocation_list_older"
    """An older list took its place in the file: it stays in force, and the older one does not count."""
    DROPPED = "revocation_list_dropped"
    """It disappeared SETTLE ago, and is no longer in force."""


class Note(Struct, frozen=True):
    """A notice on a list that was in force; `found` is the older list that took its place in the file."""

    notice: Notice
    crl: RevocationList
    found: RevocationList | None = None


class Gone(Struct, frozen=True):
    """A list that has disappeared, and since when."""

    crl: RevocationList
    since: timedelta


class ListsInForce(Struct, frozen=True):
    """The lists that count: those in the directory, and those that disappeared from it less than SETTLE ago."""

    present: tuple[RevocationList, ...] = ()
    gone: tuple[Gone, ...] = ()

    @property
    def lists(self) -> tuple[RevocationList, ...]:
        """All of them."""
        return (*self.present, *(each.crl for each in self.gone))

    def with_found(
        self, found: Iterable[RevocationList], known: Certificates, passed: timedelta
    ) -> tuple["ListsInForce", tuple[Note, ...]]:
        """The lists in force once these were found, at the time `passed`, and what changed. `known` are the CAs that
        may have issued any.
        """
        present, gone, notes = list(found), list[Gone](), list[Note]()
        before = [*((each, None) for each in self.present), *((each.crl, each.since) for each in self.gone)]
        for crl, since in before:
            successors = [each for each in present if each == crl or _is_of_line(each, crl, known)]
            if not successors and not _is_included(crl, present, known):
                gone.append(Gone(crl, passed if since is None else since))
                notes += [] if since is not None else [Note(Notice.GONE, crl)]
            elif successors and all(is_older(each, crl) for each in successors):
                present = [crl, *(each for each in present if each not in successors)]
                notes.append(Note(Notice.OLDER, crl, successors[0]))
        return ListsInForce(tuple(present), tuple(gone)), tuple(notes)

    def at(self, passed: timedelta) -> tuple["ListsInForce", tuple[Note, ...]]:
        """The lists that are still in force at the time `passed`, and what changed."""
        left = tuple(each for each in self.gone if passed - each.since < SETTLE)
        notes = tuple(Note(Notice.DROPPED, each.crl) for each in self.gone if each not in left)
        return ListsInForce(self.present, left), notes


def number_of(crl: RevocationList) -> int | None:
    """Its CRL number (RFC 5280 section 5.2.3), if it has one."""
    found = extension_of(crl, x509.CRLNumber)
    return None if found is None else found.crl_number


def is_older(crl: RevocationList, other: RevocationList) -> bool:
    """Whether it was issued before the other, of the same line.

    Neither its number nor its date may say that it is newer: a CA whose numbers began anew, or whose clock was set
    back, is no reason to refuse what it issues from then on.
    """
    number, others = number_of(crl), number_of(other)
    numbers = 0 if number is None or others is None else _order(number, others)
    dates = _order(crl.last_update_utc.timestamp(), other.last_update_utc.timestamp())
    return numbers <= 0 and dates <= 0 and (numbers, dates) != (0, 0)


def _order(one: float, other: float) -> int:
    return (one > other) - (one < other)


def _is_of_line(crl: RevocationList, other: RevocationList, known: Certificates) -> bool:
    """Whether the newer of the two replaces the older."""
    return _is_delta(crl) is _is_delta(other) and _has_scope_of(crl, other, known)


def _has_scope_of(crl: RevocationList, other: RevocationList, known: Certificates) -> bool:
    """Whether the two are of one issuer, key and scope, so that they are about the same certificates."""
    return same_name(crl.issuer, other.issuer) and _point(crl) == _point(other) and _has_key_of(crl, other, known)


def _has_key_of(crl: RevocationList, other: RevocationList, known: Certificates) -> bool:
    """Whether one key signed both, as far as that can be known: many a list does not say which one signed it."""
    signers = [ca for ca in known if is_signed_by(crl, ca) or is_signed_by(other, ca)]
    if signers:
        return any(is_signed_by(crl, ca) and is_signed_by(other, ca) for ca in signers)
    return _key_identifier(crl) == _key_identifier(other)


def _is_included(crl: RevocationList, found: Iterable[RevocationList], known: Certificates) -> bool:
    """Whether one of `found`, a complete list, includes a delta list (RFC 5280 section 5.2.4)."""
    number = number_of(crl)
    return (
        _is_delta(crl)
        and number is not None
        and any(
            not _is_delta(each) and (number_of(each) or 0) >= number and _has_scope_of(each, crl, known)
            for each in found
        )
    )


def _point(crl: RevocationList) -> bytes | None:
    point = extension_of(crl, x509.IssuingDistributionPoint)
    return None if point is None else point.public_bytes()


def _is_delta(crl: RevocationList) -> bool:
    return extension_of(crl, x509.DeltaCRLIndicator) is not None


def _key_identifier(crl: RevocationList) -> bytes | None:
    named = extension_of(crl, x509.AuthorityKeyIdentifier)
    return None if named is None else named.key_identifier
