"""Certificate policies: a chain fails for them only where one is demanded that does not hold, as for Envoy."""

from datetime import UTC, datetime

import pytest
from fakes import der
from fakes.judge import Case
from fakes.oddities.limits import certificate_policies

from sds_agent.pki.certificates import CertificateError, read_pem
from sds_agent.pki.path import PathError, find_path

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


@pytest.mark.parametrize("policy", ["1.2.3.4", "2.5.29.32.1", "1.3.6.1.4.1.311.21.8.1234567.7654321"])
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
