"""Which certificates a CA's revocation lists revoke: what is revoked, and nothing else."""

import base64

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from fakes import der
from fakes.hierarchy import DAY, HOUR, NOW, Ca, key_usage, make_ca, make_crl, make_leaf, new_key

from sds_agent.pki.validation.revocation import (
    RevocationList,
    RevocationListError,
    fault_of_list,
    is_signed_by,
    limits_of,
    overdue,
    read_crls,
    revoked,
)

ROOT = make_ca("root")
MIDDLE = make_ca("middle", ROOT)
LEAF = make_leaf(MIDDLE)
CHAIN = (LEAF, MIDDLE.certificate, ROOT.certificate)


def test_every_certificate_of_the_chain_can_be_revoked_by_its_own_issuer() -> None:
    assert revoked(CHAIN, [make_crl(MIDDLE, LEAF)]) == LEAF
    assert revoked(CHAIN, [make_crl(MIDDLE), make_crl(ROOT, 5, MIDDLE.certificate)]) == MIDDLE.certificate
    assert revoked(CHAIN, [make_crl(MIDDLE), make_crl(ROOT)]) is None
    assert revoked(CHAIN, []) is None


def test_a_serial_number_of_another_issuer_revokes_nothing() -> None:
    assert revoked(CHAIN, [make_crl(ROOT, LEAF), make_crl(MIDDLE, MIDDLE.certificate)]) is None


def test_a_list_signed_with_another_key_revokes_nothing() -> None:
    """Of two CAs of one name each has its own list, and numbers its certificates for itself."""
    namesake = make_ca("middle", ROOT)
    lists = [make_crl(namesake, LEAF)]
    assert revoked(CHAIN, lists) is None
    assert revoked((LEAF, namesake.certificate, ROOT.certificate), lists) == LEAF


def test_a_list_of_another_ca_with_the_same_key_revokes_nothing() -> None:
    """As of a CA that was renamed and numbers its certificates anew."""
    renamed = make_ca("renamed", ROOT, key=MIDDLE.key)
    lists = [make_crl(renamed, LEAF)]
    assert revoked(CHAIN, lists) is None
    assert not is_signed_by(lists[0], MIDDLE.certificate)


@pytest.mark.parametrize(
    "ca",
    [
        make_ca("rsa", ROOT, key=rsa.generate_private_key(65537, 2048)),
        make_ca("ed25519", ROOT, key=ed25519.Ed25519PrivateKey.generate()),
        make_ca("without cRLSign", ROOT, usage=key_usage(cert_sign=False)),
    ],
    ids=lambda ca: ca.certificate.subject.rfc4514_string(),
)
def test_the_list_of_every_kind_of_ca_counts(ca: Ca) -> None:
    leaf = make_leaf(ca)
    assert revoked((leaf, ca.certificate), [make_crl(ca, leaf)]) == leaf
    assert revoked((leaf, ca.certificate), [make_crl(ca, leaf, key=new_key())]) is None


def test_an_overdue_list_still_revokes_and_is_reported() -> None:
    late = make_crl(MIDDLE, LEAF, last_update=NOW - DAY, next_update=NOW - HOUR)
    assert overdue([late, make_crl(ROOT)], NOW) == (late,)
    assert overdue([late], NOW - HOUR) == ()
    assert revoked(CHAIN, [late]) == LEAF


@pytest.mark.parametrize(
    ("crl", "good"),
    [(make_crl(MIDDLE), True), (make_crl(make_ca("other")), True), (make_crl(MIDDLE, key=new_key()), False)],
    ids=["its own", "of a CA that is not here", "by another key"],
)
def test_a_list_by_another_key_is_a_fault(crl: x509.CertificateRevocationList, *, good: bool) -> None:
    assert (fault_of_list(crl, CHAIN[1:]) is None) is good


def test_a_list_that_is_damaged_anywhere_is_refused_when_it_is_read() -> None:
    """cryptography notices much of it only when it is asked, which would be when a caller renews."""
    der = make_crl(ROOT, 7).public_bytes(Encoding.DER)
    version, serial = b"\x02\x01\x01", b"\x02\x01\x07\x17"
    for whole, damaged in ((version, b"\x02\x01\x5c"), (serial, b"\x02\x01\x07\x05"), (serial, b"\x0c\x01\x07\x17")):
        assert der.count(whole) == 1
        body = base64.encodebytes(der.replace(whole, damaged))
        with pytest.raises(RevocationListError, match="list 1 is damaged"):
            read_crls(b"-----BEGIN X509 CRL-----\n" + body + b"-----END X509 CRL-----\n")


# --- entries that are not about us, or revoke nothing ---

ISSUER, OWN, OTHER = der.entity("issuer"), der.entity("own"), der.directory(der.common_name("other"))
SERIAL = 7
ISSUED = tuple(map(der.loaded, (der.certificate(OWN, ISSUER, serial=der.integer(SERIAL)), der.certificate(ISSUER))))
NUMBER = der.extension(der.CRL_NUMBER, der.integer(6))
DELTA = der.extension(der.DELTA_CRL, der.integer(5), critical=True)


def of(*names: bytes) -> bytes:
    """CertificateIssuer."""
    return der.extension(der.CERTIFICATE_ISSUER, der.sequence(*names), critical=True)


def because(reason: int) -> bytes:
    return der.extension(der.REASON_CODE, der.enumerated(reason))


def scope(number: int, content: bytes) -> bytes:
    """IssuingDistributionPoint with one of its fields."""
    value = der.sequence(der.implicit(number, content))
    return der.extension(der.ISSUING_DISTRIBUTION_POINT, value, critical=True)


INDIRECT, TRUE = scope(4, b"\xff"), b"\xff"
MINE = der.directory(ISSUER.name)
MINE_RESPELLED = der.directory(der.common_name("ISSUER", der.PRINTABLE))

NOT_OURS: dict[str, tuple[list[bytes], list[bytes]]] = {
    "of another issuer": ([der.revoked(SERIAL, of(OTHER))], [INDIRECT]),
    "after one of another issuer": ([der.revoked(3, of(OTHER)), der.revoked(SERIAL)], [INDIRECT]),
    "after several that inherit": ([der.revoked(3, of(OTHER)), der.revoked(4), der.revoked(SERIAL)], [INDIRECT]),
    "of another issuer, which the list forgets to announce": ([der.revoked(SERIAL, of(OTHER))], []),
    "taken off by a delta list": ([der.revoked(SERIAL, because(8))], [NUMBER, DELTA]),
    "of attribute certificates": ([der.revoked(SERIAL)], [scope(5, TRUE)]),
    "of another number": ([der.revoked(SERIAL + 1)], []),
}
OURS: dict[str, tuple[list[bytes], list[bytes]]] = {
    "plain": ([der.revoked(SERIAL)], []),
    "of this issuer by name": ([der.revoked(SERIAL, of(MINE))], [INDIRECT]),
    "of this issuer, spelled otherwise": ([der.revoked(SERIAL, of(MINE_RESPELLED))], [INDIRECT]),
    "of this issuer among others": ([der.revoked(SERIAL, of(OTHER, MINE))], [INDIRECT]),
    "before one of another issuer": ([der.revoked(SERIAL), der.revoked(3, of(OTHER))], [INDIRECT]),
    "of this issuer again": ([der.revoked(3, of(OTHER)), der.revoked(4, of(MINE)), der.revoked(SERIAL)], [INDIRECT]),
    "once of another issuer and once of this": (
        [der.revoked(SERIAL, of(OTHER)), der.revoked(SERIAL, of(MINE))],
        [INDIRECT],
    ),
    "added by a delta list": ([der.revoked(SERIAL, because(1))], [NUMBER, DELTA]),
    "on hold": ([der.revoked(SERIAL, because(6))], []),
    "for some reasons": ([der.revoked(SERIAL)], [scope(3, b"\x06\x40")]),
    "of users": ([der.revoked(SERIAL)], [scope(1, TRUE)]),
    "for an unknown reason": ([der.revoked(SERIAL, because(77))], []),
    "in a list with a scope that cannot be read": (
        [der.revoked(SERIAL)],
        [der.extension(der.ISSUING_DISTRIBUTION_POINT, b"\x30\x05")],
    ),
}


def listed(entries: list[bytes], extensions: list[bytes], issuer: der.Entity = ISSUER) -> tuple[RevocationList, ...]:
    return read_crls(der.pem(der.revocation_list(issuer, entries, extensions), "X509 CRL"))


@pytest.mark.parametrize(("entries", "extensions"), NOT_OURS.values(), ids=NOT_OURS)
def test_an_entry_for_another_certificate_or_a_removed_one_revokes_nothing(
    entries: list[bytes], extensions: list[bytes]
) -> None:
    assert revoked(ISSUED, listed(entries, extensions)) is None


@pytest.mark.parametrize(("entries", "extensions"), OURS.values(), ids=OURS)
def test_every_other_entry_with_our_number_revokes(entries: list[bytes], extensions: list[bytes]) -> None:
    assert revoked(ISSUED, listed(entries, extensions)) == ISSUED[0]


def test_a_delta_list_takes_nothing_off_the_complete_one_beside_it() -> None:
    complete = listed([der.revoked(SERIAL, because(6))], [NUMBER])
    delta = listed([der.revoked(SERIAL, because(8))], [NUMBER, DELTA])
    assert revoked(ISSUED, [*delta, *complete]) == ISSUED[0]


def test_a_list_whose_issuer_is_spelled_otherwise_counts() -> None:
    respelled = der.Entity(der.common_name("ISSUER", der.PRINTABLE), ISSUER.key)
    (crl,) = listed([der.revoked(SERIAL)], [], respelled)
    assert revoked(ISSUED, [crl]) == ISSUED[0]
    assert fault_of_list(crl, ISSUED) is None


@pytest.mark.parametrize(
    ("extensions", "words"),
    [
        ([], None),
        ([INDIRECT], "other issuers"),
        ([NUMBER, DELTA], "a delta list"),
        ([scope(5, TRUE)], "attribute certificates"),
        ([scope(3, b"\x06\x40")], "for some reasons"),
        ([scope(1, TRUE)], None),
    ],
)
def test_a_list_that_covers_only_some_certificates_is_reported(extensions: list[bytes], words: str | None) -> None:
    (crl,) = listed([der.revoked(SERIAL)], extensions)
    assert (words or "") in (limits_of(crl) or "")
    assert (limits_of(crl) is None) is (words is None)
