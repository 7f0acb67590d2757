"""A stand-in for a server of secrets: a bare grpc.aio server that answers every request with the same bytes.

    python benchmarks/floor.py SOCKET

What it costs is the least that a Python program on gRPC needs: one P-256 key, one self-signed certificate, no checks.
"""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

os.environ.setdefault("GRPC_VERBOSITY", "NONE")

import grpc
import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat


def secret() -> bytes:
    """A key and its certificate, in PEM."""
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
    return certificate.public_bytes(Encoding.PEM) + private


async def serve(path: str) -> None:
    """Answer until ended."""
    answer = secret()

    async def stream(requests: AsyncIterator[bytes], context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
        async for _ in requests:
            await context.write(answer)

    server = grpc.aio.server()
    handler = grpc.method_handlers_generic_handler(
        "envoy.service.secret.v3.SecretDiscoveryService",
        {"StreamSecrets": grpc.stream_stream_rpc_method_handler(stream)},
    )
    server.add_generic_rpc_handlers((handler,))
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    await server.wait_for_termination()


asyncio.run(serve(sys.argv[1]))
