"""What peers can make the agent store has a bound in bytes; who crosses it is told, and the others notice nothing."""

import asyncio
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import anyio
import grpc
import grpc.aio
import pytest
from anyio.streams.buffered import BufferedByteReceiveStream
from fakes.events import Events, recorded
from fakes.loops import anyio_backend, loop_of_the_module, one_loop  # noqa: F401 - fixtures
from fakes.peers import DeltaStream, Peer, SotwStream, chain_of, connected
from fakes.raw_http2 import DATA, END_STREAM, PREFACE, SETTINGS, RawPeer, frame, message

from sds_agent.sds.acceptor import STUCK, STUCK_IN_GRPC, Connection, StoredBytes
from sds_agent.sds.delta import MOST_OUTSTANDING
from sds_agent.sds.endpoint import SocketFile
from sds_agent.sds.server import Limits, serving
from sds_agent.sds.service import TOO_MUCH, UNREAD, SecretDiscoveryService
from sds_agent.sds.surplus import Surplus
from sds_agent.secrets.model import BundleSecret, CertificateSecret
from sds_agent.secrets.store import SecretStore

TESTS = Path(__file__).parents[1]
FIRST_REQUEST = (TESTS / "data" / "envoy-1.40-first-request.bin").read_bytes()
LATER = datetime(2036, 1, 1, tzinfo=UTC)
NAMES = [f"w{number}" for number in range(50)]
MOST = 1_000_000
ANSWER = 150_000
"""Bytes of an answer with all of these names, and a few more."""
REFUSED = (grpc.StatusCode.RESOURCE_EXHAUSTED, TOO_MUCH.detail)
WINDOW_UPDATE = 8
BEGUN = message(b"x" * 1_000_000)[:60_000]
"""Of a request that does not end: as much as the server's first window has room for."""


def certificate(content: bytes) -> CertificateSecret:
    return CertificateSecret(content * 3000, b"key", LATER)


class Agent:
    """A server with fifty certificates of a usual size, and two more names; what it says."""

    def __init__(self, path: Path, stored_bytes: int, events: Events, unread: float) -> None:
        self.socket = path
        self.events = events
        self.store = SecretStore([*NAMES, "default", "ROOTCA"])
        self.store.publish({"default": certificate(b"1"), "ROOTCA": BundleSecret(b"roots")})
        self.store.publish(dict.fromkeys(NAMES, certificate(b"w")))
        self.service = SecretDiscoveryService(self.store, stored_bytes=stored_bytes, unread=unread)

    async def until(self, *, unfinished: int = 0, connections: int | None = None) -> None:
        """Until requests that have not ended have at most so many bytes, and so many connections are open at most."""
        most = len(self.service.connections) if connections is None else connections
        with anyio.fail_after(10):
            while self.service.stored.unfinished > unfinished or len(self.service.connections) > most:
                await anyio.lowlevel.checkpoint()


@asynccontextmanager
async def running(directory: Path, stored_bytes: int = MOST, unread: float = UNREAD) -> AsyncIterator[Agent]:
    loop, met = asyncio.get_running_loop(), list[object]()
    loop.set_exception_handler(lambda _loop, context: met.append(context))
    with recorded() as events:
        agent = Agent(directory / "sds.sock", stored_bytes, events, unread)
        async with serving(agent.service, SocketFile(agent.socket), Limits()):
            await agent.until(connections=0)  # the server's own probe has left
            yield agent
    loop.set_exception_handler(None)
    assert met == events.named("fault") == []


@asynccontextmanager
async def undisturbed(agent: Agent) -> AsyncIterator[SotwStream]:
    """An Envoy that is served before, and gets each change afterwards."""
    async with connected(agent.socket) as peer:
        stream = await peer.stream(60).ask("default")
        await stream.read()
        await stream.ack("default")
        yield stream
        agent.store.publish({"default": certificate(b"2")})
        assert chain_of((await stream.read())["default"]) == b"2" * 3000
        assert "ROOTCA" in await peer.fetch("ROOTCA")


async def begin(agent: Agent, count: int, method: str = "StreamSecrets") -> list[RawPeer]:
    """So many connections of this process, with a request each that does not end."""
    peers = [await RawPeer.connect(agent.socket) for _ in range(count)]
    for each in peers:
        await each.open(1, method)
        for at in range(0, len(BEGUN), 16_384):
            await each.send(frame(DATA, 0, 1, BEGUN[at : at + 16_384]))
    return peers


async def leave(*peers: RawPeer) -> None:
    for each in peers:
        await each.connection.aclose()


async def test_requests_that_do_not_end_cost_their_process_connections_and_nobody_else(tmp_path: Path) -> None:
    """It is told why, and no more than the limit is left, with the quarter that may come between two looks."""
    command = [sys.executable, "-m", "fakes.hoard", str(tmp_path / "sds.sock"), "60", str(len(BEGUN))]
    async with running(tmp_path) as agent, undisturbed(agent):
        mine = await begin(agent, 2)
        async with await anyio.open_process(command, stderr=None, cwd=TESTS) as hostile:
            assert hostile.stdout is not None
            assert hostile.stdin is not None
            lines = BufferedByteReceiveStream(hostile.stdout)
            with anyio.fail_after(20):
                assert await lines.receive_until(b"\n", 100) == b"hoarding"
            reported = await agent.events.wait("too_much_stored", level="warning")
            assert reported["holder"].startswith(f"pid {hostile.pid} ")
            assert reported["stored_bytes"] > reported["most"] == MOST
            kept = MOST * 5 // 4 // len(BEGUN)
            await agent.until(unfinished=MOST * 5 // 4, connections=kept + 1)
            assert agent.service.stored.unfinished > MOST // 2, "the others of it go on"
            await hostile.stdin.send(b"how many?\n")
            with anyio.fail_after(20):
                refused, closed = map(int, (await lines.receive_until(b"\n", 100)).split())
            assert refused, "the first ones; where as much again has come meanwhile, connections end at once"
            assert 60 - kept <= closed < 60
        await agent.until(unfinished=2 * 100_000)
        assert agent.service.stored.unfinished > 2 * len(BEGUN), "those of the other process stay"
        await leave(*mine)
        await agent.until()


async def test_connection_that_is_just_read_can_be_ended_at_once(tmp_path: Path) -> None:
    """Many small ones come so fast that those before them have not read yet how they ended."""
    async with running(tmp_path, 100_000) as agent:
        peers = [await RawPeer.connect(agent.socket) for _ in range(80)]
        for number, each in enumerate(peers):  # the newest always has most
            await each.open(1, "StreamSecrets")
            await each.send(frame(DATA, 0, 1, BEGUN[: 5000 + 30 * number]))
        await agent.until(unfinished=125_000, connections=125_000 // 5000)
        await leave(*peers)


class Told(Connection):
    """A connection that tells whether its calls are told how they end."""

    is_told = False

    def refuse(self) -> None:
        """End it."""
        self.is_told = True
        super().refuse()


async def test_calls_of_a_connection_that_ends_at_once_are_told_why() -> None:
    stored = StoredBytes(100, lambda: None)
    surplus = Surplus[Any](stored, lambda _call: None)
    first, second = Told("first", stored=stored), Told("second", stored=stored)
    first.moved(300)
    surplus.look([first], [], 0.0)
    second.moved(300)
    surplus.look([first, second], [], 0.0)
    await anyio.lowlevel.checkpoint()
    assert (first.is_told, second.is_told) == (True, False)


async def test_requests_that_end_count_no_more(tmp_path: Path) -> None:
    async with running(tmp_path) as agent, undisturbed(agent):
        peers = await begin(agent, 10)
        with anyio.fail_after(10):
            while agent.service.stored.unfinished < 10 * len(BEGUN):
                await anyio.lowlevel.checkpoint()
        await leave(*peers)
        await agent.until()
        for _ in range(50):
            async with connected(agent.socket) as envoy:
                call = envoy.stream().call
                await call.write(FIRST_REQUEST)
                await call.read()
                call.cancel()
        assert agent.service.stored.unfinished == 0
        assert agent.events.named("too_much_stored") == []


async def test_call_that_the_agent_ends_in_the_middle_of_a_request_frees_it(tmp_path: Path) -> None:
    async with running(tmp_path) as agent:
        (peer,) = await begin(agent, 1)
        with anyio.fail_after(10):
            while agent.service.stored.unfinished < len(BEGUN):
                await anyio.lowlevel.checkpoint()
        agent.service.dismiss()
        await agent.until()
        assert len(agent.service.connections) == 1
        await leave(peer)


async def test_answers_that_are_not_read_cost_their_connection_and_its_calls_are_told(tmp_path: Path) -> None:
    """A call whose answer waits is reset: its status would come behind that."""
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.http2.bdp_probe", 0)]  # it would buffer megabytes itself
    async with (
        running(tmp_path) as agent,
        undisturbed(agent),
        grpc.aio.insecure_channel(f"unix:{agent.socket}", options=options) as channel,
    ):
        greedy = Peer(channel)
        reads = await greedy.stream().ask("ROOTCA")
        await reads.read()
        unread = [await greedy.delta().subscribe(*NAMES) for _ in range(2 * MOST // ANSWER)]
        assert await reads.end() == REFUSED
        code, detail = await unread[0].end()
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "RST_STREAM" in detail
        assert len(agent.events.named("too_much_stored", level="warning")) == 1
        await agent.until(connections=1)


@pytest.mark.parametrize(("variant", "streams"), [("SotW", 200), ("Delta", 12)])
async def test_short_names_count_by_what_it_costs_to_keep_them(tmp_path: Path, variant: str, streams: int) -> None:
    """That is many times what came, and what the answers have."""
    names = [f"{number:02d}" for number in range(99)]
    async with running(tmp_path) as agent, undisturbed(agent), connected(agent.socket) as greedy:
        await greedy.fetch("ROOTCA")
        first = set(agent.service.connections)  # a client that is told opens another
        with suppress(grpc.aio.AioRpcError):
            for _ in range(streams):
                if variant == "SotW":
                    await (await greedy.stream().ask("ROOTCA", *names)).read()
                    continue
                stream = greedy.delta()
                for _ in range(MOST_OUTSTANDING):
                    await (await stream.subscribe(*names)).read()
        await agent.events.wait("too_much_stored")
        with anyio.fail_after(10):
            while first <= agent.service.connections.keys():
                await anyio.lowlevel.checkpoint()


LARGE_WINDOWS = frame(SETTINGS, 0, 0, b"\x00\x04\x7f\xff\xff\xff") + frame(WINDOW_UPDATE, 0, 0, b"\x7f\x00\x00\x00")


@pytest.mark.parametrize("method", ["StreamSecrets", "FetchSecrets"])
@pytest.mark.parametrize("room", ["usual", "large"])
async def test_answers_that_are_not_read_are_bounded(tmp_path: Path, method: str, room: str) -> None:
    """Where the peer's windows are large, gRPC takes all of them at once and keeps them."""
    async with running(tmp_path) as agent, undisturbed(agent):
        peers = []
        for _ in range(MOST // ANSWER):
            peers.append(await RawPeer.connect(agent.socket))
            await peers[-1].send(LARGE_WINDOWS if room == "large" else b"")
            for number in range(3):
                await peers[-1].open(2 * number + 1, method)
                await peers[-1].say(2 * number + 1, _asking(NAMES))
        await agent.events.wait("too_much_stored")
        await agent.until(connections=MOST * 5 // 4 // (3 * ANSWER) + 1)
        await leave(*peers)


@pytest.mark.parametrize("begun", ["before", "since"])
async def test_calls_that_are_over_count_while_the_peer_does_not_read_that(tmp_path: Path, begun: str) -> None:
    """gRPC keeps each, and they are no streams any more, of which there may be so many."""
    async with running(tmp_path, 8 * MOST) as agent, undisturbed(agent):
        peer = await RawPeer.connect(agent.socket)
        await peer.send(LARGE_WINDOWS)
        calls = range(1, 700, 2)
        if begun == "before":
            for number in calls:
                await peer.open(number, "StreamSecrets")
        for number in range(1001, 1009, 2):  # more than its socket takes
            await peer.open(number, "StreamSecrets")
            await peer.say(number, _asking(NAMES))
        with anyio.fail_after(10):
            while not any(each.is_stuck for each in agent.service.connections.values()):
                await anyio.lowlevel.checkpoint()
        for number in calls:
            if begun == "before":
                await peer.send(frame(DATA, END_STREAM, number))
            else:
                await peer.open(number + 2000, "of no such name")
        await agent.events.wait("too_much_stored")
        await agent.until(connections=1)
        await leave(peer)


def _asking(names: list[str]) -> bytes:
    return b"".join(bytes((0x1A, len(name))) + name.encode() for name in names)


@pytest.mark.parametrize("method", ["StreamSecrets", "DeltaSecrets"])
async def test_names_that_the_agent_has_to_remember_count(tmp_path: Path, method: str) -> None:
    """A subscription lasts, and a request may have a megabyte of names that are not served."""
    long = [f"{number}{'n' * 10_000}" for number in range(20)]
    async with running(tmp_path, 4 * MOST) as agent, undisturbed(agent), connected(agent.socket) as greedy:
        streams = list[SotwStream | DeltaStream]()
        with suppress(grpc.aio.AioRpcError, grpc.aio.InternalError):
            while len(streams) < 80:
                streams.append(await _subscribed(greedy, method, ["ROOTCA", *long]))
        await agent.events.wait("too_much_stored")
        assert 2 * MOST < len(streams) * sum(map(len, long)) < 8 * MOST, "at the limit, or soon after"
        for stream in streams:
            assert await stream.end() == REFUSED


async def _subscribed(peer: Peer, method: str, names: list[str]) -> SotwStream | DeltaStream:
    if method == "DeltaSecrets":
        delta = await peer.delta().subscribe(*names)
        await delta.read()
        return await delta.ack()
    stream = await peer.stream().ask(*names)
    await stream.read()
    return await stream.ack(*names)


async def test_peers_that_make_the_agent_answer_and_do_not_read_are_bounded(tmp_path: Path) -> None:
    """gRPC replies to each ping, and keeps what is not read; so does the system."""
    async with running(tmp_path, 4 * STUCK) as agent, undisturbed(agent), anyio.create_task_group() as tasks:
        for _ in range(20):
            tasks.start_soon(_ping_without_end, agent.socket)
        await agent.events.wait("too_much_stored")
        await agent.until(connections=4 * STUCK * 5 // 4 // STUCK_IN_GRPC + 1)
        tasks.cancel_scope.cancel()


async def _ping_without_end(path: Path) -> None:
    """Until the server closes the connection."""
    loop, ping = asyncio.get_running_loop(), frame(6, 0, 0, bytes(8)) * 4000
    with socket.socket(socket.AF_UNIX) as peer, suppress(BrokenPipeError, ConnectionResetError):
        peer.setblocking(False)
        await loop.sock_connect(peer, str(path))
        await loop.sock_sendall(peer, PREFACE + frame(SETTINGS, 0, 0))
        while True:
            await loop.sock_sendall(peer, ping)


async def test_requests_behind_one_that_waits_are_bounded(tmp_path: Path) -> None:
    """The agent reads one request of a Fetch; gRPC makes room for more, and keeps them."""
    async with running(tmp_path, unread=0.2) as agent, undisturbed(agent):
        agent.store.replace_names([*NAMES, "default", "ROOTCA", "late"], (), {})
        peers = [await RawPeer.connect(agent.socket) for _ in range(60)]
        for each in peers:
            await each.open(1, "FetchSecrets")
            await each.say(1, _asking(["late"]))
        with anyio.fail_after(10):
            while agent.service.open_streams < len(peers):
                await anyio.lowlevel.checkpoint()
        for each in peers:  # enough for a look: who has waited for long by then counts, or at the next one
            with suppress(anyio.BrokenResourceError):
                await each.say(1, bytes(50_000))
        await agent.events.wait("too_much_stored")
        await agent.until(connections=MOST * 5 // 4 // 50_000 + 1)
        await leave(*peers)


async def test_fetches_that_wait_for_their_request_are_bounded_and_told(tmp_path: Path) -> None:
    async with running(tmp_path, 300_000) as agent, undisturbed(agent):
        peers = await begin(agent, 300_000 // len(BEGUN) + 1, "FetchSecrets")
        reported = await agent.events.wait("refused")
        assert reported["cause"] == TOO_MUCH.detail
        await leave(*peers)
        await agent.until()


async def test_envoys_that_all_come_at_once_and_take_a_push_stay_far_below(tmp_path: Path) -> None:
    """With the whole Node in each request: what passes is not what is stored."""
    count = 60
    async with running(tmp_path, 2 * count * len(FIRST_REQUEST)) as agent, AsyncExitStack() as stack:
        envoys = [await stack.enter_async_context(connected(agent.socket)) for _ in range(count)]
        streams = [each.stream(60) for each in envoys]
        async with anyio.create_task_group() as tasks:
            for each in streams:
                tasks.start_soon(each.call.write, FIRST_REQUEST)
        for turn in range(5):
            for stream in streams:
                assert "default" in await stream.read()
                await stream.call.write(FIRST_REQUEST + b"\x2a" + bytes((len(stream.nonce),)) + stream.nonce.encode())
            await agent.events.wait("acked", count=count * (turn + 1))
            agent.store.publish({"default": certificate(b"%d" % turn)})
        assert agent.events.named("too_much_stored") == []
        assert agent.service.open_streams == count
        assert agent.service.stored.unfinished == 0
