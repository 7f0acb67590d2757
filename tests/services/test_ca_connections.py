"""The connections of our CA: they end in time, take their share and no more, and cost others nothing."""

import errno
import os
import socket
import ssl
import sys
import tempfile
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, ExitStack, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import anyio
import anyio.lowlevel
import grpc
import grpc.aio
import pytest
from anyio.streams.buffered import BufferedByteReceiveStream
from anyio.streams.tls import TLSStream
from cryptography import x509
from fakes.ca_servers import (
    METHOD,
    WEB,
    Served,
    Shifted,
    ask,
    served,
)
from fakes.calls import counted
from fakes.events import recorded
from fakes.raw_http2 import CONTINUATION, END_HEADERS, HEADERS, PREFACE, SETTINGS, frame, message
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.events import DataReceived, StreamEnded
from sds_agent_proto.istio_pb2 import CertificateRequest

from sds_agent.ca.acceptor import IN_VAIN, UNPROVEN_CALLS, Accepting, ConnectionLimits, TlsAcceptor
from sds_agent.ca.relay import BackEnd, reach
from sds_agent.ca.server import FRAMES
from sds_agent.pki.csr import make_csr
from sds_agent.pki.keys import KeyType, generate
from sds_agent.signing.signer import SignerError


@pytest.fixture
async def ca(tmp_path: Path) -> AsyncIterator[Served]:
    async with served(tmp_path) as it:
        yield it


async def test_an_old_connection_is_replaced_without_a_failed_request(tmp_path: Path) -> None:
    async with (
        served(tmp_path, more="limits: {connection_age: 1s, per_caller: 100000}") as ca,
        ca.connected() as channel,
    ):
        token, addresses = ca.issuer.token(), set[str]()
        with anyio.fail_after(20):
            while len(addresses) < 2:
                await ask(channel, token)
                addresses = {line["address"] for line in ca.audit}


async def test_a_foreign_certificate_fails_the_connection(ca: Served, tmp_path: Path) -> None:
    """As with istiod, whose callers then come with their token alone."""
    (tmp_path / "elsewhere").mkdir()
    async with served(tmp_path / "elsewhere") as other:
        foreign = await other.ask(other.issuer.token())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ca.ask(ca.issuer.token(), foreign)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    await ca.ask(ca.issuer.token())


def presented(ca: Served) -> x509.Certificate:
    """The certificate that the server shows."""
    host, port = ca.address.rsplit(":", 1)
    context = ssl.create_default_context(cadata=ca.roots.decode())
    context.set_alpn_protocols(["h2"])
    address = (host, int(port))
    with socket.create_connection(address) as plain, context.wrap_socket(plain, server_hostname="127.0.0.1") as tls:
        der = tls.getpeercert(binary_form=True)
    assert der is not None
    return x509.load_der_x509_certificate(der)


async def test_the_server_renews_its_own_certificate(tmp_path: Path) -> None:
    clock = Shifted()
    clock.ahead = -timedelta(hours=13)  # what it issues now begins in the past of those who check it
    async with served(tmp_path, clock=clock) as ca:
        first = await anyio.to_thread.run_sync(presented, ca)
        assert await anyio.to_thread.run_sync(presented, ca) == first
        clock.ahead = timedelta(0)
        assert await anyio.to_thread.run_sync(presented, ca) != first


async def test_the_servers_certificate_holds_after_a_clock_that_was_ahead_is_set_right(tmp_path: Path) -> None:
    """A machine that starts with its clock hours ahead would be a CA to no caller for as long as it was ahead."""
    clock = Shifted()
    clock.ahead = timedelta(hours=3)
    async with served(tmp_path, clock=clock) as ca:
        clock.ahead = timedelta(0)
        certificate = await anyio.to_thread.run_sync(presented, ca)
        assert certificate.not_valid_before_utc <= datetime.now(UTC)


async def test_silence_and_plain_text_cost_others_nothing(ca: Served) -> None:
    host, port = ca.address.rsplit(":", 1)
    async with await anyio.connect_tcp(host, int(port)), await anyio.connect_tcp(host, int(port)) as plain:
        await plain.send(b"GET / HTTP/1.1\r\n\r\n")
        await ca.ask(ca.issuer.token())


async def test_connections_that_say_nothing_take_little_memory(ca: Served) -> None:
    """Every client can open thousands: with the buffer of asyncio's TLS they would take more than a gigabyte."""
    host, port = ca.address.rsplit(":", 1)
    async with AsyncExitStack() as open_until_the_end:
        tracemalloc.start()
        try:
            await ca.ask(ca.issuer.token())
            before, _ = tracemalloc.get_traced_memory()
            for _ in range(100):
                await open_until_the_end.enter_async_context(await anyio.connect_tcp(host, int(port)))
            await ca.ask(ca.issuer.token())  # which is accepted after them
            after, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert after - before < 100 * 64 * 1024


async def test_callers_are_relayed_to_no_other_process(tmp_path: Path) -> None:
    """A process of the same user may be able to put a socket of its own in the place of gRPC's, and read tokens."""
    program = (
        "import socket, sys\n"
        "with socket.socket(socket.AF_UNIX) as listener:\n"
        "    listener.bind(sys.argv[1])\n"
        "    listener.listen()\n"
        "    print('listening', flush=True)\n"
        "    connection, _ = listener.accept()\n"
        "    print(len(connection.recv(100)), flush=True)\n"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "grpc")]
    with anyio.fail_after(20):
        async with await anyio.open_process(command) as other:
            assert other.stdout is not None
            lines = BufferedByteReceiveStream(other.stdout)
            assert await lines.receive_until(b"\n", 100) == b"listening"
            back = BackEnd()
            with pytest.raises(ConnectionAbortedError, match="another process"):
                await reach(tmp_path / "grpc", f"sds-agent-test-{os.getpid()}", back)
            assert await lines.receive_until(b"\n", 100) == b"0"


async def test_nothing_of_the_ca_is_in_the_directory_of_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of the CA's is there, either: no socket to call gRPC by in another's name, past the TLS connections whose
    peers are known, and nothing that a CA that is killed would leave behind, each time.
    """
    with TemporaryDirectory() as directory:
        monkeypatch.setattr(tempfile, "tempdir", directory)
        async with served(tmp_path) as ca:
            await ca.ask(ca.issuer.token())
            assert content(Path(directory)) == []
            await ca.ask(ca.issuer.token())


def content(directory: Path) -> list[Path]:
    return list(directory.iterdir())


async def test_who_proves_nothing_keeps_no_caller_out(tmp_path: Path) -> None:
    """The oldest such connection goes for each new one; one on which a caller was proven stays."""
    async with (
        served(tmp_path, more="limits: {connections: 4}") as ca,
        ca.connected() as good,
        await speaking_http2(ca) as first,
    ):
        await first.send(PREFACE + frame(SETTINGS, 0, 0))
        await ask(good, ca.issuer.token())
        address = ca.audit[-1]["address"]
        async with AsyncExitStack() as others:
            for _ in range(4):
                await others.enter_async_context(await speaking_http2(ca))
                await ca.ask(ca.issuer.token())
            await ended(first)
            await ask(good, ca.issuer.token())
        assert ca.audit[-1]["address"] == address


async def test_a_connection_has_seconds_to_prove_a_caller(tmp_path: Path) -> None:
    """Or else it would cost nothing to hold thousands of them for as long as connections may last."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    limits = ConnectionLimits(10, FRAMES, handshake=60, unproven=0.1)
    acceptor = TlsAcceptor(lambda: context, lambda: datetime.now(UTC), limits)
    with socket.create_server(("127.0.0.1", 0)) as listener, recorded() as events:
        listener.setblocking(False)
        await let_go(acceptor, listener, tmp_path)
        assert "no caller was proven" in events.named("connection_failed")[0]["cause"]


async def test_connections_beyond_the_limit_are_closed_until_there_is_room(tmp_path: Path) -> None:
    async with served(tmp_path, more="limits: {connections: 1}") as ca:
        async with ca.connected() as channel:
            await ask(channel, ca.issuer.token())
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await ca.ask(ca.issuer.token())
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        with anyio.fail_after(10):
            while not await is_answered(ca):
                pass


async def is_answered(ca: Served) -> bool:
    try:
        await ca.ask(ca.issuer.token())
    except grpc.aio.AioRpcError:
        return False
    return True


async def test_a_machine_without_a_descriptor_left_takes_connections_again_when_it_has_one(tmp_path: Path) -> None:
    """A client that opens many connections must not be able to end the CA."""

    class Exhausted(socket.socket):
        left = 3

        def accept(self) -> Any:
            if self.left:
                self.left -= 1
                raise OSError(errno.EMFILE, "Too many open files")
            return super().accept()

    with Exhausted() as listener, recorded() as events:
        listener.setblocking(False)
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        acceptor = TlsAcceptor(no_context, lambda: datetime.now(UTC), ConnectionLimits(10, FRAMES))
        await let_go(acceptor, listener, tmp_path)
        (reported,) = events.named("not_accepted", level="error")  # once, however often it is tried again
        assert reported["cause"] == "Too many open files"
        assert events.named("connection_failed")


async def next_from(accepting: Accepting) -> str:
    """The address of the next connection, which is closed."""
    arrival = await accepting.next()
    arrival.plain.close()
    return arrival.address


async def test_the_event_loop_is_told_once_which_socket_brings_connections() -> None:
    """To tell it again for each connection takes as long as to accept one."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        with Accepting(listener) as accepting, counted() as calls, anyio.fail_after(10):
            for _ in range(5):
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(next_from, accepting)
                    await anyio.lowlevel.checkpoint()
                    socket.create_connection(listener.getsockname()).close()
    assert calls.of["epoll.register"] == 1


async def test_connections_that_nobody_can_take_do_not_keep_the_event_loop_busy() -> None:
    """As while no descriptor is free, or no worker is ready: a core would be used up, by whoever connects."""
    with socket.create_server(("127.0.0.1", 0)) as listener, ExitStack() as stack:
        listener.setblocking(False)
        accepting = stack.enter_context(Accepting(listener))
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(next_from, accepting)
            await anyio.lowlevel.checkpoint()
            clients = [stack.enter_context(socket.create_connection(listener.getsockname())) for _ in range(3)]
        with counted() as calls:
            for _ in range(100):
                await anyio.lowlevel.checkpoint()
        assert calls.of["Accepting._tell"] <= IN_VAIN
        with anyio.fail_after(10):
            others = [await next_from(accepting) for _ in clients[1:]]
        assert others == [f"127.0.0.1:{client.getsockname()[1]}" for client in clients[1:]], "they lost nothing by it"


async def test_who_connects_and_says_nothing_is_let_go(tmp_path: Path) -> None:
    """Silence costs the client nothing, and takes a connection's place from all others."""
    limits = ConnectionLimits(10, FRAMES, handshake=0.1)
    acceptor = TlsAcceptor(lambda: ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), lambda: datetime.now(UTC), limits)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        await let_go(acceptor, listener, tmp_path)


async def let_go(acceptor: TlsAcceptor, listener: socket.socket, directory: Path) -> None:
    """Connect, say nothing, and wait for the end of the connection."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(acceptor.run, listener, [directory / "grpc"])
        async with await anyio.connect_tcp(*listener.getsockname()) as stream:
            with anyio.fail_after(10), pytest.raises(anyio.EndOfStream):
                await stream.receive()
        tasks.cancel_scope.cancel()


def no_context() -> ssl.SSLContext:
    raise SignerError("there is no certificate")


async def speaking_http2(ca: Served, context: ssl.SSLContext | None = None) -> TLSStream:
    """A connection on which a test writes frames by hand."""
    host, port = ca.address.rsplit(":", 1)
    context = context or ssl.create_default_context(cadata=ca.roots.decode())
    context.set_alpn_protocols(["h2"])
    return await anyio.connect_tcp(host, int(port), ssl_context=context, tls_standard_compatible=False)


async def ended(stream: TLSStream) -> None:
    """Read until the CA closes the connection."""
    with anyio.fail_after(10), suppress(anyio.EndOfStream, anyio.BrokenResourceError):
        while True:
            await stream.receive()


@pytest.mark.parametrize(
    "flood",
    [
        frame(HEADERS, 0, 1, b"\x90" * 1000) + frame(CONTINUATION, 0, 1, b"\x90" * 1000),
        frame(HEADERS, END_HEADERS, 1, b"\x90" * 1000),
        frame(HEADERS, 0, 1) + frame(CONTINUATION, 0, 1, b"\0\1a\x7f\xff\xff\1" + b"a" * 10_000) * 3,
        frame(SETTINGS, 0, 0) * 5000,
        b"".join(frame(HEADERS, END_HEADERS, stream, b"\x90") for stream in range(1, 2 * UNPROVEN_CALLS + 2, 2)),
    ],
    ids=["a block without end", "a thousand headers", "a large block", "frames that ask nothing", "calls"],
)
async def test_who_makes_grpc_hold_much_for_little_is_let_go(ca: Served, flood: bytes) -> None:
    """Twenty such connections took two gigabytes, and every good caller waited twelve seconds."""
    with recorded() as events:
        async with await speaking_http2(ca) as stream:
            await stream.send(PREFACE + frame(SETTINGS, 0, 0) + flood)
            await ended(stream)
        failed = await events.wait("connection_failed")
    assert any(words in failed["cause"] for words in ("header block", "too many frames", "proved nothing"))
    await ca.ask(ca.issuer.token())


async def issued(stream: TLSStream, client: H2Connection) -> bool:
    """Ask for a certificate on that connection; whether a signed answer came."""
    path = [(":method", "POST"), (":scheme", "https"), (":path", METHOD), (":authority", "localhost")]
    call, data = client.get_next_available_stream_id(), b""
    csr = make_csr(generate(KeyType.EC_P256), WEB).decode()
    request = CertificateRequest(csr=csr, validity_duration=60).SerializeToString()
    client.send_headers(call, [*path, ("content-type", "application/grpc"), ("te", "trailers")])
    client.send_data(call, message(request), end_stream=True)
    await stream.send(client.data_to_send())
    while True:
        for event in client.receive_data(await stream.receive()):
            if isinstance(event, DataReceived):
                data += event.data
            if isinstance(event, StreamEnded):
                return b"BEGIN CERTIFICATE" in data
        await stream.send(client.data_to_send())


async def test_a_proven_caller_may_ping_for_as_long_as_its_connection_lasts(ca: Served) -> None:
    """Or else one that asks every few seconds whether the CA is still there would lose its connection for it."""
    got = await ca.ask(ca.issuer.token())
    client = H2Connection(H2Configuration(client_side=True))
    client.initiate_connection()
    async with await speaking_http2(ca, got.context(ca.directory)) as stream:
        with anyio.fail_after(20):
            assert await issued(stream, client)
            for _ in range(5000):
                client.ping(bytes(8))
            assert await issued(stream, client)


@pytest.mark.parametrize("asks", [False, True], ids=["it has nothing to ask", "it got its next certificate"])
async def test_a_connection_ends_with_its_clients_certificate(tmp_path: Path, *, asks: bool) -> None:
    """A client that renewed in time comes back with the new one, and is not refused on the old connection."""
    clock, client = Shifted(), H2Connection(H2Configuration(client_side=True))
    client.initiate_connection()
    async with served(tmp_path, clock=clock) as ca:
        identity = await ca.ask(ca.issuer.token())
        context, end = identity.context(tmp_path), identity.leaf.not_valid_after_utc
        clock.ahead = end - datetime.now(UTC) - timedelta(seconds=4 if asks else 1)
        async with await speaking_http2(ca, context) as stream:
            if asks:
                assert await issued(stream, client)
            else:
                await stream.send(client.data_to_send())
            await ended(stream)
        assert clock.now() >= end


@pytest.mark.parametrize("properly", [True, False])
@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
async def test_no_session_is_resumed(ca: Served, version: ssl.TLSVersion, properly: bool) -> None:
    """It would bring back a client certificate that the CA has not verified again.

    OpenSSL remembers a session of TLS 1.2 that has ended `properly`. Who resumes it is let in when it comes once more.
    """
    got = await ca.ask(ca.issuer.token())
    context = got.context(ca.directory)
    context.maximum_version = version
    first = await anyio.to_thread.run_sync(session, ca, context, None, properly)
    again = await anyio.to_thread.run_sync(session, ca, context, first.session, properly)
    assert not (again.resumed and again.served)
    last = await anyio.to_thread.run_sync(session, ca, context, first.session, properly)
    assert (last.resumed, last.served) == (False, True)


@dataclass
class Session:
    """One connection of a client: whether it resumed a session from before, and whether the CA said anything."""

    session: ssl.SSLSession | None
    resumed: bool
    served: bool


def session(ca: Served, context: ssl.SSLContext, before: ssl.SSLSession | None, properly: bool) -> Session:
    """Connect, resuming what was before if the CA lets it, and end TLS before TCP if that is to be done properly."""
    host, port = ca.address.rsplit(":", 1)
    context.set_alpn_protocols(["h2"])
    with (
        socket.create_connection((host, int(port))) as plain,
        context.wrap_socket(plain, server_hostname="127.0.0.1", session=before) as tls,
    ):
        served = b""
        with suppress(OSError):  # it ends the connection
            served = tls.recv(1)  # gRPC's first byte: what the server has to say of sessions came before it
        found = Session(tls.session, bool(tls.session_reused), bool(served))
        if properly:
            with suppress(OSError):  # gRPC's other bytes come before its end
                tls.unwrap()
        return found


async def test_a_client_that_does_not_speak_http2_is_let_go_at_once(ca: Served) -> None:
    host, port = ca.address.rsplit(":", 1)
    context = ssl.create_default_context(cadata=ca.roots.decode())
    with recorded() as events:
        stream = await anyio.connect_tcp(host, int(port), ssl_context=context, tls_standard_compatible=False)
        async with stream:
            with anyio.fail_after(10), pytest.raises(anyio.EndOfStream):
                await stream.receive()
        assert "ALPN" in (await events.wait("connection_failed"))["cause"]
    await ca.ask(ca.issuer.token())
