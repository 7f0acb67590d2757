"""A stand-in for a server of secrets: a bare grpc.aio server that answers each stream's first request with fixed bytes.

    python benchmarks/floor.py SOCKET [--lean | --core]

What it costs is the least that a Python program on gRPC needs: one P-256 key, one self-signed certificate, no checks.
SIGUSR1 has it push the same bytes once more to every stream; it reads what the clients say and looks at none of it. A
stream has a task that reads and another for each wait; with --lean the handler itself reads, and one task writes to all
streams in turn. With --core it goes without grpc.aio (floor_core.py).
"""

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta

os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc
import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

SECRET = b"type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"
OPTIONS = (("grpc.server.max_pending_requests", 20_000), ("grpc.server.max_pending_requests_hard_limit", 20_000))
"""Without these gRPC cancels calls where a thousand come at once."""
Context = grpc.aio.ServicerContext[bytes, bytes]


def certificate_and_key() -> tuple[bytes, bytes]:
    """Both in PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([]))
        .issuer_name(x509.Name([]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return certificate.public_bytes(Encoding.PEM), private


def field(number: int, data: bytes) -> bytes:
    """A field of a protobuf message, by hand: protobuf itself would be a part of the floor."""
    length, left = bytearray(), len(data)
    while left > 127:
        length.append(left & 127 | 128)
        left >>= 7
    return bytes((number << 3 | 2, *length, left)) + data


def responses() -> tuple[bytes, bytes]:
    """A DiscoveryResponse and a DeltaDiscoveryResponse with the secret `default`."""
    chain, key = (field(2, each) for each in certificate_and_key())
    secret = field(1, b"default") + field(2, field(1, chain) + field(2, key))
    resource, version, common = field(1, SECRET) + field(2, secret), field(1, b"1"), field(4, SECRET) + field(5, b"1")
    return version + field(2, resource) + common, field(2, version + field(2, resource) + field(3, b"default")) + common


class Floor:
    """Both methods, with a task that reads and a task for each wait."""

    def __init__(self) -> None:
        self.changed = asyncio.Event()

    def method(self, response: bytes) -> Callable[[object, Context], Awaitable[None]]:
        """A handler that gives this response."""

        async def stream(_requests: object, context: Context) -> None:
            if not isinstance(await context.read(), bytes):
                return
            reading = asyncio.create_task(_read(context))
            try:
                while not reading.done():
                    waiting = asyncio.create_task(self.changed.wait())
                    await context.write(response)
                    await asyncio.wait((reading, waiting), return_when=asyncio.FIRST_COMPLETED)
                    waiting.cancel()
            finally:
                reading.cancel()

        return stream

    def push(self) -> None:
        """Write to every stream."""
        self.changed.set()
        self.changed = asyncio.Event()


class LeanFloor:
    """Both methods, without a task of theirs beside the handler's."""

    def __init__(self) -> None:
        self.streams = dict[Context, bytes]()
        self.pushing: asyncio.Task[None] | None = None

    def method(self, response: bytes) -> Callable[[object, Context], Awaitable[None]]:
        """A handler that gives this response."""

        async def stream(_requests: object, context: Context) -> None:
            if not isinstance(await context.read(), bytes):
                return
            await context.write(response)
            self.streams[context] = response
            try:
                await _read(context)
            finally:
                del self.streams[context]

        return stream

    def push(self) -> None:
        """Write to every stream."""
        self.pushing = asyncio.create_task(self._push())

    async def _push(self) -> None:
        for context, response in tuple(self.streams.items()):
            await context.write(response)


async def _read(context: Context) -> None:
    while isinstance(await context.read(), bytes):  # or else it is gRPC's EOF
        pass


async def serve(path: str, floor: Floor | LeanFloor) -> None:
    """Answer until ended."""
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, floor.push)
    server = grpc.aio.server(options=OPTIONS)
    methods: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
        name: grpc.stream_stream_rpc_method_handler(floor.method(response))
        for name, response in zip(("StreamSecrets", "DeltaSecrets"), responses(), strict=True)
    }
    handler = grpc.method_handlers_generic_handler("envoy.service.secret.v3.SecretDiscoveryService", methods)
    server.add_generic_rpc_handlers((handler,))
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    await server.wait_for_termination()


async def main(path: str, *options: str) -> None:
    """Serve at the path."""
    if options == ("--core",):
        import floor_core  # noqa: PLC0415 - the floor itself is to import as little as it can

        await floor_core.serve(path, responses(), OPTIONS)
    else:
        await serve(path, LeanFloor() if options == ("--lean",) else Floor())


asyncio.run(main(*sys.argv[1:]))
