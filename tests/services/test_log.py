"""The log: one line an event whatever is in it, and nobody waits for a log that is not read."""

import io
import json
import logging
import os
import pty
import select
import threading
import tty
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import TextIO

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sds_agent import log
from sds_agent.log import LONGEST_VALUE, MOST_KEPT

LOG = logging.getLogger("sds_agent.test")
LATE = datetime(2026, 3, 14, 15, 9, 26, 535897, tzinfo=UTC)


def written(form: log.Format, name: str = "issued", **fields: log.Value) -> str:
    """What an event looks like."""
    stream = io.StringIO()
    log.configure(form, "debug", stream)
    log.event(LOG, name, level=logging.INFO, **fields)
    return stream.getvalue()


def test_an_event_is_its_name_and_its_fields() -> None:
    line = written(
        "text", workload="web", at=LATE, took=timedelta(seconds=1.5), ok=True, nothing=None, names=["a", "b"]
    )
    assert line.split(" ", 1)[1] == (
        "info    issued workload=web at=2026-03-14T15:09:26.535Z took=1.5 ok=true names=a,b\n"
    )
    told = json.loads(written("json", workload="web", at=LATE, ok=True, nothing=None, names=("a", "b")))
    del told["time"]
    assert told == {
        "level": "info",
        "event": "issued",
        "workload": "web",
        "at": "2026-03-14T15:09:26.535Z",
        "ok": True,
        "names": ["a", "b"],
    }


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
    told = line.rstrip("\n").split(" reason=", 1)[1]
    assert told == value or json.loads(told) == value


def test_a_long_value_is_cut() -> None:
    told = json.loads(written("json", name_asked="n" * 70_000, names=["n" * 70_000]))
    assert told["name_asked"] == told["names"][0] == "n" * LONGEST_VALUE + "… (70000 characters)"


def test_a_traceback_tells_its_type_alone() -> None:
    """The frames and the text of an exception may hold a key."""
    stream = io.StringIO()
    log.configure("json", "debug", stream)
    try:
        os.environ["PLANTED"]
    except KeyError:
        LOG.exception("fault")
    assert "PLANTED" not in stream.getvalue()
    assert json.loads(stream.getvalue())["exception"] == "KeyError"


# --- a log that is not read ---


class Pipe:
    """A pipe or a terminal whose reader takes nothing until it is told to."""

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
        os.close(pipe.reader)  # whoever still waits to write gives up
        for handler in logging.getLogger("sds_agent").handlers:
            handler.flush()


def promptly(action: Callable[[], None]) -> None:
    """Do it, and fail rather than stand still."""
    actor = threading.Thread(target=action, daemon=True)
    actor.start()
    actor.join(20)
    assert not actor.is_alive()


def test_a_log_that_is_read_is_written_at_once_and_by_nobody_else(pipe: Pipe) -> None:
    log.configure("json", "info", pipe.stream)
    for number in range(3):
        log.event(LOG, "issued", number=number)
        assert pipe.holds_something, "a program that is killed now has told its last event"
        assert json.loads(pipe.read(b"\n"))["number"] == number
    assert "log" not in {thread.name for thread in threading.enumerate()}


def test_nobody_waits_for_a_log_that_is_not_read_and_nothing_is_lost_of_what_is_kept(pipe: Pipe) -> None:
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


def test_what_is_not_kept_is_counted(pipe: Pipe) -> None:
    count = 2 * MOST_KEPT // LONGEST_VALUE

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
    assert MOST_KEPT / 2 < len(content) <= MOST_KEPT + moved_on
    assert last["level"] == "error"
    assert last["lines"] == count - len(lines)


def test_a_program_ends_though_nobody_reads_its_log(pipe: Pipe) -> None:
    log.configure("json", "info", pipe.stream)
    pipe.fill()
    log.event(LOG, "issued")
    promptly(logging.getLogger("sds_agent").handlers[0].flush)


def test_a_reader_that_has_left_is_no_error(pipe: Pipe) -> None:
    log.configure("json", "info", pipe.stream)
    os.close(pipe.reader)
    log.event(LOG, "issued")
    pipe.reader = os.open(os.devnull, os.O_RDONLY)
