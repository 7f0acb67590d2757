"""Name constraints: a CA that is kept to one trust domain cannot issue identities of another."""

import ipaddress
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.x509.oid import NameOID
from fakes.chains import below
from fakes.hierarchy import (
    NOW,
    common_name,
    make_ca,
    make_leaf,
    uris,
)
from fakes.openssl import verifies

from sds_agent.pki.path import PathError, find_path

PERMITTED: list[tuple[str, str, bool]] = [
    ("demo.example", "spiffe://demo.example/web", True),
    ("DEMO.Example", "spiffe://demo.example/web", True),
    ("demo.example", "SPIFFE://DEMO.EXAMPLE/web", True),
    ("demo.example", "spiffe://demo.example", True),
    ("demo.example", "https://user@demo.example:8443/web?a#b", True),
    ("demo.example", "spiffe://sub.demo.example/web", False),
    ("demo.example", "spiffe://xdemo.example/web", False),
    ("demo.example", "spiffe://demo.example.evil/web", False),
    ("demo.example", "spiffe://evil/demo.example", False),
    ("demo.example", "spiffe://demo.example@evil/web", False),
    ("demo.example", "spiffe://evil?@demo.example/", False),
    ("demo.example", "spiffe://evil#@demo.example/", False),
    (".demo.example", "spiffe://sub.demo.example/web", True),
    (".demo.example", "spiffe://a.b.demo.example/web", True),
    (".demo.example", "spiffe://demo.example/web", False),
    (".demo.example", "spiffe://xdemo.example/web", False),
    ("td", "spiffe://td/web", True),
    ("my_domain", "spiffe://my_domain/web", True),
]


@pytest.mark.parametrize(("constraint", "uri", "within"), PERMITTED)
def test_a_uri_is_within_a_constraint_by_its_host_alone(constraint: str, uri: str, within: bool) -> None:
    """RFC 5280 section 4.2.1.10: a bare host is that host, a leading dot what is below it; permitted or excluded."""
    for permitted, found in ((True, within), (False, not within)):
        limits = uris(permitted=[constraint]) if permitted else uris(excluded=[constraint])
        root = make_ca("Root", constraints=limits)
        leaf = make_leaf(root, uri)
        if found:
            assert find_path(leaf, (), [root.certificate], NOW) == (leaf,)
        else:
            with pytest.raises(PathError, match="the name constraints of 'CN=Root'"):
                find_path(leaf, (), [root.certificate], NOW)


@pytest.mark.parametrize("host", ["a..b", "demo.example.", "..", "..demo.example"])
def test_what_has_an_empty_label_is_no_host(host: str) -> None:
    """Go refuses a certificate with such a constraint: what is below would be good for some and not for others."""
    for limits in (uris(permitted=[host]), uris(excluded=[host])):
        root = make_ca("Root", constraints=limits)
        with pytest.raises(PathError, match="must be a bare host"):
            find_path(make_leaf(root), (), [root.certificate], NOW)
    root = make_ca("Root", constraints=uris(excluded=["demo.example"]))
    with pytest.raises(PathError, match="restrict URIs by their host name"):
        find_path(make_leaf(root, f"spiffe://{host}/web"), (), [root.certificate], NOW)


def organization(*texts: str) -> x509.Name:
    kinds = (NameOID.ORGANIZATION_NAME, NameOID.ORGANIZATIONAL_UNIT_NAME)
    return x509.Name([x509.NameAttribute(kind, text) for kind, text in zip(kinds, texts, strict=False)])


OTHER_FORMS: list[tuple[x509.GeneralName, x509.GeneralName, bool]] = [
    (x509.DNSName("demo.example"), x509.DNSName("demo.example"), True),
    (x509.DNSName("demo.example"), x509.DNSName("Web.Demo.Example"), True),
    (x509.DNSName("demo.example"), x509.DNSName("xdemo.example"), False),
    (x509.DNSName(""), x509.DNSName("web.demo.example"), True),
    (x509.DNSName(".demo.example"), x509.DNSName("web.demo.example"), True),
    (x509.DNSName(".demo.example"), x509.DNSName("demo.example"), False),
    (
        x509.IPAddress(ipaddress.ip_network("10.1.0.0/16")),
        x509.IPAddress(ipaddress.ip_address("10.1.2.3")),
        True,
    ),
    (
        x509.IPAddress(ipaddress.ip_network("10.1.0.0/16")),
        x509.IPAddress(ipaddress.ip_address("10.2.2.3")),
        False,
    ),
    (
        x509.IPAddress(ipaddress.ip_network("10.1.0.0/16")),
        x509.IPAddress(ipaddress.ip_address("::10.1.2.3")),
        False,
    ),
    (x509.DirectoryName(organization("Demo")), x509.DirectoryName(organization("Demo", "Web")), True),
    (x509.DirectoryName(organization("Demo")), x509.DirectoryName(organization("  dEMO ")), True),
    (x509.DirectoryName(organization("Demo Corp")), x509.DirectoryName(organization("DEMO   corp")), True),
    (x509.DirectoryName(organization("Demo Corp")), x509.DirectoryName(organization("DemoCorp")), False),
    (x509.DirectoryName(organization("Demo", "Web")), x509.DirectoryName(organization("Demo")), False),
    (x509.DirectoryName(organization("Demo")), x509.DirectoryName(organization("Other")), False),
]


@pytest.mark.parametrize(("constraint", "other", "within"), OTHER_FORMS)
def test_names_of_other_forms_keep_to_their_constraints(
    constraint: x509.GeneralName, other: x509.GeneralName, within: bool, tmp_path: Path
) -> None:
    for limits, found in (
        (x509.NameConstraints([constraint], None), within),
        (x509.NameConstraints(None, [constraint]), not within),
    ):
        root = make_ca("Root", constraints=limits)
        leaf = make_leaf(root, names=[other])
        assert verifies(tmp_path, leaf, (), [root.certificate], NOW) == found
        if found:
            assert find_path(leaf, (), [root.certificate], NOW) == (leaf,)
        else:
            with pytest.raises(PathError, match="the name constraints of 'CN=Root'"):
                find_path(leaf, (), [root.certificate], NOW)


def test_a_leafs_own_subject_keeps_to_directory_constraints() -> None:
    limits = x509.NameConstraints([x509.DirectoryName(organization("Demo"))], None)
    root = make_ca("Root", constraints=limits)
    inside, outside = make_leaf(root, subject=organization("Demo", "Web")), make_leaf(root, subject=common_name("web"))
    assert find_path(inside, (), [root.certificate], NOW) == (inside,)
    with pytest.raises(PathError, match="permit 'O=Demo', but not 'CN=web'"):
        find_path(outside, (), [root.certificate], NOW)


def test_a_self_issued_intermediate_is_free_of_constraints_and_its_leaf_is_not() -> None:
    """RFC 5280 section 6.1.3: what joins a CA's old key and its new one does not have to keep to them."""
    limits = x509.NameConstraints(
        [x509.UniformResourceIdentifier("demo.example")], [x509.DirectoryName(common_name("Root"))]
    )
    old = make_ca("Root", constraints=limits)
    rolled = make_ca("Root", old)
    leaf = make_leaf(rolled)
    assert find_path(leaf, [rolled.certificate], [old.certificate], NOW) == (leaf, rolled.certificate)
    with pytest.raises(PathError, match=r"permit 'demo\.example'"):
        find_path(make_leaf(rolled, "spiffe://evil/web"), [rolled.certificate], [old.certificate], NOW)


def test_a_leaf_that_is_named_as_its_ca_is_not_free_of_constraints() -> None:
    """Who may choose the subject could otherwise have an identity of any trust domain."""
    root = make_ca("Root", constraints=uris(permitted=["demo.example"]))
    leaf = make_leaf(root, "spiffe://evil/web", subject=root.certificate.subject)
    with pytest.raises(PathError, match=r"permit 'demo\.example', but not 'spiffe://evil/web'"):
        find_path(leaf, (), [root.certificate], NOW)


def test_constraints_bind_the_uris_of_intermediates_too() -> None:
    root = make_ca("Root", constraints=uris(permitted=["demo.example"]))
    other = make_ca("CA", root, names=[x509.UniformResourceIdentifier("spiffe://evil.example")])
    with pytest.raises(PathError, match=r"but not 'spiffe://evil\.example'"):
        below(root, other).find()
