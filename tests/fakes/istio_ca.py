"""A stand-in for istiod: Istio's certificate service over real gRPC and TLS, each call answered as the test says."""

import asyncio
import ipaddress
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, cast

import anyio
import grpc
import grpc.aio
from cryptography import x509
from fakes.hierarchy import Ca, Key, common_name, make_ca, make_leaf, new_key
from sds_agent_proto.istio_pb2 import CertificateRequest, CertificateResponse

from sds_agent.pki.certificates import write_pem
from sds_agent.pki.keys import to_pkcs8_pem

SERVICE = "istio.v1.auth.IstioCertificateService"
LONG = timedelta(days=3650)


@dataclass(frozen=True)
class Asked:
    """A call as the server saw it: `wanted` is its metadata field, `certificate` what the caller presented (PEM)."""

    message: CertificateRequest
    wanted: dict[str, object]
    headers: dict[str, str]
    peer: str
    certificate: bytes | None


Trailers = tuple[tuple[str, str | bytes], ...]


class RefusedError(Exception):
    """The service answers with this status."""

    def __init__(self, code: grpc.StatusCode, details: str = "", trailers: Trailers = ()) -> None:
        super().__init__(code, details)
        self.code = code
        self.details = details
        self.trailers = trailers


async def calls_ended() -> None:
    """Wait for what a server's end leaves behind: it does not wait for its calls to hear from gRPC's core.

    What the core has to say to a loop that is closed by then fails the next test, in whose loop it is read. That goes
    for calls of a client that were cancelled too, of which nothing is left to wait for: a call to nowhere comes after
    them in the core's queue.
    """
    calls = [task for task in asyncio.all_tasks() if task.get_name() == "rpc_task"]  # the library's name for them
    await asyncio.gather(*calls, return_exceptions=True)
    async with grpc.aio.insecure_channel("unix:/nowhere/socket") as channel:
        nowhere: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/nothing/Nothing")
        with suppress(grpc.aio.AioRpcError):
            await nowhere(b"", timeout=5)


Answer = Callable[[Asked], CertificateResponse | bytes]


class IstioCa:
    """A root, an intermediate under it, and a service that signs with it or does what `answer` says."""

    def __init__(self) -> None:
        now = datetime.now(UTC)
        self.validity: dict[str, Any] = {"not_before": now - LONG, "not_after": now + LONG}
        self.root = make_ca("istio root", **self.validity)
        self.signer = make_ca("istio cluster1", self.root, **self.validity)
        self.stranger = make_ca("stranger", **self.validity)
        self.asked: list[Asked] = []
        self.answer: Answer = self.signed
        self.hung = anyio.Event()
        """Set when a call came that is never answered."""
        self.left = anyio.Event()
        """Set when its caller has gone."""

    @property
    def root_pem(self) -> bytes:
        return write_pem([self.root.certificate])

    def leaf(self, csr_pem: str, uri: str = "spiffe://cluster.local/ns/default/sa/web") -> x509.Certificate:
        """A certificate for the key of a CSR."""
        key = cast("Key", x509.load_pem_x509_csr(csr_pem.encode()))
        now = datetime.now(UTC)
        return make_leaf(self.signer, uri, key=key, not_before=now - timedelta(minutes=2), not_after=now + LONG / 100)

    def signed(self, asked: Asked) -> CertificateResponse:
        """The answer of an istiod with a plugged-in CA."""
        chain = [self.leaf(asked.message.csr), self.signer.certificate, self.root.certificate]
        return CertificateResponse(cert_chain=[write_pem([each]).decode() for each in chain])

    async def create(self, request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        """CreateCertificate."""
        message = CertificateRequest.FromString(request)
        headers = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        presented = context.auth_context().get("x509_pem_cert", [None])
        certificate = next(iter(presented))
        asked = Asked(message, dict(message.metadata), headers, context.peer(), certificate)
        self.asked.append(asked)
        try:
            answer = self.answer(asked)
        except RefusedError as refused:
            await context.abort(refused.code, refused.details, refused.trailers)
        return answer if isinstance(answer, bytes) else answer.SerializeToString()

    async def hang(self, _request: bytes, _context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        """Take the call and never answer."""
        self.hung.set()
        try:
            await anyio.sleep_forever()
        finally:
            self.left.set()
        return b""

    async def say_nothing(
        self, _request: bytes, _context: grpc.aio.ServicerContext[bytes, bytes]
    ) -> AsyncIterator[bytes]:
        """Succeed without a message."""
        messages: tuple[bytes, ...] = ()
        for message in messages:
            yield message

    def pair(self, *names: x509.GeneralName, issuer: Ca | None = None) -> tuple[bytes, bytes]:
        """A server's key and its chain."""
        key = new_key()
        leaf = make_leaf(
            issuer or self.signer, None, key=key, subject=common_name("istiod"), names=names, **self.validity
        )
        return to_pkcs8_pem(key), write_pem([leaf, self.signer.certificate])

    @asynccontextmanager
    async def serving(
        self,
        *names: str,
        mtls: bool = False,
        plaintext: bool = False,
        hanging: bool = False,
        silent: bool = False,
        compression: grpc.Compression | None = None,
        port: int = 0,
    ) -> AsyncIterator[str]:
        """Serve on loopback inside this context, with a certificate for `names` (127.0.0.1 by default); the address.

        `mtls` wants a certificate of the root from every caller. `hanging` never answers, `silent` answers
        with success and nothing else.
        """
        server = grpc.aio.server(compression=compression)
        serve: Callable[..., Awaitable[bytes]] = self.hang if hanging else self.create
        answering: grpc.RpcMethodHandler[bytes, bytes] = grpc.unary_unary_rpc_method_handler(serve)
        if silent:
            answering = grpc.unary_stream_rpc_method_handler(self.say_nothing)
        methods = {"CreateCertificate": answering}
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, methods),))
        bound = f"127.0.0.1:{port}"
        if plaintext:
            port = server.add_insecure_port(bound)
        else:
            port = server.add_secure_port(bound, self._credentials(names, mtls=mtls))
        await server.start()
        try:
            yield f"127.0.0.1:{port}"
        finally:
            with anyio.CancelScope(shield=True):
                await server.stop(None)
                await calls_ended()

    def _credentials(self, names: Sequence[str], *, mtls: bool) -> grpc.ServerCredentials:
        known: list[x509.GeneralName] = [x509.DNSName(name) for name in names]
        pair = self.pair(*(known or [x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]))
        roots = self.root_pem if mtls else None
        return grpc.ssl_server_credentials([pair], root_certificates=roots, require_client_auth=mtls)
