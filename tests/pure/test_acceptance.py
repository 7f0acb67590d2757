"""What of a CA's answer the agent accepts: it serves no Envoy an answer with anything wrong in it."""

import base64
import re
from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from fakes import der
from fakes.authorities import ODD, SECOND, WRONG, Answer, UpstreamCa, good, huge_serial, shifted
from fakes.der import Entity
from fakes.hierarchy import DAY, HOUR, NOW, URI, make_ca, make_leaf, new_key
from fakes.odd_certificates import NOT_LOADED, NOT_READ
from hypothesis import example, given
from hypothesis import strategies as st

from sds_agent.authority.protocol import AuthorityError, ErrorKind, Issuance, IssueRequest
from sds_agent.identity.spiffe import SpiffeId
from sds_agent.issuance.acceptance import LARGEST_CHAIN, Accepted, accept
from sds_agent.issuance.validity import SKEW
from sds_agent.pki.certificates import read_pem, write_pem
from sds_agent.pki.csr import make_csr

CA = UpstreamCa(lambda: NOW)
KEY = new_key()
IDENTITY = SpiffeId.parse(URI)
REQUEST = IssueRequest(IDENTITY, make_csr(KEY, URI), HOUR, "1")
ROOT, UPPER, LOWER = (ca.certificate for ca in (CA.root, CA.upper, CA.lower))


def judge(answer: Issuance, *, anchors: tuple[x509.Certificate, ...] = ()) -> Accepted:
    return accept(answer, identity=IDENTITY, public_key=KEY.public_key(), anchors=anchors, now=NOW)


def refusal(answer: Issuance, *, anchors: tuple[x509.Certificate, ...] = ()) -> AuthorityError:
    with pytest.raises(AuthorityError) as caught:
        judge(answer, anchors=anchors)
    return caught.value


def answer_of(answer: Answer) -> Issuance:
    return answer(CA, REQUEST)


@pytest.mark.parametrize(("answer", "kind"), WRONG.values(), ids=WRONG)
def test_a_wrong_answer_is_refused_in_words(answer: Answer, kind: ErrorKind) -> None:
    error = refusal(answer_of(answer))
    assert error.kind is kind
    assert len(str(error)) > 30
    assert str(error).isprintable()


@pytest.mark.parametrize("root", (NOT_READ | NOT_LOADED).values(), ids=NOT_READ | NOT_LOADED)
@pytest.mark.filterwarnings("ignore:Attribute's length must be:UserWarning")
def test_a_root_that_no_certificate_needs_stops_no_issuing(root: bytes) -> None:
    """What is served is what Envoy loads; the rest is for the log."""
    answer = good(CA, REQUEST)
    accepted = judge(Issuance(answer.chain_pem + der.pem(root), (answer.anchors_pem or b"") + der.pem(root)))
    assert accepted.chain[1:] == (LOWER, UPPER)
    assert accepted.anchors == (ROOT,)
    assert len(accepted.left_out) == 1
    assert accepted.warnings[0].startswith("left out of the chain: PEM block ")


def test_a_certificate_that_is_needed_and_left_out_is_named_in_the_refusal() -> None:
    answer = good(CA, REQUEST)
    lower = Entity(der.name(der.attribute(der.COMMON_NAME, "x")), CA.lower.key)  # type: ignore[arg-type]  # an EC key
    odd = der.pem(der.certificate(lower, version=b""))
    leaf_alone = write_pem(read_pem(answer.chain_pem)[:1])
    error = refusal(Issuance(leaf_alone + odd, answer.anchors_pem))
    assert error.kind is ErrorKind.INVALID
    assert "no chain leads from the certificate to a trust anchor" in str(error)
    assert "(left out: PEM block 2 is a certificate that Envoy does not load: it is of version 1" in str(error)


@pytest.mark.parametrize("answer", ODD.values(), ids=ODD)
def test_an_odd_answer_becomes_the_leaf_and_its_intermediates_in_order_without_roots(answer: Answer) -> None:
    accepted = judge(answer_of(answer))
    assert accepted.leaf == accepted.chain[0]
    assert accepted.leaf.public_key() == KEY.public_key()
    assert accepted.chain[1:] == (LOWER, UPPER)
    assert accepted.anchors == (ROOT,)
    assert accepted.warnings == ()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("another key", r"none of the 3 certificates .* is for our private key"),
        ("another SAN", rf"must be exactly the URI {URI}; the CA put in: .*sa/other'"),
        ("two SANs", r"the CA put in: UniformResourceIdentifier .*sa/web', UniformResourceIdentifier .*sa/other'"),
        ("a DNS name beside", r"DNSName 'web\.demo\.example'"),
        ("no SAN", r"the CA put in: none"),
        ("no EKU", r"lacks serverAuth and clientAuth; .* change the CA's profile or template"),
        ("only serverAuth", r"lacks clientAuth;"),
        ("only clientAuth", r"lacks serverAuth;"),
        (
            "must-staple",
            r"demands an OCSP staple \(must-staple: .*\), and an Envoy without one refuses it: change the CA's",
        ),
        ("expired", r"expired at 2026-03-14T15:09:25Z, .* \(it is 2026-03-14T15:09:26Z here\): compare .* clock"),
        ("from the future", r"only from 2026-03-15T15:09:26Z \(it is 2026-03-14T15:09:26Z here\): compare .* clock"),
        ("no anchors", r"sent no trust anchors and none are configured"),
        ("garbage for the leaf", r"cannot use the certificates that the CA sent: PEM block 1"),
        ("garbage as anchors", r"cannot read the trust anchors that the CA sent"),
        ("garbage", r"answered without a certificate"),
        ("nothing", r"answered without a certificate"),
        ("an intermediate missing", r"upstream upper"),
        ("an expired intermediate", r"expired"),
    ],
)
def test_the_refusal_names_what_is_wrong(name: str, text: str) -> None:
    assert re.search(text, str(refusal(answer_of(WRONG[name][0]))))


@pytest.mark.filterwarnings("ignore:Attribute's length must be:UserWarning")
def test_a_common_name_is_left_out_or_filled_in() -> None:
    root = der.entity("root")

    def answer(*attributes: bytes) -> Issuance:
        leaf = Entity(der.name(*attributes), KEY)
        made = der.certificate(leaf, root, extensions=der.leaf_extensions(leaf, root, URI))
        return Issuance(der.pem(made), der.pem(der.certificate(root)))

    empty, filled = der.attribute(der.COMMON_NAME, ""), der.attribute(der.COMMON_NAME, "web")
    for error in (refusal(answer(empty)), refusal(answer(empty, filled))):
        assert error.kind is ErrorKind.MISMATCH
        assert "has an empty common name, with which an Envoy refuses it" in str(error)
    assert all(judge(each).chain_pem for each in (answer(), answer(filled), answer(filled, empty)))


@pytest.mark.parametrize("beside", list(x509.TLSFeatureType))
def test_a_tls_feature_beside_another_is_none_for_envoy(beside: x509.TLSFeatureType) -> None:
    """It asks whether the extension is that of must-staple, byte for byte, and goes on without a staple otherwise."""
    for features in ([x509.TLSFeatureType.status_request, beside], [x509.TLSFeatureType.status_request_v2]):
        assert judge(CA.under(CA.leaf(REQUEST, extra=[(x509.TLSFeature(features), False)]))).chain_pem


def test_a_chain_is_no_larger_than_envoys_take_of_a_peer() -> None:
    def answer(names: int) -> Issuance:
        many = [x509.DNSName(f"{number}.demo.example") for number in range(names)]
        ca = make_ca("large", CA.root, names=many)
        return CA.issuance(CA.leaf(REQUEST, issuer=ca), ca.certificate)

    assert len(judge(answer(1200)).chain_pem) < LARGEST_CHAIN
    error = refusal(answer(2000))
    assert error.kind is ErrorKind.INVALID
    assert f"over TLS 1.3 Envoys take no peer with more than {LARGEST_CHAIN}" in str(error)


def test_a_flood_of_names_makes_no_flood_of_words() -> None:
    names = [x509.DNSName(f"{'x' * 2000}{n}") for n in range(50)]
    assert len(str(refusal(CA.under(CA.leaf(REQUEST, names=names))))) < 2000


# --- times ---


@pytest.mark.parametrize(
    ("begin", "end", "kind"),
    [
        (-DAY, SECOND, None),
        (-DAY, timedelta(0), ErrorKind.INVALID),
        (timedelta(0), DAY, None),
        (SKEW, DAY, None),
        (SKEW + SECOND, DAY, ErrorKind.INVALID),
    ],
)
def test_times_hold_with_a_small_skew_at_the_beginning_and_none_at_the_end(
    begin: timedelta, end: timedelta, kind: ErrorKind | None
) -> None:
    """Clocks 5 to 30 s apart are usual, and broke fresh certificates elsewhere."""
    answer = answer_of(shifted(begin, end))
    if kind is None:
        assert judge(answer).not_after == NOW + end
    else:
        assert refusal(answer).kind is kind


def test_a_clock_that_is_behind_the_cas_is_reported() -> None:
    (warning,) = judge(answer_of(shifted(30 * SECOND, DAY))).warnings
    assert warning == "the certificate is valid only in 30 s: the CA's clock is ahead of this one"


def test_the_cas_own_warnings_are_reported() -> None:
    answer = answer_of(good)
    issuance = Issuance(answer.chain_pem, answer.anchors_pem, ("ttl clamped to 1h",))
    assert judge(issuance).warnings == ("ttl clamped to 1h",)


def test_the_secret_is_good_until_the_first_certificate_of_the_chain_expires() -> None:
    """A leaf is worthless from the moment its intermediate is, and is renewed by that."""
    short = make_ca("short", CA.root, not_after=NOW + HOUR / 2)
    accepted = judge(CA.issuance(CA.leaf(REQUEST, issuer=short), short.certificate))
    assert accepted.leaf.not_valid_after_utc == NOW + HOUR
    assert accepted.not_after == NOW + HOUR / 2


def test_an_anchor_that_ends_first_ends_the_certificate_and_is_reported() -> None:
    """Otherwise no renewal comes in time, and from its end on every handshake fails while the log is silent."""
    short = make_ca("short root", not_after=NOW + HOUR / 2)
    accepted = judge(Issuance(write_pem([CA.leaf(REQUEST, issuer=short)]), write_pem([short.certificate, ROOT])))
    assert accepted.not_after == NOW + HOUR / 2
    (warning,) = accepted.warnings
    assert warning == (
        "the trust anchor 'CN=short root' ends at 2026-03-14T15:39:26Z; no Envoy accepts the certificate after that, "
        "which by itself is valid until 2026-03-14T16:09:26Z: renew the CA"
    )


def test_an_intermediate_that_ends_with_its_leaf_is_reported() -> None:
    """The CA has shortened what it issued to its own end: each certificate from now on is shorter than the last."""
    short = make_ca("short", CA.root, not_after=NOW + HOUR)
    (warning,) = judge(CA.issuance(CA.leaf(REQUEST, issuer=short), short.certificate)).warnings
    assert warning.startswith("the intermediate CA 'CN=short' ends at 2026-03-14T16:09:26Z")


@pytest.mark.parametrize("late", ["intermediate", "anchor"])
def test_a_ca_that_is_not_valid_yet_makes_its_leaf_wait(late: str) -> None:
    begin = NOW + SKEW / 2
    root = make_ca("root", not_before=begin if late == "anchor" else NOW - DAY)
    lower = make_ca("lower", root, not_before=begin)
    accepted = judge(
        Issuance(write_pem([CA.leaf(REQUEST, issuer=lower), lower.certificate]), write_pem([root.certificate]))
    )
    assert accepted.not_before == begin
    assert accepted.warnings == ("the certificate is valid only in 30 s: the CA's clock is ahead of this one",)


@pytest.mark.parametrize("end", [SKEW / 2, SKEW])
def test_a_chain_that_ends_before_all_of_it_has_begun_is_refused(end: timedelta) -> None:
    """Each of its certificates could be taken by itself; together they never are. NotAfter is no more a good moment."""
    late = make_ca("late", CA.root, not_before=NOW + SKEW)
    leaf = CA.leaf(REQUEST, issuer=late, not_after=NOW + end)
    assert "there is no time at which the whole chain" in str(refusal(CA.issuance(leaf, late.certificate)))


# --- anchors ---


def test_known_anchors_count_where_the_ca_sends_none() -> None:
    answer = Issuance(answer_of(good).chain_pem)
    assert judge(answer, anchors=(ROOT,)).anchors == (ROOT,)
    assert refusal(answer, anchors=(CA.stranger.certificate,)).kind is ErrorKind.INVALID
    assert "none are configured" in str(refusal(answer))


def test_a_root_that_comes_in_the_chain_alone_is_not_trusted() -> None:
    """A server that can answer in the CA's place would bring a root of its own."""
    foreign = CA.leaf(REQUEST, issuer=CA.stranger)
    answer = Issuance(write_pem([foreign, CA.stranger.certificate]))
    assert refusal(answer, anchors=(ROOT,)).kind is ErrorKind.INVALID
    assert refusal(answer).kind is ErrorKind.INVALID


def test_anchors_that_the_ca_sends_replace_the_known_ones() -> None:
    assert judge(answer_of(good), anchors=(CA.stranger.certificate,)).anchors == (ROOT,)


def test_anchors_count_once_each_whatever_their_text() -> None:
    """Compared as DER: the same root with other line breaks is the same root."""
    pem = write_pem([ROOT])
    body = b"".join(pem.splitlines()[1:-1])
    on_one_line = b"# the root\r\n-----BEGIN CERTIFICATE-----\r\n" + body + b"\r\n-----END CERTIFICATE-----\r\n"
    answer = Issuance(answer_of(good).chain_pem, pem + on_one_line)
    assert judge(answer).anchors == (ROOT,)


def test_every_anchor_sent_counts_not_just_the_one_that_vouches_for_the_leaf() -> None:
    """While a CA changes its root, peers still hold leaves from the other."""
    advertised = write_pem([CA.stranger.certificate, ROOT])
    assert judge(Issuance(answer_of(good).chain_pem, advertised)).anchors == (CA.stranger.certificate, ROOT)


def test_an_intermediate_that_is_sent_as_an_anchor_beside_its_root_stays_in_the_chain() -> None:
    """A peer that trusts the root alone needs it."""
    answer = Issuance(write_pem([CA.leaf(REQUEST), LOWER]), write_pem([ROOT, UPPER]))
    assert judge(answer).chain[1:] == (LOWER, UPPER)


def test_an_intermediate_may_be_the_only_anchor() -> None:
    answer = Issuance(write_pem([CA.leaf(REQUEST), LOWER, UPPER]), write_pem([UPPER]))
    assert judge(answer).chain[1:] == (LOWER,)


def test_a_pinned_intermediate_vouches_for_a_leaf_that_the_roots_beside_it_do_not() -> None:
    answer = Issuance(write_pem([CA.leaf(REQUEST), LOWER]), write_pem([CA.stranger.certificate, UPPER]))
    assert judge(answer).chain[1:] == (LOWER,)


def test_a_self_signed_leaf_is_not_its_own_anchor() -> None:
    own = make_ca("own", key=KEY, is_ca=False)
    leaf = make_leaf(own, key=KEY)
    assert refusal(Issuance(write_pem([leaf]), write_pem([leaf]))).kind is ErrorKind.INVALID


# --- whatever comes ---


def test_a_serial_number_of_any_size_is_taken() -> None:
    assert judge(answer_of(huge_serial)).leaf.serial_number.bit_length() > 256


LEAF = CA.leaf(REQUEST)
DER = LEAF.public_bytes(Encoding.DER)


@given(st.lists(st.tuples(st.integers(0, len(DER) - 1), st.integers(0, 255)), min_size=1, max_size=3))
@example([(len(DER) - 1, DER[-1] ^ 1)])
@example([(0, DER[0])])
def test_a_leaf_with_bytes_changed_is_never_served(changes: list[tuple[int, int]]) -> None:
    """No answer ends the agent, and none that was changed under way is served."""
    changed = bytearray(DER)
    for place, value in changes:
        changed[place] = value
    pem = b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(changed) + b"-----END CERTIFICATE-----\n"
    answer = Issuance(pem + write_pem([LOWER, UPPER]), write_pem([ROOT]))
    try:
        accepted = judge(answer)
    except AuthorityError:
        assert changed != DER
    else:  # nothing that is signed has changed; a signature has more than one encoding
        assert accepted.leaf.tbs_certificate_bytes == LEAF.tbs_certificate_bytes


@given(st.binary(max_size=300), st.none() | st.binary(max_size=300))
def test_any_bytes_are_refused_as_invalid(chain: bytes, anchors: bytes | None) -> None:
    assert refusal(Issuance(chain, anchors), anchors=(ROOT,)).kind is ErrorKind.INVALID


def test_another_cas_root_of_the_same_name_in_the_bundle_is_reported_before_an_envoy_takes_it() -> None:
    """Two meshes' CAs often have one name. Without key identifiers some Envoys would refuse what one of them issued."""
    bare, other = make_ca("root", identified=False), make_ca("root", identified=False)
    issued = make_leaf(bare, URI, key=KEY)
    answer = Issuance(write_pem([issued]), write_pem([bare.certificate]))
    assert judge(answer).chain == (issued,)
    with pytest.raises(AuthorityError, match="Envoy may choose the trust anchor 'CN=root'"):
        accept(
            answer,
            identity=IDENTITY,
            public_key=KEY.public_key(),
            anchors=(),
            now=NOW,
            beside=(other.certificate,),
        )


def test_a_former_root_of_the_same_name_is_reported_and_an_expired_one_does_no_harm() -> None:
    bare = make_ca("root", identified=False)
    issued = make_leaf(bare, URI, key=KEY)
    for end, fine in ((NOW + HOUR, False), (NOW - HOUR, True)):
        former = make_ca("root", identified=False, not_after=end)
        answer = Issuance(write_pem([issued]), write_pem([bare.certificate, former.certificate]))
        if fine:
            assert judge(answer).chain == (issued,)
        else:
            assert "Envoy may choose the trust anchor" in str(refusal(answer))
