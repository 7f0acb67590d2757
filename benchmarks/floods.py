"""What hostile callers cost `sds-agent ca serve`: its memory, and how long a good caller waits meanwhile.

    python benchmarks/floods.py [CASE ...]

Each case starts a CA of its own on loopback and ends by itself within a minute. The hostile client is a process of its
own that writes HTTP/2 frame by frame; the good caller joins again and again, each time on a new connection. Printed are
the CA's resident memory before, at most during and five seconds after the flood, what was sent, the good caller's
longest wait and how often the CA refused it. `--command` names another `sds-agent` to compare with.
"""

import argparse
import asyncio
import json
import os
import resource
import socket
import ssl
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc
import grpc.aio
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.exceptions import ProtocolError
from msgspec import Struct
from sds_agent_proto.istio_pb2 import CertificateRequest

from sds_agent.ca.tokens import JoinTokens
from sds_agent.pki.csr import make_csr
from sds_agent.pki.keys import KeyType, generate

METHOD = "/istio.v1.auth.IstioCertificateService/CreateCertificate"
URI = "spiffe://demo.example/good"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PING, WINDOW_UPDATE, CONTINUATION = 0, 1, 2, 3, 4, 6, 8, 9
ACK, END_STREAM, END_HEADERS = 1, 1, 4
CONFIG = """
trust_domain: demo.example
listen: 127.0.0.1:0
server_names: [localhost]
signer: {self_signed: root}
callers: {join_tokens: tokens}
audit: audit.log
log: {format: json}
"""
LONGEST = 20.0
"""Seconds that a case may send for."""
OPEN_FOR = 3.0
"""Seconds for which connections stay open after that."""
SETTLED = 5.0
"""Seconds after which memory is read again."""


class Target(Struct):
    """Where the CA is, its root, and the tokens that hostile callers may have."""

    address: str
    roots: str
    tokens: list[str]


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One frame (RFC 9113 section 4.1)."""
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def literal(name: str, value: str) -> bytes:
    """A header that goes into no table (RFC 7541 section 6.2.2)."""
    return b"\x00" + text(name) + text(value)


def text(value: str) -> bytes:
    """A string without Huffman coding (RFC 7541 section 5.2)."""
    length, data = len(value), value.encode()
    if length < 127:
        return bytes([length]) + data
    length, prefix = length - 127, bytearray([127])
    while length >= 128:
        prefix.append(length % 128 + 128)
        length //= 128
    return bytes([*prefix, length]) + data


def request_headers(*extra: tuple[str, str]) -> bytes:
    """The headers of a call."""
    usual = ((":method", "POST"), (":scheme", "https"), (":path", METHOD), (":authority", "localhost"))
    grpc_headers = (("content-type", "application/grpc"), ("te", "trailers"))
    return b"".join(literal(*each) for each in (*usual, *grpc_headers, *extra))


def bearer(token: str) -> bytes:
    """The headers of a call with a proof."""
    return request_headers(("authorization", f"Bearer {token}"))


SMALL = b"\x90" * 16_000
"""The smallest headers there are: each one byte, which stands for a pair of the static table (RFC 7541 section 6.1)."""


class Connection:
    """A TLS connection to the CA that has said what every client says first."""

    def __init__(self, target: Target, first: bytes = PREFACE + frame(SETTINGS, 0, 0)) -> None:
        host, port = target.address.rsplit(":", 1)
        context = ssl.create_default_context(cadata=target.roots)
        context.set_alpn_protocols(["h2"])
        self.sent = 0
        self.gone = False
        self._tls = context.wrap_socket(socket.create_connection((host, int(port)), 10), server_hostname="localhost")
        self.send(first)
        self._tls.settimeout(0.5)

    def received(self) -> bytes:
        """What has arrived so far."""
        self._tls.settimeout(0.001)
        try:
            return self._tls.recv(65_536)
        except OSError:
            return b""
        finally:
            self._tls.settimeout(0.5)

    def send(self, data: bytes) -> None:
        """Send it, unless the CA has closed the connection or does not read."""
        if self.gone:
            return
        try:
            self._tls.sendall(data)
            self.sent += len(data)
        except OSError:
            self.gone = True


def several(target: Target, count: int, step: Callable[[Connection, int], None], most: int) -> int:
    """Take a step on each of so many connections in turn, until `most` bytes are sent; how many were."""
    connections = [Connection(target) for _ in range(count)]
    until, turn = time.monotonic() + LONGEST, 0
    while time.monotonic() < until and sum(each.sent for each in connections) < most:
        for each in connections:
            step(each, turn)
        turn += 1
        if all(each.gone for each in connections):
            break
    time.sleep(OPEN_FOR)
    return sum(each.sent for each in connections)


def continuation(target: Target) -> int:
    """A header block that does not end, full of small headers."""

    def step(connection: Connection, turn: int) -> None:
        kind = HEADERS if turn == 0 else CONTINUATION
        connection.send(frame(kind, 0, 1, SMALL))

    return several(target, 20, step, 67 << 20)


def empty_continuation(target: Target) -> int:
    """A header block that does not end, in frames that hold nothing."""

    def step(connection: Connection, turn: int) -> None:
        connection.send(frame(HEADERS, 0, 1, SMALL) if turn == 0 else frame(CONTINUATION, 0, 1) * 1000)

    return several(target, 20, step, 20 << 20)


def blocks(target: Target) -> int:
    """Header blocks that stop just below what is allowed, on as many connections as fit."""
    connections = [Connection(target) for _ in range(400)]
    for each in connections:
        each.send(frame(HEADERS, 0, 1, SMALL) + frame(CONTINUATION, 0, 1, SMALL[:3000]))
    time.sleep(OPEN_FOR)
    return sum(each.sent for each in connections)


def table_bomb(target: Target) -> int:
    """One large header in the table, and thousands of single bytes that stand for it (RFC 7541 section 6.1)."""
    large = b"\x40" + text("bomb") + text("x" * 4000)

    def step(connection: Connection, turn: int) -> None:
        connection.send(frame(HEADERS, END_HEADERS, 2 * turn + 1, request_headers() + large + b"\xbe" * 8000))

    return several(target, 20, step, 20 << 20)


def streams(target: Target) -> int:
    """Calls that begin, with thousands of headers each, and do not end."""

    def step(connection: Connection, turn: int) -> None:
        block = request_headers() + SMALL[:12_000]
        connection.send(frame(HEADERS, END_HEADERS, 2 * turn + 1, block))

    return several(target, 20, step, 10 << 20)


def resets(target: Target) -> int:
    """Calls that are cancelled at once."""

    def step(connection: Connection, turn: int) -> None:
        call = b""
        for number in range(turn * 50, turn * 50 + 50):
            stream = 2 * number + 1
            call += frame(HEADERS, END_HEADERS, stream, request_headers())
            call += frame(RST_STREAM, 0, stream, struct.pack(">I", 8))
        connection.send(call)

    return several(target, 20, step, 20 << 20)


def flood_of(data: bytes) -> Callable[[Target], int]:
    """The same frames again and again."""
    return lambda target: several(target, 20, lambda connection, _: connection.send(data * 500), 60 << 20)


def idle(target: Target) -> int:
    """As many connections as the CA takes, on which nothing is asked."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, max(soft, 6000)), hard))
    connections: list[Connection] = []
    until = time.monotonic() + 2 * LONGEST
    while len(connections) < 4500 and time.monotonic() < until:
        with suppress(OSError):
            connections.append(Connection(target))
    time.sleep(10)
    return sum(each.sent for each in connections)


def headers_only(target: Target) -> int:
    """Proven callers begin 120 calls each, and send no request."""
    connections: list[Connection] = []
    for token in target.tokens:
        for _ in range(3):
            connection = Connection(target)
            for stream in range(1, 80, 2):
                connection.send(frame(HEADERS, END_HEADERS, stream, bearer(token)))
            connections.append(connection)
    time.sleep(LONGEST / 2)
    return sum(each.sent for each in connections)


def unfinished_bodies(target: Target) -> int:
    """Proven callers begin 40 calls each and send as much of 4 MiB as they are let."""
    calls = [Unfinished(target, token) for token in target.tokens for _ in range(40)]
    until = time.monotonic() + LONGEST / 2
    while time.monotonic() < until:
        for each in calls:
            each.go_on()
    return sum(each.sent for each in calls)


class Unfinished:
    """A call on a connection of its own whose request is sent as the server's windows allow, but for its last bytes."""

    def __init__(self, target: Target, token: str) -> None:
        self._connection = Connection(target, b"")
        self._http2 = H2Connection(H2Configuration(client_side=True, validate_outbound_headers=False))
        self._http2.initiate_connection()
        usual = ((":method", "POST"), (":scheme", "https"), (":path", METHOD), (":authority", "localhost"))
        proof = (("content-type", "application/grpc"), ("te", "trailers"), ("authorization", f"Bearer {token}"))
        self._http2.send_headers(1, [*usual, *proof])
        self._left = b"\0" + struct.pack(">I", 4 << 20) + bytes((4 << 20) - 10)
        self.sent = 0

    def go_on(self) -> None:
        """Send what fits, and read what came."""
        with suppress(ProtocolError):
            room = min(self._http2.local_flow_control_window(1), self._http2.max_outbound_frame_size)
            self._http2.send_data(1, self._left[:room])
            self.sent += len(self._left[:room])
            self._left = self._left[room:]
        self._connection.send(self._http2.data_to_send())
        with suppress(ProtocolError):
            self._http2.receive_data(self._connection.received())


CASES: dict[str, Callable[[Target], int]] = {
    "continuation": continuation,
    "empty-continuation": empty_continuation,
    "blocks": blocks,
    "table-bomb": table_bomb,
    "streams": streams,
    "resets": resets,
    "pings": flood_of(frame(PING, 0, 0, bytes(8))),
    "settings": flood_of(frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 65_535))),
    "priorities": flood_of(frame(PRIORITY, 0, 1, bytes(5))),
    "empty-data": flood_of(frame(DATA, 0, 1)),
    "windows": flood_of(frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 1))),
    "unknown-frames": flood_of(frame(99, 0, 0)),
    "idle": idle,
    "headers-only": headers_only,
    "unfinished-bodies": unfinished_bodies,
}


@contextmanager
def serving(command: str, directory: Path) -> Iterator[tuple[Target, int]]:
    """A CA, and its process id."""
    (directory / "ca.yaml").write_text(CONFIG)
    tokens = JoinTokens(directory / "tokens")
    tokens.prepare()
    expires = datetime.now(UTC) + timedelta(hours=1)
    made = [tokens.make(f"spiffe://demo.example/hostile/{number}", expires) for number in range(3)]
    server = subprocess.Popen(
        [command, "ca", "serve", f"{directory}/ca.yaml"], stderr=subprocess.PIPE, text=True, bufsize=1
    )
    try:
        assert server.stderr is not None
        for line in server.stderr:
            event = json.loads(line)
            if event["event"] == "listening":
                roots = (directory / "root" / "roots.pem").read_text().partition("-----BEGIN PRIVATE")[0]
                yield Target(event["address"], roots, made), server.pid
                return
        sys.exit(f"{command} did not serve")
    finally:
        server.kill()
        server.wait()


class Good:
    """The good caller: joins again and again, on a new connection each time, until it is to end."""

    def __init__(self, target: Target, directory: Path) -> None:
        self._target = target
        self._tokens = JoinTokens(directory / "tokens")
        self._made = 0
        self.waits: list[float] = []
        self.failures: dict[str, int] = {}

    async def ask(self) -> None:
        """Join once."""
        key = generate(KeyType.EC_P256)
        data = CertificateRequest(csr=make_csr(key, URI).decode(), validity_duration=3600).SerializeToString()
        self._made += 1
        token = self._tokens.make(f"{URI}/{self._made}", datetime.now(UTC) + timedelta(hours=1))
        options = [("grpc.ssl_target_name_override", "localhost"), ("grpc.use_local_subchannel_pool", 1)]
        credentials = grpc.ssl_channel_credentials(self._target.roots.encode())
        started = time.monotonic()
        async with grpc.aio.secure_channel(self._target.address, credentials, options=options) as channel:
            call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(METHOD)
            try:
                await call(data, metadata=(("authorization", f"Bearer {token}"),), timeout=30)
            except grpc.aio.AioRpcError as error:
                self.failures[error.code().name] = self.failures.get(error.code().name, 0) + 1
        self.waits.append(time.monotonic() - started)


def resident(pid: int) -> float:
    """MB of memory that the process holds."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


async def measure(case: str, command: str) -> None:
    """Run one case, and print."""
    with tempfile.TemporaryDirectory() as name, serving(command, Path(name)) as (target, pid):
        good = Good(target, Path(name))
        await good.ask()
        good.waits.clear()
        before = most = resident(pid)
        flood = await asyncio.create_subprocess_exec(
            sys.executable, __file__, "--flood", case, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        asked = json.dumps([target.address, target.roots, target.tokens]).encode()
        ended = asyncio.ensure_future(flood.communicate(asked))
        while not ended.done():
            await good.ask()
            most = max(most, resident(pid))
            await asyncio.sleep(0.05)
        sent = int(ended.result()[0])
        await asyncio.sleep(SETTLED)
        print(
            f"{case}: {sent / 1e6:.1f} MB sent; memory {before:.0f}, at most {most:.0f}, after {resident(pid):.0f} MB; "
            f"a good caller waits {max(good.waits):.2f} s at most, {sum(good.failures.values())} of {len(good.waits)} "
            f"refused {good.failures or ''}",
            flush=True,
        )


def known(case: str) -> str:
    """The name of a case, as it is. Raises argparse.ArgumentTypeError for another one."""
    if case not in CASES:
        raise argparse.ArgumentTypeError(f"{case!r} is none of {', '.join(CASES)}")
    return case


def main() -> None:
    """Measure, or be the hostile client."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("case", nargs="*", metavar="CASE", type=known, help=", ".join(CASES))
    parser.add_argument("--command", default=str(Path(sys.executable).with_name("sds-agent")))
    parser.add_argument("--flood", choices=CASES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.flood is not None:
        address, roots, tokens = json.load(sys.stdin)
        print(CASES[arguments.flood](Target(address, roots, tokens)))
        return
    for case in arguments.case or CASES:
        asyncio.run(measure(case, arguments.command))


if __name__ == "__main__":
    main()
