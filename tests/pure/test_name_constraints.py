"""Name constraints: a CA that is limited to one trust domain cannot issue identities of another."""

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

from sds_agent.pki.validation.constraints import is_host_name
from sds_agent.pki.validation.path import PathError, find_path

PERMITTED: list[tuple[str, str, bool]] = [
    ("demo.example", "spiffe://demo.example/web", True),
    ("DEMO.Example", "spiffe://demo.example/web", True),
    ("demo.example", "SPIFFE://DEMO.EXAMPLE/web", True),
    ("demo.example", "spiffe://demo.example", True),
    ("demo.example", "https://demo.example:8443/web?a#b", True),
    ("demo.example", "spiffe://sub.demo.example/web", False),
    ("demo.example", "spiffe://xdemo.example/web", False),
    ("demo.example", "spiffe://demo.example.evil/web", False),
    ("demo.example", "spiffe://evil/demo.example", False),
    ("demo.example", "spiffe://evil?@demo.example/", False),
    ("demo.example", "spiffe://evil#@demo.example/", False),
    (".demo.example", "spiffe://sub.demo.example/web", True),
    (".demo.example", "spiffe://a.b.demo.example/web", True),
    (".demo.example", "spiffe://demo.example/web", False),
    (".demo.example", "spiffe://xdemo.example/web", False),
    ("td", "spiffe://td/web", True),
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


NO_HOST_NAMES = {
    "an empty label": ["a..b", "demo.example.", "..", "..demo.example"],
    "a letter that DNS does not have": ["demo_x", "a_b.example", "a*.example", "d\u00e9mo.example"],
    "a hyphen at the end of a label": ["demo-.example", "-demo.example", "demo-", "demo.example-"],
    "a number at the end": ["12345", "demo.123", "10.0.0.1", "demo.0x1f", "demo.0x"],
    "a label of 64": [f"{'a' * 64}.example"],
}


@pytest.mark.parametrize("host", [host for hosts in NO_HOST_NAMES.values() for host in hosts if host.isascii()])
def test_a_constraint_that_is_no_dns_name_is_refused_as_envoy_does(host: str) -> None:
    """Envoy 1.40 refuses all that is below such a constraint, and any such trust domain below any constraint."""
    assert not is_host_name(host)
    for limits in (uris(permitted=[host]), uris(excluded=[host])):
        root = make_ca("Root", constraints=limits)
        with pytest.raises(PathError, match="must be a DNS name"):
            find_path(make_leaf(root), (), [root.certificate], NOW)
    root = make_ca("Root", constraints=uris(excluded=["demo.example"]))
    with pytest.raises(PathError, match="must then be a DNS name"):
        find_path(make_leaf(root, f"spiffe://{host}/web"), (), [root.certificate], NOW)
    free = make_ca("Root")
    leaf = make_leaf(free, f"spiffe://{host}/web")
    assert find_path(leaf, (), [free.certificate], NOW) == (leaf,), "without constraints it may be any"


@pytest.mark.parametrize("host", ["a", "a-b.c--d", "0x1g", "1a", "9.example", f"{'a' * 63}.example", "DEMO.example"])
def test_every_dns_name_is_a_host_under_constraints(host: str) -> None:
    assert is_host_name(host)
    root = make_ca("Root", constraints=uris(permitted=[host]))
    leaf = make_leaf(root, f"spiffe://{host.lower()}/web")
    assert find_path(leaf, (), [root.certificate], NOW) == (leaf,)


def test_a_user_part_is_no_way_round_a_constraint() -> None:
    root = make_ca("Root", constraints=uris(permitted=["demo.example"]))
    for uri in ("spiffe://demo.example@evil/web", "spiffe://evil@demo.example/web"):
        with pytest.raises(PathError, match="must then be a DNS name"):
            find_path(make_leaf(root, uri), (), [root.certificate], NOW)


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
    (x509.RFC822Name("demo.example"), x509.RFC822Name("web@DEMO.example"), True),
    (x509.RFC822Name("demo.example"), x509.RFC822Name("web@sub.demo.example"), False),
    (x509.RFC822Name(".demo.example"), x509.RFC822Name("web@sub.demo.example"), True),
    (x509.RFC822Name(".demo.example"), x509.RFC822Name("web@demo.example"), False),
    (x509.RFC822Name("web@demo.example"), x509.RFC822Name("web@demo.example"), True),
    (x509.RFC822Name("web@demo.example"), x509.RFC822Name("other@demo.example"), False),
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
