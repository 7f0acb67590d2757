"""The log: one line an event whatever is in it, and no program waits for a log that is not read."""

import _thread
import asyncio
import gc
import importlib
import io
import json
import logging
import os
import pty
import select
import threading
import tty
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, TextIO

import grpc
import pytest
from fakes.deadlines import promptly
from fakes.raw_http2 import DATA, END_HEADERS, END_STREAM, HEADERS, RawPeer, frame, literal, message, request_headers
from hypothesis import given
from hypothesis import strategies as st

from sds_agent import log
from sds_agent.errors import SdsAgentError
from sds_agent.log import LONGEST_VALUE, MOST_QUEUED, MOST_VALUES

LOG = logging.getLogger("sds_agent.test")
LATE = datetime(2026, 3, 14, 15, 9, 26, 535897, tzinfo=UTC)


def written(form: log.Format, name: str = "issued", **fields: log.Value) -> str:
    """The line that the log writes for an event."""
    stream = io.StringIO()
    log.configure(form, "debug", stream)
    log.event(LOG, name, level=logging.INFO, **fields)
    return stream.getvalue()


@given(st.datetimes(), st.integers(0, 999_999))
def test_a_time_is_written_as_rfc_3339_has_it_to_the_millisecond(moment: datetime, later: int) -> None:
    """Two of one second have all but the milliseconds in common."""
    for each in (moment.replace(tzinfo=UTC), moment.replace(tzinfo=UTC, microsecond=later)):
        assert log.timestamp(each) == each.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def test_an_event_is_its_name_and_its_fields() -> None:
    line = written(
        "text", workload="web", at=LATE, took=timedelta(seconds=1.5), ok=True, nothing=None, names=["a", "b"]
    )
    assert line.split(" ", 1)[1] == (
        "info    issued workload=web at=2026-03-14T15:09:26.535Z took=1.5 ok=true names=a,b\n"
    )
    reported = json.loads(written("json", workload="web", at=LATE, ok=True, nothing=None, names=("a", "b")))
    del reported["time"]
    assert reported == {
        "level": "info",
        "event": "issued",
        "workload": "web",
        "at": "2026-03-14T15:09:26.535Z",
        "ok": True,
        "names": ["a", "b"],
    }


async def test_the_lines_of_one_piece_of_work_have_its_fields_in_its_tasks_too(stream: io.StringIO) -> None:
    async def part() -> None:
        log.event(LOG, "inside", workload="web")
        log.fault(LOG, "part", ValueError())

    with log.each_with(attempt_id="a"):
        task = asyncio.create_task(part())
    log.event(LOG, "beside")
    await task
    found = {line["event"]: line.get("attempt_id") for line in map(json.loads, stream.getvalue().splitlines())}
    assert found == {"inside": "a", "fault": "a", "beside": None}


def test_a_stream_that_is_no_terminal_gets_json() -> None:
    assert json.loads(written("auto"))["event"] == "issued"


@given(st.text(max_size=30), st.lists(st.text(max_size=10), max_size=3))
def test_what_a_peer_sends_never_starts_a_line_or_a_field_of_its_own(value: str, values: list[str]) -> None:
    """Else an Envoy could write into the log that another one was given a key."""
    assert json.loads(written("json", reason=value, names=values)) | {"time": "", "level": ""} == {
        "time": "",
        "level": "",
        "event": "issued",
        "reason": value,
        "names": values,
    }
    line = written("text", reason=value)
    assert line.isascii()
    assert line.count("\n") == 1
    reported = line.rstrip("\n").split(" reason=", 1)[1]
    assert reported == value or json.loads(reported) == value


def test_a_long_list_is_cut() -> None:
    """A node with thousands of identities would write a line that no collector of logs takes."""
    names = [f"w{each}" for each in range(MOST_VALUES + 7)]
    assert json.loads(written("json", names=names[:MOST_VALUES]))["names"] == names[:MOST_VALUES]
    assert json.loads(written("json", names=names))["names"] == [*names[:MOST_VALUES], "and 7 more"]


def test_a_long_value_is_cut() -> None:
    reported = json.loads(written("json", name_asked="n" * 70_000, names=["n" * 70_000]))
    assert reported["name_asked"] == reported["names"][0] == "n" * LONGEST_VALUE + "… (70000 characters)"


# --- faults ---


class PlantedError(Exception):
    """A bug's, with a secret in its words."""


def broken(secret: str) -> None:
    raise PlantedError(secret)


def faults(stream: io.StringIO) -> list[dict[str, Any]]:
    """What was logged: nothing but faults, in which the secret is not."""
    assert "PLANTED" not in stream.getvalue()
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert {(line["level"], line["event"]) for line in lines} <= {("error", "fault")}
    return lines


@pytest.fixture
def stream() -> io.StringIO:
    """Where the log goes, as JSON."""
    stream = io.StringIO()
    log.configure("json", "debug", stream)
    return stream


def test_a_fault_names_its_place(stream: io.StringIO) -> None:
    """Else a bug report says no more than its type, or a log line shows a key."""
    try:
        broken("PLANTED")
    except PlantedError as error:
        log.fault(LOG, "a part", error, address="10.0.0.7:1")
    (reported,) = faults(stream)
    assert (reported["part"], reported["type"], reported["address"]) == (
        "a part",
        f"{__name__}.PlantedError",
        "10.0.0.7:1",
    )
    line = broken.__code__.co_firstlineno + 1
    assert reported["at"] == f"{__name__.replace('.', '/')}.py:{line}"
    assert reported["frames"][0] == f"{__name__}:{line} broken"
    assert [frame.split()[-1] for frame in reported["frames"]] == ["broken", test_a_fault_names_its_place.__name__]


def test_a_fault_in_a_library_names_who_called_it(stream: io.StringIO) -> None:
    try:
        json.loads("{PLANTED")
    except ValueError as error:
        log.fault(LOG, "a part", error)
    (reported,) = faults(stream)
    assert reported["type"] == "json.decoder.JSONDecodeError"
    assert reported["at"].startswith("json/decoder.py:")
    assert [frame.partition(":")[0] for frame in reported["frames"]] == [__name__]


def test_the_faults_in_a_task_group_are_reported_each_and_the_group_is_not(stream: io.StringIO) -> None:
    inner = ExceptionGroup("PLANTED", [KeyError("PLANTED"), SdsAgentError("PLANTED")])
    log.fault(LOG, "a part", ExceptionGroup("PLANTED", [inner]))
    assert [line["type"] for line in faults(stream)] == ["KeyError", "sds_agent.errors.SdsAgentError"]


def test_an_adapter_of_another_package_that_logs_an_exception_shows_no_secret(stream: io.StringIO) -> None:
    try:
        broken("PLANTED")
    except PlantedError:
        LOG.exception("fault")
    (reported,) = faults(stream)
    assert (reported["type"], reported["frames"][0].split()[-1]) == (f"{__name__}.PlantedError", "broken")


def test_a_fault_that_only_the_event_loop_met_is_reported_once_for_each_place(stream: io.StringIO) -> None:
    """No operator would learn of it otherwise; and what a peer can cause must not fill the disk."""

    async def play() -> None:
        loop = asyncio.get_running_loop()
        for _ in range(3):
            loop.call_soon(broken, "PLANTED")
        loop.call_soon(json.loads, "{PLANTED")
        await asyncio.sleep(0)

    asyncio.run(play())
    reported = faults(stream)
    assert [line["part"] for line in reported] == ["event loop", "event loop"]
    assert [line["type"] for line in reported] == [f"{__name__}.PlantedError", "json.decoder.JSONDecodeError"]


@asynccontextmanager
async def served(method: Callable[[object, Any], Awaitable[bytes]], socket: Path) -> AsyncIterator[None]:
    """A gRPC server with this method, "/s/M"."""
    handler = grpc.method_handlers_generic_handler("s", {"M": grpc.unary_unary_rpc_method_handler(method)})
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((handler,))
    server.add_insecure_port(f"unix:{socket}")
    await server.start()
    try:
        yield
    finally:
        await server.stop(None)


async def test_a_fault_that_only_grpc_met_is_reported(stream: io.StringIO, tmp_path: Path) -> None:
    async def fail(_request: object, _context: object) -> bytes:
        broken("PLANTED")
        return b""

    async with served(fail, tmp_path / "grpc"), grpc.aio.insecure_channel(f"unix:{tmp_path / 'grpc'}") as channel:
        call: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary("/s/M")
        with pytest.raises(grpc.aio.AioRpcError):
            await call(b"")
    (reported,) = faults(stream)
    assert (reported["part"], reported["type"]) == ("gRPC", f"{__name__}.PlantedError")
    assert reported["frames"][0].endswith(" broken")


async def test_a_client_that_left_during_its_answer_is_no_fault(stream: io.StringIO) -> None:
    """gRPC logs an exception of its own then; a line for each would teach operators to overlook faults."""
    kind = importlib.import_module("grpc._cython.cygrpc").ExecuteBatchError  # it is not public
    logging.getLogger("grpc").error("raised in core", exc_info=kind("Failed grpc_call_start_batch: 8"))
    assert faults(stream) == []


async def test_a_header_that_is_no_text_is_no_fault(stream: io.StringIO, tmp_path: Path) -> None:
    """Every client that can connect can send one, and raise an alarm by it. gRPC logs it where the header is read."""
    read = asyncio.get_running_loop().create_future()

    async def answer(_request: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        read.set_result(dict(context.invocation_metadata() or ()))
        return b""

    async with served(answer, tmp_path / "grpc"):
        peer = await RawPeer.connect(tmp_path / "grpc")
        async with peer.connection:
            fields = request_headers("M", "/s") + literal(b"authorization", b"Bearer \xff")
            await peer.send(frame(HEADERS, END_HEADERS, 1, fields) + frame(DATA, END_STREAM, 1, message(b"")))
            async with asyncio.timeout(10):
                assert (await read)["authorization"] == "Bearer \xff"
    assert faults(stream) == []


# --- what is tried again and again ---


@pytest.mark.parametrize("causes", [("the disk is full", "the disk is gone"), (("a", "b"), ("a",))])
def test_an_error_is_reported_when_it_begins_when_it_changes_and_when_it_is_back(
    stream: io.StringIO, causes: tuple[Any, Any]
) -> None:
    """A line for each attempt would fill the log; none after a pause would hide that it is back."""
    one, other = causes
    lasting = log.LogOnChange(LOG, "state_lost")
    for cause in (one, one, other, other, one):
        lasting.report(cause, directory="/var/lib")
    lasting.resolved()
    lasting.report(one)
    lasting.report(type(one)())
    lasting.report(one)
    lines = [json.loads(line) for line in stream.getvalue().splitlines()]
    name = "cause" if isinstance(one, str) else "causes"
    reported = [each if isinstance(each, str) else list(each) for each in (one, other, one, one, one)]
    assert [line[name] for line in lines] == reported
    assert {line["level"] for line in lines} == {"error"}


# --- a log that is not read ---


class Pipe:
    """A pipe or a terminal whose reader takes nothing until the test lets it."""

    def __init__(self, reader: int, stream: TextIO) -> None:
        self.reader = reader
        self.stream = stream

    def fill(self) -> int:
        """Write until nothing more fits; returns how many bytes did."""
        os.set_blocking(self.stream.fileno(), False)
        size = 0
        try:
            while True:
                size += os.write(self.stream.fileno(), b"." * select.PIPE_BUF)
        except BlockingIOError:
            os.set_blocking(self.stream.fileno(), True)
        return size

    @property
    def holds_something(self) -> bool:
        """Whether there is something to read at this moment."""
        there = select.poll()
        there.register(self.reader, select.POLLIN)
        return bool(there.poll(0))

    def read(self, end: bytes, holding: bytes = b"") -> bytes:
        """Everything up to `end`, after `holding`."""
        content = b""
        there = select.poll()
        there.register(self.reader, select.POLLIN)
        while holding not in content or not content.endswith(end):
            assert there.poll(20_000), content[-1000:]
            content += os.read(self.reader, 1 << 16)
        return content


@pytest.fixture(params=[os.pipe, pty.openpty], ids=["pipe", "terminal"])
def pipe(request: pytest.FixtureRequest) -> Iterator[Pipe]:
    reader, writer = request.param()
    if os.isatty(writer):
        tty.setraw(writer)  # or else it makes two bytes of the end of a line
    with os.fdopen(writer, "w") as stream:
        pipe = Pipe(reader, stream)
        yield pipe
        os.close(pipe.reader)  # a thread that still waits to write gives up
        for handler in logging.getLogger("sds_agent").handlers:
            handler.flush()


def test_events_are_counted_by_level_whether_they_are_read_or_not(pipe: Pipe) -> None:
    """Else an alert on errors would depend on the reader of the log."""
    log.configure("json", "info", pipe.stream)
    log.event(LOG, "issued", level=logging.DEBUG)
    log.event(LOG, "issued")
    assert log.counts() == {"info": 1}, "what the level leaves out is not logged"
    for _ in range(100):
        log.event(LOG, "retrying", level=logging.ERROR, cause="x" * LONGEST_VALUE)
    log.fault(LOG, "part", ValueError())
    assert log.counts() == {"info": 1, "error": 101}


def test_a_log_that_is_read_is_written_at_once_without_a_thread(pipe: Pipe) -> None:
    log.configure("json", "info", pipe.stream)
    before = _thread._count()  # of Python's threads, those that `threading` does not know too
    for number in range(3):
        log.event(LOG, "issued", number=number)
        assert pipe.holds_something, "a program that is killed now has written its last event"
        assert json.loads(pipe.read(b"\n"))["number"] == number
    assert _thread._count() <= before


def test_no_program_waits_for_a_log_that_is_not_read_and_no_queued_line_is_lost(pipe: Pipe) -> None:
    """Else an agent would stand still with its log collector, and every certificate would expire."""

    def log_events() -> None:
        for number in range(50):
            log.event(LOG, "issued", number=number, more=["x" * LONGEST_VALUE] * 20)
        log.event(LOG, "last")

    log.configure("json", "info", pipe.stream)
    size = pipe.fill()
    promptly(log_events)
    lines = [json.loads(line) for line in pipe.read(b'"last"}\n')[size:].splitlines()]
    assert [line.get("number") for line in lines] == [*range(50), None]
    log.event(LOG, "later")
    assert json.loads(pipe.read(b"\n"))["event"] == "later"


def test_a_long_line_does_not_wait_for_the_little_room_there_is(pipe: Pipe) -> None:
    log.configure("json", "info", pipe.stream)
    pipe.fill()
    os.read(pipe.reader, select.PIPE_BUF)
    promptly(lambda: log.event(LOG, "issued", more=["x" * LONGEST_VALUE] * 200))
    assert b"issued" in pipe.read(b"}\n")


def test_lines_keep_their_order_however_slowly_they_are_read(pipe: Pipe) -> None:
    count = 3000

    def log_events() -> None:
        for number in range(count):
            log.event(LOG, "issued", number=number)
        log.event(LOG, "last")

    log.configure("json", "info", pipe.stream)
    writer = threading.Thread(target=log_events, daemon=True)
    size = pipe.fill()
    writer.start()
    lines = [json.loads(line) for line in pipe.read(b'"last"}\n')[size:].splitlines()]
    assert [line.get("number") for line in lines] == [*range(count), None]


def test_room_that_has_been_used_is_used_again(pipe: Pipe) -> None:
    log.configure("json", "info", pipe.stream)
    for _ in range(4):
        size = pipe.fill()
        for number in range(50):
            log.event(LOG, "issued", number=number, more=["x" * LONGEST_VALUE] * 15)
        log.event(LOG, "last")
        lines = [json.loads(line) for line in pipe.read(b'"last"}\n')[size:].splitlines()]
        assert [line.get("number") for line in lines] == [*range(50), None]
        logging.getLogger("sds_agent").handlers[0].flush()


def test_what_is_not_stored_is_counted(pipe: Pipe) -> None:
    count = 2 * MOST_QUEUED // LONGEST_VALUE

    def log_events() -> None:
        for number in range(count):
            log.event(LOG, "issued", number=number, text="x" * LONGEST_VALUE)

    log.configure("json", "info", pipe.stream)
    size = pipe.fill()
    promptly(log_events)
    content = pipe.read(b"}\n", holding=b"log_lines_dropped")[size:]
    *lines, last = [json.loads(line) for line in content.splitlines()]
    assert [line["number"] for line in lines] == list(range(len(lines)))
    moved_on = 2 * select.PIPE_BUF  # within a terminal, from where it is written to where it is read
    assert MOST_QUEUED / 2 < len(content) <= MOST_QUEUED + moved_on
    assert last["level"] == "error"
    assert last["lines"] == count - len(lines)


class Garbage:
    """It logs when it is freed, as a task of asyncio's does whose exception nobody has seen."""

    def __init__(self) -> None:
        self.itself = self

    def __del__(self) -> None:
        log.event(LOG, "freed")


def test_what_is_freed_in_the_midst_of_a_line_may_log(pipe: Pipe) -> None:
    """Python looks for garbage at any moment: a program whose log waited for itself would stand still for good."""
    moments = 100  # objects that are made until Python looks for garbage: more than a line takes

    def log_events() -> None:
        for moment in range(1, moments):
            size = pipe.fill()
            gc.collect(0)
            Garbage()
            gc.set_threshold(moment, 1 << 30, 1 << 30)
            log.event(LOG, "issued", moment=moment)
            gc.set_threshold(0)
            gc.collect(0)
            log.event(LOG, "last")
            lines = [json.loads(line) for line in pipe.read(b'"last"}\n')[size:].splitlines()]
            assert sorted(line["event"] for line in lines) == ["freed", "issued", "last"]

    log.configure("json", "info", pipe.stream)
    before = gc.get_threshold()
    try:
        promptly(log_events)
    finally:
        gc.set_threshold(*before)


def test_a_program_ends_though_its_log_is_not_read(pipe: Pipe) -> None:
    log.configure("json", "info", pipe.stream)
    pipe.fill()
    log.event(LOG, "issued")
    promptly(logging.getLogger("sds_agent").handlers[0].flush)


def test_a_reader_that_has_left_is_no_error(pipe: Pipe) -> None:
    log.configure("json", "info", pipe.stream)
    os.close(pipe.reader)
    log.event(LOG, "issued")
    pipe.reader = os.open(os.devnull, os.O_RDONLY)
