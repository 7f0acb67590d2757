"""Our CA over real TLS, asked by a real gRPC client: who gets what, who gets nothing, and what is written down."""

import base64
import errno
import hmac
import json
import shutil
import socket
import ssl
import tempfile
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import anyio
import anyio.lowlevel
import grpc
import grpc.aio
import jwt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from fakes.ca_servers import (
    AUDIENCE,
    ISSUER,
    METHOD,
    TRUST_DOMAIN,
    WEB,
    Served,
    Shifted,
    TokenIssuer,
    ask,
    fresh,
    plug,
    served,
    soon,
)
from fakes.events import recorded
from fakes.hierarchy import make_ca
from sds_agent_proto.istio_pb2 import CertificateRequest

from sds_agent.ca import service
from sds_agent.ca.acceptor import Acceptor, Peer
from sds_agent.ca.audit import AuditLog, Entry
from sds_agent.ca.authentication import Authentication
from sds_agent.ca.jwt import LONGEST_TOKEN, caller_of
from sds_agent.ca.refusal import RefusalError
from sds_agent.ca.server import serving
from sds_agent.ca.service import LARGEST_REQUEST, CertificateService, Rules
from sds_agent.ca.settings import load
from sds_agent.clock import SystemClock
from sds_agent.errors import ConfigurationError
from sds_agent.pki.certificates import extended_key_usages, read_pem, serial_hex, subject_alternative_uris, write_pem
from sds_agent.pki.csr import make_csr
from sds_agent.pki.keys import KeyType, generate
from sds_agent.pki.signer import SignerError
from sds_agent.pki.signing import SigningSet

NODE = f"spiffe://{TRUST_DOMAIN}/ns/kube-system/sa/node"
RSA_ROOT = "{self_signed: root, key: rsa-2048}"
NODE_AGENTS = f"  node_agents: [{{identity: '{NODE}', may_act_for: ['spiffe://{TRUST_DOMAIN}/ns/default/*']}}]"


@pytest.fixture
async def ca(tmp_path: Path) -> AsyncIterator[Served]:
    async with served(tmp_path, callers=NODE_AGENTS) as it:
        yield it


def refused(error: grpc.aio.AioRpcError, code: grpc.StatusCode, ca: Served, words: str) -> None:
    """The call got that status, and the audit log has one line that says why."""
    assert error.code() is code, error.details()
    assert words in (error.details() or "")
    assert [line["event"] for line in ca.audit] == ["certificate_refused"]
    assert words in ca.audit[0]["reason"]


@pytest.mark.parametrize("algorithm", ["ES256", "RS256", "EdDSA"])
async def test_a_service_account_token_gets_its_own_identity(ca: Served, algorithm: str) -> None:
    got = await ca.ask(ca.issuer.token(algorithm), uri=f"spiffe://{TRUST_DOMAIN}/somebody/else")
    assert subject_alternative_uris(got.leaf) == (WEB,), "the CSR has no say in the name"
    assert len(extended_key_usages(got.leaf)) == 2
    (line,) = ca.audit
    assert line["serial"] == serial_hex(got.leaf)
    assert (line["spiffe_id"], line["caller"], line["proof"]) == (WEB, WEB, "jwt")
    assert line["not_after"] == got.leaf.not_valid_after_utc.isoformat(timespec="milliseconds").replace("+00:00", "Z")


async def test_a_certificate_renews_without_a_token_and_counts_before_one(ca: Served) -> None:
    first = await ca.ask(ca.issuer.token())
    await ca.ask(identity=first)
    other = ca.issuer.token(sub="system:serviceaccount:default:other")
    both = await ca.ask(other, first)
    assert subject_alternative_uris(both.leaf) == (WEB,)
    assert [line["proof"] for line in ca.audit] == ["jwt", "certificate", "certificate"]
    shown = f"serial {serial_hex(first.leaf)}"
    assert [line["proof_detail"] for line in ca.audit] == [f"issuer {ISSUER}", shown, shown]


async def test_nobody_gets_anything_without_a_proof(ca: Served) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ca.ask()
    refused(caught.value, grpc.StatusCode.UNAUTHENTICATED, ca, "no proof")


LATE = datetime.now(UTC) - timedelta(minutes=1)
BAD_CLAIMS: dict[str, tuple[dict[str, Any], str]] = {
    "expired": ({"exp": LATE}, "expired"),
    "endless": ({"exp": None}, "never expires"),
    "another audience": ({"aud": "vault"}, "audience"),
    "no audience": ({"aud": None}, "audience"),
    "another issuer": ({"iss": "https://elsewhere"}, "issuer"),
    "not yet": ({"nbf": datetime.now(UTC) + timedelta(hours=1)}, "valid only from"),
    "a user": ({"sub": "system:admin"}, "service account"),
    "more than a name": ({"sub": "system:serviceaccount:default:web:admin"}, "service account"),
    "a path in the name": ({"sub": "system:serviceaccount:default:a/b"}, "slash"),
    "a path in the namespace": ({"sub": "system:serviceaccount:default/sa/web:x"}, "slash"),
    "no name": ({"sub": "system:serviceaccount:default:"}, "SPIFFE ID"),
}


@pytest.mark.parametrize(("claims", "words"), BAD_CLAIMS.values(), ids=list(BAD_CLAIMS))
async def test_a_token_that_is_not_good_gets_nothing(ca: Served, claims: dict[str, Any], words: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ca.ask(ca.issuer.token(**claims))
    refused(caught.value, grpc.StatusCode.UNAUTHENTICATED, ca, words)


async def test_an_unsigned_token_gets_nothing(ca: Served) -> None:
    token = jwt.encode(jwt.decode(ca.issuer.token(), options={"verify_signature": False}), "", "none")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ca.ask(token)
    refused(caught.value, grpc.StatusCode.UNAUTHENTICATED, ca, "not signed by")


async def test_a_public_key_is_no_shared_secret(ca: Served) -> None:
    """Everybody has the issuer's public keys, so a token that is "signed" with one by HMAC is anybody's."""
    _, claims, _ = ca.issuer.token().split(".")
    for name, key in ca.issuer.keys.items():
        header = encoded(json.dumps({"alg": "HS256", "typ": "JWT", "kid": name}).encode())
        form = (PublicFormat.SubjectPublicKeyInfo,)
        for secret in (key.public_key().public_bytes(kind, *form) for kind in (Encoding.PEM, Encoding.DER)):
            signature = hmac.digest(secret, f"{header}.{claims}".encode(), "sha256")
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await ca.ask(f"{header}.{claims}.{encoded(signature)}")
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert {line["reason"] for line in ca.audit} == {"the token is not signed by RS256, ES256 or EdDSA"}


def encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


async def test_a_key_verifies_only_by_its_own_algorithm(ca: Served) -> None:
    """The header chooses among the issuer's keys, never how one of them is used."""
    header, claims, _ = ca.issuer.token("RS256").split(".")
    _, _, signature = ca.issuer.token("ES256").split(".")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ca.ask(f"{header}.{claims}.{signature}")
    refused(caught.value, grpc.StatusCode.UNAUTHENTICATED, ca, "key of its issuer")


async def test_a_bound_service_account_token_is_mapped_by_its_subject(ca: Served) -> None:
    """What a kubelet puts into a projected volume; what its claim kubernetes.io adds changes nothing."""
    bound: dict[str, Any] = {
        "namespace": "default",
        "node": {"name": "n1", "uid": "1"},
        "pod": {"name": "web-7d", "uid": "2"},
        "serviceaccount": {"name": "web", "uid": "3"},
    }
    told: dict[str, Any] = {"kubernetes.io": bound, "iat": datetime.now(UTC), "jti": "4"}
    got = await ca.ask(ca.issuer.token(**told))
    assert subject_alternative_uris(got.leaf) == (WEB,)


async def test_a_legacy_service_account_token_gets_nothing(ca: Served) -> None:
    """Those in Secrets have the same subject, but neither an end nor an audience: whoever has one has it for good."""
    legacy: dict[str, Any] = {
        "iss": "kubernetes/serviceaccount",
        "kubernetes.io/serviceaccount/namespace": "default",
        "kubernetes.io/serviceaccount/service-account.name": "web",
        "aud": None,
        "exp": None,
        "nbf": None,
    }
    for claims in (legacy, {**legacy, "iss": ISSUER}, {**legacy, "iss": ISSUER, "aud": AUDIENCE}):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ca.ask(ca.issuer.token(**claims))
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert ["issuer" in line["reason"] for line in ca.audit] == [True, False, False]
    assert "audience" in ca.audit[1]["reason"]
    assert "never expires" in ca.audit[2]["reason"]


async def test_a_call_with_two_tokens_gets_nothing(ca: Served) -> None:
    """Which of them counted would be a matter of who reads them."""
    headers = [("authorization", f"Bearer {ca.issuer.token()}")] * 2
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ca.ask(headers=headers)
    refused(caught.value, grpc.StatusCode.UNAUTHENTICATED, ca, "more than one authorization header")


@pytest.mark.parametrize("scheme", ["bearer", "BEARER"])
async def test_a_scheme_in_any_case_brings_a_token(ca: Served, scheme: str) -> None:
    """Not every client writes Bearer with a capital letter, and it need not (RFC 9110 section 11.1)."""
    async with ca.connected() as channel:
        await ask(channel, headers=[("authorization", f"{scheme} {ca.issuer.token()}")])


async def test_a_token_under_another_scheme_gets_nothing(ca: Served) -> None:
    async with ca.connected() as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(channel, headers=[("authorization", f"Basic {ca.issuer.token()}")])
    refused(caught.value, grpc.StatusCode.UNAUTHENTICATED, ca, "no proof")


async def test_a_certificate_proves_nothing_where_that_is_switched_off(tmp_path: Path) -> None:
    async with served(tmp_path, callers="  mtls: false") as ca:
        got = await ca.ask(ca.issuer.token())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ca.ask(identity=got)
        assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_a_foreign_certificate_harms_nobody_where_certificates_are_switched_off(tmp_path: Path) -> None:
    """A caller may have one for other servers, and its library shows it to whoever asks."""
    (tmp_path / "elsewhere").mkdir()
    async with served(tmp_path / "elsewhere") as other:
        foreign = await other.ask(other.issuer.token())
    async with served(tmp_path, callers="  mtls: false") as ca:
        got = await ca.ask(ca.issuer.token(), foreign)
    assert subject_alternative_uris(got.leaf) == (WEB,)


async def test_a_token_that_is_far_too_long_is_not_even_read() -> None:
    with pytest.raises(RefusalError, match="more than"):
        await caller_of("a." * LONGEST_TOKEN, [], TRUST_DOMAIN, datetime.now(UTC))


async def test_a_long_token_is_taken_every_time(ca: Served) -> None:
    """An issuer that lists a person's groups writes long ones; gRPC by itself refuses most of these, and not all."""
    token = ca.issuer.token(groups=["administrators of something"] * 370)
    assert LONGEST_TOKEN - 2000 < len(token) < LONGEST_TOKEN
    async with ca.connected() as channel:
        for _ in range(10):
            await ask(channel, token)


async def test_a_token_that_demands_what_is_not_understood_gets_nothing(ca: Served) -> None:
    """Its issuer says that without it the token means something else (RFC 7515 section 4.1.11)."""
    _, claims, _ = ca.issuer.token().split(".")
    header = {"kid": "ES256", "crit": ["bound"], "bound": "elsewhere"}
    payload = base64.urlsafe_b64decode(claims + "==")
    token = jwt.PyJWS().encode(payload, ca.issuer.keys["ES256"], "ES256", headers=header)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ca.ask(token)
    refused(caught.value, grpc.StatusCode.UNAUTHENTICATED, ca, "token")


async def test_a_token_without_a_bottom_is_only_refused(ca: Served) -> None:
    token = jwt.PyJWS().encode(b"[" * 9000, ca.issuer.keys["ES256"], "ES256")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ca.ask(token)
    refused(caught.value, grpc.StatusCode.UNAUTHENTICATED, ca, "neither a JSON Web Token")


@pytest.mark.parametrize("claims", [[], "text", 7, None])
async def test_a_signed_token_that_holds_no_claims_gets_nothing(ca: Served, claims: object) -> None:
    token = jwt.PyJWS().encode(json.dumps(claims).encode(), ca.issuer.keys["ES256"], "ES256")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ca.ask(token)
    refused(caught.value, grpc.StatusCode.UNAUTHENTICATED, ca, "holds no claims")


async def test_a_kind_of_token_that_is_not_configured_gets_nothing(tmp_path: Path) -> None:
    least = f"trust_domain: {TRUST_DOMAIN}\nlisten: 127.0.0.1:0\nserver_names: [localhost]\naudit: audit.log\n"
    ways = {
        "join_tokens: t": (TokenIssuer().token(), "callers.jwt"),
        f"jwt: [{{issuer: i, audience: a, jwks: {tmp_path / 'keys'}}}]": ("sds-join-x", "callers.join_tokens"),
    }
    (tmp_path / "keys").write_bytes(TokenIssuer().key_set())
    for number, (callers, (token, words)) in enumerate(ways.items()):
        directory = tmp_path / str(number)
        directory.mkdir()
        (directory / "ca.yaml").write_text(f"{least}signer: {{self_signed: r}}\ncallers: {{{callers}}}\n")
        async with serving(load(directory / "ca.yaml"), SystemClock()) as address:
            roots = write_pem(read_pem((directory / "r" / "roots.pem").read_bytes()))
            ca = Served(str(address), directory, TokenIssuer(), roots)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await ca.ask(token)
            refused(caught.value, grpc.StatusCode.UNAUTHENTICATED, ca, words)


async def test_a_token_of_another_key_gets_nothing(ca: Served) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ca.ask(TokenIssuer().token())
    refused(caught.value, grpc.StatusCode.UNAUTHENTICATED, ca, "key of its issuer")


@pytest.mark.parametrize("token", ["", "x", "a.b.c", "sds-join-nobody-made-this", "e30.e30.e30", "\u007f"])
async def test_what_is_no_token_gets_nothing(ca: Served, token: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ca.ask(headers=(("authorization", f"Bearer {token.encode('unicode_escape').decode()}"),))
    refused(caught.value, grpc.StatusCode.UNAUTHENTICATED, ca, "")


async def test_a_join_token_is_spent_by_its_first_key(ca: Served) -> None:
    """An answer that was lost can be asked for again; a token that leaked is worth nothing."""
    token, key = ca.join_token(), generate(KeyType.EC_P256)
    await ca.ask(token, key=key)
    again = await ca.ask(token, key=key)
    assert subject_alternative_uris(again.leaf) == (WEB,)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ca.ask(token)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert [line["outcome"] for line in ca.audit] == ["issued", "issued", "unauthenticated"]
    assert "another key" in ca.audit[-1]["reason"]
    assert not any(token.encode() in path.read_bytes() for path in (ca.directory / "tokens").iterdir())


async def test_of_many_keys_at_once_one_gets_the_join_token(ca: Served) -> None:
    token = ca.join_token()
    outcomes: list[bool] = []

    async def attempt(channel: grpc.aio.Channel) -> None:
        try:
            await ask(channel, token)
        except grpc.aio.AioRpcError:
            outcomes.append(False)
        else:
            outcomes.append(True)

    async with ca.connected() as channel, anyio.create_task_group() as tasks:
        for _ in range(8):
            tasks.start_soon(attempt, channel)
    assert sorted(outcomes) == [False] * 7 + [True]


async def test_an_expired_join_token_gets_nothing(ca: Served) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ca.ask(ca.join_token(ttl=timedelta(seconds=-1)))
    refused(caught.value, grpc.StatusCode.UNAUTHENTICATED, ca, "expired")


async def test_a_refused_csr_does_not_spend_the_join_token(ca: Served) -> None:
    token = ca.join_token()
    with pytest.raises(grpc.aio.AioRpcError):
        await ca.ask(token, csr="nonsense")
    await ca.ask(token)


async def test_a_node_agent_acts_for_what_its_list_allows(ca: Served) -> None:
    token = ca.issuer.token(sub="system:serviceaccount:kube-system:node")
    got = await ca.ask(token, metadata={"ImpersonatedIdentity": WEB, "CertSigner": ""})
    assert subject_alternative_uris(got.leaf) == (WEB,)
    assert (ca.audit[0]["caller"], ca.audit[0]["spiffe_id"]) == (NODE, WEB)


@pytest.mark.parametrize(
    ("account", "wanted"),
    [
        ("default:web", WEB),
        ("kube-system:node", f"spiffe://{TRUST_DOMAIN}/ns/default-2/sa/web"),
        ("kube-system:node", f"spiffe://{TRUST_DOMAIN}/ns/default"),
        ("kube-system:node", "spiffe://elsewhere/ns/default/sa/web"),
    ],
)
async def test_an_impersonation_that_is_not_listed_is_denied(ca: Served, account: str, wanted: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ca.ask(ca.issuer.token(sub=f"system:serviceaccount:{account}"), metadata={"ImpersonatedIdentity": wanted})
    refused(caught.value, grpc.StatusCode.PERMISSION_DENIED, ca, "may not act for")


async def test_nothing_that_a_caller_asks_for_can_begin_an_audit_line(ca: Served) -> None:
    """What is not ASCII may be the end of a line to whatever reads the log."""
    wanted = f'{WEB}\u2028\n\r\x85{{"outcome": "issued"}}'
    with pytest.raises(grpc.aio.AioRpcError):
        await ca.ask(
            ca.issuer.token(sub="system:serviceaccount:kube-system:node"), metadata={"ImpersonatedIdentity": wanted}
        )
    assert ca.audit[0]["spiffe_id"] == wanted
    text = (ca.directory / "audit.log").read_text()
    assert text.isascii()
    assert len(text.splitlines()) == 1


async def test_an_audit_line_has_an_end_whatever_a_caller_asks_for(ca: Served) -> None:
    """Or else a caller could fill the disk, and then nothing is signed for anybody."""
    node = ca.issuer.token(sub="system:serviceaccount:kube-system:node")
    with pytest.raises(grpc.aio.AioRpcError):
        await ca.ask(node, metadata={"ImpersonatedIdentity": f"spiffe://{TRUST_DOMAIN}/{'x' * 1_000_000}"})
    assert len(ca.audit) == 1
    assert (ca.directory / "audit.log").stat().st_size < 5000


def test_the_audit_log_leaves_no_file_open(tmp_path: Path) -> None:
    """It is opened for every line, and a process may have no more than some thousand open."""
    log = AuditLog(tmp_path / "audit.log")
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        log.write(Entry("issued", "127.0.0.1:1"), datetime.now(UTC))
    assert len(list(Path("/proc/self/fd").iterdir())) <= before
    assert len((tmp_path / "audit.log").read_text().splitlines()) == 5


def unproven() -> str:
    """A CSR whose signature is another's."""
    mine, other = (x509.load_pem_x509_csr(make_csr(generate(KeyType.EC_P256), WEB)) for _ in range(2))
    der = mine.public_bytes(Encoding.DER).replace(mine.tbs_certrequest_bytes, other.tbs_certrequest_bytes)
    return x509.load_der_x509_csr(der).public_bytes(Encoding.PEM).decode() if len(der) > 10 else ""


def signed(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey | ed25519.Ed25519PrivateKey, extra: int = 0) -> str:
    builder = x509.CertificateSigningRequestBuilder(x509.Name([]))
    if extra:
        oid = x509.ObjectIdentifier("1.2.3.4")
        builder = builder.add_extension(x509.UnrecognizedExtension(oid, b"\0" * extra), critical=False)
    digest = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(key, digest).public_bytes(Encoding.PEM).decode()


BAD_CSRS = {
    "garbage": "garbage",
    "no CSR in it": "-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n-----END CERTIFICATE REQUEST-----\n",
    "unproven": unproven(),
    "a weak key": signed(rsa.generate_private_key(65537, 1024)),  # noqa: S505 - weak on purpose
    "a curve of its own": signed(ec.generate_private_key(ec.SECP256K1())),
    "a short curve": signed(ec.generate_private_key(ec.SECP224R1())),
    "a kind of key that Envoy does not take": signed(ed25519.Ed25519PrivateKey.generate()),
    "two CSRs": 2 * make_csr(generate(KeyType.EC_P256), WEB).decode(),
    "a certificate": write_pem([fresh("web").certificate]).decode(),
    "a megabyte of extensions": signed(ec.generate_private_key(ec.SECP256R1()), 1 << 20),
}


@pytest.mark.parametrize("csr", BAD_CSRS.values(), ids=list(BAD_CSRS))
async def test_a_csr_that_cannot_be_signed_is_called_invalid(ca: Served, csr: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ca.ask(ca.issuer.token(), csr=csr)
    refused(caught.value, grpc.StatusCode.INVALID_ARGUMENT, ca, "CSR")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\xff", "not an IstioCertificateRequest"),
        (CertificateRequest(csr="\0").SerializeToString(), "no CSR"),
        (CertificateRequest(metadata={"ImpersonatedIdentity": 7}).SerializeToString(), "not a text"),
    ],
)
async def test_a_request_that_is_none_is_called_invalid(ca: Served, data: bytes, words: str) -> None:
    async with ca.connected() as channel:
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(METHOD)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(data, metadata=(("authorization", f"Bearer {ca.issuer.token()}"),), timeout=10)
    refused(caught.value, grpc.StatusCode.INVALID_ARGUMENT, ca, words)


async def test_what_is_too_large_for_grpc_is_turned_away_by_it_and_written_down(ca: Served) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ca.ask(ca.issuer.token(), csr="A" * (LARGEST_REQUEST + 1))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert [(line["outcome"], line["caller"]) for line in ca.audit] == [("invalid", WEB)]


async def test_nothing_is_read_from_a_caller_that_proves_nothing(ca: Served) -> None:
    """Or else anybody's requests that never end would be kept in memory, a hundred of 4 MB on every connection."""
    async with ca.connected() as channel:
        begin: grpc.aio.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary(METHOD)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await begin(timeout=10)
    refused(caught.value, grpc.StatusCode.UNAUTHENTICATED, ca, "no proof")


async def test_a_proven_caller_has_to_send_its_request_in_time(ca: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A caller that stops in the middle keeps none of the places for requests in work."""
    monkeypatch.setattr(service, "PATIENCE", 0.1)
    proof = (("authorization", f"Bearer {ca.issuer.token()}"),)
    async with ca.connected() as channel:
        begin: grpc.aio.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary(METHOD)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await begin(metadata=proof, timeout=10)
    refused(caught.value, grpc.StatusCode.INVALID_ARGUMENT, ca, "did not arrive")


async def test_a_call_without_a_request_is_called_invalid(ca: Served) -> None:
    proof = (("authorization", f"Bearer {ca.issuer.token()}"),)
    async with ca.connected() as channel:
        begin: grpc.aio.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary(METHOD)
        call = begin(metadata=proof, timeout=10)
        await call.done_writing()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
    refused(caught.value, grpc.StatusCode.INVALID_ARGUMENT, ca, "without a request")


async def test_a_refused_request_never_reaches_the_signer(tmp_path: Path) -> None:
    """The signer has expired, so whoever reaches it is told that."""
    root, clock = fresh("root"), Shifted()
    signer = make_ca(
        "short", root, not_before=datetime.now(UTC) - timedelta(hours=1), not_after=soon(timedelta(hours=1))
    )
    plug(tmp_path / "cacerts", signer, [signer], [root])
    roots = write_pem([root.certificate])
    async with (
        served(tmp_path, signer="{cacerts: cacerts}", roots=roots, clock=clock, callers=NODE_AGENTS) as ca,
        ca.connected() as channel,
    ):
        good = ca.issuer.token(exp=soon(timedelta(days=1)))
        spent = ca.join_token(ttl=timedelta(days=1))
        record, other = ca.tokens.find(spent), generate(KeyType.EC_P256)
        ca.tokens.spend(record, other.public_key())
        await ask(channel, good)
        clock.ahead = timedelta(hours=2)
        bad: list[tuple[str | None, dict[str, Any]]] = [
            (None, {}),
            (ca.issuer.token(), {}),
            (spent, {}),
            (good, {"metadata": {"ImpersonatedIdentity": NODE}}),
            (good, {"seconds": 91 * 86400}),
            *((good, {"csr": csr}) for csr in BAD_CSRS.values()),
        ]
        for token, asked in bad:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await ask(channel, token, **asked)
            assert "the CA" not in (caught.value.details() or "")
        with recorded() as events, pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(channel, good)
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert "expired on" in events.named("cannot_sign")[0]["cause"], "the operator has to act"
    outcomes = [line["outcome"] for line in ca.audit]
    denied = ["unauthenticated"] * 3 + ["denied"] + ["invalid"] * (1 + len(BAD_CSRS))
    assert outcomes == ["issued", *denied, "internal"]
    assert "expired on" in ca.audit[-1]["reason"]


async def test_nothing_that_was_signed_is_lost_when_the_ca_ends(tmp_path: Path) -> None:
    outcomes: list[grpc.StatusCode] = []

    async def attempt(channel: grpc.aio.Channel, token: str) -> None:
        try:
            await ask(channel, token)
        except grpc.aio.AioRpcError as error:
            outcomes.append(error.code())
        else:
            outcomes.append(grpc.StatusCode.OK)

    async with AsyncExitStack() as later:
        async with anyio.create_task_group() as tasks, served(tmp_path, signer=RSA_ROOT) as ca:
            channel = await later.enter_async_context(ca.connected())
            await ask(channel, ca.issuer.token())
            for _ in range(30):
                tasks.start_soon(attempt, channel, ca.issuer.token())
            with anyio.fail_after(10):
                while len(ca.audit) < 3:
                    await anyio.lowlevel.checkpoint()
        assert len(outcomes) == 30
    assert outcomes.count(grpc.StatusCode.OK) == len(ca.audit) - 1


async def test_more_than_ninety_days_are_invalid_and_none_are_a_day(ca: Served) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ca.ask(ca.issuer.token(), seconds=90 * 86400 + 1)
    refused(caught.value, grpc.StatusCode.INVALID_ARGUMENT, ca, "90 days")
    for seconds in (0, -5):
        leaf = (await ca.ask(ca.issuer.token(), seconds=seconds)).leaf
        left = leaf.not_valid_after_utc - datetime.now(UTC)
        assert timedelta(hours=23, minutes=59) < left <= timedelta(hours=24)


async def test_an_rsa_key_is_signed_too(ca: Served) -> None:
    got = await ca.ask(ca.issuer.token(), key=generate(KeyType.RSA_2048))
    assert isinstance(got.leaf.public_key(), rsa.RSAPublicKey)


async def test_a_caller_that_asks_too_often_is_slowed_down_alone(tmp_path: Path) -> None:
    async with served(tmp_path, more="limits: {per_caller: 2}") as ca:
        token = ca.issuer.token()
        await ca.ask(token)
        await ca.ask(token)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ca.ask(token)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await ca.ask(ca.issuer.token(sub="system:serviceaccount:default:other"))
        assert [line["outcome"] for line in ca.audit] == ["issued", "issued", "exhausted", "issued"]


async def test_whoever_has_a_spent_token_does_not_use_up_what_its_machine_is_allowed(tmp_path: Path) -> None:
    """Or else a token that leaked would keep the machine from renewing for as long as the token lasts."""
    async with served(tmp_path, more="limits: {per_caller: 2}") as ca:
        token = ca.join_token()
        machine = await ca.ask(token)
        for _ in range(3):
            with pytest.raises(grpc.aio.AioRpcError):
                await ca.ask(token)
        await ca.ask(identity=machine)
        assert [line["outcome"] for line in ca.audit] == ["issued", "unauthenticated", *["exhausted"] * 2, "issued"]


async def test_health_needs_no_proof(ca: Served) -> None:
    async with ca.connected() as channel:
        check: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/grpc.health.v1.Health/Check")
        assert await check(b"", timeout=10) == b"\x08\x01"


async def test_an_old_connection_is_replaced_without_a_failed_request(tmp_path: Path) -> None:
    async with (
        served(tmp_path, more="limits: {connection_age: 1s, per_caller: 100000}") as ca,
        ca.connected() as channel,
    ):
        token, addresses = ca.issuer.token(), set[str]()
        with anyio.fail_after(20):
            while len(addresses) < 2:
                await ask(channel, token)
                addresses = {line["address"] for line in ca.audit}


async def test_an_expired_certificate_is_refused_on_a_live_connection(tmp_path: Path) -> None:
    """The handshake was good; TLS never looks again."""
    clock = Shifted()
    async with served(tmp_path, clock=clock) as ca:
        short = await ca.ask(ca.issuer.token())
        async with ca.connected(short) as channel:
            await ask(channel)
            clock.ahead = timedelta(hours=2)
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await ask(channel)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
    assert "expired" in (caught.value.details() or "")
    assert "expired" in ca.audit[-1]["reason"]


async def test_a_foreign_certificate_fails_the_connection(ca: Served, tmp_path: Path) -> None:
    """As with istiod: the caller then comes with its token alone."""
    (tmp_path / "elsewhere").mkdir()
    async with served(tmp_path / "elsewhere") as other:
        foreign = await other.ask(other.issuer.token())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ca.ask(ca.issuer.token(), foreign)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    await ca.ask(ca.issuer.token())


def presented(ca: Served) -> x509.Certificate:
    """The certificate that the server shows."""
    host, port = ca.address.rsplit(":", 1)
    context = ssl.create_default_context(cadata=ca.roots.decode())
    context.set_alpn_protocols(["h2"])
    address = (host, int(port))
    with socket.create_connection(address) as plain, context.wrap_socket(plain, server_hostname="127.0.0.1") as tls:
        der = tls.getpeercert(binary_form=True)
    assert der is not None
    return x509.load_der_x509_certificate(der)


async def test_the_server_renews_its_own_certificate(tmp_path: Path) -> None:
    clock = Shifted()
    clock.ahead = -timedelta(hours=13)  # what it issues now begins in the past of those who check it
    async with served(tmp_path, clock=clock) as ca:
        first = await anyio.to_thread.run_sync(presented, ca)
        assert await anyio.to_thread.run_sync(presented, ca) == first
        clock.ahead = timedelta(0)
        assert await anyio.to_thread.run_sync(presented, ca) != first


async def test_the_servers_certificate_holds_after_a_clock_that_was_ahead_is_set_right(tmp_path: Path) -> None:
    """A machine that starts with its clock hours ahead would be no CA to anybody for as long as it was ahead."""
    clock = Shifted()
    clock.ahead = timedelta(hours=3)
    async with served(tmp_path, clock=clock) as ca:
        clock.ahead = timedelta(0)
        certificate = await anyio.to_thread.run_sync(presented, ca)
        assert certificate.not_valid_before_utc <= datetime.now(UTC)


async def test_silence_and_plain_text_cost_others_nothing(ca: Served) -> None:
    host, port = ca.address.rsplit(":", 1)
    async with await anyio.connect_tcp(host, int(port)), await anyio.connect_tcp(host, int(port)) as plain:
        await plain.send(b"GET / HTTP/1.1\r\n\r\n")
        await ca.ask(ca.issuer.token())


async def test_connections_that_say_nothing_take_little_memory(ca: Served) -> None:
    """Anybody can open thousands: with what asyncio sets aside for each they would take more than a gigabyte."""
    host, port = ca.address.rsplit(":", 1)
    async with AsyncExitStack() as open_until_the_end:
        tracemalloc.start()
        try:
            await ca.ask(ca.issuer.token())
            before, _ = tracemalloc.get_traced_memory()
            for _ in range(100):
                await open_until_the_end.enter_async_context(await anyio.connect_tcp(host, int(port)))
            await ca.ask(ca.issuer.token())  # which is accepted after them
            after, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert after - before < 100 * 64 * 1024


async def test_who_clears_the_directory_of_temporary_files_takes_no_ca_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its socket to gRPC is there: every connection would fail, and nothing would say so."""
    with TemporaryDirectory() as directory:
        monkeypatch.setattr(tempfile, "tempdir", directory)
        async with served(tmp_path) as ca:
            await ca.ask(ca.issuer.token())
            clear(Path(directory))
            await ca.ask(ca.issuer.token())


def clear(directory: Path) -> None:
    (own,) = directory.iterdir()
    shutil.rmtree(own)


async def test_more_requests_than_fit_are_sent_away_and_the_rest_served(tmp_path: Path) -> None:
    outcomes: list[grpc.StatusCode] = []

    async def attempt(channel: grpc.aio.Channel, token: str) -> None:
        try:
            await ask(channel, token)
        except grpc.aio.AioRpcError as error:
            outcomes.append(error.code())
        else:
            outcomes.append(grpc.StatusCode.OK)

    async with (
        served(tmp_path, signer=RSA_ROOT, more="limits: {at_once: 1}") as ca,
        ca.connected() as channel,
    ):
        async with anyio.create_task_group() as tasks:
            for _ in range(20):
                tasks.start_soon(attempt, channel, ca.issuer.token())
        await ask(channel, ca.issuer.token())  # there is room again
    assert set(outcomes) == {grpc.StatusCode.OK, grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert len(ca.audit) == 21


async def test_connections_beyond_the_limit_are_closed_until_there_is_room(tmp_path: Path) -> None:
    async with served(tmp_path, more="limits: {connections: 1}") as ca:
        async with ca.connected() as channel:
            await ask(channel, ca.issuer.token())
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await ca.ask(ca.issuer.token())
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        with anyio.fail_after(10):
            while not await is_answered(ca):
                pass


async def is_answered(ca: Served) -> bool:
    try:
        await ca.ask(ca.issuer.token())
    except grpc.aio.AioRpcError:
        return False
    return True


async def test_a_machine_without_a_descriptor_left_takes_connections_again_when_it_has_one(tmp_path: Path) -> None:
    """Whoever opens many connections must not be able to end the CA."""

    class Exhausted(socket.socket):
        left = 1

        def accept(self) -> Any:
            if self.left:
                self.left -= 1
                raise OSError(errno.EMFILE, "Too many open files")
            return super().accept()

    with Exhausted() as listener, recorded() as events:
        listener.setblocking(False)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        acceptor = Acceptor(no_context, lambda: datetime.now(UTC), 10)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(acceptor.run, listener, [tmp_path / "nobody"])
            async with await anyio.connect_tcp(*listener.getsockname()) as stream:
                with anyio.fail_after(10), pytest.raises(anyio.EndOfStream):
                    await stream.receive()
            tasks.cancel_scope.cancel()
        assert events.named("not_accepted")[0]["cause"] == "Too many open files"
        assert events.named("connection_failed")


async def test_who_connects_and_says_nothing_is_let_go(tmp_path: Path) -> None:
    """Silence costs nothing to whoever keeps it, and a connection's place to everybody else."""
    acceptor = Acceptor(
        lambda: ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER),
        lambda: datetime.now(UTC),
        10,
        handshake=0.1,
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(acceptor.run, listener, [tmp_path / "nobody"])
            async with await anyio.connect_tcp(*listener.getsockname()) as stream:
                with anyio.fail_after(10), pytest.raises(anyio.EndOfStream):
                    await stream.receive()
            tasks.cancel_scope.cancel()


def no_context() -> ssl.SSLContext:
    raise SignerError("there is no certificate")


async def test_a_connection_ends_with_its_clients_certificate(ca: Served) -> None:
    """A client that renewed in time comes back with the new one, and is not refused on the old connection."""
    short = await ca.ask(ca.issuer.token(), seconds=2)
    host, port = ca.address.rsplit(":", 1)
    context = short.context(ca.directory)
    context.set_alpn_protocols(["h2"])
    stream = await anyio.connect_tcp(host, int(port), ssl_context=context, tls_standard_compatible=False)
    async with stream:
        await stream.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\4\0\0\0\0\0")  # a client that has nothing to ask
        with anyio.fail_after(10), suppress(anyio.EndOfStream):
            while True:
                await stream.receive()
    assert datetime.now(UTC) >= short.leaf.not_valid_after_utc


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_no_session_is_resumed(ca: Served, version: ssl.TLSVersion) -> None:
    """It would bring a client certificate back that nobody has looked at since."""
    got = await ca.ask(ca.issuer.token())
    context = got.context(ca.directory)
    context.maximum_version = version
    first = await anyio.to_thread.run_sync(session, ca, context, None)
    again = await anyio.to_thread.run_sync(session, ca, context, first[0])
    assert not again[1]


def session(ca: Served, context: ssl.SSLContext, before: ssl.SSLSession | None) -> tuple[ssl.SSLSession | None, bool]:
    """The session of a connection, and whether it was one from before."""
    host, port = ca.address.rsplit(":", 1)
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((host, int(port))) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1", session=before) as tls,
    ):
        tls.recv(1)  # gRPC's first byte: what the server has to say of sessions came before it
        return tls.session, bool(tls.session_reused)


async def test_what_a_bug_says_goes_to_nobody(tmp_path: Path) -> None:
    """It may quote anything, and is told to the operator by its place alone."""

    def broken() -> SigningSet:
        raise ValueError("planted")

    audit = AuditLog(tmp_path / "audit.log")
    rules = Rules(Authentication(TRUST_DOMAIN, [], mtls=True, tokens=None), {}, 10, 10)
    service = CertificateService(rules, broken, lambda _: Peer("nobody"), audit, SystemClock())
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((service.handler(),))
    server.add_insecure_port(f"unix:{tmp_path / 'grpc'}")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"unix:{tmp_path / 'grpc'}") as channel:
            with recorded() as events, pytest.raises(grpc.aio.AioRpcError) as caught:
                await ask(channel)
    finally:
        await server.stop(None)
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    (told,) = events.named("bug")
    assert told["exception"] == "ValueError"
    assert "planted" not in str(caught.value.details()) + str(told) + (tmp_path / "audit.log").read_text()


async def test_the_audit_log_goes_to_standard_output_unless_told(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    async with served(tmp_path, audit="") as ca:
        got = await ca.ask(ca.issuer.token())
        with pytest.raises(grpc.aio.AioRpcError):
            await ca.ask()
    issued, denied = (json.loads(line) for line in capfd.readouterr().out.splitlines())
    assert (issued["serial"], issued["outcome"]) == (serial_hex(got.leaf), "issued")
    assert denied["outcome"] == "unauthenticated"


async def test_the_audit_log_can_be_moved_away_while_the_ca_runs(ca: Served) -> None:
    """As logrotate does it."""
    await ca.ask(ca.issuer.token())
    (ca.directory / "audit.log").rename(ca.directory / "audit.log.1")
    await ca.ask(ca.issuer.token())
    assert len(ca.audit) == 1
    assert (ca.directory / "audit.log").stat().st_mode & 0o777 == 0o600


async def test_a_client_that_does_not_speak_http2_is_let_go_at_once(ca: Served) -> None:
    host, port = ca.address.rsplit(":", 1)
    context = ssl.create_default_context(cadata=ca.roots.decode())
    with recorded() as events:
        stream = await anyio.connect_tcp(host, int(port), ssl_context=context, tls_standard_compatible=False)
        async with stream:
            with anyio.fail_after(10), pytest.raises(anyio.EndOfStream):
                await stream.receive()
        assert "ALPN" in (await events.wait("connection_failed"))["cause"]
    await ca.ask(ca.issuer.token())


async def test_nothing_is_signed_that_cannot_be_audited(ca: Served) -> None:
    (ca.directory / "audit.log").unlink()
    (ca.directory / "audit.log").mkdir()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ca.ask(ca.issuer.token())
    assert caught.value.code() is grpc.StatusCode.INTERNAL


async def test_a_bad_directory_does_not_start(tmp_path: Path) -> None:
    (tmp_path / "ca.yaml").write_text(
        f"trust_domain: {TRUST_DOMAIN}\nlisten: 127.0.0.1:0\nsigner: {{cacerts: nothing}}\n"
        "callers: {join_tokens: t}\n"
    )
    with pytest.raises(ConfigurationError, match=r"signer\.cacerts"):
        async with serving(load(tmp_path / "ca.yaml"), SystemClock()):
            raise AssertionError


async def test_a_taken_port_does_not_start(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        (tmp_path / "ca.yaml").write_text(
            f"trust_domain: {TRUST_DOMAIN}\nlisten: 127.0.0.1:{port}\nsigner: {{self_signed: r}}\n"
            "callers: {join_tokens: t}\n"
        )
        with pytest.raises(ConfigurationError, match=r"listen: .*; free it or choose another port"):
            async with serving(load(tmp_path / "ca.yaml"), SystemClock()):
                raise AssertionError
