"""When a chain is taken: a certificate that is given out too early, or past its CA's end, fails every handshake."""

from datetime import timedelta

import pytest
from fakes.hierarchy import DAY, HOUR, NOW, make_ca, make_leaf, new_key

from sds_agent.issuance.validity import SKEW, validity

MINUTE = timedelta(minutes=1)
ROOT = make_ca("root")
LOWER = make_ca("lower", ROOT)
LEAF = make_leaf(LOWER)
CHAIN = (LEAF, LOWER.certificate)


def test_a_chain_is_valid_from_its_latest_begin_to_its_earliest_end() -> None:
    found = validity(CHAIN, [ROOT.certificate], NOW)
    assert found is not None
    assert (found.begin, found.end, found.ends_with) == (NOW - HOUR, NOW + HOUR, LEAF)


@pytest.mark.parametrize("late", ["leaf", "intermediate", "anchor"])
def test_the_agent_waits_for_the_certificate_that_begins_last(late: str) -> None:
    """Envoy checks the validity of each certificate, the root's too."""
    begin = NOW + SKEW / 2
    root = make_ca("root", not_before=begin if late == "anchor" else NOW - DAY)
    lower = make_ca("lower", root, not_before=begin if late == "intermediate" else NOW - DAY)
    leaf = make_leaf(lower, not_before=begin if late == "leaf" else NOW - HOUR)
    found = validity((leaf, lower.certificate), [root.certificate], NOW)
    assert found is not None
    assert found.begin == begin


@pytest.mark.parametrize("short", ["intermediate", "anchor"])
def test_a_ca_that_ends_before_what_is_below_it_ends_it(short: str) -> None:
    root = make_ca("root", not_after=NOW + MINUTE if short == "anchor" else NOW + DAY)
    lower = make_ca("lower", root, not_after=NOW + MINUTE if short == "intermediate" else NOW + DAY)
    found = validity((make_leaf(lower), lower.certificate), [root.certificate], NOW)
    assert found is not None
    assert found.end == NOW + MINUTE
    assert found.ends_with == (root if short == "anchor" else lower).certificate


def test_a_leaf_that_was_fitted_to_its_cas_end_is_ended_by_the_ca() -> None:
    root = make_ca("root", not_after=NOW + HOUR)
    found = validity((make_leaf(root),), [root.certificate], NOW)
    assert found is not None
    assert found.ends_with == root.certificate


def test_of_several_anchors_the_one_that_vouches_longest_counts() -> None:
    """A root and its renewal, and one that signed the same intermediate; others, of whatever name, do not."""
    key = new_key()
    old, renewed = (make_ca("root", key=key, not_after=NOW + end) for end in (MINUTE, 2 * MINUTE))
    namesake = make_ca("root", not_after=NOW + DAY)
    leaf = make_leaf(old)
    for anchors in ([old, renewed, namesake], [namesake, renewed, old]):
        found = validity((leaf,), [anchor.certificate for anchor in anchors], NOW)
        assert found is not None
        assert (found.end, found.ends_with) == (NOW + 2 * MINUTE, renewed.certificate)


def test_a_renewed_root_that_begins_in_a_moment_lengthens_what_the_old_one_has_begun() -> None:
    key = new_key()
    old = make_ca("root", key=key, not_after=NOW + 2 * MINUTE)
    renewed = make_ca("root", key=key, not_before=NOW + SKEW / 2)
    found = validity((make_leaf(old),), [old.certificate, renewed.certificate], NOW)
    assert found is not None
    assert (found.begin, found.end) == (NOW - HOUR, NOW + HOUR)


@pytest.mark.parametrize(
    ("old_end", "end"), [(SKEW / 4, SKEW / 4), (SKEW / 2, HOUR)], ids=["a pause", "at the same moment"]
)
def test_a_pause_between_two_anchors_is_an_end(old_end: timedelta, end: timedelta) -> None:
    key = new_key()
    old = make_ca("root", key=key, not_after=NOW + old_end)
    renewed = make_ca("root", key=key, not_before=NOW + SKEW / 2)
    found = validity((make_leaf(old),), [old.certificate, renewed.certificate], NOW)
    assert found is not None
    assert (found.begin, found.end) == (NOW - HOUR, NOW + end)


def test_a_pinned_intermediate_outlives_its_root_for_those_who_have_it() -> None:
    root = make_ca("root", not_after=NOW + MINUTE)
    lower = make_ca("lower", root)
    found = validity((make_leaf(lower), lower.certificate), [root.certificate, lower.certificate], NOW)
    assert found is not None
    assert found.end == NOW + HOUR


def test_below_no_anchor_there_is_no_time() -> None:
    expired = make_ca("root", key=ROOT.key, not_after=NOW - MINUTE).certificate
    for anchors in ([], [make_ca("root").certificate], [expired], [LEAF]):
        assert validity(CHAIN, anchors, NOW) is None
