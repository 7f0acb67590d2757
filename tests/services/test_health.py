"""grpc.health.v1 as probers use it: Check answers the truth, and Watch every change."""

import asyncio
import ssl
import sys
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import anyio
import anyio.lowlevel
import grpc
import grpc.aio
import pytest
from anyio.streams.tls import TLSStream
from fakes.ca_servers import Served, served
from fakes.events import recorded
from fakes.raw_http2 import PREFACE, SETTINGS, RawPeer, frame
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from sds_agent_proto.health_pb2 import HealthCheckRequest, HealthCheckResponse

from sds_agent.ca.service import SERVICE as CA_SERVICE
from sds_agent.rpc import health
from sds_agent.rpc.health import Health
from sds_agent.sds.endpoint import SocketFile
from sds_agent.sds.server import Limits, serving
from sds_agent.sds.service import SecretDiscoveryService
from sds_agent.secrets.store import SecretStore

Call = grpc.aio.UnaryStreamCall[bytes, bytes]

SERVING = HealthCheckResponse.SERVING
NOT_SERVING = HealthCheckResponse.NOT_SERVING
SERVICE_UNKNOWN = HealthCheckResponse.SERVICE_UNKNOWN
NO_WINDOW = b"\x00\x04\x00\x00\x00\x00"
"""SETTINGS_INITIAL_WINDOW_SIZE (RFC 9113 section 6.5.2): the client takes no answer yet."""


class Server:
    """A server that a test makes ready and unready."""

    ready = False
    reasons: tuple[str, ...] = ()

    def __init__(self, directory: Path, most_watchers: int = 10) -> None:
        self.service = SecretDiscoveryService(SecretStore())
        self.health = Health(
            lambda: self.ready,
            frozenset({"a.Service"}),
            reasons=lambda: self.reasons,
            most_watchers=most_watchers,
            hang_up=self.service.hang_up,
            holder=self.service.holder,
        )
        self.address = f"unix:{directory / 'sds.sock'}"
        self._socket = SocketFile(directory / "sds.sock")
        self._calls: list[Call] = []

    def change(self, *, ready: bool) -> None:
        self.ready = ready
        self.health.check_again()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[grpc.aio.Channel]:
        """The server, and a connection to it, which lasts until every watch has seen its end."""
        async with grpc.aio.insecure_channel(self.address) as channel:
            async with serving(self.service, self._socket, Limits(), [self.health]):
                yield channel
            for call in self._calls:
                with suppress(grpc.aio.AioRpcError):
                    await rest(call)

    def watch(self, channel: grpc.aio.Channel, service: str = "", data: bytes | None = None) -> Call:
        self._calls.append(watch(channel, service, data))
        return self._calls[-1]


@pytest.fixture
def server(tmp_path: Path) -> Server:
    return Server(tmp_path)


def watch(channel: grpc.aio.Channel, service: str = "", data: bytes | None = None) -> Call:
    ask: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(f"/{health.SERVICE}/Watch")
    return ask(HealthCheckRequest(service=service).SerializeToString() if data is None else data, timeout=30)


async def rest(call: Call) -> tuple[list[HealthCheckResponse.ServingStatus], grpc.StatusCode]:
    """The answers until the end, and how it ends. Await it before the end: gRPC drops what was not read by then."""
    reported = []
    while (next_one := await status(call)) is not None:
        reported.append(next_one)
    return reported, await call.code()


async def status(call: Call) -> HealthCheckResponse.ServingStatus | None:
    """The next status, or None at the end."""
    data = await call.read()
    return HealthCheckResponse.FromString(data).status if isinstance(data, bytes) else None


async def test_check_follows_readiness(server: Server) -> None:
    async with server.running():
        assert not (await health.check(server.address, 5)).ready
        server.change(ready=True)
        assert await health.check(server.address, 5) == health.Answer(ready=True)


async def test_check_says_why_not_and_says_it_only_then(server: Server) -> None:
    server.reasons = ("web: not issued yet", "batch: expired")
    async with server.running():
        assert await health.check(server.address, 5) == health.Answer(ready=False, reasons=server.reasons)
        server.change(ready=True)
        assert await health.check(server.address, 5) == health.Answer(ready=True)
        server.health.drain()
        assert await health.check(server.address, 5) == health.Answer(ready=False, reasons=("the server is stopping",))


async def test_what_check_says_is_bounded(server: Server) -> None:
    """A client takes 4 MiB and no more, and an agent may have thousands of workloads."""
    server.reasons = tuple(f"{number} {'x' * 1000}" for number in range(10_000))
    async with server.running():
        reasons = (await health.check(server.address, 5)).reasons
    assert len(reasons) == health.MOST_REASONS + 1
    assert reasons[-1] == f"and {10_000 - health.MOST_REASONS} more"
    assert max(map(len, reasons)) == health.LONGEST_REASON


async def test_a_prober_that_knows_the_standard_alone_reads_the_status(server: Server) -> None:
    server.reasons = ("web: not issued yet",)
    standard = descriptor_pb2.FileDescriptorProto(name="standard.proto", syntax="proto3")
    standard.message_type.add(name="Answer").field.add(
        name="status", number=1, type="TYPE_INT32", label="LABEL_OPTIONAL"
    )
    pool = descriptor_pool.DescriptorPool()
    pool.Add(standard)
    read = message_factory.GetMessageClass(pool.FindMessageTypeByName("Answer"))
    async with server.running() as channel:
        ask: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/{health.SERVICE}/Check")
        data = await ask(HealthCheckRequest().SerializeToString())
    assert b"not issued" in data
    assert read.FromString(data).status == NOT_SERVING  # type: ignore[attr-defined] # the field was made just now


async def test_check_of_an_unknown_service_is_not_found(server: Server) -> None:
    server.ready = True
    async with server.running() as channel:
        ask: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/{health.SERVICE}/Check")
        assert await ask(HealthCheckRequest(service="a.Service").SerializeToString()) == b"\x08\x01"
        for data, code in (
            (HealthCheckRequest(service="other").SerializeToString(), grpc.StatusCode.NOT_FOUND),
            (b"\xff", grpc.StatusCode.INVALID_ARGUMENT),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await ask(data)
            assert caught.value.code() is code


def begun(channel: grpc.aio.Channel) -> grpc.aio.StreamUnaryCall[bytes, bytes]:
    """A check whose request does not come."""
    begin: grpc.aio.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary(f"/{health.SERVICE}/Check")
    return begin(timeout=30)


async def test_only_so_many_requests_are_begun_and_not_ended_and_they_keep_no_prober_out(server: Server) -> None:
    """Any caller may ask the CA for its health, and memory is reserved for what each of these could still send. A
    prober that is refused may well have the server killed.
    """
    async with server.running() as channel:
        calls = [begun(channel) for _ in range(health.MOST_UNREAD + 1)]
        codes = [asyncio.ensure_future(call.code()) for call in calls]
        (refused,), _ = await asyncio.wait(codes, timeout=20, return_when=asyncio.FIRST_COMPLETED)
        assert refused.result() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert not (await health.check(server.address, 5)).ready
        for call in calls:
            await call.done_writing()
        outcomes = [await code for code in codes]
        assert outcomes.count(grpc.StatusCode.RESOURCE_EXHAUSTED) == 2
        assert outcomes.count(grpc.StatusCode.INVALID_ARGUMENT) == health.MOST_UNREAD - 1


async def test_a_peer_that_does_not_read_the_answers_to_its_checks_is_hung_up_on(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gRPC stores each answer, with the reasons in it, for as long as its client likes."""
    monkeypatch.setattr(health, "MOST_WAITING", 3)
    with recorded() as events:
        async with server.running():
            peer = await RawPeer.connect(tmp_path / "sds.sock", PREFACE + frame(SETTINGS, 0, 0, NO_WINDOW))
            for number in range(4):
                await peer.open(2 * number + 1, "Check", f"/{health.SERVICE}")
                await peer.say(2 * number + 1, b"")
            ended = await events.wait("connection_ended", level="warning")
            assert ended["cause"] == "it does not read the answers to health checks"
            assert not (await health.check(server.address, 5)).ready
            await peer.connection.aclose()


async def speaking_http2(ca: Served) -> TLSStream:
    host, port = ca.address.rsplit(":", 1)
    context = ssl.create_default_context(cadata=ca.roots.decode())
    context.set_alpn_protocols(["h2"])
    return await anyio.connect_tcp(host, int(port), ssl_context=context, tls_standard_compatible=False)


async def test_who_does_not_read_the_answers_of_the_ca_is_hung_up_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every client that can connect may check, and its memory is the server's."""
    monkeypatch.setattr(health, "MOST_WAITING", 3)
    with recorded() as events:
        async with served(tmp_path) as ca, await speaking_http2(ca) as stream:
            peer = RawPeer(stream)
            await peer.send(PREFACE + frame(SETTINGS, 0, 0, NO_WINDOW))
            for number in range(4):
                await peer.open(2 * number + 1, "Check", f"/{health.SERVICE}")
                await peer.say(2 * number + 1, b"")
            failed = await events.wait("connection_failed")
            assert failed["cause"] == "it does not read the answers to health checks"
            with anyio.fail_after(10), suppress(anyio.EndOfStream, anyio.BrokenResourceError):
                while True:
                    await stream.receive()
            await ca.ask(ca.issuer.token())


async def test_a_request_has_to_arrive_in_time(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or else those that never come would keep others out for good."""
    monkeypatch.setattr(health, "TIMEOUT", 0.1)
    async with server.running() as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await begun(channel)
        assert "did not arrive" in (caught.value.details() or "")


async def test_a_watcher_hears_of_every_change_once(server: Server) -> None:
    async with server.running() as channel:
        call = server.watch(channel, "a.Service")
        assert await status(call) == NOT_SERVING
        server.health.check_again()
        for ready in (True, False, True):
            server.change(ready=ready)
            assert await status(call) == (SERVING if ready else NOT_SERVING)


async def test_a_watch_of_an_unknown_service_says_so_and_stays(server: Server) -> None:
    """The protocol has it so: the service may come."""
    async with server.running() as channel:
        call = server.watch(channel, "other")
        assert await status(call) == SERVICE_UNKNOWN
        known = server.watch(channel)
        assert await status(known) == NOT_SERVING
        server.change(ready=True)
        assert await status(known) == SERVING
        assert not call.done()


async def test_a_watch_does_not_keep_the_name_that_it_brings() -> None:
    """There may be a thousand, each with a megabyte, and a program that watches needs no proof at the CA."""
    health_of = Health(lambda: True, frozenset(), hang_up=lambda _peer, _why: None, holder=str)
    found: Any = health_of.handler().service(cast("Any", SimpleNamespace(method=f"/{health.SERVICE}/Watch")))
    context, name = Context(), "\U0001f600" + "x" * 500_000
    data = HealthCheckRequest(service=name).SerializeToString()
    tracemalloc.start()
    try:
        context.inbox.put_nowait(data)
        task = asyncio.ensure_future(found.stream_stream(None, context))
        with anyio.fail_after(10):
            assert await context.written.get() == HealthCheckResponse(status=SERVICE_UNKNOWN).SerializeToString()
        assert tracemalloc.get_traced_memory()[0] < 100_000
    finally:
        tracemalloc.stop()
        task.cancel()
        await asyncio.wait([task])


class Context:
    """A stand-in for gRPC's context of a call."""

    def __init__(self) -> None:
        self.inbox, self.written = asyncio.Queue[bytes](), asyncio.Queue[bytes]()

    def peer(self) -> str:
        """Who is at the other end."""
        return "a peer"

    async def read(self) -> bytes:
        """The next message."""
        return await self.inbox.get()

    async def write(self, message: bytes) -> None:
        """Take an answer."""
        await self.written.put(message)


async def test_a_watch_that_is_no_request_is_refused(server: Server) -> None:
    async with server.running() as channel:
        assert await server.watch(channel, data=b"\xff").code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_the_end_of_the_server_is_announced_and_ends_every_watch_well(server: Server) -> None:
    """A prober takes a watch that is cut off for a broken network; one that is left open would hold up the end."""
    server.ready = True
    async with grpc.aio.insecure_channel(server.address) as channel:
        async with server.running():
            calls = [watch(channel) for _ in range(5)]
            assert [await status(call) for call in calls] == [SERVING] * 5
            ends = asyncio.gather(*(rest(call) for call in calls))
            await anyio.lowlevel.checkpoint()
        assert await ends == [([NOT_SERVING], grpc.StatusCode.OK)] * 5


async def test_watchers_that_leave_make_room_for_others(tmp_path: Path) -> None:
    server = Server(tmp_path, most_watchers=1)
    async with server.running() as channel:
        first = watch(channel)
        assert await status(first) == NOT_SERVING
        assert await server.watch(channel).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        first.cancel()
        with anyio.fail_after(10):
            while server.health.watchers:
                await health.check(server.address, 5)  # the server learns of it in its own time
        assert await status(server.watch(channel)) == NOT_SERVING


WATCH = """
import os, sys, grpc
watch = grpc.insecure_channel(sys.argv[1]).unary_stream("/grpc.health.v1.Health/Watch")(b"")
try:
    for _ in watch:
        os.write(1, b"watches\\n")
except grpc.RpcError:
    pass  # the server has ended it, and this program is about to be
"""


@asynccontextmanager
async def another(server: Server) -> AsyncIterator[None]:
    """Another process, which watches inside this context."""
    async with await anyio.open_process([sys.executable, "-c", WATCH, server.address], stderr=None) as process:
        assert process.stdout is not None
        try:
            with anyio.fail_after(30):
                assert await process.stdout.receive() == b"watches\n"
            yield
        finally:
            process.terminate()


async def test_a_process_that_watches_again_and_again_keeps_no_other_from_it(tmp_path: Path) -> None:
    """A prober that is refused may well have the server killed."""
    server = Server(tmp_path, most_watchers=3)
    async with server.running() as channel:
        watches = [server.watch(channel) for _ in range(3)]
        assert [await status(each) for each in watches] == [NOT_SERVING] * 3
        assert await server.watch(channel).code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        async with another(server):
            codes = [asyncio.ensure_future(each.code()) for each in watches]
            (ended,), _ = await asyncio.wait(codes, timeout=20, return_when=asyncio.FIRST_COMPLETED)
            assert ended.result() is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert server.health.watchers == 3
            server.change(ready=True)
            staying = [each for each in watches if not each.done()]
            assert [await status(each) for each in staying] == [SERVING] * 2


async def test_a_watch_that_gives_way_and_does_not_read_loses_its_connection(tmp_path: Path) -> None:
    """gRPC ends no call while an answer waits to be read."""
    server = Server(tmp_path, most_watchers=1)
    with recorded() as events:
        async with server.running():
            peer = await RawPeer.connect(tmp_path / "sds.sock", PREFACE + frame(SETTINGS, 0, 0, NO_WINDOW))
            await peer.open(1, "Watch", f"/{health.SERVICE}")
            await peer.say(1, b"")
            with anyio.fail_after(10):
                while not server.health.watchers:
                    await health.check(server.address, 5)
            async with another(server):
                ended = await events.wait("connection_ended", level="warning")
                assert ended["cause"] == "it does not read the answers to its watches of the health"
                assert server.health.watchers == 1
            await peer.connection.aclose()


async def test_the_ca_is_watched_without_a_proof_and_says_when_it_ends(tmp_path: Path) -> None:
    async with AsyncExitStack() as until_the_end:
        async with served(tmp_path) as ca:
            channel = await until_the_end.enter_async_context(ca.connected())
            calls = [watch(channel), watch(channel, CA_SERVICE)]
            assert [await status(call) for call in calls] == [SERVING] * 2
            ends = asyncio.gather(*(rest(call) for call in calls))
            await anyio.lowlevel.checkpoint()
        assert await ends == [([NOT_SERVING], grpc.StatusCode.OK)] * 2
