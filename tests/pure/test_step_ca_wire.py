"""step-ca's keys, tokens, requests and answers as values."""

import json
from datetime import timedelta
from hashlib import sha256

import jwt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from fakes.hierarchy import HOUR, NOW, URI, make_ca, make_leaf, new_key
from fakes.step_ca_server import encoded, jwe_of, jwk_of

from sds_agent.authority.protocol import AuthorityError, ErrorKind, IssueRequest
from sds_agent.authority.step_ca.jwk import MOST_ROUNDS, StepCaKeyError, read_jwk, thumbprint
from sds_agent.authority.step_ca.wire import (
    BACKDATE,
    StepCaProof,
    StepCaProvisioner,
    audience_host,
    claims,
    clock_difference,
    jwk_proof,
    provisioner_fault,
    read_certificates,
    read_chain,
    read_root,
    refusal,
    rekey_fault,
    sign_body,
    vouched,
    words_of,
    x5c_proof,
)
from sds_agent.identity.spiffe import SpiffeId
from sds_agent.pki.certificates import ParsedBundle, write_pem
from sds_agent.pki.csr import make_csr

WEB = SpiffeId.parse(URI)
KEY = new_key()
PLAIN = json.dumps(jwk_of(KEY)).encode()
PASSWORD = b"a long passphrase"


def key_error(data: str | bytes, password: bytes | None = PASSWORD) -> str:
    with pytest.raises(StepCaKeyError) as caught:
        read_jwk(data.encode() if isinstance(data, str) else data, password)
    return str(caught.value)


# Keys


@pytest.mark.parametrize("in_json", [False, True])
@pytest.mark.parametrize("enc", ["A128GCM", "A256GCM"])
def test_an_encrypted_key_is_read_in_each_form_that_step_writes(enc: str, in_json: bool) -> None:
    read = read_jwk(jwe_of(PLAIN, PASSWORD, enc=enc, in_json=in_json).encode() + b"\n", PASSWORD)
    assert isinstance(read.key, ec.EllipticCurvePrivateKey)
    assert read.key.private_numbers() == KEY.private_numbers()
    assert (read.algorithm, read.kid) == ("ES256", "the-key-of-sds")


def other_keys() -> dict[str, tuple[dict[str, object], str]]:
    rsa_key = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    edwards = ed25519.Ed25519PrivateKey.generate()
    raw = edwards.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
    public = edwards.public_key().public_bytes_raw()
    return {
        "P-384": (dict(jwk_of(ec.generate_private_key(ec.SECP384R1()))), "ES384"),
        "P-521": (dict(jwk_of(ec.generate_private_key(ec.SECP521R1()))), "ES512"),
        "RSA": (json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(rsa_key)), "RS256"),
        "Ed25519": ({"kty": "OKP", "crv": "Ed25519", "d": encoded(raw), "x": encoded(public)}, "EdDSA"),
    }


@pytest.mark.parametrize("name", ["P-384", "P-521", "RSA", "Ed25519"])
def test_every_kind_of_provisioners_key_signs_a_token(name: str) -> None:
    members, algorithm = other_keys()[name]
    members.pop("key_ops", None)
    proof = jwk_proof(read_jwk(json.dumps(members).encode()))
    token = jwt.encode({"sub": "x"}, proof.key, algorithm=proof.algorithm, headers=dict(proof.headers))
    assert jwt.get_unverified_header(token)["alg"] == algorithm
    assert jwt.decode(token, proof.key.public_key(), algorithms=[algorithm]) == {"sub": "x"}


def test_a_key_without_a_name_is_named_by_itsthumbprint() -> None:
    """The example of RFC 7638 section 3.1 is a public key, so it is asked of the function alone."""
    modulus = (
        "0vx7agoebGcQSuuPiLJXZptN9nndrQmbXEps2aiAFbWhM78LhWx4cbbfAAtVT86zwu1RK7aPFFxuhDR1L6tSoc_BJECPebWKRXjBZCiFV4n3oknjhM"
        "stn64tZ_2W-5JsGY4Hc5n9yBXArwl93lqt7_RN5w6Cf0h4QyQ5v-65YGjQR0_FDW2QvzqY368QQMicAtaSqzs8KJZgnYb9c7d0zgdAZHzu6qMQvRL5h"
        "ajrn1n91CbOpbISD08qNLyrdkt-bFTWhAI4vMQFh6WeZu0fM4lFd2NcRwr3XPksINHaQ-G_xBniIqbw0Ls1jF44-csFCur-kEgU8awapJzKnqDKgw"
    )
    members = {"kty": "RSA", "n": modulus, "e": "AQAB", "alg": "RS256", "kid": "2011-04-29"}
    assert thumbprint(members) == "NzbLsXh8uDCcd-6MNwXF4W_7noWXFZAfHkxZsRGC9Xs"
    assert read_jwk(json.dumps(jwk_of(KEY, kid=None)).encode()).kid == thumbprint(jwk_of(KEY))


def test_a_key_that_cannot_be_used_says_why_and_shows_nothing() -> None:
    sealed = jwe_of(PLAIN, PASSWORD)
    said = {
        "is empty": key_error(""),
        "is neither a JWK nor a JWE": key_error("-----BEGIN EC PRIVATE KEY-----"),
        "is a public key": key_error(json.dumps(jwk_of(KEY, private=False))),
        "is a shared secret": key_error('{"kty":"oct","k":"c2VjcmV0"}'),
        "is no JWK that can sign": key_error('{"kty":"EC","crv":"P-256","d":"AA"}'),
        "signs by 'ES256K'": key_error(jwt.algorithms.ECAlgorithm.to_jwk(ec.generate_private_key(ec.SECP256K1()))),
        "there is no password": key_error(sealed, None),
        "the password is wrong": key_error(sealed, b"another"),
        "its content does not match": key_error(sealed[:-4] + "AAAA"),
        "has no header": key_error("x" + sealed),
        "'dir' and 'A256GCM'": key_error(jwe_of(PLAIN, PASSWORD, alg="dir")),
        "is encrypted by": key_error(jwe_of(PLAIN, PASSWORD, crit=["x"])),
        "rounds of PBKDF2": key_error(jwe_of(PLAIN, PASSWORD, p2c=MOST_ROUNDS + 1)),
        "asks for 0 rounds": key_error(jwe_of(PLAIN, PASSWORD, p2c=0)),
        "another size": key_error(
            jwe_of(PLAIN, PASSWORD, enc="A128GCM").partition(".")[0] + "." + sealed.partition(".")[2]
        ),
        "holds no JWK inside": key_error(jwe_of(b"no json", PASSWORD)),
        "no JWE with one recipient": key_error('{"ciphertext":"x","recipients":[]}'),
    }
    assert [words for words, whole in said.items() if words not in whole] == []
    assert not any(jwk_of(KEY)["d"] in each for each in said.values())


# Tokens and requests


def request(ttl: timedelta = HOUR) -> IssueRequest:
    return IssueRequest(WEB, make_csr(KEY, URI), ttl, "id")


def proof() -> StepCaProof:
    return jwk_proof(read_jwk(PLAIN))


def test_a_token_says_what_step_ca_asks_for_and_nothing_that_it_refuses() -> None:
    said = claims(request(), proof(), provisioner="sds", host="ca.example:9000", jti="1", now=NOW)
    assert said.pop("cnf").keys() == {"x5rt#S256"}
    assert said == {
        "iss": "sds",
        "aud": "https://ca.example:9000/1.0/sign",
        "sub": URI,
        "sans": [URI],
        "nbf": int(NOW.timestamp()),
        "exp": int(NOW.timestamp()) + 300,
        "jti": "1",
    }


def test_an_x5c_token_carries_its_chain_and_names_the_provisioner_in_the_audience() -> None:
    root = make_ca("devices")
    shown = x5c_proof([make_leaf(root), root.certificate], KEY, "devices")
    said = claims(request(), shown, provisioner="devices", host="ca", jti="1", now=NOW)
    assert said["aud"] == "https://ca/1.0/sign#x5c/devices"
    assert (len(shown.headers["x5c"]), shown.algorithm, shown.kid) == (2, "ES256", None)


@pytest.mark.parametrize(
    ("url", "server_name", "host"),
    [
        ("https://ca.example:9000/prefix", None, "ca.example:9000"),
        ("https://10.0.0.1:9000", "ca.example", "ca.example:9000"),
        ("https://[::1]", None, "[::1]"),
        ("https://10.0.0.1", "ca.example", "ca.example"),
    ],
)
def test_the_audience_is_the_cas_own_name(url: str, server_name: str | None, host: str) -> None:
    assert audience_host(url, server_name) == host


def test_a_lifetime_has_a_unit() -> None:
    """step-ca refuses a number alone, and takes an empty one for its default."""
    assert json.loads(sign_body(request(timedelta(hours=2)), "t"))["notAfter"] == "7200s"
    assert json.loads(sign_body(request(timedelta(milliseconds=20)), "t"))["notAfter"] == "1s"


# Renewal


def held(begin: timedelta = -BACKDATE, end: timedelta = HOUR, uri: str | None = URI) -> x509.Certificate:
    return make_leaf(make_ca("signer"), uri, not_before=NOW + begin, not_after=NOW + end)


@pytest.mark.parametrize(
    ("leaf", "ttl", "backdate", "fault"),
    [
        (held(), HOUR, BACKDATE, None),
        (held(begin=timedelta(seconds=-59)), HOUR, BACKDATE, None),
        (None, HOUR, BACKDATE, "there is none"),
        (held(begin=-2 * HOUR, end=timedelta(0)), HOUR, BACKDATE, "it is not valid now"),
        (held(begin=timedelta(seconds=1)), HOUR, BACKDATE, "it is not valid now"),
        (held(uri="spiffe://demo.example/other"), HOUR, BACKDATE, "it is for another identity"),
        (held(uri=None), HOUR, BACKDATE, "it is for another identity"),
        (held(), 2 * HOUR, BACKDATE, "it has another lifetime than the ttl"),
        (held(), HOUR, timedelta(0), "it has another lifetime than the ttl"),
        (held(begin=timedelta(0)), HOUR, timedelta(0), None),
    ],
)
def test_a_certificate_is_rekeyed_only_where_that_gives_what_is_asked_for(
    leaf: x509.Certificate | None, ttl: timedelta, backdate: timedelta, fault: str | None
) -> None:
    assert rekey_fault(leaf, WEB, ttl, backdate, NOW) == fault


# Answers


def pem(*certificates: x509.Certificate) -> str:
    return write_pem(certificates).decode()


def test_a_chain_is_read_whole_and_from_old_answers_too() -> None:
    root = make_ca("root")
    leaf = make_leaf(root)
    whole = {"crt": "x", "ca": "y", "certChain": [pem(leaf), pem(root.certificate)], "tlsOptions": {"minVersion": 1.2}}
    both = pem(leaf) + "\n" + pem(root.certificate)
    assert read_chain(json.dumps(whole).encode(), "step-ca").decode() == both
    assert read_chain(json.dumps({"crt": pem(leaf), "ca": pem(root.certificate)}).encode(), "step-ca").decode() == both
    # where the chain has one certificate, such as that of a registration authority, step-ca has no issuer to name
    alone = {"crt": pem(leaf), "ca": None, "certChain": [pem(leaf)]}
    assert read_chain(json.dumps(alone).encode(), "step-ca").decode() == pem(leaf)


@pytest.mark.parametrize("body", [b"", b"[]", b"{", b'{"certChain": 1}', b"{}", b"\xff", b"[" * 100_000])
def test_an_answer_without_a_chain_is_invalid(body: bytes) -> None:
    with pytest.raises(AuthorityError) as caught:
        read_chain(body, "step-ca")
    assert caught.value.kind is ErrorKind.INVALID


def test_roots_that_cannot_be_read_are_invalid_and_none_are_none() -> None:
    assert read_certificates(b'{"crts": []}', "step-ca") == ParsedBundle(())
    with pytest.raises(AuthorityError, match="cannot be read"):
        read_certificates(b'{"crts": ["-----BEGIN CERTIFICATE-----"]}', "step-ca")


def test_only_the_root_with_the_pinned_hash_is_taken() -> None:
    root = make_ca("root").certificate
    body = json.dumps({"ca": pem(make_ca("other").certificate, root)}).encode()
    assert read_root(body, sha256(root.public_bytes(Encoding.DER)).hexdigest(), "step-ca").decode() == pem(root)
    with pytest.raises(AuthorityError, match="another root"):
        read_root(body, "0" * 64, "step-ca")
    with pytest.raises(AuthorityError, match="cannot be read"):
        read_root(b'{"ca": "-----BEGIN CERTIFICATE-----"}', "0" * 64, "step-ca")


def test_new_anchors_are_read_only_where_the_known_ones_did_not_issue_the_chain() -> None:
    root, other = make_ca("root"), make_ca("root")
    signer = make_ca("signer", root)
    chain = write_pem([make_leaf(signer), signer.certificate])
    assert vouched(chain, [other.certificate, root.certificate])
    assert not vouched(chain, [other.certificate])
    assert vouched(b"-----BEGIN CERTIFICATE-----", [])


def test_the_words_of_an_error_are_one_bounded_line() -> None:
    assert words_of(b'{"status":403,"message":"no\\nwildcards \xe2\x80\xae here"}') == "no wildcards ? here"
    assert len(words_of(b"x" * 10_000)) < 310
    assert words_of(b"\xff\x00") == "??"


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (204, ErrorKind.INVALID),
        (302, ErrorKind.INVALID),
        (400, ErrorKind.INVALID),
        (401, ErrorKind.UNAUTHENTICATED),
        (403, ErrorKind.DENIED),
        (404, ErrorKind.INVALID),
        (408, ErrorKind.TRANSIENT),
        (413, ErrorKind.INVALID),
        (429, ErrorKind.THROTTLED),
        (500, ErrorKind.TRANSIENT),
        (503, ErrorKind.TRANSIENT),
    ],
)
def test_a_status_says_who_has_to_act(status: int, kind: ErrorKind) -> None:
    error = refusal(status, "words", "step-ca", retry_after=5.0)
    assert (error.kind, error.retry_after) == (kind, 5.0)
    assert str(error).startswith(f"step-ca did not issue ({status}: words); ")


@pytest.mark.parametrize(
    ("date", "said"),
    [
        ("Sat, 14 Mar 2026 15:10:26 GMT", None),
        ("Sat, 14 Mar 2026 15:08:25 GMT", "61 s ahead of step-ca's"),
        ("Sat, 14 Mar 2026 16:09:26 GMT", "3600 s behind step-ca's"),
        ("", None),
        ("today", None),
        ("Sat, 14 Mar 99999999999 15:09:26 GMT", None),
    ],
)
def test_clocks_that_differ_by_more_than_step_ca_allows_are_named(date: str, said: str | None) -> None:
    found = clock_difference(date, NOW)
    assert found is None if said is None else said in (found or "")


def test_a_provisioner_that_fits_is_not_complained_of() -> None:
    listed = StepCaProvisioner("JWK", "sds", None)
    assert provisioner_fault([listed], "sds", proof()) is None
