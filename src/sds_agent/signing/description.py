"""A CA that can be plugged in, put into words: its certificates, its revocation lists, and for whom it can issue."""

from collections.abc import Iterator, Mapping
from datetime import datetime

from cryptography import x509

from sds_agent.pki.certificates import describe, describe_name, describe_time
from sds_agent.pki.keys import describe_key
from sds_agent.pki.validation.revocation import RevocationList, limits_of, overdue
from sds_agent.pki.validation.rules import fault_of_ca
from sds_agent.signing.cacerts import reach
from sds_agent.signing.signing_set import SigningSet


def lines(files: Mapping[str, bytes], signing: SigningSet, now: datetime) -> Iterator[str]:
    """What `signing`, which was read from these files, consists of; a line for each part, with what to do about it."""
    for title, certificates in (
        ("signer", (signing.signer.certificate,)),
        ("above it", signing.intermediates[1:]),
        ("root", signing.roots),
    ):
        yield from (f"{title}: {_certificate(each, now)}" for each in certificates)
    late = overdue(signing.crls, now)
    yield from (f"revocation list: {_list(each, is_late=each in late)}" for each in signing.crls)
    yield from (f"left out: {cause}; remove it, or have its CA issue it anew" for cause in signing.left_out)
    yield f"trust domains: {reach(files, signing, now)}"


def _certificate(certificate: x509.Certificate, now: datetime) -> str:
    end = certificate.not_valid_after_utc
    fault = "it has expired" if now > end else "it is no CA" if fault_of_ca(certificate) else ""
    fix = fault and f"; {fault}: remove it"
    return f"{describe(certificate)}, {describe_key(certificate.public_key())}, valid until {describe_time(end)}{fix}"


def _list(crl: RevocationList, *, is_late: bool) -> str:
    end = "" if crl.next_update_utc is None else f", valid until {describe_time(crl.next_update_utc)}"
    fix = "; it is overdue: have it issued anew" if is_late else ""
    kind = f" ({found})" if (found := limits_of(crl)) else ""
    size = f"{len(crl)} {'entry' if len(crl) == 1 else 'entries'}"
    return f"{describe_name(crl.issuer)}, {size}{kind}{end}{fix}"
