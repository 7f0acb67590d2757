"""Revocation lists (RFC 5280 section 5) as values: which certificates of a chain they revoke.

A listed certificate is revoked, whatever else the list says. A list that is overdue (its nextUpdate has passed) still
revokes all that it names, and what it does not name is good: to refuse every certificate instead while a list is
overdue would stop every renewal below that CA because one file was forgotten. The issuer needs no cRLSign: its key is
proof enough, and to ask for the bit would lose a revocation that was meant. Listed for some reasons only
(onlySomeReasons), or in a delta list, counts as well; so does a list that is by its own words for another kind of
certificate or another distribution point, since a CA gives no serial number twice (section 4.1.2.2).

An entry is not always about this issuer's certificate, nor does it always revoke: an indirect list names certificates
of other issuers too (section 5.3.3), removeFromCRL takes a certificate off the list (section 5.3.1), and a list for
attribute certificates alone is about none of ours (section 5.2.5). A delta list takes nothing off the complete list
beside it; only the next complete list does.

Envoy judges its own lists otherwise. It ignores a delta list beside a complete one; below a CA whose only list is a
delta one, an indirect one, or one for some reasons or of another scope, it refuses every certificate.
"""

import binascii
import itertools
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import datetime
from typing import TypeAlias

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm

from sds_agent.errors import Problem, SdsAgentError
from sds_agent.pki.certificates import ExtensionT, describe_name
from sds_agent.pki.forms import other_form
from sds_agent.pki.names import same_name
from sds_agent.pki.pem import Block, blocks

RevocationList: TypeAlias = x509.CertificateRevocationList

_LABELS = frozenset({b"X509 CRL"})
_LONGEST_REASON = 120


class RevocationListError(SdsAgentError):
    """A text holds a revocation list that cannot be read; `problem` says which, counting from 1, and why."""

    def __init__(self, found: str, fix: str = "write it anew, as revocation lists in PEM, or remove it") -> None:
        self.problem = Problem((), found, fix)
        super().__init__(str(self.problem))


def read_crls(data: bytes) -> tuple[RevocationList, ...]:
    """Every revocation list in `data` (PEM), in its order; cryptography's own reader stops after the first.

    Raises RevocationListError.
    """
    found = tuple(_read(block, number) for number, block in enumerate(blocks(data, _LABELS), start=1))
    if data.strip() and not found:
        form = other_form(data, "crl")
        raise (
            RevocationListError(form.found, form.fix)
            if form
            else RevocationListError("holds no revocation list in PEM")
        )
    return found


def _read(block: Block, number: int) -> RevocationList:
    if not block.has_end:
        raise RevocationListError(f"its revocation list {number} is damaged: it has no END line, so it is cut off")
    try:
        crl = x509.load_der_x509_crl(block.der())
        # what cryptography parses only on demand, so that a malformed part is found here and not later on
        _ = crl.issuer, crl.next_update_utc, [entry.serial_number for entry in crl]
    except binascii.Error as error:
        raise RevocationListError(f"its revocation list {number} is damaged: it is not in base64 ({error})") from error
    except (ValueError, TypeError, x509.InvalidVersion, UnsupportedAlgorithm) as error:
        reason = str(error)[:_LONGEST_REASON]
        raise RevocationListError(
            f"its revocation list {number} is damaged: it is not well-formed ({reason})"
        ) from error
    return crl


def revoked(chain: Sequence[x509.Certificate], crls: Iterable[RevocationList]) -> x509.Certificate | None:
    """The first certificate of `chain` that a list revokes, or None.

    Each is followed by its issuer. A serial number means something only together with its issuer, and of several CAs of
    one name only the key tells which: so a list counts for a certificate when the certificate's issuer signed both.
    """
    lists = tuple(crls)
    for certificate, issuer in itertools.pairwise(chain):
        for crl in lists:
            if _names(crl, certificate) and is_signed_by(crl, issuer):
                return certificate
    return None


def _names(crl: RevocationList, certificate: x509.Certificate) -> bool:
    """Whether an entry revokes the certificate, where the list is its issuer's."""
    number = certificate.serial_number
    entry = crl.get_revoked_certificate_by_serial_number(number)
    if entry is None or not same_name(crl.issuer, certificate.issuer):
        return False
    scope = extension_of(crl, x509.IssuingDistributionPoint)
    if scope is not None and scope.only_contains_attribute_certs:
        return False
    if (scope is None or not scope.indirect_crl) and extension_of(entry, x509.CertificateIssuer) is None:
        return _revokes(entry)
    return any(_revokes(each) for each in _entries_of_issuer(crl) if each.serial_number == number)


def _entries_of_issuer(crl: RevocationList) -> Iterator[x509.RevokedCertificate]:
    """Those of an indirect list that are about its issuer's own certificates.

    An entry is about the issuer that is named in it, or else in the last one before it that names one (section 5.3.3).
    """
    is_own = True
    for entry in crl:
        if named := extension_of(entry, x509.CertificateIssuer):
            names = named.get_values_for_type(x509.DirectoryName)
            is_own = any(same_name(name, crl.issuer) for name in names)
        if is_own:
            yield entry


def _revokes(entry: x509.RevokedCertificate) -> bool:
    reason = extension_of(entry, x509.CRLReason)
    return reason is None or reason.reason is not x509.ReasonFlags.remove_from_crl


def extension_of(listed: RevocationList | x509.RevokedCertificate, kind: type[ExtensionT]) -> ExtensionT | None:
    """The extension of that kind, or None, also where the extensions cannot be read: then they take nothing back."""
    with suppress(x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType, ValueError):
        return listed.extensions.get_extension_for_class(kind).value
    return None


def is_signed_by(crl: RevocationList, issuer: x509.Certificate) -> bool:
    """Whether the list is from that CA, by name and key."""
    try:
        return same_name(crl.issuer, issuer.subject) and crl.is_signature_valid(issuer.public_key())  # type: ignore[arg-type]  # refuses kinds that cannot sign by TypeError
    except (TypeError, ValueError, InvalidSignature, UnsupportedAlgorithm):
        return False


def fault_of_list(crl: RevocationList, known: Iterable[x509.Certificate]) -> str | None:
    """What is wrong with a list beside these CAs: it names one of them and another key signed it.

    One by a CA that is not among them may yet be that of a former signer, whose certificates are still in use.
    """
    namesakes = [ca for ca in known if same_name(ca.subject, crl.issuer)]
    if not namesakes or any(is_signed_by(crl, ca) for ca in namesakes):
        return None
    return f"names {describe_name(crl.issuer)} as its issuer, and is not signed with that CA's key"


def overdue(crls: Iterable[RevocationList], now: datetime) -> tuple[RevocationList, ...]:
    """The lists that should have been replaced by now (nextUpdate has passed)."""
    return tuple(crl for crl in crls if crl.next_update_utc is not None and crl.next_update_utc < now)


def limits_of(crl: RevocationList) -> str | None:
    """What a list leaves open that is not the complete one for all certificates of its issuer, or None."""
    scope = extension_of(crl, x509.IssuingDistributionPoint)
    if scope is not None and scope.only_contains_attribute_certs:
        return "of attribute certificates: it revokes no other"
    if scope is not None and scope.indirect_crl:
        return "indirect: what it lists of other issuers does not count"
    if extension_of(crl, x509.DeltaCRLIndicator) is not None:
        return "a delta list: it revokes what it adds, and takes nothing off the complete one"
    if scope is not None and scope.only_some_reasons:
        return "for some reasons: what it does not list may be revoked for others"
    return None
