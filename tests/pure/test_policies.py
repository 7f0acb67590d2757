"""Certificate policies: a chain fails for them only where one is demanded that does not hold, as for Envoy."""

from datetime import UTC, datetime

import pytest
from fakes import der
from fakes.judge import Case
from fakes.oddities.limits import certificate_policies

from sds_agent.pki.certificates import CertificateError, read_pem
from sds_agent.pki.validation.path import PathError, find_path
from sds_agent.pki.validation.policies import fault_of_policies

NOW = datetime(2026, 3, 14, tzinfo=UTC)
CASES = {each.label: each for each in certificate_policies()}

# Who demands, and with whom no policy holds any more.
LACKING = {
    "a policy is demanded: none anywhere": ("Demo Upper", "Demo CA"),
    "a policy is demanded: not critical": ("Demo Upper", "Demo CA"),
    "a policy is demanded: not in the leaf": ("Demo Upper", "web"),
    "a policy is demanded: not in the lower": ("Demo Upper", "Demo CA"),
    "a policy is demanded: another in the leaf": ("Demo Upper", "web"),
    "a policy is demanded: after 1": ("Demo Upper", "web"),
    "a policy is demanded: after 2": ("Demo Upper", "web"),
    "a policy is demanded: after 3, and by the lower at once": ("Demo CA", "web"),
    "a policy is demanded: by the lower, not in the leaf": ("Demo CA", "web"),
    "a policy is demanded: by the lower, not in the upper": ("Demo CA", "web"),
    "a policy is demanded: by the leaf": ("web", "web"),
    "anyPolicy: inhibited": ("Demo Upper", "Demo CA"),
    "anyPolicy: inhibited after 1": ("Demo Upper", "web"),
    "policies mapped: the unmapped below": ("Demo Upper", "Demo CA"),
    "policies mapped: inhibited below": ("Demo Upper", "web"),
    "policies mapped: inhibited below, the unmapped": ("Demo Upper", "web"),
}
MALFORMED = {
    "policies mapped: to any": "maps no certificate policy, or the one that stands for all",
    "policies mapped: from any": "maps no certificate policy, or the one that stands for all",
    "policies mapped: empty": "maps no certificate policy, or the one that stands for all",
    "list of policies: empty": "lists a certificate policy twice, or none at all",
    "list of policies: empty in the leaf": "lists a certificate policy twice, or none at all",
    "list of policies: one twice": "lists a certificate policy twice, or none at all",
    "list of policies: one twice in the leaf": "lists a certificate policy twice, or none at all",
}


def walked(each: Case) -> None:
    (leaf, *above), anchors = read_pem(each.chain_pem), read_pem(each.anchors_pem)
    assert find_path(leaf, above, anchors, NOW) == (leaf, *above)


@pytest.mark.parametrize("label", LACKING)
def test_a_chain_without_the_policy_that_is_demanded_is_refused(label: str) -> None:
    demanding, lacking = LACKING[label]
    words = f"'CN={demanding}' demands a certificate policy that holds .* and with 'CN={lacking}' none does"
    with pytest.raises(PathError, match=words):
        walked(CASES[label])


@pytest.mark.parametrize("label", MALFORMED)
def test_policies_that_break_their_own_rules_are_refused(label: str) -> None:
    with pytest.raises(PathError, match=MALFORMED[label]):
        walked(CASES[label])


@pytest.mark.parametrize("label", [label for label in CASES if label not in LACKING | MALFORMED])
def test_every_other_chain_is_taken_whatever_is_critical(label: str) -> None:
    try:
        walked(CASES[label])
    except CertificateError:  # an extension that cannot be read: not a matter of policies
        assert any(word in label for word in ("of nothing", "negative", "2**70", "-1", "qualifier", "notice", "CPS"))


def test_policy_mappings_that_are_damaged_are_refused() -> None:
    one, cut = der.oid("1.2.3"), der.tlv(0x06, b"\x2a\x83")
    for content in (der.NULL, der.sequence(one), der.sequence(one, cut), der.sequence(one, der.tlv(0x06)), b"\x30\x05"):
        value = der.sequence(content)
        damaged = der.extension(der.POLICY_MAPPINGS, value)
        upper, ca, leaf = (der.entity(text) for text in ("upper", "ca", "leaf"))
        chain = [
            der.certificate(leaf, ca, extensions=der.leaf_extensions(leaf, ca, "spiffe://demo.example/web")),
            der.certificate(ca, upper, extensions=der.ca_extensions(ca, upper, damaged)),
            der.certificate(upper),
        ]
        below, issuer, anchor = map(der.loaded, chain)
        with pytest.raises(PathError, match="'CN=ca' has PolicyMappings that are damaged"):
            find_path(below, [issuer], [anchor], NOW)


@pytest.mark.parametrize("policy", ["1.2.3.4", "2.5.29.32.1", "2.999.3", "1.3.6.1.4.1.311.21.8.1234567.7654321"])
def test_policies_of_every_length_are_mapped(policy: str) -> None:
    mapped = (der.policy_constraints(0), der.policy_mappings(("1.2.3", policy)), der.policies("1.2.3"))
    upper, ca, leaf = (der.entity(text) for text in ("upper", "ca", "leaf"))
    below = der.leaf_extensions(leaf, ca, "spiffe://demo.example/web", der.policies(policy))
    chain = [
        der.certificate(leaf, ca, extensions=below),
        der.certificate(ca, upper, extensions=der.ca_extensions(ca, upper, *mapped)),
        der.certificate(upper),
    ]
    first, issuer, anchor = map(der.loaded, chain)
    assert find_path(first, [issuer], [anchor], NOW) == (first, issuer)


ROOT, FIRST, UPPER, LOWER, LAST, LEAF = (
    der.entity(text) for text in ("root", "first", "upper", "lower", "last", "leaf")
)
ONE, OTHER = "1.2.3", "1.2.4"


def fault(*below: tuple[der.Entity, tuple[bytes, ...]]) -> str | None:
    """Of a chain below the root: each CA, then the leaf, with its extensions."""
    path, issuer = [der.certificate(ROOT)], ROOT
    for own, extensions in below:
        path.insert(0, der.certificate(own, issuer, extensions=extensions))
        issuer = own
    return fault_of_policies(tuple(map(der.loaded, path)))


@pytest.mark.parametrize(
    ("upper", "lower", "last", "leaf"),
    [
        (der.inhibit_any_policy(0), der.inhibit_any_policy(5), (), der.ANY_POLICY),
        (
            der.policy_constraints(None, 0),
            der.policy_constraints(None, 5),
            (der.policy_mappings((ONE, OTHER)),),
            OTHER,
        ),
    ],
    ids=["anyPolicy", "mappings"],
)
def test_a_lower_ca_cannot_allow_again_what_an_upper_one_rules_out(
    upper: bytes, lower: bytes, last: tuple[bytes, ...], leaf: str
) -> None:
    one, demand = der.policies(ONE), der.policy_constraints(0)
    cas = ((FIRST, (one, demand)), (UPPER, (one, upper)), (LOWER, (one, lower)), (LAST, (one, *last)))
    found = fault(*cas, (LEAF, (der.policies(leaf),)))
    assert found is not None
    assert "with 'CN=leaf' none does" in found
    assert fault(*cas, (LEAF, (one,))) is None or last


def test_a_lower_ca_cannot_put_off_a_demand() -> None:
    demand, later = der.policy_constraints(0), der.policy_constraints(5)
    found = fault((UPPER, (der.policies(ONE), demand)), (LOWER, (der.policies(ONE), later)), (LEAF, ()))
    assert found is not None
    assert found.startswith("'CN=upper' demands a certificate policy")


def test_a_ca_that_certifies_its_next_key_may_do_so_for_any_policy() -> None:
    """RFC 5280 section 6.1.3, step d.2, and BoringSSL: such a certificate is no step down."""
    renewed = der.Entity(UPPER.name, LOWER.key)
    upper = (UPPER, (der.policies(ONE), der.policy_constraints(0), der.inhibit_any_policy(0)))
    leaf = (LEAF, (der.policies(ONE),))
    assert fault(upper, (renewed, (der.policies(der.ANY_POLICY),)), leaf) is None
    assert fault(upper, (LOWER, (der.policies(der.ANY_POLICY),)), leaf) is not None
