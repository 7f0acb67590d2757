"""Which of several issuers an Envoy chooses: a chain counts only where every choice that it may make is good."""

import re
from datetime import timedelta

import pytest
from cryptography import x509
from fakes.hierarchy import DAY, NOW, Ca, make_ca, make_leaf, new_key, uris
from fakes.oddities.anchors import cross_signed, intermediates, namesakes, self_issued

from sds_agent.pki.certificates import read_pem
from sds_agent.pki.validation.choice import LONGEST, MOST_CHOICES, Bundle, current
from sds_agent.pki.validation.path import PathError, find_path
from sds_agent.pki.validation.rules import Times

SECOND = timedelta(seconds=1)
CASES = {each.label: each for family in (namesakes, intermediates, cross_signed, self_issued) for each in family()}
AMBIGUOUS = {
    f"{label}, no AuthorityKeyIdentifier"
    for label in (
        "namesake: another key, longer",
        "namesake: another key, shorter",
        "namesake: another key, without identifiers",
        "namesake: another key, spelled otherwise",
        "namesake: two other keys",
        "namesake: twenty other keys",
        "another CA of its name is an anchor too",
    )
} | {
    # an anchor without SubjectKeyIdentifier is not distinguished by the AuthorityKeyIdentifier of what is below
    "namesake: another key, without identifiers",
    "new key with old, both roots, no identifiers",
}


@pytest.mark.parametrize("label", sorted(AMBIGUOUS))
def test_a_chain_for_which_an_envoy_may_choose_a_wrong_anchor_is_refused(label: str) -> None:
    """Which one it takes depends on its version and on the order and the length of the bundle."""
    case = CASES[label]
    (leaf, *above), anchors = read_pem(case.chain_pem), read_pem(case.anchors_pem)
    for order in (anchors, anchors[::-1]):
        with pytest.raises(PathError, match=r"Envoy may choose the trust anchor .* with serial number"):
            find_path(leaf, above, order, NOW)


@pytest.mark.parametrize(
    "label",
    [
        "namesake: another key, longer",
        "namesake: another key that may not sign, no AuthorityKeyIdentifier",
        "namesake: the same key, longer, no AuthorityKeyIdentifier",
        "namesake: twenty other keys",
        "two CAs of one name: other first, no AuthorityKeyIdentifier",
        "another CA of its name is an anchor too",
        "the CA is an anchor too",
        "cross-signed: to both",
        "new key with old, both roots",
        "new key with old",
    ],
)
def test_a_chain_for_which_every_choice_is_good_is_taken(label: str) -> None:
    case = CASES[label]
    (leaf, *above), anchors = read_pem(case.chain_pem), read_pem(case.anchors_pem)
    assert find_path(leaf, above, anchors, NOW)[0] == leaf


def test_an_anchor_above_an_anchor_counts_as_envoy_goes_on_to_it() -> None:
    """An intermediate that is pinned beside its root lets no peer in when the root has ended: so that is not served."""
    root = make_ca("Root", not_after=NOW - SECOND)
    pinned = make_ca("Pinned", root)
    leaf, anchors = make_leaf(pinned), (pinned.certificate, root.certificate)
    fault = Bundle(anchors).fault_of_choice((leaf,), Times(NOW, timedelta(0)))
    assert fault is not None
    assert re.search(r"may choose the trust anchor 'CN=Root' .* 'CN=Root' expired on", fault)
    assert current(anchors, NOW) == (pinned.certificate,)
    assert find_path(leaf, (), anchors, NOW) == (leaf,)


def test_the_whole_bundle_counts_not_only_what_ends_the_chain() -> None:
    root = make_ca("Root")
    pinned = make_ca("CA", root)
    other = make_ca("CA", identified=False).certificate
    leaf = make_leaf(pinned)
    assert find_path(leaf, [pinned.certificate], [root.certificate], NOW) == (leaf, pinned.certificate)
    with pytest.raises(PathError, match="may choose the trust anchor 'CN=CA'"):
        find_path(leaf, [pinned.certificate], [root.certificate], NOW, bundle=[root.certificate, other])


@pytest.mark.parametrize(
    ("label", "words"),
    [
        ("new key with old, no identifiers", "may choose the trust anchor 'CN=Demo Root'"),
        ("new key with old, not saying which", "Envoy takes 'CN=Demo Root' for self-signed"),
    ],
)
def test_the_agent_refuses_a_link_certificate_without_identifiers_as_envoy_does(label: str, words: str) -> None:
    """Envoy takes such a certificate for a root, and goes no further up."""
    case = CASES[label]
    (leaf, *above), anchors = read_pem(case.chain_pem), read_pem(case.anchors_pem)
    with pytest.raises(PathError, match=words):
        find_path(leaf, above, anchors, NOW)


def test_too_many_copies_of_one_anchor_are_given_up_soon() -> None:
    key = new_key()
    copies = [make_ca("Root", key=key) for _ in range(MOST_CHOICES + 1)]
    leaf = make_leaf(copies[0])
    anchors = [each.certificate for each in copies]
    assert find_path(leaf, (), anchors[1:], NOW) == (leaf,)
    with pytest.raises(PathError, match="more than 64 chains can be built"):
        find_path(leaf, (), anchors, NOW)


def test_a_way_through_all_anchors_is_given_up_soon() -> None:
    """CAs that issued each other: to follow all of a thousand would take minutes, and end with no verdict."""
    keys = new_key(), new_key()
    names = "One", "Two"
    ends = [make_ca(name, key=key, identified=False) for name, key in zip(names, keys, strict=True)]
    made = [
        make_ca(names[number % 2], ends[1 - number % 2], key=keys[number % 2], identified=False).certificate
        for number in range(2 * LONGEST)
    ]
    with pytest.raises(PathError, match=f"a chain of {LONGEST} certificates and more can be built"):
        find_path(make_leaf(ends[0]), (), made, NOW)


@pytest.mark.parametrize("label", sorted(AMBIGUOUS))
def test_a_chain_that_no_envoy_verifies_may_have_several_roots_of_one_name(label: str) -> None:
    """A CA that verifies its callers' certificates finds the root that signed."""
    case = CASES[label]
    (leaf, *above), anchors = read_pem(case.chain_pem), read_pem(case.anchors_pem)
    assert find_path(leaf, above, anchors, NOW, envoys=False)[0] == leaf


def test_a_policy_that_is_demanded_counts_for_everybody() -> None:
    root = make_ca("Root")
    ca = make_ca("CA", root, extra=[(x509.PolicyConstraints(0, None), False)])
    with pytest.raises(PathError, match="demands a certificate policy"):
        find_path(make_leaf(ca), [ca.certificate], [root.certificate], NOW, envoys=False)


def test_a_circle_of_anchors_is_left() -> None:
    first, second = make_ca("First"), make_ca("Second")
    circle = [make_ca("First", second, key=first.key), make_ca("Second", first, key=second.key)]
    leaf = make_leaf(first)
    assert find_path(leaf, (), [each.certificate for each in circle], NOW) == (leaf,)


# --- what of the anchors is served ---


def ends(*anchors: Ca) -> list[timedelta]:
    return [each.not_valid_after_utc - NOW for each in current([anchor.certificate for anchor in anchors], NOW)]


def test_expired_anchors_are_left_out_as_envoy_may_choose_them() -> None:
    key = new_key()
    copies = [make_ca("Root", key=key, not_after=NOW + days * DAY) for days in (1, -1, 2)]
    assert ends(*copies, make_ca("Other", not_after=NOW)) == [DAY, 2 * DAY]


def test_a_bundle_is_never_emptied() -> None:
    """Envoy refuses a secret without anchors, and it may be this machine's clock that is wrong."""
    assert ends(make_ca("Root", not_after=NOW - DAY)) == [-DAY]


def test_a_copy_that_is_not_valid_yet_waits_for_its_time_and_another_root_is_there_ahead_of_it() -> None:
    key = new_key()
    valid, early = make_ca("Root", key=key), make_ca("Root", key=key, not_before=NOW + SECOND, not_after=NOW + 2 * DAY)
    other = make_ca("Root", not_before=NOW + SECOND, not_after=NOW + 3 * DAY)
    assert ends(valid, early, other) == [DAY, 3 * DAY]
    assert ends(early, other) == [2 * DAY, 3 * DAY]
    assert list(current([early.certificate], NOW + SECOND)) == [early.certificate]


def test_the_constraints_of_an_anchor_above_an_anchor_bind() -> None:
    root = make_ca("Root", constraints=uris(permitted=["other.example"]))
    pinned = make_ca("Pinned", root)
    with pytest.raises(PathError, match=r"name constraints of 'CN=Root' permit 'other\.example'"):
        find_path(make_leaf(pinned), (), [pinned.certificate, root.certificate], NOW)
