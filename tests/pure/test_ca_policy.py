"""What the CA makes of proofs and requests: no caller gets a name, a lifetime or a quota that is not its own."""

import base64
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding
from fakes.hierarchy import HOUR, NOW, URI, make_ca, make_leaf
from fakes.openssl import openssl
from hypothesis import given
from hypothesis import strategies as st

from sds_agent.ca.callers import (
    SKEW,
    Caller,
    ClaimRule,
    Proof,
    check_chain_times,
    from_chain,
    from_claims,
    from_join_token,
)
from sds_agent.ca.policy import (
    DEFAULT_TTL,
    LONGEST_TTL,
    MOST_CALLERS,
    NodeAgent,
    Quota,
    identity_for,
    key_of,
    overreaching,
    ttl_of,
)
from sds_agent.ca.refusal import Reason, RefusalError
from sds_agent.identity.spiffe import SpiffeId
from sds_agent.pki.csr import CsrError, make_csr, proven_key
from sds_agent.pki.keys import KeyType, generate, public_bytes, to_pkcs8_pem
from sds_agent.pki.strength import LARGEST_RSA

RULE = ClaimRule("https://issuer", "istio-ca")
GOOD: dict[str, object] = {
    "iss": "https://issuer",
    "aud": ["other", "istio-ca"],
    "sub": "system:serviceaccount:default:web",
    "exp": NOW.timestamp() + 60,
}
ROOT = make_ca("root")
KEYS = {kind: generate(kind) for kind in (KeyType.EC_P256, KeyType.RSA_2048)}
CSRS = {kind: make_csr(key, URI) for kind, key in KEYS.items()}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


def reason_of(error: pytest.ExceptionInfo[RefusalError]) -> Reason:
    return error.value.reason


def test_a_service_account_is_mapped_as_istio_does() -> None:
    caller = from_claims(GOOD, RULE, "demo.example", NOW)
    assert (str(caller.identity), caller.proof) == (URI, Proof.JWT)


def test_a_claim_by_configuration_names_the_caller() -> None:
    rule = ClaimRule("https://issuer", "istio-ca", "spiffe_id")
    caller = from_claims({**GOOD, "spiffe_id": "spiffe://demo.example/vm/7"}, rule, "demo.example", NOW)
    assert str(caller.identity) == "spiffe://demo.example/vm/7"


@pytest.mark.parametrize("claim", [None, "spiffe_id"])
@pytest.mark.parametrize(
    ("allow", "taken"),
    [
        ((), True),
        ((URI,), True),
        (("spiffe://demo.example/vm/*", "spiffe://demo.example/ns/default/*"), True),
        (("spiffe://demo.example/ns/defaul/*",), False),
        ((f"{URI}/*", f"{URI}2"), False),
    ],
)
def test_an_issuer_names_no_more_than_it_may(allow: tuple[str, ...], claim: str | None, *, taken: bool) -> None:
    """The operator of a build system's issuer could otherwise act as a node agent, and so as every workload."""
    rule = ClaimRule("https://issuer", "istio-ca", claim, allow)
    claims = {**GOOD, "spiffe_id": URI}
    if taken:
        assert str(from_claims(claims, rule, "demo.example", NOW).identity) == URI
    else:
        with pytest.raises(RefusalError, match="which its issuer may not name") as error:
            from_claims(claims, rule, "demo.example", NOW)
        assert reason_of(error) is Reason.UNAUTHENTICATED


def test_a_node_agent_that_may_be_another_one_is_found() -> None:
    one = NodeAgent("spiffe://demo.example/node/1", ("spiffe://demo.example/ns/*", "spiffe://demo.example/node/1"))
    two = NodeAgent("spiffe://demo.example/node/2", ("spiffe://demo.example/*",))
    assert list(overreaching([one, two])) == [(two, one)]


@pytest.mark.parametrize("audience", ["not-istio-ca", ["not-istio-ca"], "istio-ca,vault", [["istio-ca"]]])
def test_a_token_for_an_audience_whose_name_holds_ours_is_refused(audience: object) -> None:
    """A service of another name that receives such a token could otherwise act here as the token's subject."""
    with pytest.raises(RefusalError, match="not for this CA") as error:
        from_claims({**GOOD, "aud": audience}, RULE, "demo.example", NOW)
    assert reason_of(error) is Reason.UNAUTHENTICATED


def test_an_audience_may_be_written_without_a_list() -> None:
    from_claims({**GOOD, "aud": "istio-ca"}, RULE, "demo.example", NOW)


@pytest.mark.parametrize("claimed", [None, 7, "", "web", "spiffe://elsewhere/web", "spiffe://demo.example"])
def test_the_ca_refuses_a_claim_that_names_no_identity_of_its_trust_domain(claimed: object) -> None:
    rule = ClaimRule("https://issuer", "istio-ca", "spiffe_id")
    with pytest.raises(RefusalError) as error:
        from_claims({**GOOD, "spiffe_id": claimed}, rule, "demo.example", NOW)
    assert reason_of(error) is Reason.UNAUTHENTICATED


def test_a_token_ends_at_its_end_and_may_begin_a_little_later() -> None:
    end = NOW + timedelta(seconds=60)
    from_claims(GOOD, RULE, "demo.example", end - timedelta(microseconds=1))
    with pytest.raises(RefusalError):
        from_claims(GOOD, RULE, "demo.example", end)
    starts = {**GOOD, "nbf": (NOW + SKEW).timestamp()}
    from_claims(starts, RULE, "demo.example", NOW)
    with pytest.raises(RefusalError):
        from_claims(starts, RULE, "demo.example", NOW - timedelta(seconds=1))


@pytest.mark.parametrize("never", [10**400, float("inf"), float("nan"), 1e300, True, "2099-01-01", None, [], {}])
def test_an_end_that_never_comes_is_refused(never: object) -> None:
    with pytest.raises(RefusalError) as error:
        from_claims({**GOOD, "exp": never}, RULE, "demo.example", NOW)
    assert reason_of(error) is Reason.UNAUTHENTICATED


@given(st.sampled_from(sorted(GOOD)), JSON)
def test_no_claim_of_any_kind_does_more_than_refuse(name: str, value: object) -> None:
    with suppress(RefusalError):
        caller = from_claims({**GOOD, name: value}, RULE, "demo.example", NOW)
        assert str(caller.identity).startswith("spiffe://demo.example/ns/")


def test_a_certificate_speaks_for_its_one_uri_until_it_ends() -> None:
    leaf = make_leaf(ROOT)
    chain = (leaf, ROOT.certificate)
    assert str(from_chain(chain, None, "demo.example").identity) == URI
    check_chain_times(chain, NOW + HOUR)
    with pytest.raises(RefusalError, match="expired"):
        check_chain_times(chain, NOW + HOUR + timedelta(seconds=1))


@pytest.mark.parametrize("ended", ["intermediate", "root"])
def test_the_ca_refuses_a_client_certificate_once_a_ca_above_it_has_expired(ended: str) -> None:
    """Its own NotAfter lies later: a caller that leaves its connection open must not renew it for ever."""
    soon, late = NOW + timedelta(minutes=1), NOW + timedelta(days=1)
    root = make_ca("root", not_after=soon if ended == "root" else late)
    signer = make_ca("cluster1", root, not_after=soon if ended == "intermediate" else late)
    chain = (make_leaf(signer), signer.certificate, root.certificate)
    check_chain_times(chain, soon)
    with pytest.raises(RefusalError, match="above the client's expired") as error:
        check_chain_times(chain, soon + timedelta(seconds=1))
    assert reason_of(error) is Reason.UNAUTHENTICATED


def test_the_ca_refuses_a_client_certificate_before_it_begins() -> None:
    leaf = make_leaf(ROOT, not_before=NOW + timedelta(minutes=1))
    with pytest.raises(RefusalError, match="not valid yet") as error:
        check_chain_times((leaf, ROOT.certificate), NOW)
    assert reason_of(error) is Reason.UNAUTHENTICATED


@pytest.mark.parametrize(
    "leaf",
    [
        make_leaf(ROOT, names=[x509.UniformResourceIdentifier("spiffe://demo.example/other")]),
        make_leaf(ROOT, None, names=[x509.DNSName("web")]),
        make_leaf(ROOT, "spiffe://elsewhere/web"),
        make_leaf(ROOT, "spiffe://demo.example"),
        make_leaf(ROOT, "https://demo.example/web"),
        make_leaf(ROOT, is_ca=True),
    ],
    ids=["two URIs", "no URI", "foreign", "the trust domain's", "no SPIFFE ID", "a CA"],
)
def test_a_certificate_that_is_no_workloads_is_refused(leaf: x509.Certificate) -> None:
    with pytest.raises(RefusalError) as error:
        from_chain((leaf, ROOT.certificate), None, "demo.example")
    assert reason_of(error) is Reason.UNAUTHENTICATED


def test_a_join_token_ends_when_it_ends() -> None:
    assert str(from_join_token(URI, NOW + HOUR, "demo.example", NOW).identity) == URI
    with pytest.raises(RefusalError, match="expired"):
        from_join_token(URI, NOW, "demo.example", NOW)
    with pytest.raises(RefusalError, match="no workload"):
        from_join_token(URI, NOW + HOUR, "other.example", NOW)


@given(st.integers(-(2**63), 2**63 - 1))
def test_no_lifetime_is_over_the_longest(seconds: int) -> None:
    if seconds > LONGEST_TTL.total_seconds():
        with pytest.raises(RefusalError) as error:
            ttl_of(seconds)
        assert reason_of(error) is Reason.INVALID
    else:
        assert ttl_of(seconds) == (DEFAULT_TTL if seconds <= 0 else timedelta(seconds=seconds))


NODE = SpiffeId.parse("spiffe://demo.example/node")
AGENTS = {str(NODE): NodeAgent(str(NODE), ("spiffe://demo.example/ns/a/*", URI))}


@pytest.mark.parametrize(
    ("wanted", "kind"),
    [
        ("", None),
        (URI, None),
        ("spiffe://demo.example/ns/a/sa/x", None),
        ("spiffe://demo.example/ns/a", Reason.DENIED),
        ("spiffe://demo.example/ns/ab/sa/x", Reason.DENIED),
        (f"{URI}2", Reason.DENIED),
        ("spiffe://elsewhere/ns/a/sa/x", Reason.DENIED),
        ("spiffe://demo.example/ns/a/../b", Reason.INVALID),
        ("x", Reason.INVALID),
    ],
)
def test_a_node_agent_gets_what_its_list_allows(wanted: str, kind: Reason | None) -> None:
    caller = Caller(NODE, Proof.JWT, "")
    if kind is None:
        assert str(identity_for(caller, wanted, AGENTS)) == (wanted or str(NODE))
    else:
        with pytest.raises(RefusalError) as error:
            identity_for(caller, wanted, AGENTS)
        assert reason_of(error) is kind


@pytest.mark.parametrize(
    "caller", [Caller(SpiffeId.parse(URI), Proof.JWT, ""), Caller(NODE, Proof.JOIN_TOKEN, "")], ids=["unlisted", "join"]
)
def test_a_caller_that_is_unlisted_or_has_just_joined_gets_no_other_identity(caller: Caller) -> None:
    with pytest.raises(RefusalError) as error:
        identity_for(caller, "spiffe://demo.example/ns/a/sa/x", AGENTS)
    assert reason_of(error) is Reason.DENIED


@pytest.mark.parametrize("kind", [KeyType.EC_P256, KeyType.EC_P384, KeyType.RSA_2048])
def test_every_kind_of_key_that_envoy_takes_is_signed(kind: KeyType) -> None:
    key = generate(kind)
    assert public_bytes(key_of(make_csr(key, URI).decode())) == public_bytes(key.public_key())


@given(st.text(max_size=300))
def test_no_text_in_the_place_of_a_csr_does_more_than_refuse(text: str) -> None:
    framed = f"-----BEGIN CERTIFICATE REQUEST-----\n{text}\n-----END CERTIFICATE REQUEST-----\n"
    for csr in (text, framed):
        with pytest.raises(RefusalError) as error:
            key_of(csr)
        assert reason_of(error) is Reason.INVALID


@given(
    st.sampled_from([KeyType.EC_P256, KeyType.RSA_2048]),
    st.lists(st.tuples(st.integers(0, 2000), st.integers(1, 255)), min_size=1, max_size=4),
)
def test_no_damage_to_a_csr_makes_another_key_be_signed(kind: KeyType, changes: list[tuple[int, int]]) -> None:
    der = bytearray(x509.load_pem_x509_csr(CSRS[kind]).public_bytes(Encoding.DER))
    for place, change in changes:
        der[place % len(der)] ^= change
    with suppress(RefusalError):
        assert public_bytes(key_of(in_pem(bytes(der)))) == public_bytes(KEYS[kind].public_key())


@pytest.mark.parametrize(
    ("digest", "words"),
    [("sha1", "signed with SHA1"), ("md5", "signed with MD5"), ("sha512-256", "algorithm 1.2.840.113549.1.1.16")],
)
def test_the_error_for_a_csr_with_a_refused_hash_names_the_hash(tmp_path: Path, digest: str, words: str) -> None:
    """Its signature is right: an error that called it wrong would send the user to the wrong place."""
    (tmp_path / "key.pem").write_bytes(to_pkcs8_pem(KEYS[KeyType.RSA_2048]))
    openssl(tmp_path, "req", "-new", f"-{digest}", "-key", "key.pem", "-subj", "/", "-out", "csr.pem")
    with pytest.raises(RefusalError, match=words) as refused:
        key_of((tmp_path / "csr.pem").read_text())
    assert reason_of(refused) is Reason.INVALID
    with pytest.raises(CsrError, match=words):
        proven_key((tmp_path / "csr.pem").read_bytes())
    assert "wrong" not in str(refused.value)


def test_a_csr_that_another_key_signed_proves_nothing() -> None:
    der = bytearray(x509.load_pem_x509_csr(CSRS[KeyType.RSA_2048]).public_bytes(Encoding.DER))
    der[-1] ^= 1
    with pytest.raises(RefusalError, match="its signature is wrong"):
        key_of(in_pem(bytes(der)))
    with pytest.raises(CsrError, match="its signature is wrong"):
        proven_key(in_pem(bytes(der)).encode())


def in_pem(der: bytes) -> str:
    """A CSR as it is sent."""
    body = base64.encodebytes(der).decode()
    return f"-----BEGIN CERTIFICATE REQUEST-----\n{body}-----END CERTIFICATE REQUEST-----\n"


def test_two_csrs_in_one_are_refused() -> None:
    csr = make_csr(generate(KeyType.EC_P256), URI).decode()
    with pytest.raises(RefusalError, match="more than one"):
        key_of(csr + csr)


def test_a_csr_of_a_version_that_there_is_not_is_refused_in_words() -> None:
    der = x509.load_pem_x509_csr(CSRS[KeyType.EC_P256]).public_bytes(Encoding.DER)
    assert der.count(b"\x02\x01\x00") == 1, "the version"
    with pytest.raises(RefusalError) as error:
        key_of(in_pem(der.replace(b"\x02\x01\x00", b"\x02\x01\x05")))
    assert reason_of(error) is Reason.INVALID


def test_a_giant_key_is_refused_before_it_costs_anything() -> None:
    """The time that its signature takes to check grows with the square of its size, for every call again."""
    size = LARGEST_RSA + 8
    key = rsa.RSAPublicNumbers(65537, (1 << (size - 1)) + 1).public_key()
    info = der_of(0x30, b"\x02\x01\x00", der_of(0x30), public_bytes(key), der_of(0xA0))
    algorithm = bytes.fromhex("300d06092a864886f70d01010b0500")  # sha256WithRSAEncryption
    giant = der_of(0x30, info, algorithm, der_of(0x03, bytes(1 + size // 8)))
    with pytest.raises(RefusalError, match=f"{size} bits") as error:
        key_of(in_pem(giant))
    assert reason_of(error) is Reason.INVALID


def der_of(tag: int, *parts: bytes) -> bytes:
    """A value in DER, its length in two bytes where one is not enough."""
    content = b"".join(parts)
    length = bytes([len(content)]) if len(content) < 128 else b"\x82" + len(content).to_bytes(2, "big")
    return bytes([tag]) + length + content


def test_a_quota_is_a_minutes_worth_and_fills_evenly() -> None:
    quota, start = Quota(60), datetime(2026, 1, 1, tzinfo=UTC)
    assert [quota.take("a", start) for _ in range(61)] == [True] * 60 + [False]
    assert quota.take("b", start), "another caller has its own"
    assert not quota.take("a", start - timedelta(hours=1)), "a clock set back gives nothing"
    assert quota.take("a", start - timedelta(hours=1) + timedelta(seconds=1.5))


def test_a_quota_that_is_not_used_does_not_grow() -> None:
    """Or else a caller that was silent for a day could have thousands of certificates at once."""
    quota, start = Quota(60), datetime(2026, 1, 1, tzinfo=UTC)
    assert quota.take("a", start)
    assert [quota.take("a", start + timedelta(days=1)) for _ in range(61)] == [True] * 60 + [False]


def test_the_quota_forgets_the_caller_it_has_not_seen_for_longest() -> None:
    """Memory is bounded, and the quota never forgets a caller that goes on asking."""
    quota, start = Quota(1), datetime(2026, 1, 1, tzinfo=UTC)
    for caller in ("silent", "busy", *map(str, range(MOST_CALLERS - 2))):
        assert quota.take(caller, start)
    assert not quota.take("busy", start)
    assert quota.take("one more", start)
    assert quota.take("silent", start)
    assert not quota.take("busy", start)
