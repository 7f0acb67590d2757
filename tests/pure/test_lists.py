"""Which revocation lists go out: all that Envoys need, or none, since a missing one has every peer of a CA refused."""

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.hashes import SHA224
from cryptography.hazmat.primitives.serialization import Encoding
from fakes.der import CRL_NUMBER, Entity, common_name, extension, integer, oid, revocation_list, revoked, sequence, time
from fakes.hierarchy import DAY, HOUR, NOW, UNKNOWN, Ca, key_usage, make_ca, make_crl, make_leaf, new_key

from sds_agent.issuance.lists import (
    MOST_LISTS,
    Choice,
    KnownCas,
    PublishedList,
    choose,
    published,
    read_lists,
)
from sds_agent.pki.validation.revocation import RevocationListError, read_crls

ROOT = make_ca("root")
SIGNER = make_ca("signer", ROOT)
LEAF = make_leaf(SIGNER)
IN_USE = KnownCas((ROOT.certificate,), ((LEAF, SIGNER.certificate),))
POINT = x509.UniformResourceIdentifier("https://ca.example/1.0/crl")


def point_of(*names: x509.GeneralName, **changed: Any) -> x509.CRLDistributionPoints:
    given: dict[str, Any] = {"full_name": names, "relative_name": None, "reasons": None, "crl_issuer": None}
    return x509.CRLDistributionPoints([x509.DistributionPoint(**{**given, **changed})])


def scope(**changed: Any) -> x509.IssuingDistributionPoint:
    given: dict[str, Any] = {
        "full_name": None,
        "relative_name": None,
        "only_contains_user_certs": False,
        "only_contains_ca_certs": False,
        "only_some_reasons": None,
        "indirect_crl": False,
        "only_contains_attribute_certs": False,
    }
    return x509.IssuingDistributionPoint(**{**given, **changed})


def identifier(ca: Ca) -> x509.AuthorityKeyIdentifier:
    return x509.AuthorityKeyIdentifier.from_issuer_public_key(ca.key.public_key())


def listed(ca: Ca = SIGNER, *revoked: x509.Certificate | int, **changed: Any) -> PublishedList:
    return published(make_crl(ca, *revoked, **changed))


def chosen(
    *latest: PublishedList,
    earlier: Sequence[PublishedList] = (),
    known: KnownCas = IN_USE,
    now: datetime = NOW,
) -> Choice:
    return choose(latest, earlier, known, now)


def served(choice: Choice) -> set[bytes]:
    """The lists that go out, in DER."""
    return {each.public_bytes(Encoding.DER) for each in read_crls(choice.pem)}


def der(*lists: PublishedList) -> set[bytes]:
    return {each.crl.public_bytes(Encoding.DER) for each in lists}


def test_the_list_of_the_cas_own_certificates_goes_out() -> None:
    crl = listed(SIGNER, LEAF)
    choice = chosen(crl)
    assert served(choice) == der(crl)
    assert (choice.off, choice.left_out) == ((), ())


def test_the_root_needs_no_list_where_an_intermediate_issues() -> None:
    """Most CAs publish none of their root."""
    assert not chosen(listed()).off


def test_a_root_that_issues_needs_its_own_list() -> None:
    known = KnownCas((ROOT.certificate,), ((make_leaf(ROOT),),))
    assert "'CN=root', which issues" in chosen(known=known).off[0]
    assert not chosen(listed(ROOT), known=known).off


def test_without_a_list_of_a_ca_that_issues_none_goes_out() -> None:
    other = make_ca("other", ROOT)
    known = KnownCas(IN_USE.anchors, (*IN_USE.chains, (make_leaf(other), other.certificate)))
    choice = chosen(listed(), known=known)
    assert choice.pem == b""
    assert "no usable revocation list of 'CN=other', which issues certificates" in choice.off[0]
    assert not chosen(listed(), listed(other), known=known).off


def test_a_certificate_that_is_valid_later_has_its_cas_list_asked_for_now() -> None:
    """It is served as soon as it is valid."""
    other = make_ca("other", ROOT)
    coming = make_leaf(other, not_before=NOW + HOUR / 2)
    known = KnownCas(IN_USE.anchors, (*IN_USE.chains, (coming, other.certificate)))
    assert "'CN=other', which issues" in chosen(listed(), known=known).off[0]


def test_an_anchor_without_any_list_below_it_takes_all_lists_out() -> None:
    """Peers below it would be refused: Envoys would look for a list of theirs."""
    another = make_ca("another root")
    known = KnownCas((ROOT.certificate, another.certificate), IN_USE.chains)
    choice = chosen(listed(), known=known)
    assert choice.pem == b""
    assert "below the trust anchor 'CN=another root' no CA with a revocation list is known" in choice.off[0]


def test_the_new_cas_list_goes_out_together_with_its_anchor() -> None:
    """In a rotation that the CA tells: before its first certificate is known here."""
    root = make_ca("root 2")
    signer = make_ca("signer 2", root)
    old, new = listed(), listed(signer)
    known = KnownCas((ROOT.certificate, root.certificate), IN_USE.chains, advertised=(signer.certificate,))
    assert chosen(old, known=known).pem == b""
    assert served(chosen(old, new, known=known)) == der(old, new)


def test_the_former_cas_list_stays_while_its_certificates_are_in_use() -> None:
    """A CA that has a new intermediate publishes that one's list alone."""
    signer = make_ca("signer 2", ROOT)
    known = KnownCas(IN_USE.anchors, ((make_leaf(signer), signer.certificate),), former=(SIGNER.certificate,))
    old, new = listed(), listed(signer)
    assert served(chosen(new, earlier=[old], known=known)) == der(old, new)
    assert "'CN=signer', which issues" in chosen(new, known=known).off[0]


def test_a_former_ca_of_a_removed_root_asks_for_nothing() -> None:
    gone = make_ca("gone")
    known = KnownCas(IN_USE.anchors, IN_USE.chains, former=(make_ca("old", gone).certificate,))
    assert not chosen(listed(), known=known).off


def test_a_list_of_a_ca_that_is_not_known_takes_all_out() -> None:
    """That CA issues for others already, and they would be refused."""
    assert "by a CA whose certificate is not known here" in chosen(listed(), listed(make_ca("new", ROOT))).off[0]


def test_an_earlier_list_of_a_ca_that_is_gone_is_dropped() -> None:
    assert not chosen(listed(), earlier=[listed(make_ca("gone"))]).off


def test_a_list_by_another_key_is_no_list() -> None:
    choice = chosen(listed(key=new_key()))
    assert choice.pem == b""
    assert "signed by another key than that CA's" in choice.off[0]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"extra": [(UNKNOWN, True)]}, "has the critical extension 1.2.3.4.5"),
        ({"extra": [(x509.CRLNumber(1), True)]}, "has the critical extension 2.5.29.20"),
        ({"extra": [(x509.DeltaCRLIndicator(1), True)]}, "is a delta list"),
        ({"extra": [(x509.DeltaCRLIndicator(1), False)]}, "is a delta list"),
        ({"extra": [(scope(indirect_crl=True), True)]}, "is indirect"),
        ({"extra": [(scope(only_contains_ca_certs=True), True)]}, "is for CA certificates alone"),
        ({"extra": [(scope(only_contains_attribute_certs=True), True)]}, "is for attribute certificates alone"),
        (
            {"extra": [(scope(only_some_reasons=frozenset([x509.ReasonFlags.key_compromise])), True)]},
            "is for some reasons alone",
        ),
        ({"extra": [(scope(full_name=[POINT]), True)]}, "is for certificates with the distribution point"),
        (
            {"extra": [(identifier(ROOT), False)]},
            "asks by its AuthorityKeyIdentifier for another certificate of its CA",
        ),
        ({"digest": SHA224()}, "is signed with a digest that Envoys may refuse"),
        ({"last_update": NOW + HOUR}, "is valid only from"),
        ({"next_update": NOW - timedelta(seconds=1)}, "ends on 2026-03-14 15:09:25 UTC and was not replaced"),
        ({"next_update": NOW + timedelta(seconds=30)}, "ends on 2026-03-14 15:09:56 UTC and was not replaced"),
    ],
)
def test_a_list_for_which_envoys_refuse_everybody_does_not_go_out(changed: dict[str, Any], words: str) -> None:
    choice = chosen(listed(**changed))
    assert choice.pem == b""
    assert words in choice.left_out[0]
    assert choice.left_out[0].startswith("the revocation list of 'CN=signer' ")
    assert "no usable revocation list of 'CN=signer'" in choice.off[0]


def test_a_list_names_each_certificate_of_its_ca_that_peers_may_send() -> None:
    """Envoy wants the list's AuthorityKeyIdentifier to fit the certificate in the chain."""
    renewed = make_ca("signer", ROOT, key=SIGNER.key)
    issuer = [x509.DirectoryName(ROOT.certificate.subject)]
    numbered = x509.AuthorityKeyIdentifier(None, issuer, renewed.certificate.serial_number)
    crl = listed(extra=[(numbered, False)])
    chains = ((make_leaf(renewed), renewed.certificate),)
    assert served(chosen(crl, known=KnownCas(IN_USE.anchors, chains))) == der(crl)
    both = KnownCas(IN_USE.anchors, chains, former=(SIGNER.certificate,))
    assert "than is in use, by the serial number" in chosen(crl, known=both).left_out[0]
    ended = make_ca("signer", ROOT, key=SIGNER.key, not_after=NOW)
    gone = KnownCas(IN_USE.anchors, chains, former=(ended.certificate,))
    assert served(chosen(crl, known=gone)) == der(crl), "no peer is accepted with that one"


def test_an_anchor_comes_before_what_a_peer_sends_of_the_lists_ca() -> None:
    """As where a root was certified by an older one: Envoy never takes that certificate then."""
    older = make_ca("older")
    cross = make_ca("root", older, key=ROOT.key, usage=key_usage(cert_sign=True, crl_sign=False))

    def numbered(ca: Ca) -> x509.AuthorityKeyIdentifier:
        issuer = [x509.DirectoryName(ca.certificate.issuer)]
        return x509.AuthorityKeyIdentifier(None, issuer, ca.certificate.serial_number)

    crl = listed(ROOT, extra=[(numbered(ROOT), False)])
    leaf, anchors = make_leaf(ROOT), (ROOT.certificate, older.certificate)
    chains = ((leaf, cross.certificate),)
    assert served(chosen(crl, known=KnownCas(anchors, chains))) == der(crl)
    assert "without cRLSign" in chosen(crl, known=KnownCas(anchors[1:], chains)).left_out[0]
    signing = make_ca("root", older, key=ROOT.key)
    of_cross = KnownCas(anchors, ((leaf, signing.certificate),))
    by_cross = listed(ROOT, extra=[(numbered(signing), False)])
    assert "by the serial number" in chosen(by_cross, known=of_cross).left_out[0]
    assert "by the serial number" in chosen(crl, known=KnownCas(anchors[1:], of_cross.chains)).left_out[0]


def test_a_list_of_version_1_has_no_extensions() -> None:
    """An Envoy rejects the whole bundle for one that has."""
    signer = Entity(common_name("signer"), SIGNER.key)  # type: ignore[arg-type]  # an EC key
    bare = revocation_list(signer, [revoked(7)], version=b"", next_update=time(NOW + DAY))
    number = extension(CRL_NUMBER, integer(1))
    assert not chosen(*read_lists([bare])).off
    for odd in (
        revocation_list(signer, [revoked(7)], [number], version=b"", next_update=time(NOW + DAY)),
        revocation_list(signer, [revoked(7, number)], version=b"", next_update=time(NOW + DAY)),
    ):
        assert "is of version 1 and has extensions" in chosen(*read_lists([odd])).left_out[0]


def test_the_reason_is_the_digest_where_a_signature_cannot_be_checked_for_it() -> None:
    signer = Entity(common_name("signer"), SIGNER.key)  # type: ignore[arg-type]  # an EC key
    sha1 = sequence(oid("1.2.840.10045.4.1"))
    crl = revocation_list(signer, [revoked(7)], inner=sha1, outer=sha1, next_update=time(NOW + DAY))
    assert "is signed with a digest that Envoys may refuse" in chosen(*read_lists([crl])).off[0]


def test_an_entry_with_a_critical_extension_keeps_the_list_back() -> None:
    choice = chosen(listed(SIGNER, 7, entry_extra=[(UNKNOWN, True)]))
    assert "has an entry with a critical extension" in choice.left_out[0]


@pytest.mark.parametrize(
    "extra",
    [
        (),
        [(x509.CRLNumber(3), False), (identifier(SIGNER), False)],
        [(identifier(SIGNER), True)],
        [(UNKNOWN, False)],
        [(scope(only_contains_user_certs=True), True)],
    ],
)
def test_a_list_that_envoys_use_goes_out(extra: Sequence[tuple[x509.ExtensionType, bool]]) -> None:
    assert not chosen(listed(extra=extra)).off


def test_an_entry_with_a_reason_is_as_good_as_any() -> None:
    reason = (x509.CRLReason(x509.ReasonFlags.key_compromise), False)
    assert not chosen(listed(SIGNER, 7, entry_extra=[reason])).off


@pytest.mark.parametrize(
    ("points", "usable"),
    [
        ([], False),
        ([(point_of(POINT), False)], True),
        ([(point_of(x509.UniformResourceIdentifier("https://ca.example/crl")), False)], False),
        ([(point_of(x509.DNSName("other"), POINT), False)], True),
        ([(point_of(POINT, reasons=frozenset([x509.ReasonFlags.key_compromise])), False)], False),
        ([(point_of(POINT, crl_issuer=[x509.DirectoryName(ROOT.certificate.subject)]), False)], False),
    ],
)
def test_a_list_for_a_distribution_point_needs_certificates_that_name_it(
    points: Sequence[tuple[x509.ExtensionType, bool]], usable: bool
) -> None:
    """step-ca's list is such a one; Envoy refuses a certificate without it for `Different CRL scope`."""
    known = KnownCas(IN_USE.anchors, ((make_leaf(SIGNER, extra=points), SIGNER.certificate),))
    choice = chosen(listed(extra=[(scope(full_name=[POINT]), True)]), known=known)
    assert (choice.pem != b"") is usable
    assert usable or "CRL distribution point into every certificate" in choice.left_out[0]


def test_one_certificate_without_the_distribution_point_is_enough_to_keep_the_list_back() -> None:
    named = make_leaf(SIGNER, extra=[(point_of(POINT), False)])
    known = KnownCas(IN_USE.anchors, ((named, SIGNER.certificate), *IN_USE.chains))
    assert chosen(listed(extra=[(scope(full_name=[POINT]), True)]), known=known).off


def test_a_former_cas_list_for_a_distribution_point_stays_without_certificates_to_tell_by() -> None:
    signer = make_ca("signer 2", ROOT)
    known = KnownCas(IN_USE.anchors, ((make_leaf(signer), signer.certificate),), former=(SIGNER.certificate,))
    old, new = listed(extra=[(scope(full_name=[POINT]), True)]), listed(signer)
    assert served(chosen(new, earlier=[old], known=known)) == der(old, new)


def test_a_ca_that_may_not_sign_lists_has_none() -> None:
    """Envoy then refuses its certificates."""
    signer = make_ca("signer", ROOT, usage=key_usage(cert_sign=True, crl_sign=False))
    known = KnownCas(IN_USE.anchors, ((make_leaf(signer), signer.certificate),))
    assert "without cRLSign" in chosen(listed(signer), known=known).left_out[0]


def test_a_ca_without_key_usage_may_sign_lists() -> None:
    signer = make_ca("signer", ROOT, usage=None)
    known = KnownCas(IN_USE.anchors, ((make_leaf(signer), signer.certificate),))
    assert not chosen(listed(signer), known=known).off


def test_the_newest_list_of_a_ca_goes_out_alone() -> None:
    old, new = listed(last_update=NOW - 2 * HOUR), listed(last_update=NOW - HOUR)
    for latest, earlier in (((old, new), ()), ((new, old), ()), ((new,), (old,)), ((old,), (new,))):
        assert served(chosen(*latest, earlier=earlier)) == der(new)


def test_of_one_second_the_list_that_is_published_now_goes_out() -> None:
    """A revocation within a second of the last one."""
    before, now = listed(), listed(SIGNER, 7)
    assert served(chosen(now, earlier=[before])) == der(now)


def test_a_good_list_stays_where_the_new_one_cannot_be_used() -> None:
    good, bad = listed(last_update=NOW - 2 * HOUR), listed(extra=[(UNKNOWN, True)])
    choice = chosen(bad, earlier=[good])
    assert served(choice) == der(good)
    assert "critical extension" in choice.left_out[0]


def test_two_cas_of_one_name_need_lists_that_say_whose_they_are() -> None:
    signer = make_ca("signer", ROOT)
    known = KnownCas(IN_USE.anchors, (*IN_USE.chains, (make_leaf(signer), signer.certificate)))
    choice = chosen(listed(), listed(signer), known=known)
    assert "several CAs have that name" in choice.off[0]
    old, new = (listed(ca, extra=[(identifier(ca), False)]) for ca in (SIGNER, signer))
    assert served(chosen(old, new, known=known)) == der(old, new)


def test_a_renewed_root_of_the_same_key_needs_no_list_of_its_own() -> None:
    renewed = make_ca("root", key=ROOT.key, not_after=NOW + 2 * DAY)
    known = KnownCas((renewed.certificate, ROOT.certificate), IN_USE.chains)
    assert not chosen(listed(), known=known).off


def test_an_anchor_that_is_not_valid_now_needs_no_list() -> None:
    """It vouches for no peer."""
    early = make_ca("early", not_before=NOW + HOUR)
    known = KnownCas((ROOT.certificate, early.certificate), IN_USE.chains)
    assert not chosen(listed(), known=known).off
    assert chosen(listed(), known=known, now=NOW + HOUR).off


def test_too_many_lists_keep_all_back() -> None:
    """Every Envoy loads them all at each change."""
    cas = [make_ca(f"ca {n}", ROOT) for n in range(MOST_LISTS)]
    known = KnownCas(IN_USE.anchors, IN_USE.chains, advertised=tuple(ca.certificate for ca in cas))
    choice = chosen(listed(), *map(listed, cas), known=known)
    assert choice.pem == b""
    assert choice.off[0].startswith("the 101 revocation lists have ")


def test_the_next_choice_is_due_when_a_list_is_late_and_when_it_is_taken_out() -> None:
    crl = listed(last_update=NOW - HOUR, next_update=NOW + 7 * HOUR)
    assert chosen(crl).check_at == NOW + 6 * HOUR
    out = NOW + 7 * HOUR - timedelta(seconds=30)
    assert chosen(crl, now=NOW + 6 * HOUR).check_at == out
    assert not chosen(crl, now=out - timedelta(seconds=1)).off
    assert chosen(crl, now=out).off


def test_a_list_that_begins_later_is_taken_when_it_begins() -> None:
    late = listed(last_update=NOW + HOUR, next_update=NOW + DAY)
    assert chosen(late, earlier=[listed()]).check_at == NOW + HOUR
    assert served(chosen(late, earlier=[listed()], now=NOW + HOUR)) == der(late)


def test_a_list_is_read_from_der_and_from_pem() -> None:
    one, other = make_crl(SIGNER), make_crl(ROOT)
    pem = one.public_bytes(Encoding.PEM) + other.public_bytes(Encoding.PEM)
    assert [each.crl for each in read_lists([pem, one.public_bytes(Encoding.DER)])] == [one, other, one]
    assert read_lists([b""]) == ()


@pytest.mark.parametrize(
    "answer", [b"\x30\x03\x02\x01\x01", b"<html>no such page</html>", b"-----BEGIN X509 CRL-----\n"]
)
def test_what_is_no_list_is_an_error(answer: bytes) -> None:
    with pytest.raises(RevocationListError):
        read_lists([answer])
