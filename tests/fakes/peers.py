"""A real gRPC client of the SDS socket, for tests to speak the protocol by hand through the published schema."""

import warnings
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Self

import anyio
import grpc
import grpc.aio

with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # envoy-data-plane's own, at import
    from envoy_data_plane.envoy.config.core.v3 import Node
    from envoy_data_plane.envoy.extensions.transport_sockets.tls.v3 import Secret
    from envoy_data_plane.envoy.service.discovery.v3 import (
        DeltaDiscoveryRequest,
        DeltaDiscoveryResponse,
        DiscoveryRequest,
        DiscoveryResponse,
    )
    from envoy_data_plane.google.rpc import Status

SERVICE = "/envoy.service.secret.v3.SecretDiscoveryService"
TIMEOUT = 30.0
"""Seconds after which a stream without the expected answer fails the test. All that a test does with one stream has to
come within them, on a busy machine too.
"""

Call = grpc.aio.StreamStreamCall[bytes, bytes]


class Peer:
    """One connection to the socket."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._channel = channel

    async def reached(self) -> None:
        """Wait until a server answers at the socket."""
        with anyio.fail_after(TIMEOUT):
            await self._channel.channel_ready()

    def stream(self, seconds: float = TIMEOUT) -> "SotwStream":
        """Open StreamSecrets; it ends by itself after so many seconds."""
        return SotwStream(self._channel.stream_stream(f"{SERVICE}/StreamSecrets")(timeout=seconds))

    def delta(self) -> "DeltaStream":
        """Open DeltaSecrets."""
        return DeltaStream(self._channel.stream_stream(f"{SERVICE}/DeltaSecrets")(timeout=TIMEOUT))

    async def fetch(self, *names: str, seconds: float = TIMEOUT) -> dict[str, Secret]:
        """Call FetchSecrets."""
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = self._channel.unary_unary(f"{SERVICE}/FetchSecrets")
        data = await call(bytes(DiscoveryRequest(resource_names=list(names))), timeout=seconds)
        return secrets_of(DiscoveryResponse.parse(data))

    async def call(self, method: str, data: bytes) -> None:
        """Send raw bytes as the only message of a call, and wait for its end. Raises AioRpcError."""
        call: Call = self._channel.stream_stream(f"{SERVICE}/{method}")(timeout=TIMEOUT)
        await call.write(data)
        await call.read()


class _Stream:
    def __init__(self, call: Call) -> None:
        self.call = call
        self.nonce = ""

    async def _read(self) -> bytes:
        data = await self.call.read()
        if not isinstance(data, bytes):
            raise grpc.aio.AioRpcError(
                await self.call.code(), grpc.aio.Metadata(), grpc.aio.Metadata(), details=await self.call.details()
            )
        return data

    async def end(self) -> tuple[grpc.StatusCode, str]:
        """Wait until the server ends the stream; returns its status code and message."""
        return await self.call.code(), await self.call.details()

    def leave(self) -> None:
        """End the stream abruptly, as an Envoy that is killed."""
        self.call.cancel()


class SotwStream(_Stream):
    """A StreamSecrets stream. It remembers the newest nonce, and sends no ACK by itself."""

    async def ask(
        self, *names: str, nonce: str = "", version: str = "", error: str | None = None, node: str = ""
    ) -> Self:
        """Send a request."""
        message = DiscoveryRequest(
            resource_names=list(names),
            version_info=version,
            response_nonce=nonce,
            error_detail=None if error is None else Status(code=13, message=error),
            node=Node(id=node) if node else None,
        )
        await self.call.write(bytes(message))
        return self

    async def read(self) -> dict[str, Secret]:
        """The next answer's secrets by name."""
        answer = DiscoveryResponse.parse(await self._read())
        self.nonce = answer.nonce
        return secrets_of(answer)

    async def ack(self, *names: str, version: str = "", error: str | None = None) -> Self:
        """Accept or reject the newest answer."""
        return await self.ask(*names, nonce=self.nonce, version=version, error=error)


class DeltaStream(_Stream):
    """A DeltaSecrets stream."""

    async def subscribe(self, *names: str, versions: dict[str, str] | None = None, node: str = "") -> Self:
        """Send a subscription; `versions` of the secrets this client has from an earlier stream, by name."""
        message = DeltaDiscoveryRequest(
            resource_names_subscribe=list(names),
            initial_resource_versions=versions or {},
            node=Node(id=node) if node else None,
        )
        await self.call.write(bytes(message))
        return self

    async def ack(self, error: str | None = None) -> Self:
        """Accept or reject the newest answer."""
        detail = None if error is None else Status(code=13, message=error)
        await self.call.write(bytes(DeltaDiscoveryRequest(response_nonce=self.nonce, error_detail=detail)))
        return self

    async def read(self) -> DeltaDiscoveryResponse:
        """The next answer."""
        answer = DeltaDiscoveryResponse.parse(await self._read())
        self.nonce = answer.nonce
        return answer


def secrets_of(answer: DiscoveryResponse) -> dict[str, Secret]:
    """The answer's resources by name."""
    secrets = [Secret.parse(resource.value) for resource in answer.resources]
    return {secret.name: secret for secret in secrets}


def chain_of(secret: Secret) -> bytes:
    """The certificate chain in a secret."""
    assert secret.tls_certificate is not None
    assert secret.tls_certificate.certificate_chain is not None
    return secret.tls_certificate.certificate_chain.inline_bytes or b""


def bundle_of(secret: Secret) -> bytes:
    """The trust anchors in a secret."""
    assert secret.validation_context is not None
    assert secret.validation_context.trusted_ca is not None
    return secret.validation_context.trusted_ca.inline_bytes or b""


@asynccontextmanager
async def connected(socket: Path) -> AsyncIterator[Peer]:
    """A connection to the socket that no other peer shares, closed at the end."""
    async with grpc.aio.insecure_channel(f"unix:{socket}", options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        yield Peer(channel)
