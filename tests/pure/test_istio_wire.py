"""How an Istio CA's answer is read, in every form that one sends, and what is asked of it."""

import json
from datetime import timedelta
from itertools import permutations

import pytest
from cryptography import x509
from fakes.hierarchy import NOW, make_ca, make_leaf, new_key
from hypothesis import given
from hypothesis import strategies as st
from sds_agent_proto.istio_pb2 import CertificateRequest, CertificateResponse

from sds_agent.authority.answers import LONGEST_WORDS
from sds_agent.authority.istio.wire import (
    CallStatus,
    names_a_workload,
    read_response,
    refusal,
    request_bytes,
)
from sds_agent.authority.protocol import AuthorityError, ErrorKind, Issuance, IssueRequest
from sds_agent.identity.spiffe import SpiffeId
from sds_agent.issuance.acceptance import accept
from sds_agent.pki.certificates import read_pem, write_pem
from sds_agent.pki.csr import make_csr

URI = "spiffe://cluster.local/ns/default/sa/web"
KEY = new_key()
ROOT = make_ca("root")
OTHER_ROOT = make_ca("other root")
UPPER = make_ca("upper", ROOT)
LOWER = make_ca("lower", UPPER)
LEAF = make_leaf(LOWER, URI, key=KEY)
CHAIN = (LEAF, LOWER.certificate, UPPER.certificate)


def pem(*certificates: x509.Certificate) -> str:
    return write_pem(certificates).decode()


def answer(*elements: str, root_cert: tuple[bytes, ...] = ()) -> bytes:
    return CertificateResponse(cert_chain=elements, root_cert=root_cert).SerializeToString()


def accepted(issuance: Issuance) -> tuple[x509.Certificate, ...]:
    identity = SpiffeId.parse(URI)
    return accept(issuance, identity=identity, public_key=KEY.public_key(), anchors=(), now=NOW).chain


FORMS = {
    "istiod: cert-chain.pem element by element, then the root": [*map(pem, CHAIN), pem(ROOT.certificate)],
    "the root in cert-chain.pem too": [*map(pem, CHAIN), pem(ROOT.certificate), pem(ROOT.certificate)],
    "several certificates in one element": [pem(*CHAIN), pem(ROOT.certificate)],
    "without an end of line": [pem(each).strip() for each in (*CHAIN, ROOT.certificate)],
    "text before each certificate": [f"subject=x\nissuer=/CN=y\n{pem(each)}" for each in (*CHAIN, ROOT.certificate)],
    "CRLF": [pem(each).replace("\n", "\r\n") for each in (*CHAIN, ROOT.certificate)],
    "an element without a certificate": [pem(*CHAIN), "# nothing\n", pem(ROOT.certificate)],
    "text that is not ASCII": [f"größe\n{pem(*CHAIN)}", pem(ROOT.certificate)],
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_chain_is_read(form: str) -> None:
    issuance = read_response(answer(*FORMS[form]))
    assert accepted(issuance) == CHAIN
    assert read_pem(issuance.anchors_pem or b"") == (ROOT.certificate,)


@pytest.mark.parametrize("order", list(permutations((*CHAIN, ROOT.certificate))))
def test_the_order_before_the_root_bundle_means_nothing(order: tuple[x509.Certificate, ...]) -> None:
    assert accepted(read_response(answer(*map(pem, order), pem(ROOT.certificate)))) == CHAIN


def test_a_root_bundle_of_several_roots_is_taken_whole() -> None:
    roots = (OTHER_ROOT.certificate, ROOT.certificate)
    issuance = read_response(answer(*map(pem, CHAIN), pem(*roots)))
    assert read_pem(issuance.anchors_pem or b"") == roots


def test_a_root_bundle_that_holds_an_intermediate_is_the_anchor() -> None:
    issuance = read_response(answer(pem(LEAF), pem(LOWER.certificate), pem(UPPER.certificate)))
    assert read_pem(issuance.anchors_pem or b"") == (UPPER.certificate,)
    assert accepted(issuance)[:2] == (LEAF, LOWER.certificate)


def test_a_self_signed_certificate_before_the_root_bundle_is_not_an_anchor() -> None:
    stray = make_leaf(OTHER_ROOT, URI, key=KEY)
    issuance = read_response(answer(pem(stray), pem(OTHER_ROOT.certificate), pem(ROOT.certificate)))
    with pytest.raises(AuthorityError, match="no chain leads"):
        accepted(issuance)


@pytest.mark.parametrize("elements", [(), (pem(*CHAIN, ROOT.certificate),)])
def test_fewer_than_two_elements_are_refused(elements: tuple[str, ...]) -> None:
    with pytest.raises(AuthorityError, match="two are the least") as caught:
        read_response(answer(*elements))
    assert caught.value.kind is ErrorKind.INVALID


@pytest.mark.parametrize("last", ["", "no certificate", "-----BEGIN CERTIFICATE-----\nMIIB\n"])
def test_a_root_bundle_without_roots_is_refused(last: str) -> None:
    with pytest.raises(AuthorityError, match="its last element") as caught:
        read_response(answer(*map(pem, CHAIN), last))
    assert caught.value.kind is ErrorKind.INVALID


def test_the_proposed_root_cert_counts_where_it_is_sent() -> None:
    issuance = read_response(answer(*map(pem, CHAIN), root_cert=(write_pem([ROOT.certificate]),)))
    assert accepted(issuance) == CHAIN
    assert read_pem(issuance.anchors_pem or b"") == (ROOT.certificate,)
    with pytest.raises(AuthorityError, match="root_cert holds no certificate"):
        read_response(answer(*map(pem, CHAIN), root_cert=(b"",)))


def test_configured_anchors_are_added() -> None:
    extra = write_pem([OTHER_ROOT.certificate])
    issuance = read_response(answer(*map(pem, CHAIN), pem(ROOT.certificate).strip()), extra)
    assert read_pem(issuance.anchors_pem or b"") == (ROOT.certificate, OTHER_ROOT.certificate)


@given(st.binary(max_size=200))
def test_a_malformed_response_is_an_authority_error(data: bytes) -> None:
    """Random bytes hold no certificates, so it is an error, and none of a library's."""
    with pytest.raises(AuthorityError) as caught:
        read_response(data)
    assert caught.value.kind is ErrorKind.INVALID


@pytest.mark.parametrize(("seconds", "sent"), [(0.2, 1), (0, 1), (-5, 1), (59.9, 59), (86_400, 86_400)])
def test_the_lifetime_asked_for_is_always_positive(seconds: float, sent: int) -> None:
    request = IssueRequest(SpiffeId.parse(URI), make_csr(KEY, URI), timedelta(seconds=seconds), "0")
    message = CertificateRequest.FromString(request_bytes(request))
    assert message.validity_duration == sent
    assert not message.HasField("metadata")


def test_metadata_has_the_keys_that_istio_reads() -> None:
    request = IssueRequest(SpiffeId.parse(URI), make_csr(KEY, URI), timedelta(hours=1), "0")
    message = CertificateRequest.FromString(request_bytes(request, cert_signer="x", impersonate=True))
    assert dict(message.metadata) == {"CertSigner": "x", "ImpersonatedIdentity": URI}


@given(st.text(max_size=1000))
def test_a_cas_words_stay_on_one_bounded_line(words: str) -> None:
    shown = str(refusal(CallStatus("UNAVAILABLE", words), "ca:1"))
    assert len(shown) <= len(str(refusal(CallStatus("UNAVAILABLE", "x"), "ca:1"))) + LONGEST_WORDS + 2
    assert json.dumps(shown) == json.dumps(shown, ensure_ascii=False)
    assert shown.isprintable()


def test_an_unknown_status_is_a_transient_error() -> None:
    assert refusal(CallStatus("SOMETHING_NEW", ""), "ca:1").kind is ErrorKind.TRANSIENT


def test_the_error_for_a_refused_node_agent_names_the_setting_to_check() -> None:
    """istiod answers UNAUTHENTICATED to a caller that may not impersonate."""
    status = CallStatus("UNAUTHENTICATED", "request impersonation authentication failure")
    error = refusal(status, "ca:1", impersonate=True)
    assert error.kind is ErrorKind.UNAUTHENTICATED
    assert "CA_TRUSTED_NODE_ACCOUNTS" in str(error)
    assert "CA_TRUSTED_NODE_ACCOUNTS" not in str(refusal(status, "ca:1"))


@pytest.mark.parametrize(
    ("uris", "good"),
    [
        ((URI,), True),
        ((), False),
        ((URI, URI), False),
        (("spiffe://cluster.local/web",), True),
        (("spiffe://cluster.local",), False),
        (("spiffe://cluster.local/",), False),
        (("https://cluster.local/ns/default/sa/web",), False),
    ],
)
def test_which_certificates_speak_for_their_holder(uris: tuple[str, ...], good: bool) -> None:
    assert names_a_workload(uris) is good
