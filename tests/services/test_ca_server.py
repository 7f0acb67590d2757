"""Our CA over real TLS, asked by a real gRPC client: who gets what, who gets nothing, and what is written down."""

import asyncio
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import grpc
import grpc.aio
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding
from fakes.ca_servers import (
    ISSUER,
    METHOD,
    TRUST_DOMAIN,
    WEB,
    Served,
    Shifted,
    ask,
    fresh,
    plug,
    refused,
    served,
    soon,
)
from fakes.events import recorded
from fakes.hierarchy import make_ca
from sds_agent_proto.istio_pb2 import CertificateRequest

from sds_agent.ca import service
from sds_agent.ca.acceptor import UNKNOWN, Peer
from sds_agent.ca.audit import AuditLog
from sds_agent.ca.authentication import Authentication
from sds_agent.ca.books import Ledger, OwnBooks
from sds_agent.ca.server import serving
from sds_agent.ca.service import LARGEST_REQUEST, CertificateService, Rules
from sds_agent.ca.settings import load
from sds_agent.ca.tokens import JoinTokens
from sds_agent.clock import SystemClock
from sds_agent.errors import ConfigurationError
from sds_agent.pki.certificates import subject_alternative_uris, write_pem
from sds_agent.pki.csr import make_csr
from sds_agent.pki.keys import KeyType, generate
from sds_agent.signing.signer import Signer, make_root
from sds_agent.signing.signing_set import SigningSet

NODE = f"spiffe://{TRUST_DOMAIN}/ns/kube-system/sa/node"


RSA_ROOT = "{self_signed: root, key: rsa-2048}"


NODE_AGENTS = f"  node_agents: [{{identity: '{NODE}', may_act_for: ['spiffe://{TRUST_DOMAIN}/ns/default/*']}}]"


@pytest.fixture
async def ca(tmp_path: Path) -> AsyncIterator[Served]:
    async with served(tmp_path, callers=NODE_AGENTS) as it:
        yield it


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
    "128 KiB of extensions": signed(ec.generate_private_key(ec.SECP256R1()), 1 << 17),
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
    """Or else requests that never end, from any caller, would fill the memory, a hundred on every connection."""
    async with ca.connected() as channel:
        begin: grpc.aio.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary(METHOD)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await begin(timeout=10)
    refused(caught.value, grpc.StatusCode.UNAUTHENTICATED, ca, "no proof")


async def test_a_proven_caller_has_to_send_its_request_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has sent until it stops would stay in memory."""
    monkeypatch.setattr(service, "TIMEOUT", 0.1)
    async with served(tmp_path) as ca, ca.connected() as channel:
        proof = (("authorization", f"Bearer {ca.issuer.token()}"),)
        begin: grpc.aio.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary(METHOD)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await begin(metadata=proof, timeout=10)
    refused(caught.value, grpc.StatusCode.INVALID_ARGUMENT, ca, "did not arrive")


async def test_requests_that_do_not_arrive_keep_no_other_caller_out(tmp_path: Path) -> None:
    """They hold no place for work, and give way to the newer ones of their own caller."""
    async with served(tmp_path, more="limits: {at_once: 1}") as ca, ca.connected() as channel:
        proof = (("authorization", f"Bearer {ca.issuer.token(sub='system:serviceaccount:default:slow')}"),)
        begin: grpc.aio.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary(METHOD)
        calls = [begin(metadata=proof, timeout=30) for _ in range(service.MOST_UNREAD_OF_ONE + 1)]
        codes = [asyncio.ensure_future(call.code()) for call in calls]
        (gone,), _ = await asyncio.wait(codes, timeout=20, return_when=asyncio.FIRST_COMPLETED)
        assert gone.result() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await ask(channel, ca.issuer.token())
        assert [line["outcome"] for line in ca.audit] == ["exhausted", "issued"]
        for call in calls:
            call.cancel()
        await asyncio.wait(codes)


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
    """The signer has expired, and each caller gets that as the reason."""
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
        with recorded() as events:
            for _ in range(3):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await ask(channel, good)
                assert caught.value.code() is grpc.StatusCode.INTERNAL
        (reported,) = events.named("cannot_sign")  # and not for each call of a whole fleet
        assert "expired on" in reported["cause"], "the operator has to act"
    outcomes = [line["outcome"] for line in ca.audit]
    denied = ["unauthenticated"] * 3 + ["denied"] + ["invalid"] * (1 + len(BAD_CSRS))
    assert outcomes == ["issued", *denied, *["internal"] * 3]
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


async def test_a_caller_with_a_spent_token_does_not_use_up_the_limit_of_its_machine(tmp_path: Path) -> None:
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


async def test_an_expired_certificate_is_refused_on_a_live_connection(tmp_path: Path) -> None:
    """The handshake was good; TLS never checks again."""
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


class WaitingKey:
    """A stand-in for a slow signer: an RSA key that signs when the test lets it."""

    def __init__(self, key: rsa.RSAPrivateKey) -> None:
        self.begun = asyncio.Event()
        self.go_on = threading.Event()
        self._key = key
        self._loop = asyncio.get_running_loop()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._key, name)

    def sign(self, *arguments: Any) -> bytes:
        self._loop.call_soon_threadsafe(self.begun.set)
        assert self.go_on.wait(10)
        return self._key.sign(*arguments)


rsa.RSAPrivateKey.register(WaitingKey)


async def test_a_request_that_does_not_fit_is_sent_away_and_the_one_in_work_served(tmp_path: Path) -> None:
    key = rsa.generate_private_key(65537, 2048)
    root = make_root(key, TRUST_DOMAIN, datetime.now(UTC), timedelta(days=1))
    waiting = WaitingKey(key)
    signing = SigningSet(Signer(root.certificate, waiting), (), (root.certificate,))  # type: ignore[arg-type]
    tokens = JoinTokens(tmp_path / "tokens")
    tokens.prepare()
    rules = Rules(Authentication(TRUST_DOMAIN, [], mtls=False, tokens=tokens), {}, 10)
    books = OwnBooks(Ledger(AuditLog(tmp_path / "audit.log"), at_once=1, per_caller=10))
    service = CertificateService(rules, lambda: signing, Nowhere(), books, SystemClock())
    first, second = (tokens.make(WEB, datetime.now(UTC) + timedelta(minutes=5)) for _ in range(2))
    async with on_a_socket(service, tmp_path / "grpc") as channel:
        served_one = asyncio.create_task(ask(channel, first))
        await waiting.begun.wait()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(channel, second)
        waiting.go_on.set()
        await served_one
        await ask(channel, second)  # there is room again, and the refusal has spent no token
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "the CA is busy with other requests" in str(caught.value.details())


@asynccontextmanager
async def on_a_socket(service: CertificateService, path: Path) -> AsyncIterator[grpc.aio.Channel]:
    """A connection to the service without the rest of the server."""
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((service.handler(),))
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    try:
        async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
            yield channel
    finally:
        await server.stop(None)


class Nowhere:
    """A stand-in for connections of which nothing is known."""

    def peer(self, _: str) -> Peer:
        return UNKNOWN

    def proven(self, _: str, caller: str) -> None:
        assert caller == WEB


class Remembered(Nowhere):
    """The same, with the callers for which a connection may stay."""

    def __init__(self) -> None:
        self.callers = list[str]()

    def proven(self, _: str, caller: str) -> None:
        self.callers.append(caller)


async def test_only_who_gets_a_certificate_keeps_its_connection(tmp_path: Path) -> None:
    """Who has a token that was used already would otherwise have connections in the place of the machine's own."""
    key = generate(KeyType.EC_P256)
    root = make_root(key, TRUST_DOMAIN, datetime.now(UTC), timedelta(days=1))
    tokens, connections = JoinTokens(tmp_path / "tokens"), Remembered()
    tokens.prepare()
    rules = Rules(Authentication(TRUST_DOMAIN, [], mtls=False, tokens=tokens), {}, 10)
    books = OwnBooks(Ledger(AuditLog(tmp_path / "audit.log"), at_once=1, per_caller=10))
    signing = SigningSet(root, (), (root.certificate,))
    service = CertificateService(rules, lambda: signing, connections, books, SystemClock())
    spent, unused = (tokens.make(WEB, datetime.now(UTC) + timedelta(minutes=5)) for _ in range(2))
    tokens.spend(tokens.find(spent), generate(KeyType.EC_P256).public_key())
    bad: list[tuple[str, dict[str, Any]]] = [
        (spent, {}),
        (unused, {"csr": "garbage"}),
        (unused, {"metadata": {"ImpersonatedIdentity": NODE}}),
    ]
    async with on_a_socket(service, tmp_path / "grpc") as channel:
        for token, asked in bad:
            with pytest.raises(grpc.aio.AioRpcError):
                await ask(channel, token, **asked)
        assert connections.callers == []
        await ask(channel, unused)
        assert connections.callers == [WEB]


async def test_no_caller_gets_the_words_of_a_bug(tmp_path: Path) -> None:
    """It may quote anything; the log names its place alone."""

    def broken() -> SigningSet:
        raise ValueError("planted")

    books = OwnBooks(Ledger(AuditLog(tmp_path / "audit.log"), at_once=10, per_caller=10))
    rules = Rules(Authentication(TRUST_DOMAIN, [], mtls=True, tokens=None), {}, 10)
    service = CertificateService(rules, broken, Nowhere(), books, SystemClock())
    async with on_a_socket(service, tmp_path / "grpc") as channel:
        with recorded() as events, pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(channel)
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    (reported,) = events.named("fault", part="certificate service", type="ValueError")
    assert reported["frames"][0].endswith(" test_no_caller_gets_the_words_of_a_bug.<locals>.broken")
    assert "planted" not in str(caught.value.details()) + str(reported) + (tmp_path / "audit.log").read_text()


async def test_the_start_warns_of_settings_that_reach_further_than_they_seem(tmp_path: Path) -> None:
    """An issuer that may name node agents, and a node agent that may be another one, may be everybody."""
    node, other = f"spiffe://{TRUST_DOMAIN}/node", f"spiffe://{TRUST_DOMAIN}/other"
    agents = f"  node_agents: [{{identity: {node}, may_act_for: ['spiffe://{TRUST_DOMAIN}/*']}}"
    agents += f", {{identity: {other}, may_act_for: ['{WEB}']}}]"
    with recorded() as events:
        async with served(tmp_path, jwks="jwks.json, claim: spiffe_id", callers=agents):
            pass
        assert events.named("issuer_names_anybody", level="warning", issuer=ISSUER)
        assert events.named("node_agent_covers_another", level="warning", node_agent=node, other=other)
    with recorded() as events:
        for bounded in (f"jwks.json, claim: spiffe_id, allow: ['{WEB}']", "jwks.json"):
            async with served(tmp_path, jwks=bounded, callers=agents.replace("/*", "/ns/*")):
                pass
        assert not events.named("issuer_names_anybody") + events.named("node_agent_covers_another")


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
