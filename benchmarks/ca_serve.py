"""What a certificate of `sds-agent ca serve` costs: its processor time, the time that callers wait, and its memory.

    python benchmarks/ca_serve.py
    python benchmarks/ca_serve.py --signer ec-p256 --rounds 20 --beside CHECKOUT
    python benchmarks/ca_serve.py --peer NAME=ADDRESS:PID --peer-roots FILE --peer-token FILE [--peer-name HOST]

Callers ask over TLS, each on a connection of its own that it keeps, or with a new one for each request; one of them or
eight at once. They prove themselves by a JSON Web Token (RS256, as Kubernetes signs its own), by the certificate of the
connection, or by a join token, a new one for each request. Each sends one and the same CSR again and again.

The servers answer in turn, a burst of requests each, so that other work on the machine slows all alike. None has two
bursts one after the other, as the second one would be cheaper, by a tenth where connections are new. `floor` is a bare
gRPC server that signs and checks nothing else (ca_floor.py). --beside adds the `ca serve` of another checkout,
--workers one of several processes, as the callers take a core themselves, and --without-grpc a prototype with HTTP/2
of its own (ca_http2.py).
--peer adds another CA with Istio's protocol that runs already, such as istiod; it takes part where the signer's key is
of the same kind as its own, by token and by certificate. Each server with the first kind of signer signs --many
certificates at its end.

On a machine that does other things, those share caches and cores with the servers. As root, run it before them, with
the peer:

    chrt --rr 5 python benchmarks/ca_serve.py
"""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentTypeError, Namespace
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Self

os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc
import grpc.aio
import jwt
from bench import processes, program
from bench.figures import FLOOR, Figure, Row
from bench.program import MissingError
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from jwt.algorithms import RSAAlgorithm
from msgspec import Struct
from sds_agent_proto.istio_pb2 import CertificateRequest, CertificateResponse

from sds_agent.ca.tokens import JoinTokens
from sds_agent.pki.certificates import read_pem
from sds_agent.pki.csr import make_csr
from sds_agent.pki.keys import KeyType, generate, to_pkcs8_pem

METHOD = "/istio.v1.auth.IstioCertificateService/CreateCertificate"
NAME = "localhost"
URI = "spiffe://demo.example/ns/default/sa/web"
ISSUER = "https://kubernetes.default.svc"
AUDIENCE = "istio-ca"
OURS = "sds-agent"
KINDS = ("ec-p256", "rsa-2048")
TOKEN, CERTIFICATE, JOIN_TOKEN = "token", "certificate", "join token"
KEPT, NEW = "kept", "new"
WARM_UP = 2
"""Rounds that come first and do not count."""
TIMEOUT = 30
CONFIG = """
trust_domain: demo.example
listen: 127.0.0.1:0
server_names: [localhost]
signer: {{self_signed: root, key: {kind}}}
callers:
  join_tokens: tokens
  jwt: [{{issuer: "{issuer}", audience: {audience}, jwks: jwks.json}}]
limits: {{per_caller: 1000000}}
audit: audit.log
log: {{format: json}}
"""

Metadata = tuple[tuple[str, str], ...]


class Case(Struct, frozen=True):
    """What is asked how: the kinds of the CA's key and of the callers', their proof, how many ask at once, and whether
    they keep their connections.
    """

    signer: str
    key: str
    proof: str
    callers: int
    connection: str = KEPT

    @property
    def named(self) -> dict[str, str | int]:
        """For a row."""
        return {each: getattr(self, each) for each in self.__struct_fields__}


class Server(Struct, frozen=True):
    """One that is measured. `join` makes a join token; None where it takes none."""

    name: str
    address: str
    pid: int
    roots: bytes
    token: str = ""
    host: str = NAME
    join: Callable[[], str] | None = None

    def takes(self, case: Case) -> bool:
        """Whether it can be asked so."""
        return case.proof != JOIN_TOKEN or self.join is not None or self.name == FLOOR

    def channel(self, identity: tuple[bytes, bytes] | None = None) -> grpc.aio.Channel:
        """A connection, which shows a certificate with its key where it is given one."""
        options = [("grpc.ssl_target_name_override", self.host), ("grpc.use_local_subchannel_pool", 1)]
        credentials = grpc.ssl_channel_credentials(self.roots, *(identity or ()))
        return grpc.aio.secure_channel(self.address, credentials, options=options)

    def metadata(self, case: Case) -> Metadata:
        """The proof in a request's headers."""
        token = self.token
        if case.proof == CERTIFICATE or self.name == FLOOR:
            return ()
        if case.proof == JOIN_TOKEN and self.join is not None:
            token = self.join()
        return (("authorization", f"Bearer {token}"),)


class Caller:
    """Asks one server in one way."""

    def __init__(self, server: Server, case: Case) -> None:
        self._server, self._case = server, case
        key = generate(KeyType(case.key))
        self._data = CertificateRequest(csr=make_csr(key, URI).decode(), validity_duration=3600).SerializeToString()
        self._identity: tuple[bytes, bytes] | None = None
        self._private = to_pkcs8_pem(key)
        self._channel: grpc.aio.Channel | None = None

    async def __aenter__(self) -> Self:
        if self._case.proof == CERTIFICATE and self._server.name != FLOOR:
            by_token = Case(self._case.signer, self._case.key, TOKEN, 1)
            async with self._server.channel() as channel:
                answer = await self.ask(channel, self._server.metadata(by_token))
            self._identity = self._private, "".join(answer[:-1]).encode()
        if self._case.connection == KEPT:
            self._channel = self._server.channel(self._identity)
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._channel is not None:
            await self._channel.close()

    def metadata(self, count: int) -> list[Metadata]:
        """The proofs for so many requests, made beforehand."""
        return [self._server.metadata(self._case) for _ in range(count)]

    async def ask_each(self, proofs: Iterable[Metadata]) -> None:
        """Ask again and again."""
        for metadata in proofs:
            if self._channel is not None:
                await self.ask(self._channel, metadata)
            else:
                async with self._server.channel(self._identity) as channel:
                    await self.ask(channel, metadata)

    async def ask(self, channel: grpc.aio.Channel, metadata: Metadata) -> Sequence[str]:
        """Ask once; the elements of the answer."""
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(METHOD)
        return CertificateResponse.FromString(await call(self._data, metadata=metadata, timeout=TIMEOUT)).cert_chain


class Burst(Struct, frozen=True):
    """What a certificate cost in one burst, in milliseconds."""

    processor: float
    wall: float


async def burst(server: Server, callers: Sequence[Caller], requests: int) -> Burst:
    """Let the callers ask at once, so often in all."""
    each = max(1, requests // len(callers))
    proofs = [caller.metadata(each) for caller in callers]
    before, began = processes.clock_ms(server.pid), time.perf_counter()
    await asyncio.gather(*(caller.ask_each(given) for caller, given in zip(callers, proofs, strict=True)))
    wall, count = (time.perf_counter() - began) * 1000, each * len(callers)
    return Burst((processes.clock_ms(server.pid) - before) / count, wall / count)


@asynccontextmanager
async def calling(server: Server, case: Case) -> AsyncIterator[list[Caller]]:
    """The callers of a case."""
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(Caller(server, case)) for _ in range(case.callers)]


async def in_turn(case: Case, servers: Sequence[Server], requests: int, rounds: int) -> list[Row]:
    """A row for each server."""
    found: dict[str, list[Burst]] = {server.name: [] for server in servers}
    async with AsyncExitStack() as stack:
        asking = [(server, await stack.enter_async_context(calling(server, case))) for server in servers]
        for number in range(-WARM_UP, rounds):
            for server, callers in asking:
                taken = await burst(server, callers, requests)
                if number >= 0:
                    found[server.name].append(taken)
    return [
        Row(
            server.name,
            case.named,
            (
                Figure("processor time a certificate", "ms", tuple(each.processor for each in found[server.name])),
                Figure("time a certificate", "ms", tuple(each.wall for each in found[server.name])),
            ),
        )
        for server in servers
    ]


async def many(case: Case, server: Server, count: int) -> Row:
    """Its memory before and after so many certificates."""
    before = resident_mb(server)
    async with calling(server, case) as callers:
        taken = await burst(server, callers, count)
        after = resident_mb(server)
    figures = (
        Figure("resident memory before", "MB", (before,)),
        Figure("resident memory at the end", "MB", (after,)),
        Figure("processor time a certificate", "ms", (taken.processor,)),
        Figure("time a certificate", "ms", (taken.wall,)),
    )
    return Row(server.name, {**case.named, "certificates": count}, figures)


def resident_mb(server: Server) -> float:
    """Of all its processes together."""
    return sum(processes.resident_mb(pid) for pid in processes.family(server.pid))


@contextmanager
def listening(command: Sequence[str], checkout: Path | None = None) -> Iterator[tuple[str, int]]:
    """Run a server, of this checkout unless another is given; its address and process id. Raises MissingError."""
    path = {} if checkout is None else {"PYTHONPATH": f"{checkout / 'src'}{os.pathsep}{checkout / 'proto_gen'}"}
    environment = program.environment(path)
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment) as server:
        try:
            assert server.stderr is not None
            for line in server.stderr:
                event = json.loads(line) if line.startswith("{") else {}  # a library's own words may come between
                if event.get("event") == "listening":
                    yield event["address"], server.pid
                    return
            raise MissingError(f"{' '.join(command)} does not serve")
        finally:
            server.terminate()


@contextmanager
def floor(directory: Path, kind: str) -> Iterator[Server]:
    """The bare server."""
    directory.mkdir()
    command = [sys.executable, str(processes.HERE / "ca_floor.py"), str(directory), kind]
    with listening(command) as (address, pid):
        yield Server(FLOOR, address, pid, (directory / "roots.pem").read_bytes())


@contextmanager
def ours(
    name: str,
    directory: Path,
    kind: str,
    checkout: Path | None = None,
    *,
    workers: int | None = None,
    command: Sequence[str] = ("-m", "sds_agent", "ca", "serve"),
) -> Iterator[Server]:
    """`ca serve`, with an issuer of tokens."""
    directory.mkdir()
    issuer = rsa.generate_private_key(65537, 2048)
    key_set = {"keys": [{**json.loads(RSAAlgorithm.to_jwk(issuer.public_key())), "kid": "one", "use": "sig"}]}
    (directory / "jwks.json").write_text(json.dumps(key_set))
    more = "" if workers is None else f"workers: {workers}\n"
    (directory / "ca.yaml").write_text(CONFIG.format(kind=kind, issuer=ISSUER, audience=AUDIENCE) + more)
    tokens = JoinTokens(directory / "tokens")
    tokens.prepare()
    expires = datetime.now(UTC) + timedelta(hours=2)
    claims = {"iss": ISSUER, "aud": [AUDIENCE], "sub": "system:serviceaccount:default:web", "exp": expires}
    token = jwt.encode(claims, issuer, "RS256", headers={"kid": "one"})
    with listening([sys.executable, *command, f"{directory}/ca.yaml"], checkout) as (address, pid):
        roots = (directory / "root" / "roots.pem").read_bytes().partition(b"-----BEGIN PRIVATE")[0]
        yield Server(name, address, pid, roots, token, join=lambda: tokens.make(URI, expires))


def peer_address(text: str) -> tuple[str, str, int]:
    """Read NAME=ADDRESS:PID; without a name it is called `peer`. Raises ArgumentTypeError."""
    name, place = program.label(text)
    address, _, pid = place.rpartition(":")
    if ":" not in address or not pid.isdecimal():
        raise ArgumentTypeError(f"{text!r} is not NAME=ADDRESS:PID, such as 'istiod 1.31=127.0.0.1:15012:4711'")
    if not Path(f"/proc/{pid}").is_dir():
        raise ArgumentTypeError(f"there is no process {pid}")
    return name or "peer", address, int(pid)


async def peers(arguments: Namespace) -> dict[str, Server]:
    """The peer, by the kind of its CA's key: that of the first certificate's signature. Raises MissingError."""
    if arguments.peer is None:
        return {}
    if arguments.peer_roots is None or arguments.peer_token is None:
        raise MissingError("--peer needs --peer-roots and --peer-token: the files that a caller of it has")
    (name, address, pid), token = arguments.peer, arguments.peer_token.read_text().strip()
    found = Server(name, address, pid, arguments.peer_roots.read_bytes(), token, arguments.peer_name)
    async with Caller(found, Case("", "ec-p256", TOKEN, 1)) as caller, found.channel() as channel:
        try:
            answer = await caller.ask(channel, found.metadata(Case("", "ec-p256", TOKEN, 1)))
        except grpc.aio.AioRpcError as error:
            raise MissingError(f"the peer at {address} gives no certificate: {error.details()}") from error
    issuer = read_pem("".join(answer[1:]).encode())[0].public_key()
    return {"ec-p256" if isinstance(issuer, ec.EllipticCurvePublicKey) else "rsa-2048": found}


def cases(signer: str, keys: Iterable[str], *, small: bool) -> Iterator[Case]:
    """What is measured with one kind of signer."""
    for key in keys:
        for proof in (TOKEN, CERTIFICATE, JOIN_TOKEN):
            for callers in (1, 8):
                yield Case(signer, key, proof, callers)
    if not small:
        for proof in (TOKEN, CERTIFICATE):
            yield Case(signer, "ec-p256", proof, 8, NEW)


async def measure(arguments: Namespace) -> list[Row]:
    """All rows."""
    rows = list[Row]()
    small = arguments.small
    requests, rounds = (16, 1) if small else (arguments.requests, arguments.rounds)
    signers = arguments.signer or (KINDS[:1] if small else KINDS)
    keys = arguments.key or (KINDS[:1] if small else KINDS)
    chosen = {each: getattr(arguments, each) for each in ("proof", "callers", "connection")}
    running = await peers(arguments)
    for kind in signers:
        with tempfile.TemporaryDirectory() as name, ExitStack() as stack:
            started = [
                stack.enter_context(floor(Path(name) / "floor", kind)),
                stack.enter_context(ours(OURS, Path(name) / "ours", kind)),
            ]
            if arguments.beside is not None:
                started.append(stack.enter_context(ours("beside", Path(name) / "beside", kind, arguments.beside)))
            if arguments.workers is not None:
                named = f"{OURS}, {arguments.workers} workers"
                started.append(
                    stack.enter_context(ours(named, Path(name) / "workers", kind, workers=arguments.workers))
                )
            if arguments.without_grpc:
                own = (str(processes.HERE / "ca_http2.py"),)
                named = f"{OURS}, prototype without gRPC"
                started.append(stack.enter_context(ours(named, Path(name) / "http2", kind, command=own)))
            started += [running[kind]] if kind in running else []
            for case in cases(kind, keys, small=small):
                if all(value is None or getattr(case, each) == value for each, value in chosen.items()):
                    rows += await in_turn(case, [each for each in started if each.takes(case)], requests, rounds)
            count = 64 if small else arguments.many
            if count and kind == signers[0]:
                case = Case(kind, "ec-p256", CERTIFICATE, 8)
                rows += [await many(case, each, count) for each in started]
    return rows


def main() -> None:
    """Measure and print."""
    parser = program.parser(__doc__)
    parser.add_argument("--signer", choices=KINDS, action="append", help="the kinds of the CA's key (default: both)")
    parser.add_argument("--key", choices=KINDS, action="append", help="the kinds of the callers' keys (default: both)")
    parser.add_argument("--proof", choices=(TOKEN, CERTIFICATE, JOIN_TOKEN), help="this proof alone")
    parser.add_argument("--callers", type=int, choices=(1, 8), help="so many callers alone")
    parser.add_argument("--connection", choices=(KEPT, NEW), help="this kind of connection alone")
    parser.add_argument("--requests", type=int, default=160, help="requests of a burst (160)")
    parser.add_argument("--rounds", type=int, default=7, help="bursts for each server (7)")
    parser.add_argument("--many", type=int, default=100_000, help="for the memory (100000; 0 for none)")
    parser.add_argument("--workers", type=int, metavar="N", help="a server with so many workers answers too")
    parser.add_argument("--without-grpc", action="store_true", help="a prototype with HTTP/2 of its own answers too")
    parser.add_argument("--beside", type=Path, metavar="CHECKOUT", help="another checkout, whose server answers too")
    parser.add_argument("--peer", type=peer_address, metavar="NAME=ADDRESS:PID", help="a CA with Istio's protocol")
    parser.add_argument("--peer-roots", type=Path, metavar="FILE", help="what its callers trust, in PEM")
    parser.add_argument("--peer-token", type=Path, metavar="FILE", help="a token that it takes")
    parser.add_argument("--peer-name", default="istiod.istio-system.svc", metavar="HOST", help="of its certificate")
    arguments = parser.parse_args()
    program.main(__doc__, arguments, lambda: asyncio.run(measure(arguments)))


if __name__ == "__main__":
    main()
