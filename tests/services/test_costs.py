"""What a stream and a push cost the agent, in counts that no other program on the machine changes.

A figure that rises with every Envoy on the node, or with every push, is what a node with five hundred of them pays for.
How long all that takes, benchmarks/ measures.
"""

import json
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import anyio
import grpc.aio
import pytest
from anyio.abc import Process
from anyio.streams.buffered import BufferedByteReceiveStream
from fakes.loops import anyio_backend, loop_of_the_module, one_loop  # noqa: F401 - fixtures
from fakes.peers import SERVICE
from msgspec import Struct
from sds_agent_proto import sds_pb2 as wire

TESTS = Path(__file__).parents[1]
PROGRAM = TESTS / "fakes" / "counting_server.py"
FIRST_REQUEST = (TESTS / "data" / "envoy-1.40-first-request.bin").read_bytes()
"""What a real Envoy says first: 61 KB, nearly all of it the Node."""

FEW, MANY = 20, 60
WITHIN = 120.0
"""Seconds after which something that does not come fails the test."""

LEFT_WITHIN = 30.0
"""Seconds in which what a stream held has to be free once it has left; a timer that was cancelled keeps it a while."""
LEFTOVER = MANY // 2
"""Python's objects that may stay of so many streams: not one for each, where one that is open has a hundred. Bytes do
not tell, as Python keeps some of what was freed for the next of the same kind.
"""

FUNCTIONS = {"StreamSecrets": 131, "DeltaSecrets": 141}
"""Of ours that a push calls for a stream: as many as it does, and one."""
BYTES, OBJECTS = (17_000, 120) if sys.version_info < (3, 14) else (17_500, 124)
"""Python's own that a stream may keep. Frames of 3.14 have more."""

Counts = dict[str, int]


class Took(Struct, frozen=True):
    """What one kind of stream cost: the process without any, with few and with many; a push to few and to many."""

    method: str
    none: Counts
    few: Counts
    many: Counts
    push_to_few: Counts
    push_to_many: Counts
    again: Counts
    """Without any once more."""

    def each(self, what: str) -> int:
        """How many of these a stream has: what the agent itself does just then is rounded away."""
        return round((self.many[what] - self.few[what]) / (MANY - FEW))

    def for_each(self, what: str) -> int:
        """How many of these a stream costs in a push."""
        return round((self.push_to_many[what] - self.push_to_few[what]) / (MANY - FEW))


class Server:
    """The program that counts."""

    def __init__(self, process: Process) -> None:
        assert process.stdout is not None
        self._process = process
        self._answers = BufferedByteReceiveStream(process.stdout)

    async def answer(self) -> Counts:
        """Its next line."""
        with anyio.fail_after(WITHIN):
            line = await self._answers.receive_until(b"\n", 10_000)
        found: Counts = json.loads(line)
        return found

    async def does(self, *command: object) -> Counts:
        """What it answers to a command."""
        await self.asked(*command)
        return await self.answer()

    async def asked(self, *command: object) -> None:
        """Give it a command whose answer comes later."""
        assert self._process.stdin is not None
        await self._process.stdin.send(f"{' '.join(map(str, command))}\n".encode())


class Envoy:
    """A stream on a connection of its own, which acknowledges what it is sent as an Envoy does."""

    def __init__(self, channel: grpc.aio.Channel, method: str) -> None:
        self._delta = method == "DeltaSecrets"
        self._call: grpc.aio.StreamStreamCall[bytes, bytes] = channel.stream_stream(f"{SERVICE}/{method}")()

    async def ask(self) -> None:
        """Subscribe to `default`, with the whole Node."""
        first = FIRST_REQUEST
        if self._delta:
            node = wire.DiscoveryRequest.FromString(FIRST_REQUEST).node
            first = wire.DeltaDiscoveryRequest(node=node, resource_names_subscribe=["default"]).SerializeToString()
        await self._call.write(first)

    async def take(self) -> None:
        """Read an answer and acknowledge it."""
        data = await self._call.read()
        assert isinstance(data, bytes)
        if self._delta:
            delta = wire.DeltaDiscoveryResponse.FromString(data)
            ack = wire.DeltaDiscoveryRequest(response_nonce=delta.nonce).SerializeToString()
        else:
            answer = wire.DiscoveryResponse.FromString(data)
            names = ["default"]
            message = wire.DiscoveryRequest(resource_names=names, response_nonce=answer.nonce)
            ack = message.SerializeToString()
        await self._call.write(ack)


@asynccontextmanager
async def envoys(path: Path, method: str, count: int) -> AsyncIterator[list[Envoy]]:
    """So many, each with its own connection, served once."""
    async with AsyncExitStack() as stack:
        channels = [
            await stack.enter_async_context(
                grpc.aio.insecure_channel(f"unix:{path}", options=[("grpc.use_local_subchannel_pool", 1)])
            )
            for _ in range(count)
        ]
        found = [Envoy(channel, method) for channel in channels]
        with anyio.fail_after(WITHIN):
            for each in found:
                await each.ask()
            await take(found)
        yield found


async def take(peers: Sequence[Envoy]) -> None:
    """Each of them takes an answer."""
    async with anyio.create_task_group() as tasks:
        for each in peers:
            tasks.start_soon(each.take)


class Bench:
    """A server and the ACKs that it should have had."""

    def __init__(self, server: Server, path: Path, method: str) -> None:
        self._server = server
        self._path = path
        self._method = method
        self._acks = 0

    async def with_streams(self, count: int) -> tuple[Counts, Counts]:
        """What the server holds with so many, and what a push to them takes; a push before it has made all warm."""
        async with envoys(self._path, self._method, count) as peers:
            await self._acknowledged(count)
            await self._push(peers)
            held = await self._server.does("count")
            assert held["streams"] == count
            return held, await self._push(peers)

    async def _push(self, peers: Sequence[Envoy]) -> Counts:
        await self._server.asked("push", len(peers))
        with anyio.fail_after(WITHIN):
            await take(peers)
        self._acks += len(peers)
        return await self._server.answer()

    async def _acknowledged(self, count: int) -> None:
        self._acks += count
        await self._server.does("acked", self._acks)

    async def with_none(self, bounds: Counts) -> Counts:
        """What the server holds once all have left and it has no more of anything than that, or after `LEFT_WITHIN`."""
        held: Counts = {}
        with anyio.move_on_after(LEFT_WITHIN):
            while not held or any(held[what] > most for what, most in bounds.items()):
                held = await self._server.does("count")
        return held


@pytest.fixture(scope="module", params=["StreamSecrets", "DeltaSecrets"])
async def took(anyio_backend: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Took:  # noqa: ARG001, F811 - it runs on that
    """Both variants of the protocol, each at a server of its own."""
    path = tmp_path_factory.mktemp("costs") / "sds.sock"
    async with await anyio.open_process([sys.executable, str(PROGRAM), str(path)], stderr=None) as process:
        server = Server(process)
        await server.answer()
        idle = await server.does("count")
        gone = {what: idle[what] for what in ("streams", "tasks", "descriptors")}
        bench = Bench(server, path, request.param)
        await bench.with_streams(MANY)  # what the first ones cause once, such as imports, stays
        none = await bench.with_none(gone)
        few, push_to_few = await bench.with_streams(FEW)
        await bench.with_none(gone)
        many, push_to_many = await bench.with_streams(MANY)
        again = await bench.with_none({**gone, "objects": none["objects"] + LEFTOVER})
        process.kill()
    return Took(request.param, none, few, many, push_to_few, push_to_many, again)


async def test_a_push_encodes_its_secret_once_however_many_envoys_ask_for_it(took: Took) -> None:
    """Once for each variant of the protocol. A node of 500 Envoys would pay for 500 encodings, with 500 copies."""
    assert took.push_to_few["encoded"] == took.push_to_many["encoded"] <= 2


async def test_a_push_serializes_nothing_for_a_stream(took: Took) -> None:
    """All but the nonce, which is joined to it, is the same for every stream that asks for the same names."""
    assert took.for_each("serialized") == 0


async def test_a_push_is_one_line_of_the_log_however_many_envoys_take_it(took: Took) -> None:
    """A line for each push and ACK was 38% of the processor time of a push."""
    assert took.push_to_few["lines"] == took.push_to_many["lines"] == 1


async def test_a_push_calls_few_functions_for_each_stream(took: Took) -> None:
    """With its ACK, and without what relays both."""
    assert took.for_each("functions") <= FUNCTIONS[took.method]


async def test_a_relay_calls_few_functions_for_each_piece_that_it_reads(took: Took) -> None:
    """In how many pieces a push and its ACK come depends on the moment."""
    assert took.push_to_many["relaying"] <= 15 * took.push_to_many["pieces"]


async def test_a_push_to_many_costs_nothing_that_grows_faster_than_they_do(took: Took) -> None:
    """A look at every stream for each stream, and 2,000 of them would not be served."""
    few, many = (push["functions"] / count for push, count in ((took.push_to_few, FEW), (took.push_to_many, MANY)))
    assert many <= 1.25 * few


async def test_a_stream_is_few_tasks(took: Took) -> None:
    """Both are gRPC's own: one runs the handler, and one waits for its cancellation."""
    assert took.each("tasks") <= 2


async def test_a_stream_starts_no_thread(took: Took) -> None:
    """A container's limit of processes counts threads, and each has a stack. gRPC has some of its own, by its load."""
    assert took.each("threads") == 0


async def test_a_connection_is_three_descriptors(took: Took) -> None:
    """The peer's, and both ends of its relay to gRPC: the limit on connections is computed with three."""
    assert took.each("descriptors") <= 3


async def test_a_stream_keeps_little_and_nothing_of_the_first_request(took: Took) -> None:
    """In bytes of Python's objects. An Envoy's first request has 61,000; 500 Envoys would have them kept for ever."""
    assert took.each("bytes") <= BYTES


async def test_grpc_keeps_no_large_buffer_for_a_stream(took: Took) -> None:
    """In bytes that the C library gives out: of up to 110,000 a stream, 65,536 were a buffer as large as a request."""
    assert took.each("allocated") <= 57_000


async def test_a_stream_is_few_objects(took: Took) -> None:
    """Those that Python's garbage collector looks at, time and again."""
    assert took.each("objects") <= OBJECTS


async def test_streams_that_have_left_leave_nothing(took: Took) -> None:
    """An agent runs for months, and Envoys come and go."""
    for what in ("streams", "tasks", "descriptors"):
        assert took.again[what] <= took.none[what], what
    assert took.again["objects"] <= took.none["objects"] + LEFTOVER
