"""How many CSRs a second `sds-agent ca serve` signs, beside what signing and gRPC cost alone; and its memory.

    python benchmarks/ca_serve.py [--seconds 5] [--requests 100000] [--signer ec-p256|rsa-2048]
    python benchmarks/ca_serve.py --beside CHECKOUT [--rounds 100] [--connections 8] [--signer ec-p256|rsa-2048]

Eight callers ask at once, over TLS, from two processes of their own; each has a connection of its own and renews with
the certificate that it got for its join token. `a` is a bare loop of `cryptography` that reads and checks the CSR,
signs and encodes; `b` is a bare grpc.aio TLS server (this file, started with --floor) that answers the same bytes
unsigned. The CA does the work of both, so no more than 1/(1/a + 1/b) is possible on one core; at least half of that is
what it should reach.

`--beside` compares this checkout with another one. Their servers answer in turn, in bursts of a fraction of a second,
so that other work on the machine slows both alike. Printed are the processor time that each takes for a request, and
the median of the ratios within a round.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc
import grpc.aio
from cryptography import x509
from sds_agent_proto.istio_pb2 import CertificateRequest, CertificateResponse

from sds_agent.ca.tls import sign_server
from sds_agent.ca.tokens import JoinTokens
from sds_agent.pki.certificates import has_key, read_pem, write_pem
from sds_agent.pki.csr import make_csr
from sds_agent.pki.keys import KeyType, PublicKey, generate, to_pkcs8_pem
from sds_agent.signing.signer import Signer, make_root

METHOD = "/istio.v1.auth.IstioCertificateService/CreateCertificate"
URI = "spiffe://demo.example/ns/default/sa/web"
CALLERS = 8
PROCESSES = 2
BURST = 20
WARM_UP = 3
"""Requests of each caller in one round of a comparison, and rounds that come first and do not count."""
CONFIG = """
trust_domain: demo.example
listen: 127.0.0.1:0
server_names: [localhost]
signer: {{self_signed: root, key: {0}}}
callers: {{join_tokens: tokens}}
limits: {{per_caller: 1000000}}
audit: audit.log
log: {{format: json}}
"""


def bare_signing(signer: Signer, csr: bytes, seconds: float) -> float:
    """Bound a, in certificates a second."""
    root = write_pem([signer.certificate]).decode()
    count, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        request = x509.load_pem_x509_csr(csr)
        key = request.public_key()
        assert request.is_signature_valid
        assert isinstance(key, PublicKey)
        leaf = signer.sign_leaf(key, URI, datetime.now(UTC), timedelta(hours=1))
        CertificateResponse(cert_chain=[write_pem([leaf]).decode(), root]).SerializeToString()
        count += 1
    return count / (time.perf_counter() - started)


async def floor(directory: Path) -> None:
    """Serve for bound b: the same bytes for every request."""
    signer = make_root(generate(KeyType.EC_P256), "demo.example", datetime.now(UTC), timedelta(days=1))
    key = generate(KeyType.EC_P256)
    leaf = sign_server(signer, key.public_key(), ["localhost"], datetime.now(UTC), timedelta(days=1))
    root = write_pem([signer.certificate])
    answer = CertificateResponse(cert_chain=[write_pem([leaf]).decode(), root.decode()]).SerializeToString()

    async def create(_request: bytes, _context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        return answer

    server = grpc.aio.server()
    service, method = METHOD[1:].split("/")
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {method: grpc.unary_unary_rpc_method_handler(create)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
    credentials = grpc.ssl_server_credentials([(to_pkcs8_pem(key), write_pem([leaf]))])
    port = server.add_secure_port("127.0.0.1:0", credentials)
    await server.start()
    (directory / "root.pem").write_bytes(root)
    print(json.dumps({"event": "listening", "address": f"127.0.0.1:{port}"}), file=sys.stderr, flush=True)
    await server.wait_for_termination()


Caller = tuple[grpc.aio.Channel, bytes]
"""A connection on which the caller's certificate proves it, and its request."""


async def joined(address: str, roots: bytes, token: str) -> Caller:
    """Join by a token, and connect with the certificate."""
    key = generate(KeyType.EC_P256)
    data = CertificateRequest(csr=make_csr(key, URI).decode(), validity_duration=3600).SerializeToString()
    options = [("grpc.ssl_target_name_override", "localhost"), ("grpc.use_local_subchannel_pool", 1)]
    credentials = grpc.ssl_channel_credentials(roots)
    async with grpc.aio.secure_channel(address, credentials, options=options) as channel:
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(METHOD)
        answer = await call(data, metadata=(("authorization", f"Bearer {token}"),), timeout=30)
    chain = "".join(CertificateResponse.FromString(answer).cert_chain[:-1]).encode()
    if has_key(read_pem(chain)[0], key.public_key()):  # the bare server's answer is not
        credentials = grpc.ssl_channel_credentials(roots, to_pkcs8_pem(key), chain)
    return grpc.aio.secure_channel(address, credentials, options=options), data


async def ask(callers: Iterable[Caller], more: Callable[[], bool]) -> None:
    """Let all ask at once, each again and again, while `more` says so."""

    async def one(channel: grpc.aio.Channel, data: bytes) -> None:
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(METHOD)
        while more():
            await call(data, timeout=30)

    await asyncio.gather(*(one(channel, data) for channel, data in callers))


async def asking(address: str, roots: bytes, tokens: list[str], seconds: float, requests: int) -> int:
    """Ask from len(tokens) connections at once for so long, or so often in all; how many answers came."""
    until, begun = time.perf_counter() + seconds, 0

    def more() -> bool:
        nonlocal begun
        if begun >= requests or time.perf_counter() >= until:
            return False
        begun += 1
        return True

    await ask([await joined(address, roots, token) for token in tokens], more)
    return begun


@contextmanager
def serving(command: list[str], checkout: Path | None = None) -> Iterator[tuple[str, int]]:
    """Run a server, of this checkout unless another is given; its address and process id."""
    path = None if checkout is None else f"{checkout / 'src'}{os.pathsep}{checkout / 'proto_gen'}"
    environment = None if path is None else os.environ | {"PYTHONPATH": path}
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        assert server.stderr is not None
        for line in server.stderr:
            event = json.loads(line)
            if event["event"] == "listening":
                yield event["address"], server.pid
                return
        sys.exit(f"{command} did not serve")
    finally:
        server.terminate()
        server.wait()


def rate(address: str, roots: bytes, tokens: list[str], seconds: float, requests: int = 1 << 40) -> float:
    """Answers a second to the callers."""
    return sum(count / taken for count, taken in asked(address, roots, tokens, seconds, requests))


def asked(
    address: str, roots: bytes, tokens: list[str], seconds: float, requests: int = 1 << 40
) -> list[tuple[int, float]]:
    """Let the callers ask, divided between PROCESSES; of each process how many answers it got, in how many seconds."""
    shares = [tokens[number::PROCESSES] for number in range(PROCESSES)]
    questions = [json.dumps([address, roots.decode(), share, seconds, requests // PROCESSES]) for share in shares]
    command = [sys.executable, __file__, "--callers"]
    running = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in questions]
    for process, question in zip(running, questions, strict=True):
        assert process.stdin is not None
        process.stdin.write(question)
        process.stdin.close()
    answers = [json.loads(process.stdout.read()) for process in running if process.stdout is not None]
    for process in running:
        process.wait()
    return [(count, taken) for count, taken in answers]


def resident(pid: int) -> float:
    """MB of memory that the process holds."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


def processor_time(pid: int) -> float:
    """Seconds of processor time that all threads of the process took so far: its clock, as clock_getcpuclockid(3)."""
    return time.clock_gettime((~pid << 3) | 2)


class Home:
    """The directory of one CA server."""

    def __init__(self, directory: Path, kind: str) -> None:
        self.directory = directory
        directory.mkdir(exist_ok=True)
        (directory / "ca.yaml").write_text(CONFIG.format(kind))
        self.command = [sys.executable, "-m", "sds_agent", "ca", "serve", f"{directory}/ca.yaml"]
        self._tokens = JoinTokens(directory / "tokens")
        self._tokens.prepare()

    @property
    def roots(self) -> bytes:
        """What its callers trust, once it serves."""
        return (self.directory / "root" / "roots.pem").read_bytes().partition(b"-----BEGIN PRIVATE")[0]

    def joining(self, count: int = CALLERS) -> list[str]:
        """A join token for each of so many callers."""
        expires = datetime.now(UTC) + timedelta(hours=2)
        return [self._tokens.make(f"spiffe://demo.example/caller/{number}", expires) for number in range(count)]


async def milliseconds_a_request(pid: int, callers: Sequence[Caller]) -> float:
    """The processor time that the server takes for each request of a burst: BURST of each caller."""
    left, before = BURST * len(callers), processor_time(pid)

    def more() -> bool:
        nonlocal left
        left -= 1
        return left >= 0

    await ask(callers, more)
    return (processor_time(pid) - before) / (BURST * len(callers)) * 1000


async def compare(other: Path, kind: str, rounds: int, count: int) -> None:
    """Let this checkout and the other one answer `count` callers in turn, and print what each takes."""
    pairs = list[tuple[float, float]]()
    with tempfile.TemporaryDirectory() as name:
        homes = Home(Path(name) / "this", kind), Home(Path(name) / "other", kind)
        with serving(homes[0].command) as this, serving(homes[1].command, other) as that:
            servers = [
                (pid, [await joined(address, home.roots, token) for token in home.joining(count)])
                for (address, pid), home in zip((this, that), homes, strict=True)
            ]
            for number in range(-WARM_UP, rounds):
                order = (0, 1) if number % 2 else (1, 0)
                taken = {each: await milliseconds_a_request(*servers[each]) for each in order}
                if number >= 0:
                    pairs.append((taken[0], taken[1]))
            memory = [resident(pid) for pid, _ in servers]
    ratios = sorted(one / another for one, another in pairs)
    # between these lies the median with 95% certainty (by the signs of the differences)
    edge = min(rounds // 2, round(0.98 * rounds**0.5))
    low, high = ratios[rounds // 2 - edge], ratios[min(rounds - 1, rounds // 2 + edge)]
    for text, costs, mb in zip(("this checkout", str(other)), zip(*pairs, strict=True), memory, strict=True):
        print(f"{kind}: {text}: {statistics.median(costs):.3f} ms of processor time a request, {mb:.1f} MB at the end")
    print(f"{kind}: this / other: {statistics.median(ratios):.3f}, with 95% certainty from {low:.3f} to {high:.3f}")


def measure(kind: str, seconds: float, requests: int) -> None:
    """Measure one kind of signer, and print."""
    with tempfile.TemporaryDirectory() as name:
        home = Home(Path(name), kind)
        directory, joining = home.directory, home.joining
        signer = make_root(generate(KeyType(kind)), "demo.example", datetime.now(UTC), timedelta(days=1))
        a = bare_signing(signer, make_csr(generate(KeyType.EC_P256), URI), seconds)
        with serving([sys.executable, __file__, "--floor", str(directory)]) as (address, _):
            b = rate(address, (directory / "root.pem").read_bytes(), joining(), seconds)
        with serving(home.command) as (address, pid):
            roots = home.roots
            rate(address, roots, joining(), 1)
            first = resident(pid)
            reached = rate(address, roots, joining(), seconds)
            bound = 1 / (1 / a + 1 / b)
            print(f"{kind}: bare signing {a:,.0f}/s, bare gRPC {b:,.0f}/s, together at most {bound:,.0f}/s")
            print(f"{kind}: sds-agent ca serve {reached:,.0f}/s, {reached / bound:.0%} of that (50% is the aim)")
            if requests:
                rate(address, roots, joining(), 3600, requests)
                print(
                    f"{kind}: memory {first:.1f} MB at first, {resident(pid):.1f} MB after {requests:,} more requests"
                )


def main() -> None:
    """Measure, or be a part of the measurement."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--requests", type=int, default=100_000)
    parser.add_argument("--signer", choices=("ec-p256", "rsa-2048"), action="append")
    parser.add_argument("--beside", type=Path, metavar="CHECKOUT")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--connections", type=int, default=CALLERS)
    parser.add_argument("--floor", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--callers", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.floor is not None:
        asyncio.run(floor(arguments.floor))
    elif arguments.callers:
        address, roots, tokens, seconds, requests = json.load(sys.stdin)
        started = time.perf_counter()
        count = asyncio.run(asking(address, roots.encode(), tokens, seconds, requests))
        print(json.dumps([count, time.perf_counter() - started]))
    for kind in () if arguments.floor or arguments.callers else arguments.signer or ("ec-p256", "rsa-2048"):
        if arguments.beside is not None:
            asyncio.run(compare(arguments.beside.resolve(), kind, arguments.rounds, arguments.connections))
        else:
            measure(kind, arguments.seconds, arguments.requests)


if __name__ == "__main__":
    main()
