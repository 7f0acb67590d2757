"""What many identities in one agent cost: memory, time until all are issued, renewals, and what others wait meanwhile.

    python benchmarks/identities.py [--identities 1,100,1000,10000] [--renewing 1000] [--streams 500] [--runs 1]

An agent (`sds-agent run`, embedded CA, all defaults but those named here) starts with so many identities on an empty
state directory. All are issued when its log says `ready`: that is the moment when every name has a secret. The floor is
a bare loop of cryptography in one process: for each identity a key, a CSR, a certificate with the extensions of ours,
signed by one key, and both as PEM. Figures:

- all issued: seconds from exec to `ready`; of the floor, of the loop alone.
- processor: what the agent ran until then beyond an agent with one identity, for each identity.
- memory: resident beyond that of an agent with one identity, a second after the last file was written, for each
  identity, without the bytes of its chain and its key as they are served.
- a renewal: processor time of a running agent for each certificate that its log calls renewed, with the key for it, and
  how many that makes a second on one core. The certificates live for --life seconds, and each is renewed twice.
- a turn of the loop, and late: see bench/agent_lag.py, while --renewing identities renew and --streams streams listen,
  each on a connection of its own to an identity of its own. The floor has a bare asyncio loop on the same cores with
  nothing to do. A small request is a FetchSecrets, sent every 5 ms by another process and timed there.
"""

import argparse
import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from functools import cache
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc.aio
from bench import program
from bench.figures import FLOOR, Figure, Row
from bench.leaf import BOTH_ENDS, KEY_USAGE
from bench.processes import HERE, agent_command, processor_ms, resident_mb, started
from bench.program import MissingError
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from sds_agent_proto import sds_pb2

OURS = "sds-agent"
SERVICE = "/envoy.service.secret.v3.SecretDiscoveryService/"
HALF, SMALL_FRACTION = 0.5, 0.2
"""After which part of its life a certificate is renewed, and for a run that nobody measures with."""
SETTLED = 1.0
"""Seconds after the last file was written, after which memory is read."""
LONGEST = 900.0
"""Seconds for one agent."""
BETWEEN = 0.005
"""Seconds between two small requests."""
CONFIG = """
trust_domain: demo.example
renewal: {{fraction: {fraction}}}
state_dir: {folder}/state
sds:
  socket: {folder}/agent.sock
  limits: {{streams: {streams}}}
workloads:
"""
WORKLOAD = "- {{name: w{0}, spiffe_id: spiffe://demo.example/w{0}, ttl: {1}, key: {2}}}\n"
KEYS: dict[str, Callable[[], ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey]] = {
    "ec-p256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "rsa-2048": lambda: rsa.generate_private_key(public_exponent=65537, key_size=2048),
}


class Span(NamedTuple):
    """Seconds of a certificate's life where renewals are measured, after which fraction of it it is renewed, and how
    often each certificate is while they are watched.
    """

    life: int
    fraction: float
    renewals: int

    @property
    def seconds(self) -> float:
        """For which they are watched."""
        return self.life * self.fraction * self.renewals


class Issued(NamedTuple):
    """Of one agent: seconds from exec until it was ready, its processor time then, and its memory a moment later."""

    seconds: float
    processor: float
    resident: float
    certificate: int


def main() -> None:
    parser = program.parser(__doc__)
    parser.add_argument("--identities", default="1,100,1000,10000", metavar="N,N", help="how many, one after another")
    parser.add_argument("--renewing", type=int, default=1000, metavar="N")
    parser.add_argument("--streams", type=int, default=500, metavar="N")
    parser.add_argument("--runs", type=int, default=1, metavar="N", help="of each agent; 1 unless given")
    parser.add_argument("--life", type=int, default=16, metavar="S", help="of certificates that are renewed; 16 s")
    chosen = parser.parse_args()
    if chosen.small:
        chosen.identities, chosen.renewing, chosen.streams, chosen.life = "1,50", 20, 10, 6
    program.main(__doc__, chosen, lambda: measure(chosen))


def measure(chosen: argparse.Namespace) -> Iterator[Row]:
    """All rows."""
    program.descriptors(3 * chosen.streams + 500)
    numbers = [int(each) for each in chosen.identities.split(",")]
    yield from issuing(numbers, chosen.runs, 0.0 if chosen.small else SETTLED)
    span = Span(chosen.life, SMALL_FRACTION, 1) if chosen.small else Span(chosen.life, HALF, 2)
    yield from renewing("ec-p256", chosen.renewing, span)
    yield from renewing("rsa-2048", max(chosen.renewing // 50, 2), span)
    yield from lag(chosen.renewing, chosen.streams, span)


def issuing(numbers: Sequence[int], runs: int, settled: float) -> Iterator[Row]:
    """From an empty state to all issued, and memory so many seconds later."""
    alone = [issued(1, settled) for _ in range(runs)]
    for number in numbers:
        case: dict[str, str | int] = {"identities": number}
        found, floors = list[Issued](), list[tuple[float, float]]()
        for run in range(runs):
            floors.append(bare_loop(number, "ec-p256"))
            found.append(alone[run] if number == 1 else issued(number, settled))
        yield Row(
            FLOOR,
            case,
            (
                Figure("all issued", "s", tuple(seconds for seconds, _ in floors)),
                Figure("processor", "ms an identity", tuple(1000 * ran / number for _, ran in floors)),
            ),
        )
        figures = [
            Figure("all issued", "s", tuple(each.seconds for each in found)),
            Figure("resident memory", "MB", tuple(each.resident for each in found)),
        ]
        if number > 1:
            each_of = [(one, first) for one, first in zip(found, alone, strict=True)]
            ran = tuple((one.processor - first.processor) / (number - 1) for one, first in each_of)
            memory = tuple(
                (one.resident - first.resident) * 1024 / (number - 1) - one.certificate / 1024 for one, first in each_of
            )
            figures += [Figure("processor", "ms an identity", ran), Figure("memory", "KB an identity", memory)]
        yield Row(OURS, case, tuple(figures))


def issued(number: int, settled: float) -> Issued:
    """An agent from exec until all is issued."""
    with agent(number, "1h", "ec-p256") as running:
        seconds = running.ready()
        processor = processor_ms(running.pid)
        running.settled(number)
        time.sleep(settled)
        return Issued(seconds, processor, resident_mb(running.pid), secret_size(running.socket))


def renewing(key: str, number: int, span: Span) -> Iterator[Row]:
    """Certificates that are all renewed, again and again."""
    case: dict[str, str | int] = {"renewing": number, "key": key}
    _, ran = bare_loop(number, key)
    floor = 1000 * ran / number
    yield Row(FLOOR, case, (Figure("a renewal", "ms", (floor,)), Figure("renewals", "a second", (1000 / floor,))))
    with agent(number, f"{span.life}s", key, fraction=span.fraction) as running:
        running.ready()
        running.count("renewed", number // 2 if span.renewals > 1 else 0)
        before, first = processor_ms(running.pid), running.count("renewed", 0)
        renewals = running.count("renewed", first + span.renewals * number) - first
        took = processor_ms(running.pid) - before
    each = took / renewals
    yield Row(OURS, case, (Figure("a renewal", "ms", (each,)), Figure("renewals", "a second", (1000 / each,))))


def lag(number: int, streams: int, span: Span) -> Iterator[Row]:
    """What others wait while certificates are renewed."""
    case: dict[str, str | int] = {"renewing": number, "streams": streams}
    bare = asyncio.run(bare_lag(span.seconds / 2))
    yield Row(FLOOR, case, _lag_figures(bare))
    with agent(
        number, f"{span.life}s", "ec-p256", fraction=span.fraction, streams=2 * streams + 100, watched=True
    ) as running:
        running.ready()
        with listening(running.socket, number, streams) as link:
            running.lags()
            before = running.count("renewed", 0)
            link.send("time")
            time.sleep(1.5 * span.seconds)
            found, renewals = running.lags(), running.count("renewed", 0) - before
            link.send("end")
            waits = link.recv()
    figures = (*_lag_figures(found), Figure("a small request, 99.9th percentile", "ms", (percentile(waits, 99.9),)))
    yield Row(OURS, case, (*figures, Figure("renewals meanwhile", "", (float(renewals),))))


def _lag_figures(found: Sequence[tuple[float, float]]) -> tuple[Figure, ...]:
    late, ran = [each for each, _ in found], [each for _, each in found]
    return (
        Figure("a turn of the loop, 99.9th percentile", "ms", (percentile(ran, 99.9),)),
        Figure("a turn of the loop, longest", "ms", (max(ran),)),
        Figure("late, 99.9th percentile", "ms", (percentile(late, 99.9),)),
        Figure("late, longest", "ms", (max(late),)),
    )


def percentile(values: Iterable[float], share: float) -> float:
    """The least value that so many percent of all do not exceed."""
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * share / 100), len(ordered) - 1)]


async def bare_lag(seconds: float) -> list[tuple[float, float]]:
    """What bench/agent_lag.py notes, of a loop with nothing to do."""
    from bench.agent_lag import tick  # noqa: PLC0415 - its other half imports the agent

    noted: list[tuple[float, float]] = []
    task = asyncio.create_task(tick(noted))
    await asyncio.sleep(seconds)
    task.cancel()
    return noted


def bare_loop(number: int, key_type: str) -> tuple[float, float]:
    """Seconds, and seconds of the processor, that cryptography needs for so many certificates."""
    signer, new = KEYS["ec-p256"](), KEYS[key_type]
    issuer = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "demo.example")])
    above = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    began, ran = time.monotonic(), time.process_time()
    for each in range(number):
        key = new()
        names = x509.SubjectAlternativeName([x509.UniformResourceIdentifier(f"spiffe://demo.example/w{each}")])
        request = x509.CertificateSigningRequestBuilder(x509.Name([])).add_extension(names, critical=True)
        request.sign(key, hashes.SHA256()).public_bytes(Encoding.PEM)
        now = datetime.now(UTC)
        certificate = (
            x509.CertificateBuilder(issuer, x509.Name([]), key.public_key(), x509.random_serial_number())
            .not_valid_before(now)
            .not_valid_after(now + timedelta(hours=1))
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(names, critical=True)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(KEY_USAGE, critical=True)
            .add_extension(x509.ExtendedKeyUsage(BOTH_ENDS), critical=False)
            .add_extension(above, critical=False)
            .sign(signer, hashes.SHA256())
        )
        certificate.public_bytes(Encoding.PEM)
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return time.monotonic() - began, time.process_time() - ran


class RunningAgent:
    """An agent that has begun, and what its log says."""

    def __init__(self, pid: int, folder: Path, began: float) -> None:
        self.pid = pid
        self.socket = folder / "agent.sock"
        self._folder = folder
        self._began = began
        self._at = 0
        self._counts: dict[str, int] = {}
        self._ready_at: float | None = None

    def ready(self) -> float:
        """Wait until each name has a secret; returns the seconds from exec until then. Raises MissingError."""
        while self._ready_at is None:
            self._wait("its identities are not all issued")
            self._read()
        return self._ready_at - self._began

    def count(self, event: str, least: int) -> int:
        """How many such events the log has, once it has so many. Raises MissingError."""
        self._read()
        while self._counts.get(event, 0) < least:
            self._wait(f"its log has no {least} events {event}")
            self._read()
        return self._counts.get(event, 0)

    def settled(self, files: int) -> None:
        """Wait until so many certificates are kept in the state directory. Raises MissingError."""
        directory = self._folder / "state" / "certificates"
        while sum(each.name.endswith(".json") for each in os.scandir(directory)) < files:
            self._wait("its certificates are not kept")

    def lags(self) -> list[tuple[float, float]]:
        """What bench/agent_lag.py has noted since the last call."""
        file = self._folder / "lag"
        file.unlink(missing_ok=True)
        os.kill(self.pid, signal.SIGUSR1)
        while not file.exists():
            self._wait("it notes no lag")
        return [(float(late), float(ran)) for late, ran in (line.split() for line in file.read_text().splitlines())]

    def _wait(self, why: str) -> None:
        if time.monotonic() > self._began_monotonic + LONGEST or not Path(f"/proc/{self.pid}/fd").exists():
            raise MissingError(f"the agent has ended or takes too long: {why}")
        time.sleep(0.02)

    @property
    def _began_monotonic(self) -> float:
        return time.monotonic() - (time.time() - self._began)

    def _read(self) -> None:
        with (self._folder / "log").open("rb") as log:
            log.seek(self._at)
            text = log.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._at += len(whole)
        for line in whole.splitlines():
            event = json.loads(line)
            self._counts[event["event"]] = self._counts.get(event["event"], 0) + 1
            if event["event"] == "ready" and self._ready_at is None:
                self._ready_at = datetime.fromisoformat(event["time"]).timestamp()


@contextmanager
def agent(
    number: int, ttl: str, key: str, *, fraction: float = HALF, streams: int = 100, watched: bool = False
) -> Iterator[RunningAgent]:
    """An agent with so many identities, whose certificates live so long and are renewed after that part of it. It has
    room for half as many connections as for `streams`.
    """
    folder = Path(tempfile.mkdtemp(dir=_kept().name))
    workloads = "".join(WORKLOAD.format(each, ttl, key) for each in range(number))
    config = folder / "agent.yaml"
    config.write_text(CONFIG.format(folder=folder, streams=streams, fraction=fraction) + workloads)
    command = [*agent_command(config), "--log-format", "json"]
    if watched:
        command = [sys.executable, str(HERE / "bench" / "agent_lag.py"), str(config), str(folder / "lag")]
    began = time.time()
    with started(command, folder / "agent.sock", log=folder / "log") as pid:
        yield RunningAgent(pid, folder, began)


@cache
def _kept() -> "tempfile.TemporaryDirectory[str]":
    """The directory of all agents, until this program ends. ext4 gives no number of a file away that was removed in
    the last minutes, and looks for the next one: beside thousands of them each new file took up to 0.9 ms of the
    processor, and 0.1 ms without.
    """
    return tempfile.TemporaryDirectory()


def secret_size(socket: Path) -> int:
    """Bytes of one identity's chain and key, as they are served."""

    async def fetch() -> int:
        async with grpc.aio.insecure_channel(f"unix:{socket}") as channel:
            answer = sds_pb2.DiscoveryResponse.FromString(await _fetch(channel, "w0"))
            return sum(len(each.value) for each in answer.resources)

    return asyncio.run(fetch())


async def _fetch(channel: grpc.aio.Channel, name: str) -> bytes:
    ask: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"{SERVICE}FetchSecrets")
    return await ask(sds_pb2.DiscoveryRequest(resource_names=[name]).SerializeToString())


@contextmanager
def listening(socket: Path, identities: int, streams: int) -> Iterator[Connection]:
    """So many streams in another process, once each has its first secret. See `_clients` for the link."""
    ours, theirs = get_context("spawn").Pipe()
    client = get_context("spawn").Process(target=clients, args=(socket, identities, streams, theirs), daemon=True)
    client.start()
    theirs.close()  # or its end would not be noticed here
    try:
        if not _says_served(ours):
            raise MissingError("the streams are not served")
        yield ours
    finally:
        client.kill()
        client.join()


def _says_served(link: Connection) -> bool:
    """Whether the process of the streams comes so far."""
    try:
        return link.poll(LONGEST) and link.recv() == "served"
    except EOFError:
        return False


def clients(socket: Path, identities: int, streams: int, link: Connection) -> None:
    """The process of the streams."""
    asyncio.run(_clients(socket, identities, streams, link))


async def _clients(socket: Path, identities: int, streams: int, link: Connection) -> None:
    """Says `served` when each stream has its secret; told `time`, sends small requests until told `end`, and then what
    each took, in milliseconds.
    """
    served = [asyncio.Event() for _ in range(streams)]
    tasks = [asyncio.create_task(_stream(socket, n % identities, each)) for n, each in enumerate(served)]
    for each in served:
        await each.wait()
    link.send("served")
    await asyncio.to_thread(link.recv)
    told, waits = asyncio.create_task(asyncio.to_thread(link.recv)), list[float]()
    async with grpc.aio.insecure_channel(f"unix:{socket}") as channel:
        while not told.done():
            began = time.monotonic()
            await _fetch(channel, "w0")
            waits.append(1000 * (time.monotonic() - began))
            await asyncio.sleep(BETWEEN)
    link.send(waits)
    for task in tasks:
        task.cancel()


async def _stream(socket: Path, number: int, served: asyncio.Event) -> None:
    """Subscribe to one identity and acknowledge all that comes."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(f"unix:{socket}", options=options) as channel:
        call: grpc.aio.StreamStreamCall[bytes, bytes] = channel.stream_stream(f"{SERVICE}StreamSecrets")()
        node, names = sds_pb2.Node(id=f"envoy-{number}"), [f"w{number}"]
        await call.write(sds_pb2.DiscoveryRequest(node=node, resource_names=names).SerializeToString())
        while isinstance(data := await call.read(), bytes):
            answer = sds_pb2.DiscoveryResponse.FromString(data)
            acked = sds_pb2.DiscoveryRequest(resource_names=names, response_nonce=answer.nonce)
            await call.write(acked.SerializeToString())
            served.set()


if __name__ == "__main__":
    main()
