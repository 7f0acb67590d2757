"""Certificates in odd encodings: one of them never costs the others, and what Envoy refuses never leaves the agent."""

import pytest
from cryptography import x509
from fakes import der
from fakes.odd_certificates import LOADED, NOT_LOADED, NOT_READ, together

from sds_agent.pki.certificates import MOST_FAULTS, CertificateError, read_bundle, read_pem

pytestmark = pytest.mark.filterwarnings("ignore:Attribute's length must be:UserWarning")  # in the program it is ignored


@pytest.mark.parametrize("root", NOT_LOADED.values(), ids=NOT_LOADED)
def test_a_certificate_that_envoy_does_not_load_is_left_out_with_the_reason(root: bytes) -> None:
    """Envoy would refuse the whole bundle for it."""
    assert x509.load_der_x509_certificate(root) is not None
    reading = read_bundle(together(root))
    assert [c.subject.rfc4514_string() for c in reading.certificates] == ["CN=good root"]
    (reported,) = reading.left_out
    assert reported.startswith("PEM block 2 is a certificate that Envoy does not load: ")
    assert "; its subject is '" in reported
    assert reported.isprintable()


@pytest.mark.parametrize("root", NOT_READ.values(), ids=NOT_READ)
def test_an_unreadable_certificate_is_left_out_with_the_reason(root: bytes) -> None:
    reading = read_bundle(together(root))
    assert len(reading.certificates) == 1
    assert reading.left_out[0].startswith("PEM block 2 is ")


@pytest.mark.parametrize("root", LOADED.values(), ids=LOADED)
def test_every_certificate_that_envoy_loads_is_read(root: bytes) -> None:
    assert len(read_pem(together(root))) == 2


def test_a_certificate_is_named_where_its_name_can_be_read() -> None:
    for root, name in (("x400Address", "'CN=Plain Root'"), ("critical FALSE", "'Plain Root'")):
        assert read_bundle(together(NOT_READ[root])).left_out[0].endswith(f"; its subject is {name}")
    assert "'Old_Root!'" in read_bundle(together(NOT_READ["_ in PrintableString"])).left_out[0]


def test_where_nothing_can_be_used_the_bundle_is_refused_with_every_reason() -> None:
    both = der.pem(NOT_LOADED["version 1 with extensions"]) + der.pem(NOT_READ["version 2"])
    for read in (read_bundle, read_pem):
        with pytest.raises(CertificateError, match=r"PEM block 1 .* version 1 .*; PEM block 2 is "):
            read(both)


def test_the_report_on_a_damaged_bundle_is_short() -> None:
    text = together(NOT_LOADED["version 1 with extensions"]) + der.pem(b"\x30\x00") * 1000
    reported = read_bundle(text).left_out
    assert len(reported) == MOST_FAULTS + 1
    assert reported[-1] == f"{1001 - MOST_FAULTS} more cannot be used"


def test_a_bundle_that_is_cut_off_is_refused_since_others_may_be_missing() -> None:
    text = together(LOADED["as it should be"])
    with pytest.raises(CertificateError, match="PEM block 2 has no END line: the certificate is cut off"):
        read_bundle(text[:-30])
    reading = read_bundle(text[:-30] + b"\n" + text)
    assert len(reading.certificates) == 3
    assert reading.left_out == ("PEM block 2 has no END line before the next BEGIN: the certificate is cut off",)
