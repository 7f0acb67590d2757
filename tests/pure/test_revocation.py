"""Which certificates a CA's revocation lists revoke: what is revoked, and nothing else."""

import base64

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from fakes.hierarchy import DAY, HOUR, NOW, Ca, key_usage, make_ca, make_crl, make_leaf, new_key

from sds_agent.pki.certificates import CertificateError
from sds_agent.pki.revocation import fault_of_list, overdue, read_crls, revoked

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


def test_an_overdue_list_still_revokes_and_is_told() -> None:
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
    """cryptography notices much of it only when it is asked, which would be when somebody renews."""
    der = make_crl(ROOT, 7).public_bytes(Encoding.DER)
    version, serial = b"\x02\x01\x01", b"\x02\x01\x07\x17"
    for whole, damaged in ((version, b"\x02\x01\x5c"), (serial, b"\x02\x01\x07\x05"), (serial, b"\x0c\x01\x07\x17")):
        assert der.count(whole) == 1
        body = base64.encodebytes(der.replace(whole, damaged))
        with pytest.raises(CertificateError, match="list 1 is damaged"):
            read_crls(b"-----BEGIN X509 CRL-----\n" + body + b"-----END X509 CRL-----\n")
