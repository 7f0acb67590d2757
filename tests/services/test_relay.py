"""Between a peer and gRPC: every byte, in order, no faster than it is taken; and an end that both can read."""

import array
import asyncio
import errno
import fcntl
import gc
import os
import socket
import termios
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import pytest
from anyio.abc import SocketStream
from fakes.clocks import HAND_LOOP, HandLoop
from fakes.events import recorded
from fakes.raw_http2 import DATA, RST_STREAM, frame
from msgspec import Struct

from sds_agent.rpc.frames import PREFACE, Bounds, Inspection
from sds_agent.sds.acceptor import RETRY_AFTER, Connection, UnixAcceptor
from sds_agent.sds.relay import BEGINNING, CHECK_INTERVAL, CHUNK, PIECE, Relay

PING = b"\x00\x00\x08\x06\x00\x00\x00\x00\x00" + bytes(8)
CALL = b"\x00\x00\x01\x01\x04\x00\x00\x00\x01\x82"


class Ends:
    """A relay between two socket pairs, and what it said when it was over."""

    def __init__(self, wait: float = 0.0, room: int | None = None) -> None:
        self.peer, front = socket.socketpair(socket.AF_UNIX)
        back, self.server = socket.socketpair(socket.AF_UNIX)
        if room is not None:
            for each in (front, back):
                each.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, room)
        for each in (self.peer, front, back, self.server):
            each.setblocking(False)
        self.calls = 0
        self.over = asyncio.Event()
        self.why: str | None = None
        self._wait = wait
        self.relay = Relay(front, back, Inspection(Bounds(block=100, frames=1 << 30)), self._pace, self._end)
        self.relay.begin()

    def _pace(self, calls: int) -> float:
        self.calls += calls
        return self._wait if self.calls else 0.0

    def _end(self, _relay: Relay, why: str | None) -> None:
        self.why = why
        self.over.set()

    def close(self) -> None:
        self.relay.close()
        self.peer.close()
        self.server.close()


@contextmanager
def relayed(wait: float = 0.0, room: int | None = None) -> Iterator[Ends]:
    ends = Ends(wait, room)
    try:
        yield ends
    finally:
        ends.close()


async def send(connection: socket.socket, data: bytes) -> None:
    with anyio.fail_after(10):
        await asyncio.get_running_loop().sock_sendall(connection, data)


async def receive(connection: socket.socket, count: int) -> bytes:
    """So many bytes, or those before the end."""
    data = b""
    with anyio.fail_after(10):
        while len(data) < count and (more := await asyncio.get_running_loop().sock_recv(connection, count)):
            data += more
    return data


@pytest.mark.parametrize("room", [None, 10_000])
async def test_every_byte_arrives_in_order_however_slowly_it_is_taken(room: int | None) -> None:
    """Where the system gives sockets little room (net.core.wmem_default), what is left of a chunk takes many turns."""
    data = os.urandom(3 << 20)
    frames = PREFACE + PING * 200_000
    with relayed(room=room) as ends:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(send, ends.server, data)
            tasks.start_soon(send, ends.peer, frames)
            await anyio.wait_all_tasks_blocked()  # both are sent as much as there is room for
            assert await receive(ends.peer, len(data)) == data
            assert await receive(ends.server, len(frames)) == frames
        assert not ends.over.is_set()


@pytest.mark.parametrize("anyio_backend", [HAND_LOOP])
async def test_no_byte_is_lost_of_what_waits_for_a_peer_that_rests_for_long() -> None:
    """As an Envoy that is paused: what it has not taken must not be overwritten by what comes after it."""
    data = os.urandom(3 << 20)
    with relayed() as ends:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(send, ends.server, data)
            await anyio.wait_all_tasks_blocked()
            for _ in range(3):
                await pass_time(CHECK_INTERVAL)
            assert await receive(ends.peer, len(data)) == data


async def pass_time(seconds: float) -> None:
    """Let so many seconds pass on a HandLoop."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, HandLoop)
    loop.move(seconds)
    for _ in range(10):  # the loop sees what is due, and then what can be read
        await anyio.lowlevel.checkpoint()


async def receive_nothing(ends: Ends) -> None:
    """Nothing more comes in many turns of the loop."""
    for _ in range(20):
        await anyio.lowlevel.checkpoint()
    with pytest.raises(BlockingIOError):
        ends.server.recv(1)


async def to_be_read(ends: Ends) -> int:
    """How much gRPC finds where it comes late."""
    with anyio.fail_after(10):
        await anyio.wait_readable(ends.server)
    for _ in range(20):  # more comes now if more comes before this is taken
        await anyio.lowlevel.checkpoint()
    found = array.array("i", [0])
    fcntl.ioctl(ends.server, termios.FIONREAD, found)
    return found[0]


async def at_one_time(ends: Ends, count: int) -> list[int]:
    """How much gRPC finds each time until it has so many bytes, where it takes all that it finds."""
    found = list[int]()
    while sum(found) < count:
        found.append(len(await receive(ends.server, await to_be_read(ends))))
    return found


async def test_grpc_never_finds_much_at_one_time_in_the_beginning() -> None:
    """It would keep a buffer of 64 KB for the life of the connection, for each Envoy of a node."""
    requests = PREFACE + PING * (BEGINNING // len(PING) - len(PREFACE))
    with relayed() as ends:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(send, ends.peer, requests)
            assert max(await at_one_time(ends, len(requests))) <= PIECE


@pytest.mark.parametrize("anyio_backend", [HAND_LOOP])
async def test_grpc_finds_no_more_in_the_beginning_when_it_does_not_read_for_long() -> None:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, HandLoop)
    with relayed() as ends:
        await send(ends.peer, PREFACE + PING * 2000)
        for _ in range(3):
            assert await to_be_read(ends) == PIECE
            loop.move(CHECK_INTERVAL)
        assert await to_be_read(ends) == PIECE


@pytest.mark.parametrize("anyio_backend", [HAND_LOOP])
async def test_a_relay_that_is_over_looks_at_its_ends_no_more() -> None:
    """It waited for the time that its calls cost, and then for gRPC too: each sets a timer."""
    met = list[dict[str, Any]]()
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: met.append(context))
    with relayed(wait=CHECK_INTERVAL / 2) as ends:
        await send(ends.peer, PREFACE + CALL + PING * 2000)
        assert await to_be_read(ends) == PIECE
        assert ends.calls == 1
    await pass_time(2 * CHECK_INTERVAL)
    assert met == []


async def test_what_comes_after_the_beginning_is_not_slowed_down() -> None:
    """An Envoy that repeats its Node sends 61 KB with every ACK: small pieces would double what a push costs."""
    requests, acks = PREFACE + PING * (BEGINNING // len(PING)), PING * 10_000
    with relayed() as ends:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(send, ends.peer, requests)
            await at_one_time(ends, len(requests))
            tasks.start_soon(send, ends.peer, acks)
            assert max(await at_one_time(ends, len(acks))) >= 2 * CHUNK


async def test_a_peer_that_leaves_is_seen_by_grpc() -> None:
    with relayed() as ends:
        ends.peer.close()
        assert await receive(ends.server, 1) == b""
        await asyncio.wait_for(ends.over.wait(), 10)


async def test_a_peer_that_is_just_writing_still_reads_the_last_answer() -> None:
    """Closed at once, the connection would break under its hand: an Envoy would count an error for a clean end."""
    with relayed() as ends:
        await send(ends.peer, PREFACE + PING * 10_000)  # more than was read by the time of the end
        await send(ends.server, b"the last word")
        ends.server.close()
        assert await receive(ends.peer, 13) == b"the last word"
        await send(ends.peer, PING * 10_000)
        assert await receive(ends.peer, 1) == b""
        ends.peer.close()
        await asyncio.wait_for(ends.over.wait(), 10)
        assert ends.why is None


async def test_nothing_is_said_in_the_middle_of_what_the_peer_is_sent() -> None:
    """Also where the peer has just made room, and the rest is about to follow."""
    data = os.urandom(1 << 20)
    with relayed() as ends:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(send, ends.server, data)
            with anyio.fail_after(10):
                while not ends.relay.is_stuck:
                    await anyio.lowlevel.checkpoint()
            read = ends.peer.recv(1 << 20)
            ends.relay.say(b"a reset")
            assert read + await receive(ends.peer, len(data) - len(read)) == data
        ends.relay.say(b"a reset")
        assert await receive(ends.peer, 7) == b"a reset"


async def test_a_peer_that_has_left_can_be_told_nothing() -> None:
    with relayed() as ends:
        ends.peer.close()
        ends.relay.say(b"a reset")
        await asyncio.wait_for(ends.over.wait(), 10)
        ends.relay.say(b"a reset")


async def test_a_connection_that_is_over_leaves_nothing_for_the_garbage_collector() -> None:
    """A thousand Envoys that leave at once would stay in memory for long, and a push would wait for the collector."""

    def connection() -> None:
        (peer, front), (back, server) = (socket.socketpair(socket.AF_UNIX) for _ in range(2))
        relay = Relay(front, back, Inspection(Bounds(block=100)), lambda _calls: 0.0, lambda _relay, _why: None)
        relay.begin()
        relay.close()
        for each in (peer, server):
            each.close()

    connection()
    gc.collect()
    gc.disable()
    try:
        connection()
        await asyncio.sleep(0)  # the event loop forgets what it no longer has to watch
        assert gc.collect() == 0
    finally:
        gc.enable()


async def test_a_peer_that_does_not_close_is_closed() -> None:
    with relayed() as ends:
        ends.server.close()
        await asyncio.wait_for(ends.over.wait(), 10)
        assert ends.why is None


@pytest.mark.parametrize("anyio_backend", [HAND_LOOP])
@pytest.mark.parametrize("seconds", [0, 3])
@pytest.mark.parametrize("frozen", ["peer", "server"])
async def test_a_peer_that_leaves_while_the_other_end_is_frozen_takes_no_descriptors(frozen: str, seconds: int) -> None:
    """gRPC closes the connection of a peer that answers no ping; what that peer has not read stays unread."""
    with relayed() as ends:
        leaves = ends.server if frozen == "peer" else ends.peer
        data = PREFACE + PING * 200_000
        for _ in range(1000):  # until there is room neither here nor there
            with suppress(BlockingIOError):
                data = data[leaves.send(data) :]
            await anyio.lowlevel.checkpoint()
        assert data
        for _ in range(seconds):
            await pass_time(CHECK_INTERVAL)
        leaves.close()
        await pass_time(CHECK_INTERVAL)
        await asyncio.wait_for(ends.over.wait(), 10)


async def test_bytes_with_a_fault_are_not_passed_on_and_end_the_connection() -> None:
    with relayed() as ends:
        await send(ends.peer, PREFACE)
        assert await receive(ends.server, len(PREFACE)) == PREFACE
        await send(ends.peer, b"\x00\x00\xff\x01\x00\x00\x00\x00\x01" + bytes(0xFF))
        await asyncio.wait_for(ends.over.wait(), 10)
        assert ends.why == "a header block has more than 100 bytes"
        assert await receive(ends.server, 1) == b""


async def test_a_peer_that_made_too_many_calls_waits_and_goes_on() -> None:
    with relayed(wait=0.01) as ends:
        await send(ends.peer, PREFACE + CALL)
        await receive(ends.server, len(PREFACE + CALL))
        await send(ends.peer, PING)
        assert ends.calls == 1
        ends._wait = 0.0
        assert await receive(ends.server, len(PING)) == PING


async def test_too_many_calls_in_one_piece_of_the_beginning_hold_back_the_next_piece() -> None:
    """A thousand calls are in each: a peer could have gRPC make them all before it is told to wait."""
    calls = CALL * (PIECE // len(CALL))
    with relayed(wait=1000) as ends:
        await send(ends.peer, PREFACE + calls + calls)
        await receive(ends.server, PIECE)
        made = ends.calls
        await receive_nothing(ends)
        assert ends.calls == made


async def test_a_peer_that_is_not_read_from_and_leaves_is_noticed() -> None:
    """Otherwise the connections of a peer that calls without end, and connects again, would pile up."""
    with relayed(wait=1000) as ends:
        await send(ends.peer, PREFACE + CALL)
        await receive(ends.server, len(PREFACE + CALL))
        await send(ends.peer, PING)
        ends.peer.close()
        await asyncio.wait_for(ends.over.wait(), 10)
        assert await receive(ends.server, len(PING)) == b"", "it was to wait"


class Exhausted(socket.socket):
    """A stand-in for a socket of a process that has no descriptor left, `left` times."""

    left = 0

    def accept(self) -> Any:
        if self.left:
            self.left -= 1
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return super().accept()


class Accepting(Struct, frozen=True):
    """An acceptor, its listener, the one in the place of gRPC, and what it says of who is connected."""

    acceptor: UnixAcceptor
    listener: Exhausted
    behind: socket.socket
    connections: dict[str, Connection]

    async def until_connected(self, *, connected: bool = True) -> None:
        """Until a peer is, or until none is any more."""
        with anyio.fail_after(10):
            while bool(self.connections) is not connected:
                await anyio.lowlevel.checkpoint()


@contextmanager
def accepting(directory: Path, most: int = 10) -> Iterator[Accepting]:
    """An acceptor at `directory/sds`, with a listener in the place of gRPC."""
    connections: dict[str, Connection] = {}
    with socket.socket(socket.AF_UNIX) as behind, Exhausted(socket.AF_UNIX) as listener:
        for each, name in ((behind, "grpc"), (listener, "sds")):
            each.bind(str(directory / name))
            each.listen()
        backend = os.open(directory / "grpc", os.O_PATH | os.O_CLOEXEC)
        acceptor = UnixAcceptor(listener, backend, most, connections)
        acceptor.begin()
        try:
            yield Accepting(acceptor, listener, behind, connections)
        finally:
            acceptor.abort()
            acceptor.close()


@asynccontextmanager
async def accepted(directory: Path) -> AsyncIterator[tuple[SocketStream, Connection, socket.socket]]:
    """A peer's end of a connection, the connection, and the end of gRPC, which does not block."""
    with accepting(directory) as here:
        async with await anyio.connect_unix(directory / "sds") as peer:
            await here.until_connected()
            (connection,) = here.connections.values()
            grpc, _ = here.behind.accept()
            with grpc:
                grpc.setblocking(False)
                yield peer, connection, grpc


async def test_connections_that_have_ended_take_no_place(tmp_path: Path) -> None:
    """Or else an agent would refuse every Envoy once so many had come, whether they are still there or not."""
    with accepting(tmp_path, most=2) as here:
        for _ in range(4):
            async with await anyio.connect_unix(tmp_path / "sds"):
                await here.until_connected()
            await here.until_connected(connected=False)
        async with await anyio.connect_unix(tmp_path / "sds") as last:
            await last.send(PREFACE)
            await here.until_connected()
            for _ in range(20):
                await anyio.lowlevel.checkpoint()
            assert len(here.connections) == 1, "it stays"


async def test_each_time_that_descriptors_are_short_is_logged_and_peers_that_wait_are_accepted_later(
    tmp_path: Path,
) -> None:
    """Without a word an operator sees Envoys that hang, and nothing else."""
    with recorded() as events, accepting(tmp_path) as here:
        for count in (1, 2):
            here.listener.left = 2
            async with await anyio.connect_unix(tmp_path / "sds"):
                reported = await events.wait("not_accepted", level="error", count=count)
                assert reported["cause"] == "Too many open files"
                await here.until_connected()
                here.acceptor.abort()
        assert len(events.named("not_accepted")) == 2, "once each, however often it is tried again"


async def test_a_connection_that_is_ended_is_closed_and_the_log_says_why(tmp_path: Path) -> None:
    with recorded() as events, accepting(tmp_path) as here:
        async with await anyio.connect_unix(tmp_path / "sds") as peer:
            await here.until_connected()
            (connection,) = here.connections.values()
            connection.end("it does not read")
            with pytest.raises(anyio.EndOfStream):
                await peer.receive()
            await here.until_connected(connected=False)
            reported = await events.wait("connection_ended", level="warning", cause="it does not read")
            assert reported["holder"] == connection.holder


async def test_answers_that_grpc_was_given_wait_for_the_peer_until_they_have_passed(tmp_path: Path) -> None:
    """gRPC takes megabytes at once where the peer's windows are large, and keeps them while the peer does not read."""
    given, data = 3_000_000, frame(DATA, 0, 1, bytes(16_000))
    async with accepted(tmp_path) as (peer, connection, grpc):
        connection.give(given)
        assert connection.unread(writing=1_000_000, calls=0) == 1_000_000, "the rest is on its way"
        connection.give(given)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(send, grpc, data * 60)
            while not connection.is_stuck:
                await anyio.lowlevel.checkpoint()
            assert connection.unread(writing=0, calls=0) >= 1_000_000 + given - 60 * 16_000
            read = 0
            while read < len(data) * 60:
                read += len(await peer.receive(1 << 20))
        assert connection.unread(writing=0, calls=0) == 0, "nothing waits any more"


@pytest.mark.parametrize("reads", [True, False])
async def test_calls_of_a_connection_that_is_refused_are_reset_if_the_peer_has_read_all_else(
    tmp_path: Path, *, reads: bool
) -> None:
    """In the middle of what gRPC says it would read nonsense."""
    answer, reset = frame(DATA, 0, 1, bytes(16_000)) * 60, frame(RST_STREAM, 0, 1, b"\0\0\0\x0b")
    async with accepted(tmp_path) as (peer, connection, grpc):
        await peer.send(PREFACE + CALL)
        assert await receive(grpc, len(PREFACE + CALL)) == PREFACE + CALL
        read = b""
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(send, grpc, answer)
            while not connection.is_stuck:
                await anyio.lowlevel.checkpoint()
            while reads and len(read) < len(answer):
                read += await peer.receive(1 << 20)
            connection.refuse()
            tasks.cancel_scope.cancel()
        with anyio.fail_after(10), suppress(anyio.EndOfStream):
            while True:
                read += await peer.receive(1 << 20)
        assert (read == answer + reset) if reads else answer.startswith(read)


async def test_an_acceptor_that_is_stopped_does_not_try_again(tmp_path: Path) -> None:
    """Its listener is closed by then, and the number of that may be another file's."""
    loop, met = asyncio.get_running_loop(), list[dict[str, Any]]()
    with recorded() as events, accepting(tmp_path) as here:
        here.listener.left = 1000
        async with await anyio.connect_unix(tmp_path / "sds"):
            await events.wait("not_accepted")
            loop.set_exception_handler(lambda _loop, context: met.append(context))
            here.acceptor.close()
            later = asyncio.Event()
            loop.call_later(RETRY_AFTER, later.set)
            await later.wait()
            assert met == []


async def test_a_peer_that_cannot_be_accepted_costs_no_processor(tmp_path: Path) -> None:
    """It waits in the kernel's queue, which the event loop would be told of in every turn."""
    with recorded() as events, accepting(tmp_path) as here:
        here.listener.left = 1000
        async with await anyio.connect_unix(tmp_path / "sds"):
            await events.wait("not_accepted")
            for _ in range(200):
                await anyio.lowlevel.checkpoint()
            assert here.listener.left > 900
            here.listener.left = 0
            await here.until_connected()
