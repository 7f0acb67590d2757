"""When two names are one: a CA whose name is spelled in two ways is still the issuer of what is below it."""

from datetime import UTC, datetime

import pytest
from cryptography import x509
from fakes import der
from fakes.oddities.places import ROOT, case, parts
from fakes.oddities.texts import NAMES, STRINGS

from sds_agent.pki.certificates import CertificateError, read_pem
from sds_agent.pki.names import email_addresses, same_name
from sds_agent.pki.validation.path import PathError, find_path

NOW = datetime(2026, 3, 14, tzinfo=UTC)
NAME = der.common_name
A, B = der.attribute(der.ORGANIZATION, "a"), der.attribute(der.COMMON_NAME, "b")

SAME: dict[str, tuple[bytes, bytes]] = {
    "PrintableString and UTF8String": (NAME("Demo", der.PRINTABLE), NAME("Demo")),
    "IA5String and UTF8String": (NAME("Demo", der.IA5), NAME("Demo")),
    "T61String and UTF8String": (NAME("Demo", der.TELETEX), NAME("Demo")),
    "BMPString and UTF8String": (NAME("Café".encode("utf-16-be"), der.BMP), NAME("Café")),
    "UniversalString and UTF8String": (NAME("Café".encode("utf-32-be"), der.UNIVERSAL), NAME("Café")),
    "capitals": (NAME("DEMO Root"), NAME("demo rOOT")),
    "runs of spaces, and tabs": (NAME(" Demo \t Root "), NAME("Demo Root")),
}
OTHER: dict[str, tuple[bytes, bytes]] = {
    "another text": (NAME("Demo"), NAME("Demos")),
    "no space and one": (NAME("DemoRoot"), NAME("Demo Root")),
    "a capital beyond ASCII": (NAME("É"), NAME("é")),
    "a space beyond ASCII": (NAME("Demo\u00a0Root"), NAME("Demo Root")),
    "composed and decomposed": (NAME("é"), NAME("e\u0301")),
    "NumericString and UTF8String": (NAME("12", der.NUMERIC), NAME("12")),
    "another kind of attribute": (NAME("a"), der.name(der.attribute(der.ORGANIZATION, "a"))),
    "another order": (der.name(A, B), der.name(B, A)),
    "one RDN and two": (der.name(A, B), der.sequence(der.set_of(B, A))),
    "one more": (der.name(A, B), der.name(A)),
}


def read(name: bytes) -> x509.Name:
    return der.loaded(der.certificate(der.Entity(name, ROOT.key))).subject


@pytest.mark.parametrize(("one", "other"), SAME.values(), ids=SAME)
def test_a_ca_whose_name_is_spelled_in_two_ways_is_the_issuer_as_for_envoy(one: bytes, other: bytes) -> None:
    assert same_name(read(one), read(other))
    odd = case("", root=der.Entity(one, ROOT.key), make_ca=parts(issuer_name=other))
    leaf, ca, root = (der.loaded(each) for each in (odd.leaf, *odd.above, *odd.anchors))
    assert find_path(leaf, [ca], [root], NOW) == (leaf, ca)


@pytest.mark.parametrize(("one", "other"), OTHER.values(), ids=OTHER)
def test_names_that_are_two_for_envoy_are_two(one: bytes, other: bytes) -> None:
    assert not same_name(read(one), read(other))
    odd = case("", root=der.Entity(one, ROOT.key), make_ca=parts(issuer_name=other))
    leaf, ca, root = (der.loaded(each) for each in (odd.leaf, *odd.above, *odd.anchors))
    with pytest.raises(PathError, match="which is neither among the certificates"):
        find_path(leaf, [ca], [root], NOW)


def test_an_rdns_attributes_have_no_order() -> None:
    kinds = (x509.NameOID.COMMON_NAME, x509.NameOID.ORGANIZATION_NAME)
    attributes = [x509.NameAttribute(kind, "a") for kind in kinds]
    one, other = (x509.RelativeDistinguishedName(each) for each in (attributes, attributes[::-1]))
    assert same_name(x509.Name([one]), x509.Name([other]))


def test_an_email_address_counts_only_in_ascii() -> None:
    def addresses(tag: int) -> list[str | None]:
        return list(email_addresses(read(der.name(der.attribute(der.EMAIL_ADDRESS, "a@b", tag), B))))

    assert (addresses(der.IA5), addresses(der.UTF8)) == (["a@b"], [None])


@pytest.mark.filterwarnings("ignore:Attribute's length must be")  # cryptography's, of names that it reads all the same
def test_every_certificate_that_is_read_can_be_compared() -> None:
    """A name that the comparison cannot bear would end the search with a foreign exception."""
    for name in (*NAMES.values(), *(NAME(content, tag) for tag, content in STRINGS.values())):
        try:
            (certificate,) = read_pem(der.pem(der.certificate(der.Entity(name, ROOT.key))))
        except CertificateError:
            continue
        assert same_name(certificate.subject, certificate.issuer)
