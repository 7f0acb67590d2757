"""A stand-in for SPIRE's agent: a SPIFFE Workload API over real gRPC on a Unix socket.

It stands in where a test needs an answer at a certain moment, or one that no real agent gives. It was written from the
standard and from what SPIRE 1.13.3 was seen to do: it refuses a call without the security header, answers
PERMISSION_DENIED `no identity issued` while the caller has no entry, on open streams too, sends the whole state in each
message, repeats messages, and drops its streams when it stops.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote

import anyio
import grpc
import grpc.aio
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from fakes.hierarchy import Ca, Key, make_ca, make_leaf, new_key
from fakes.istio_ca import calls_ended
from sds_agent_proto.spiffe_pb2 import X509Svid, X509SvidsResponse

SERVICE = "SpiffeWorkloadAPI"
METHOD = "FetchX509SVID"
LONG = timedelta(days=3650)
USAGE = x509.KeyUsage(
    digital_signature=True,
    content_commitment=False,
    key_encipherment=True,
    data_encipherment=False,
    key_agreement=True,
    key_cert_sign=False,
    crl_sign=False,
    encipher_only=False,
    decipher_only=False,
)
Message = X509SvidsResponse | bytes


class Gone(Exception):  # noqa: N818 - it is how a stream ends, and often no error
    """The stream ends with this status."""

    def __init__(self, code: grpc.StatusCode, details: str = "") -> None:
        super().__init__(code, details)
        self.code = code
        self.details = details


NO_IDENTITY = Gone(grpc.StatusCode.PERMISSION_DENIED, "no identity issued")


class SpireCa:
    """A trust domain's CA, which makes certificates with the properties of SPIRE's."""

    def __init__(self, trust_domain: str = "demo.example") -> None:
        now = datetime.now(UTC)
        self.trust_domain = trust_domain
        self.ca = make_ca(f"{trust_domain} CA", not_before=now - LONG, not_after=now + LONG)

    def svid(
        self,
        spiffe_id: str,
        *,
        hint: str = "",
        key: Key | None = None,
        lifetime: timedelta = timedelta(hours=1),
        backdated: timedelta = timedelta(seconds=10),
        issuer: Ca | None = None,
        bundle: tuple[x509.Certificate, ...] | None = None,
    ) -> X509Svid:
        """A new certificate with a new key. Its subject, its SAN and its key usage are as SPIRE has them."""
        own, now = key or new_key(), datetime.now(UTC)
        leaf = make_leaf(
            issuer or self.ca,
            spiffe_id,
            key=own,
            not_before=now - backdated,
            not_after=now + lifetime,
            subject=x509.Name.from_rfc4514_string("O=SPIRE,C=US"),
            usage=USAGE,
        )
        return X509Svid(
            spiffe_id=spiffe_id,
            x509_svid=leaf.public_bytes(Encoding.DER),
            x509_svid_key=own.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()),
            bundle=der((self.ca.certificate,) if bundle is None else bundle),
            hint=hint,
        )


def der(certificates: tuple[x509.Certificate, ...]) -> bytes:
    """The certificates as a message has them."""
    return b"".join(each.public_bytes(Encoding.DER) for each in certificates)


def message(*svids: X509Svid, federated: Mapping[str, bytes] | None = None) -> X509SvidsResponse:
    """One whole state."""
    return X509SvidsResponse(svids=svids, federated_bundles=federated or {})


class WorkloadApi:
    """The service: each stream gets what is `given` now, and whatever is given later."""

    def __init__(self, socket: Path) -> None:
        self.socket = socket
        self.compression: grpc.Compression | None = None
        self.calls = 0
        self.sent = 0
        self.open = 0
        self.headers: list[dict[str, str]] = []
        self._given: tuple[Message | Gone, ...] = ()
        self._round = 0
        self._changed = anyio.Event()

    def give(self, *given: Message | Gone) -> None:
        """Send these to every stream from now on, and to new ones; nothing means silence."""
        self._given, self._round = given, self._round + 1
        self._changed.set()
        self._changed = anyio.Event()

    async def called(self, count: int) -> None:
        """Wait for the count-th call."""
        await self._until(lambda: self.calls >= count)

    async def have_sent(self, count: int) -> None:
        """Wait until so many messages have been sent, to all streams together."""
        await self._until(lambda: self.sent >= count)

    async def have_closed(self) -> None:
        """Wait until no stream is open."""
        await self._until(lambda: not self.open)

    async def _until(self, done: Any) -> None:
        with anyio.fail_after(10):
            while not done():
                await anyio.wait_all_tasks_blocked()
                await asyncio.sleep(0.001)  # gRPC's threads are no tasks

    async def fetch(self, _request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> AsyncIterator[bytes]:
        """FetchX509SVID."""
        self.calls += 1
        headers = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        self.headers.append(headers)
        if headers.get("workload.spiffe.io") != "true":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "security header missing from request")
        self.open += 1
        try:
            seen = 0
            while True:
                changed = self._changed
                if seen != self._round:
                    seen = self._round
                    for each in self._given:
                        if isinstance(each, Gone):
                            if each.code is grpc.StatusCode.OK:
                                return
                            await context.abort(each.code, each.details)
                        yield each if isinstance(each, bytes) else each.SerializeToString()
                        self.sent += 1
                await changed.wait()
        finally:
            self.open -= 1

    @asynccontextmanager
    async def serving(self) -> AsyncIterator["WorkloadApi"]:
        """Run inside this context."""
        server = grpc.aio.server(options=[("grpc.max_send_message_length", -1)], compression=self.compression)
        handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_stream_rpc_method_handler(self.fetch)
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, {METHOD: handler})])
        server.add_insecure_port(f"unix:{quote(str(self.socket))}")
        await server.start()
        try:
            yield self
        finally:
            with anyio.CancelScope(shield=True):
                await server.stop(None)
                await calls_ended()
                self.socket.unlink(missing_ok=True)
