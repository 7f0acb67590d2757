"""A stream's task and its pushes take turns, whatever comes in the moment of the other: gRPC ends the process for two
writes at one time, and a change that is lost leaves an Envoy with an old certificate.
"""

import asyncio
import math
import tracemalloc
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import anyio
import anyio.lowlevel
import grpc
import pytest
from fakes.clocks import HandClock
from fakes.events import recorded
from fakes.loops import anyio_backend, loop_of_the_module, one_loop  # noqa: F401 - fixtures
from grpc.aio import EOF
from sds_agent_proto import sds_pb2 as wire

from sds_agent.rpc.calls import Context
from sds_agent.sds.acceptor import Connection
from sds_agent.sds.audience import Audience
from sds_agent.sds.catalog import Catalog, OnDemand
from sds_agent.sds.codec import decode, encode
from sds_agent.sds.journal import Journal
from sds_agent.sds.protocol import Absence, Finish, Resource, SotwRequest, StatusCode
from sds_agent.sds.service import SERVICE, TOO_MUCH, SecretDiscoveryService
from sds_agent.sds.sotw import SotwSession
from sds_agent.sds.stream import BEHIND, Conversation, Stream
from sds_agent.secrets.model import CertificateSecret
from sds_agent.secrets.store import SecretStore


class HandContext:
    """A stand-in for gRPC's context of a call, whose messages come and whose writes end when the test says so."""

    def __init__(self) -> None:
        self.written: list[wire.DiscoveryResponse] = []
        self.writing: asyncio.Future[None] | None = None
        self._inbox: asyncio.Queue[object] = asyncio.Queue()
        self.reads = 0

    async def read(self) -> object:
        """The next message, or gRPC's EOF."""
        self.reads += 1
        return await self._inbox.get()

    async def write(self, message: bytes) -> None:
        """Take an answer: one at a time."""
        assert self.writing is None, "two writes at one time"
        self.writing = asyncio.get_running_loop().create_future()
        try:
            await self.writing
            self.written.append(wire.DiscoveryResponse.FromString(message))
        finally:
            self.writing = None

    def say(self, *names: str, nonce: str = "") -> None:
        """A message of the client comes."""
        self._inbox.put_nowait(wire.DiscoveryRequest(resource_names=names, response_nonce=nonce).SerializeToString())

    def send(self, message: bytes) -> None:
        """The same, as it is on the wire."""
        self._inbox.put_nowait(message)

    def leave(self) -> None:
        """The client has nothing more to say."""
        self._inbox.put_nowait(EOF)

    async def until_writing(self) -> None:
        """Until a write has begun."""
        await _until(lambda: self.writing is not None)

    async def let_write(self) -> wire.DiscoveryResponse:
        """End the write that is under way, or the next one; what it wrote."""
        await self.until_writing()
        assert self.writing is not None
        number = len(self.written)
        self.writing.set_result(None)
        await _until(lambda: len(self.written) > number)
        return self.written[-1]


async def _until(fits: Any) -> None:
    with anyio.fail_after(10):
        while not fits():
            await anyio.lowlevel.checkpoint()


class Broken:
    """A stand-in for secrets that are made on demand, which has a bug once it is told to."""

    directories: tuple[Path, ...] = ()
    broken = False

    def __getitem__(self, name: str) -> Resource | Absence:
        if self.broken:
            raise LookupError(name)
        return Absence.PENDING

    def replaced(self, name: str) -> Resource | None:
        """Nothing was served before."""

    def want(self, client: object, names: Iterable[str]) -> None:
        """It makes none."""


class Bench:
    """One stream of a store with the name `default`, and the task that runs it."""

    def __init__(self, files: OnDemand | None = None) -> None:
        self.store = SecretStore(("default", "other"))
        self.publish("first")
        self.context = HandContext()
        self.audience = Audience[Stream[Any]]()
        self.catalog = Catalog(self.store, files)
        self.journal = Journal(known=lambda: self.store)
        numbers = iter(range(1000))
        session = SotwSession(iter(lambda: f"n{next(numbers)}", None))
        self.stream: Stream[SotwRequest] = Stream(
            cast("Context", self.context),
            Conversation(session, decode, encode),
            audience=self.audience,
            catalog=self.catalog,
            store=self.store,
            journal=self.journal.open("StreamSecrets", "pid 7 (uid 101)"),
        )
        self.task: asyncio.Task[Finish | None] = asyncio.ensure_future(self.stream.run())

    def publish(self, content: str, name: str = "default") -> None:
        """The secret has this content from now on."""
        ends = HandClock().now() + timedelta(days=1)
        self.store.publish({name: CertificateSecret(content.encode(), b"key", ends)})

    def change(self, content: str) -> None:
        """The same, and the stream is told as the service tells it."""
        self.publish(content)
        self.tell()

    def tell(self) -> None:
        """The name has changed."""
        found = self.catalog["default"]
        for each in self.audience.of("default"):
            each.due("default", found.version if isinstance(found, Resource) else None, 0.0)
            each.push()

    def remove(self) -> None:
        """The name is served no longer."""
        self.store.replace_names(("other",), (), {})
        self.tell()

    async def subscribed(self) -> None:
        """The stream has its first answer, and has acknowledged it."""
        self.context.say("default")
        answer = await self.context.let_write()
        self.context.say("default", nonce=answer.nonce)
        await _until(lambda: self.context.reads == 3)

    async def begun_to_write(self, *, pushing: bool) -> None:
        """The stream is writing a push, or else its first answer."""
        if pushing:
            await self.subscribed()
            self.change("second")
        else:
            self.context.say("default")
        await self.context.until_writing()

    async def ended(self) -> Finish | None:
        """How the stream ends."""
        with anyio.fail_after(10):
            return await self.task


@asynccontextmanager
async def bench(files: OnDemand | None = None) -> AsyncIterator[Bench]:
    """It, and nothing of it is left."""
    with recorded():
        made = Bench(files)
        try:
            yield made
        finally:
            made.task.cancel()
            await asyncio.wait([made.task])
            assert made.audience.of("default") == ()
            assert {task for task in asyncio.all_tasks() if "Stream." in repr(task)} == set()


async def test_a_message_that_comes_while_a_push_is_written_is_answered_after_it() -> None:
    async with bench() as here:
        await here.subscribed()
        here.change("second")
        await here.context.until_writing()
        here.publish("other", "other")
        here.context.say("default", "other")
        await _until(here.context._inbox.empty)
        assert b"second" in (await here.context.let_write()).SerializeToString()
        assert b"other" in (await here.context.let_write()).SerializeToString()


async def test_a_change_that_comes_while_an_answer_is_written_is_sent_after_its_ack() -> None:
    async with bench() as here:
        here.context.say("default")
        await here.context.until_writing()
        here.change("second")
        answer = await here.context.let_write()
        here.context.say("default", nonce=answer.nonce)
        assert b"second" in (await here.context.let_write()).SerializeToString()


@pytest.mark.parametrize("pushing", [False, True])
async def test_a_name_that_goes_while_an_answer_is_written_ends_the_stream_after_it(*, pushing: bool) -> None:
    async with bench() as here:
        await here.begun_to_write(pushing=pushing)
        here.remove()
        assert not here.task.done()
        await here.context.let_write()
        ended = await here.ended()
        assert ended is not None
        assert (ended.code, ended.names) == (StatusCode.NOT_FOUND, ("default",))


@pytest.mark.parametrize("pushing", [False, True])
async def test_a_stream_that_is_to_end_writes_first_what_it_has_begun(*, pushing: bool) -> None:
    async with bench() as here:
        await here.begun_to_write(pushing=pushing)
        here.stream.drain()
        await asyncio.sleep(0)
        assert not here.task.done()
        await here.context.let_write()
        assert await here.ended() is None


async def test_a_stream_that_waits_ends_at_once_when_it_is_to() -> None:
    async with bench() as here:
        await here.subscribed()
        here.stream.give_way()
        ended = await here.ended()
        assert ended is not None
        assert ended.code is StatusCode.RESOURCE_EXHAUSTED


async def test_a_client_that_has_nothing_more_to_say_ends_the_stream() -> None:
    async with bench() as here:
        await here.subscribed()
        here.context.leave()
        assert await here.ended() is None


async def test_a_stream_whose_client_leaves_writes_no_more() -> None:
    """gRPC cancels the task."""
    async with bench() as here:
        await here.subscribed()
        here.change("second")
        await here.context.until_writing()
        here.task.cancel()
        await asyncio.wait([here.task])
        await _until(lambda: here.context.writing is None)
        assert here.task.cancelled()
        assert len(here.context.written) == 1


async def test_a_stream_that_is_to_end_as_its_client_leaves_is_cancelled() -> None:
    """gRPC has cancelled the task, and waits for it to be."""
    async with bench() as here:
        await here.subscribed()
        here.stream.drain()
        here.task.cancel()
        await asyncio.wait([here.task])
        assert here.task.cancelled()


async def test_a_bug_that_a_push_meets_ends_the_stream() -> None:
    """An Envoy opens another, and the log has the bug; silence would leave it with an old certificate."""
    files = Broken()
    async with bench(files) as here:
        here.context.say("default", "file-cert:a")
        answer = await here.context.let_write()
        here.context.say("default", "file-cert:a", nonce=answer.nonce)
        await _until(lambda: here.context.reads == 3)
        files.broken = True
        here.change("second")
        with pytest.raises(LookupError):
            await here.ended()


class Call(HandContext):
    """One that says who is at its other end."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self._address = address

    def peer(self) -> str:
        """What gRPC gives as the address."""
        return self._address

    def time_remaining(self) -> float | None:
        """Its client waits for as long as it takes."""
        return None


class AbortedError(Exception):
    """What gRPC's `abort` raises."""


class Told(Call):
    """One that is told how it ends."""

    async def abort(self, code: grpc.StatusCode, details: str) -> None:
        """It ends with that."""
        raise AbortedError(code, details)


@pytest.mark.parametrize("method", ["StreamSecrets", "DeltaSecrets", "FetchSecrets"])
async def test_a_call_whose_connection_gave_way_before_it_began_is_told_so(method: str) -> None:
    """Of such a connection nothing is read any more, so that it would wait for a request in vain."""
    service = SecretDiscoveryService(SecretStore(["default"]))
    service.connections["a"] = Connection("pid 1 (uid 1)")
    service.connections["a"].give_way()
    found = cast("Any", service.handler().service(cast("Any", SimpleNamespace(method=f"/{SERVICE}/{method}"))))
    with recorded() as events:
        async with asyncio.timeout(10):
            with pytest.raises(AbortedError) as told:
                await found.stream_stream(None, Told("a"))
    assert told.value.args == (grpc.StatusCode.RESOURCE_EXHAUSTED, TOO_MUCH.detail)
    assert service.open_streams == 0
    assert events.named("fault") == []


class Absent:
    """A stand-in for secrets that are made on demand, which has none yet, and remembers what it is asked."""

    directories: tuple[Path, ...] = ()

    def __init__(self) -> None:
        self.looks = list[str]()
        self.wanted = dict[object, set[str]]()

    def __getitem__(self, name: str) -> Resource | Absence:
        self.looks.append(name)
        return Absence.PENDING

    def replaced(self, name: str) -> Resource | None:
        """Nothing was served before."""

    def want(self, client: object, names: Iterable[str]) -> None:
        """Remember it."""
        self.wanted[client] = set(names)


async def test_a_fetch_looks_again_only_when_one_of_its_own_names_changes() -> None:
    """A node may have thousands of names, and thousands of calls that wait."""
    files = Absent()
    store = SecretStore(["default"])
    service = SecretDiscoveryService(store, files=files)
    found = cast("Any", service.handler().service(cast("Any", SimpleNamespace(method=f"/{SERVICE}/FetchSecrets"))))
    call, ends = Call("a"), HandClock().now() + timedelta(days=1)
    with recorded():
        task = asyncio.ensure_future(found.stream_stream(None, call))
        try:
            call.say(*["file-cert:a"] * 100, "file-cert:b")  # two names, however often
            await _until(lambda: files.looks)
            assert list(files.wanted.values()) == [{"file-cert:a", "file-cert:b"}]
            store.publish({"default": CertificateSecret(b"chain", b"key", ends)})
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            assert files.looks == ["file-cert:a", "file-cert:b"]
            store.announce(frozenset({"file-cert:b"}))
            await _until(lambda: len(files.looks) == 4)
        finally:
            task.cancel()
            await asyncio.wait([task])


@pytest.mark.parametrize("method", ["StreamSecrets", "FetchSecrets"])
async def test_a_call_that_is_to_give_way_and_cannot_end_takes_no_place_and_loses_its_connection(method: str) -> None:
    """Its client does not read, so its answer is never written: the bound on streams has to hold all the same, and gRPC
    would keep the answer for as long as the connection lasts.
    """
    store = SecretStore()
    store.publish({"default": CertificateSecret(b"chain", b"key", HandClock().now() + timedelta(days=1))})
    service = SecretDiscoveryService(store, most_streams=2, unread=0)
    ended = asyncio.Queue[str]()
    service.connections |= {
        "a": Connection("pid 1 (uid 1)", lambda _cause: ended.put_nowait("a")),
        "b": Connection("pid 2 (uid 1)", lambda _cause: ended.put_nowait("b")),
    }
    found = cast("Any", service.handler().service(cast("Any", SimpleNamespace(method=f"/{SERVICE}/{method}"))))
    tasks, calls = list[asyncio.Task[None]](), [Call("a"), Call("a"), Call("b")]
    with recorded() as events:
        try:
            for number, each in enumerate(calls, 1):
                tasks.append(asyncio.ensure_future(found.stream_stream(None, each)))
                each.say("default")
                await each.until_writing()
                assert service.open_streams == min(number, 2)
            assert [each.peer for each in service.streams] == ["pid 1 (uid 1)", "pid 2 (uid 1)"]
            assert not tasks[0].done(), "it cannot end"
            async with asyncio.timeout(10):
                assert await ended.get() == "a"
            service.drain()
            assert ended.empty(), "the others keep theirs"
            assert events.named("fault") == []
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


LARGE = "\U0001f600" + "x" * 500_000
"""Four bytes in memory for each of its characters."""
LITTLE = 100_000


@contextmanager
def little_is_kept() -> Iterator[None]:
    """What begins and is not over inside this context keeps little memory."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[0] < LITTLE
    finally:
        tracemalloc.stop()


@asynccontextmanager
async def called(method: str, call: Call, *names: str) -> AsyncIterator[tuple[SecretDiscoveryService, SecretStore]]:
    """The call, at a service whose store has secrets of these names, and is to get one of the name `late`."""
    store, ends = SecretStore((*names, "late")), HandClock().now() + timedelta(days=1)
    store.publish(dict.fromkeys(names, CertificateSecret(b"chain", b"key", ends)))
    service = SecretDiscoveryService(store)
    found = cast("Any", service.handler().service(cast("Any", SimpleNamespace(method=f"/{SERVICE}/{method}"))))
    with recorded():
        task = asyncio.ensure_future(found.stream_stream(None, call))
        try:
            yield service, store
        finally:
            task.cancel()
            await asyncio.wait([task])


async def test_the_reason_of_a_refusal_is_not_kept_while_the_next_answer_waits_to_be_read() -> None:
    call, request = Call("a"), wire.DiscoveryRequest(resource_names=["default", "other"])
    request.error_detail.message = LARGE
    async with called("StreamSecrets", call, "default", "other"):
        call.say("default")
        request.response_nonce = (await call.let_write()).nonce
        message = request.SerializeToString()
        with little_is_kept():
            call.send(message)
            await call.until_writing()


async def test_what_a_delta_client_wrote_beside_names_is_not_kept_while_its_answer_waits_to_be_read() -> None:
    call, request = Call("a"), wire.DeltaDiscoveryRequest(resource_names_subscribe=["default"], response_nonce=LARGE)
    request.error_detail.message = LARGE
    message = request.SerializeToString()
    async with called("DeltaSecrets", call, "default"):
        with little_is_kept():
            call.send(message)
            await call.until_writing()


@pytest.mark.parametrize("name", ["default", "late"])
async def test_what_a_fetch_brings_beside_names_is_not_kept_while_it_waits(name: str) -> None:
    """For its answer to be read, or for the secret; the same name may also be there half a million times."""
    call, request = Call("a"), wire.DiscoveryRequest(resource_names=[name, *[""] * 500_000], response_nonce=LARGE)
    request.error_detail.message = LARGE
    message = request.SerializeToString()
    async with called("FetchSecrets", call, "default") as (_, store):
        with little_is_kept():
            call.send(message)
            if name == "default":
                await call.until_writing()
            else:
                await _until(lambda: store.awaited(["late"]))


class Unread(Call):
    """One whose client does not read how it ends."""

    told: tuple[grpc.StatusCode, str] | None = None

    async def abort(self, code: grpc.StatusCode, details: str) -> None:
        """It is told that, and does not end."""
        self.told = code, details
        await asyncio.get_running_loop().create_future()


@pytest.mark.parametrize("method", ["StreamSecrets", "FetchSecrets"])
async def test_names_that_are_refused_are_not_kept_while_their_client_does_not_read_that(method: str) -> None:
    call, message = Unread("a"), wire.DiscoveryRequest(resource_names=[LARGE]).SerializeToString()
    async with called(method, call) as (service, _):
        with little_is_kept():
            call.send(message)
            await _until(lambda: call.told)
        assert service.open_streams == 0


async def test_a_message_that_waits_for_a_push_to_be_read_counts() -> None:
    async with bench() as here:
        await here.subscribed()
        here.change("second")
        await here.context.until_writing()
        before = here.stream.look(0.0)
        here.context.say("default", LARGE)
        await _until(here.context._inbox.empty)
        await _until(lambda: here.stream.look(0.0) > before + len(LARGE))
        await here.context.let_write()
        await _until(lambda: here.stream.look(0.0) > before + 4 * len(LARGE))  # a name now


async def test_an_answer_that_was_read_late_counts_no_more() -> None:
    """Nor does it ever after: a stream is idle for hours, and read from."""
    async with bench() as here:
        await here.subscribed()
        idle, now = here.stream.look(math.inf), asyncio.get_running_loop().time
        here.change("second")
        await here.context.until_writing()
        assert here.stream.look(0.0) == idle
        assert here.stream.look(now()) == idle + BEHIND
        answer = await here.context.let_write()
        here.context.say("default", nonce=answer.nonce)
        await _until(lambda: here.context.reads == 4)
        assert here.stream.look(math.inf) == idle


@pytest.mark.parametrize("patience", [0.0, 60.0])
async def test_an_answer_that_has_just_begun_to_wait_is_on_its_way(patience: float) -> None:
    """An agent that sends a change to hundreds of Envoys, and is sent as many replies, looks several times meanwhile:
    what they might store while they do not read must not cost them their connections.
    """
    store, ends = SecretStore(("default",)), HandClock().now() + timedelta(days=1)
    store.publish({"default": CertificateSecret(b"chain", b"key", ends)})
    service = SecretDiscoveryService(store, stored_bytes=3 * BEHIND, unread=patience)
    service.connections |= {name: Connection(name) for name in "abc"}
    found = cast("Any", service.handler().service(cast("Any", SimpleNamespace(method=f"/{SERVICE}/StreamSecrets"))))
    calls = [Call(name) for name in service.connections]
    with recorded() as events:
        tasks = [asyncio.ensure_future(found.stream_stream(None, each)) for each in calls]
        try:
            for each in calls:
                each.say("default")
                await each.until_writing()
            for _ in range(3):
                service.stored.add(4 * BEHIND)
            assert len(events.named("too_much_stored")) == (0 if patience else 1)
            assert service.open_streams == (3 if patience else 2)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)


async def test_answers_that_wait_are_looked_at_once_more_when_they_have_waited_for_long() -> None:
    """Their clients need not send anything more."""
    store, ends = SecretStore(("default",)), HandClock().now() + timedelta(days=1)
    store.publish({"default": CertificateSecret(b"chain", b"key", ends)})
    service = SecretDiscoveryService(store, stored_bytes=BEHIND // 2, unread=0.05)
    service.connections["a"] = Connection("a")
    found = cast("Any", service.handler().service(cast("Any", SimpleNamespace(method=f"/{SERVICE}/StreamSecrets"))))
    call = Call("a")
    with recorded() as events:
        task = asyncio.ensure_future(found.stream_stream(None, call))
        try:
            call.say("default")
            await call.until_writing()
            service.stored.add(BEHIND)
            assert events.named("too_much_stored") == []
            await events.wait("too_much_stored")
        finally:
            task.cancel()
            await asyncio.wait([task])


class Looked(Connection):
    """A connection that tells how often it was looked at."""

    looks = 0

    def unread(self, writing: int, calls: int) -> int:
        """Part of each look."""
        self.looks += 1
        return super().unread(writing, calls)


async def test_each_answer_that_waits_for_ever_causes_two_looks() -> None:
    """A look takes time for each connection: who does not read must not cause one every few seconds."""
    store, ends = SecretStore(("default",)), HandClock().now() + timedelta(days=1)
    store.publish({"default": CertificateSecret(b"chain", b"key", ends)})
    service = SecretDiscoveryService(store, stored_bytes=8 * BEHIND, unread=0.02)
    connection = service.connections["a"] = Looked("a")
    found = cast("Any", service.handler().service(cast("Any", SimpleNamespace(method=f"/{SERVICE}/StreamSecrets"))))
    tasks = []
    try:
        for looks in (0, 2):
            call, later = Call("a"), asyncio.Event()
            tasks.append(asyncio.ensure_future(found.stream_stream(None, call)))
            call.say("default")
            await call.until_writing()
            service.stored.add(9 * BEHIND)
            assert connection.looks == looks + 1
            await _until(lambda most=looks + 2: connection.looks == most)
            asyncio.get_running_loop().call_later(0.02, later.set)  # a look more would come before
            await later.wait()
            assert connection.looks == looks + 2
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
