"""Our CA server inside a test, and what its callers need: a real gRPC client over real TLS, tokens, their issuer."""

import json
import ssl
from collections.abc import AsyncIterator, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import jwt
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from fakes.hierarchy import Ca, Key, make_ca
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm
from sds_agent_proto.istio_pb2 import CertificateRequest, CertificateResponse

from sds_agent.ca.server import serving
from sds_agent.ca.settings import load
from sds_agent.ca.tokens import JoinTokens
from sds_agent.clock import Clock, SystemClock
from sds_agent.pki.certificates import read_pem, write_pem
from sds_agent.pki.csr import make_csr
from sds_agent.pki.keys import KeyType, PrivateKey, generate, to_pkcs8_pem
from sds_agent.signing.self_signed import ROOTS

METHOD = "/istio.v1.auth.IstioCertificateService/CreateCertificate"
TRUST_DOMAIN = "demo.example"
WEB = f"spiffe://{TRUST_DOMAIN}/ns/default/sa/web"
ISSUER = "https://kubernetes.default.svc"
AUDIENCE = "istio-ca"
TIMEOUT = 10.0
Metadata = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Identity:
    """A key, and the certificates that a CA answered with."""

    key: PrivateKey = field(repr=False)
    elements: tuple[str, ...]

    @property
    def leaf(self) -> x509.Certificate:
        return read_pem(self.elements[0].encode())[0]

    @property
    def roots(self) -> bytes:
        return self.elements[-1].encode()

    def credentials(self, roots: bytes) -> grpc.ChannelCredentials:
        """For a connection that shows this certificate."""
        chain = "".join(self.elements[:-1]).encode()
        return grpc.ssl_channel_credentials(roots, to_pkcs8_pem(self.key), chain)

    def context(self, directory: Path) -> ssl.SSLContext:
        """The same for Python's TLS, which reads a certificate from a file alone."""
        pem = directory / "identity.pem"
        pem.touch(0o600)
        pem.write_bytes("".join(self.elements[:-1]).encode() + to_pkcs8_pem(self.key))
        context = ssl.create_default_context(cadata=self.elements[-1])
        context.load_cert_chain(pem)
        return context


POLL = 1.0
"""Seconds between two checks of the CA server's files."""


class Shifted(SystemClock):
    """The machine's clocks, but each is ahead by as much as a test says, and files are checked more often."""

    ahead = timedelta(0)
    """The wall clock."""
    lasted = timedelta(0)
    """The clock that nobody sets."""

    async def sleep(self, seconds: float) -> None:
        """Sleep on the monotonic clock; between two checks of a file a twentieth of the time."""
        await super().sleep(seconds / 20 if seconds <= POLL else seconds)

    def now(self) -> datetime:
        """The wall clock."""
        return super().now() + self.ahead

    def passed(self) -> float:
        """See `Clock.passed`."""
        return super().passed() + self.lasted.total_seconds()


@cache
def rsa_key() -> rsa.RSAPrivateKey:
    """One for all issuers: to make one takes longer than most of what is done with it."""
    return rsa.generate_private_key(65537, 2048)


class TokenIssuer:
    """A stand-in for a kube-apiserver: its keys, as a key set and as tokens. All but the RSA key are of its own."""

    def __init__(self) -> None:
        self.keys: dict[str, Any] = {
            "ES256": ec.generate_private_key(ec.SECP256R1()),
            "RS256": rsa_key(),
            "EdDSA": ed25519.Ed25519PrivateKey.generate(),
        }

    def key_set(self) -> bytes:
        kinds: dict[str, Any] = {"ES256": ECAlgorithm, "RS256": RSAAlgorithm, "EdDSA": OKPAlgorithm}
        keys = [
            {**json.loads(kinds[name].to_jwk(key.public_key())), "kid": name, "use": "sig"}
            for name, key in self.keys.items()
        ]
        return json.dumps({"keys": keys}).encode()

    def token(self, algorithm: str = "ES256", key: Any = None, **claims: Any) -> str:
        """A good token, except for `claims`; a claim that is None is left out."""
        now = datetime.now(UTC)
        good: dict[str, object] = {
            "iss": ISSUER,
            "aud": [AUDIENCE],
            "sub": "system:serviceaccount:default:web",
            "exp": now + timedelta(minutes=5),
            "nbf": now,
        }
        payload = {name: value for name, value in {**good, **claims}.items() if value is not None}
        return jwt.encode(payload, key or self.keys[algorithm], algorithm, headers={"kid": algorithm})


@dataclass(frozen=True)
class Served:
    """A running CA server: its address, its directory, and the roots that its callers trust."""

    address: str
    directory: Path
    issuer: TokenIssuer
    roots: bytes

    @property
    def audit(self) -> list[dict[str, str]]:
        """The audit log so far."""
        path = self.directory / "audit.log"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @property
    def tokens(self) -> JoinTokens:
        return JoinTokens(self.directory / "tokens")

    def join_token(self, spiffe_id: str = WEB, ttl: timedelta = timedelta(minutes=5)) -> str:
        return self.tokens.make(spiffe_id, datetime.now(UTC) + ttl)

    @asynccontextmanager
    async def connected(self, identity: Identity | None = None) -> AsyncIterator[grpc.aio.Channel]:
        """Connect, with a client certificate or without."""
        plain = grpc.ssl_channel_credentials(self.roots)
        credentials = plain if identity is None else identity.credentials(self.roots)
        options = [("grpc.ssl_target_name_override", "localhost"), ("grpc.use_local_subchannel_pool", 1)]
        async with grpc.aio.secure_channel(self.address, credentials, options=options) as channel:
            yield channel

    async def ask(self, token: str | None = None, identity: Identity | None = None, **asked: Any) -> Identity:
        """Connect and ask once."""
        async with self.connected(identity) as channel:
            return await ask(channel, token, **asked)


async def ask(
    channel: grpc.aio.Channel,
    token: str | None = None,
    *,
    csr: str | None = None,
    key: PrivateKey | None = None,
    uri: str = WEB,
    seconds: int = 3600,
    metadata: Mapping[str, Any] | None = None,
    headers: Iterable[tuple[str, str]] = (),
) -> Identity:
    """Ask for a certificate on that connection. Raises AioRpcError."""
    key = key or generate(KeyType.EC_P256)
    request = CertificateRequest(csr=make_csr(key, uri).decode() if csr is None else csr, validity_duration=seconds)
    if metadata is not None:
        request.metadata.update(dict(metadata))
    sent = (*headers, *((("authorization", f"Bearer {token}"),) if token is not None else ()))
    call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(METHOD)
    data = await call(request.SerializeToString(), metadata=sent, timeout=TIMEOUT)
    answer = CertificateResponse.FromString(data)
    assert not answer.root_cert, "a proposal that no client of Istio's reads"
    return Identity(key, tuple(answer.cert_chain))


def refused(error: grpc.aio.AioRpcError, code: grpc.StatusCode, ca: Served, words: str) -> None:
    """Assert that the call got that status, and that the audit log has one line with the reason."""
    assert error.code() is code, error.details()
    assert words in (error.details() or "")
    assert [line["event"] for line in ca.audit] == ["certificate_refused"]
    assert words in ca.audit[0]["reason"]


@asynccontextmanager
async def served(
    directory: Path,
    *,
    signer: str = "{self_signed: root}",
    jwks: str = "jwks.json",
    callers: str = "",
    audit: str = "audit: audit.log",
    more: str = "",
    clock: Clock | None = None,
    roots: bytes | None = None,
    listen: str = "127.0.0.1:0",
) -> AsyncIterator[Served]:
    """A CA on that directory.

    `jwks` (with what follows it), `callers`, `audit` and `more` are YAML; `roots` are the signer's unless given.
    """
    clock = clock or Shifted()
    issuer = TokenIssuer()
    (directory / "jwks.json").write_bytes(issuer.key_set())
    (directory / "ca.yaml").write_text(
        f"trust_domain: {TRUST_DOMAIN}\nlisten: {listen}\n"
        "server_names: [localhost, 127.0.0.1, istiod.istio-system.svc]\n"
        f"signer: {signer}\n{audit}\n{more}\n"
        "callers:\n"
        f'  jwt: [{{issuer: "{ISSUER}", audience: {AUDIENCE}, jwks: {jwks}}}]\n'
        f"  join_tokens: tokens\n{callers}\n"
    )
    settings = load(directory / "ca.yaml")
    async with serving(settings, clock) as address:
        if roots is None:
            assert settings.signer.self_signed is not None
            roots = _roots(settings.signer.self_signed)
        yield Served(str(address), directory, issuer, roots)


def _roots(directory: Path) -> bytes:
    """The roots that the server made, from the file that also has their keys."""
    return write_pem(read_pem((directory / ROOTS).read_bytes()))


def plug(directory: Path, signer: Any, intermediates: Iterable[Any], roots: Iterable[Any]) -> None:
    """Write a directory in Istio's layout: CAs of `fakes.hierarchy`."""
    directory.mkdir(exist_ok=True)
    (directory / "ca-cert.pem").write_bytes(write_pem([signer.certificate]))
    (directory / "ca-key.pem").write_bytes(to_pkcs8_pem(signer.key))
    (directory / "cert-chain.pem").write_bytes(write_pem(ca.certificate for ca in (*intermediates, *roots)))
    (directory / "root-cert.pem").write_bytes(write_pem(ca.certificate for ca in roots))


def fresh(name: str, issuer: Ca | None = None, key: Key | None = None) -> Ca:
    """A CA that is valid by the machine's clock."""
    now = datetime.now(UTC).replace(microsecond=0)
    return make_ca(name, issuer, key=key, not_before=now - timedelta(days=1), not_after=now + timedelta(days=100))


def soon(ahead: timedelta) -> datetime:
    """So long from now, in whole seconds as certificates have it."""
    return datetime.now(UTC).replace(microsecond=0) + ahead
