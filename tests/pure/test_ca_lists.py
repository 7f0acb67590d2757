"""Revocation lists as they come and go: nothing that was revoked ceases to be, because a file was lost or put back."""

from collections.abc import Iterable
from datetime import datetime, timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from fakes.hierarchy import DAY, HOUR, NOW, Ca, make_ca

from sds_agent.ca.lists import SETTLE, ListsInForce, Note, Notice, is_older
from sds_agent.pki.validation.revocation import RevocationList

ROOT = make_ca("root")
NAMESAKE = make_ca("root")
OTHER = make_ca("other")
STRANGER = make_ca("stranger")
"""A CA whose certificate is not there, so that only the key's identifier shows who signed its lists."""
START = timedelta(0)
"""A time of a clock that nobody sets."""
KNOWN = tuple(ca.certificate for ca in (ROOT, NAMESAKE, OTHER))


def crl(
    issuer: Ca = ROOT,
    number: int | None = None,
    *,
    at: datetime = NOW,
    base: int | None = None,
    scope: str | None = None,
    key_identifier: bytes | None = None,
) -> RevocationList:
    """A list; with `base` a delta to the list of that number, with `scope` one for that distribution point alone."""
    builder = x509.CertificateRevocationListBuilder(issuer.certificate.subject, at, at + DAY)
    if number is not None:
        builder = builder.add_extension(x509.CRLNumber(number), critical=False)
    if base is not None:
        builder = builder.add_extension(x509.DeltaCRLIndicator(base), critical=True)
    if scope is not None:
        point = x509.IssuingDistributionPoint([x509.DNSName(scope)], None, False, False, None, False, False)
        builder = builder.add_extension(point, critical=True)
    if key_identifier is not None:
        builder = builder.add_extension(x509.AuthorityKeyIdentifier(key_identifier, None, None), critical=False)
    return builder.sign(issuer.key, hashes.SHA256())


def after(*steps: Iterable[RevocationList]) -> tuple[ListsInForce, list[Notice]]:
    """What is in force after these were found one after the other, and the notices on the last."""
    in_force, notes = ListsInForce(), tuple[Note, ...]()
    for found in steps:
        in_force, notes = in_force.with_found(found, KNOWN, START)
    return in_force, [note.notice for note in notes]


def test_a_list_that_is_gone_counts_for_an_hour_and_both_ends_are_reported() -> None:
    lost = crl()
    in_force, notices = after([lost], [])
    assert (in_force.lists, notices) == ((lost,), [Notice.GONE])
    in_force, notes = in_force.with_found([crl(OTHER)], KNOWN, START + HOUR / 2)
    assert notes == (), "the loss is reported once"
    in_force, notes = in_force.at(START + SETTLE - timedelta(seconds=1))
    assert lost in in_force.lists
    assert notes == ()
    in_force, notes = in_force.at(START + SETTLE)
    assert lost not in in_force.lists
    assert [note.notice for note in notes] == [Notice.DROPPED]


def test_a_list_that_comes_back_is_there_as_if_it_had_never_been_gone() -> None:
    lost = crl()
    in_force, notices = after([lost], [], [lost])
    assert (in_force, notices) == (ListsInForce((lost,)), [])


@pytest.mark.parametrize(
    ("newer", "older"),
    [
        (crl(number=7), crl(number=6)),
        (crl(number=7), crl(number=7, at=NOW - HOUR)),
        (crl(number=7), crl(number=6, at=NOW - HOUR)),
        (crl(), crl(at=NOW - HOUR)),
        (crl(number=7), crl(at=NOW - HOUR)),
    ],
    ids=["by number", "by date", "by both", "without numbers", "with a number against none"],
)
def test_an_older_list_takes_the_place_of_no_newer_one(newer: RevocationList, older: RevocationList) -> None:
    """A backup that is played back, or an old copy, would let in again the callers that the newer one shuts out."""
    assert after([older], [newer]) == (ListsInForce((newer,)), [])
    assert after([newer], [older]) == (ListsInForce((newer,)), [Notice.OLDER])
    assert after([newer], [older], [older]) == (ListsInForce((newer,)), [Notice.OLDER])
    assert after([newer], [], [older]) == (ListsInForce((newer,)), [Notice.OLDER]), "nor by way of an empty place"
    assert is_older(older, newer)
    assert not is_older(newer, older)


@pytest.mark.parametrize("after_that", [crl(number=1, at=NOW + HOUR), crl(number=8, at=NOW - HOUR)])
def test_numbers_that_began_anew_and_a_clock_that_was_set_back_keep_no_list_out(after_that: RevocationList) -> None:
    assert after([crl(number=7)], [after_that]) == (ListsInForce((after_that,)), [])


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (crl(ROOT), crl(NAMESAKE, at=NOW + HOUR)),
        (crl(scope="a"), crl(scope="b", at=NOW + HOUR)),
        (crl(number=7), crl(number=8, base=7, at=NOW + HOUR)),
        (crl(), crl(OTHER, at=NOW + HOUR)),
        (crl(STRANGER, key_identifier=b"1"), crl(STRANGER, key_identifier=b"2", at=NOW + HOUR)),
        (crl(STRANGER), crl(make_ca("other stranger"), at=NOW + HOUR)),
    ],
    ids=[
        "a key of the same name",
        "another scope",
        "a delta",
        "another issuer",
        "another key that is not there",
        "another issuer that is not there",
    ],
)
def test_a_list_of_another_line_is_no_successor(one: RevocationList, other: RevocationList) -> None:
    """The new list does not repeat what the first one revokes: without the first, the CA would accept that again."""
    in_force, notices = after([one, other], [other])
    assert (set(map(id, in_force.lists)), notices) == ({id(other), id(one)}, [Notice.GONE])
    assert after([other, one], [one])[1] == [Notice.GONE]


def test_a_delta_that_a_complete_list_includes_may_go() -> None:
    base, delta, included = crl(number=7), crl(number=8, base=7), crl(number=9)
    assert after([base, delta], [included]) == (ListsInForce((included,)), [])
    assert after([base, delta], [base])[1] == [Notice.GONE]


def test_a_complete_list_of_the_same_number_includes_a_delta() -> None:
    """A CA that issues both at one time gives them one number (RFC 5280 section 5.2.3)."""
    base, delta, included = crl(number=7), crl(number=8, base=7), crl(number=8)
    assert after([base, delta], [included]) == (ListsInForce((included,)), [])


@pytest.mark.parametrize(
    "other",
    [crl(OTHER, 9), crl(NAMESAKE, 9), crl(number=9, scope="a")],
    ids=["another issuer", "a key of the same name", "another scope"],
)
def test_a_complete_list_of_another_line_includes_no_delta(other: RevocationList) -> None:
    """What the delta revokes is not in it, whatever its number is."""
    delta = crl(number=8, base=7)
    in_force, notices = after([delta], [other])
    assert (in_force.lists, notices) == ((other, delta), [Notice.GONE])


def test_a_delta_without_a_number_is_in_no_complete_list() -> None:
    """RFC 5280 wants one in every list; without it nothing shows which list includes the delta."""
    delta, complete = crl(base=7), crl(number=9)
    in_force, notices = after([delta], [complete])
    assert (in_force.lists, notices) == ((complete, delta), [Notice.GONE])


def test_one_list_takes_the_place_of_another_whose_signer_is_not_there() -> None:
    older, newer = (crl(STRANGER, key_identifier=b"1", at=at) for at in (NOW, NOW + HOUR))
    assert after([older], [newer]) == (ListsInForce((newer,)), [])
    assert after([newer], [older]) == (ListsInForce((newer,)), [Notice.OLDER])


def test_a_newer_list_is_taken_though_an_older_one_lies_beside_it() -> None:
    first, second, third = (crl(number=n, at=NOW + timedelta(hours=n)) for n in (1, 2, 3))
    assert after([second], [first, third]) == (ListsInForce((first, third)), [])


def test_two_lists_of_one_line_side_by_side_count_both_until_a_newer_one_comes() -> None:
    first, second, third = (crl(number=n, at=NOW + timedelta(hours=n)) for n in (1, 2, 3))
    assert after([first], [first, second]) == (ListsInForce((first, second)), [])
    assert after([first, second], [third]) == (ListsInForce((third,)), [])
    assert after([first, second], [first]) == (ListsInForce((second,)), [Notice.OLDER])
