"""One line an event: `log.event(LOG, "issued", workload="default", serial="4f…")`.

On a terminal a line reads `time level event key=value …`; elsewhere, or when asked for, it is one JSON object. The
standard library's logging carries the events, so an embedding program and pytest see them as usual. Values come from
peers and CAs too, so they are quoted, cut to a bounded length and never able to start a line of their own.

An exception that no code foresaw is the event `fault` (`log.fault`). It names the part of the program, the exception's
type and its place in the code, and nothing that the exception says or holds.

The program never waits for the reader of its log: one that stood still with a log collector would renew nothing.
"""

import _thread
import logging
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from itertools import islice
from pathlib import Path
from types import FrameType
from typing import Annotated, Literal, TextIO

from msgspec import Meta, Struct

from sds_agent.errors import leaves
from sds_agent.pipes import has_room, never_waiting, write_some
from sds_agent.text import ascii_json, cut, first

Value = str | int | float | bool | datetime | timedelta | None | list[str] | tuple[str, ...]
Format = Literal["auto", "text", "json"]
Level = Literal["debug", "info", "warning", "error"]

ROOT = "sds_agent"
LONGEST_VALUE = 600
"""Characters of a text."""
MOST_VALUES = 100
"""Texts of a list. A node may have thousands of names, and programs that take lines of a log do not take any length."""
MOST_QUEUED = 1 << 20
"""Bytes of lines that wait for a reader."""
TIMEOUT = 0.5
"""Seconds that the end of the program waits for it."""
MOST_FRAMES = 8
"""Frames that a fault names."""
MOST_LEAVES = 5
"""Faults that are logged of one exception group."""
MOST_PLACES = 100
"""Faults in other libraries' hands that are logged, each at a place of its own."""
ENDED_CALL = "grpc._cython.cygrpc.ExecuteBatchError"
"""What gRPC logs of a call whose client left while an answer was being written: no fault."""
READS_TEXT = "grpc._cython.cygrpc._decode"
"""Where gRPC reads text of a peer's, such as a header's value. It logs an exception where that is no UTF-8, and goes on
as if it were Latin-1: no fault.
"""
_FIELDS = "sds_agent_fields"
_common: ContextVar[Mapping[str, str]] = ContextVar("fields of each event", default={})  # noqa: B039 - never changed


class LogSettings(Struct, frozen=True, kw_only=True):
    """What is logged, and how."""

    format: Annotated[
        Format,
        Meta(
            description="How an event is written: text is key=value, json one object a line; auto is text on a "
            "terminal, else json.",
        ),
    ] = "auto"
    level: Annotated[Level, Meta(description="The lowest level that is logged.")] = "info"


def event(logger: logging.Logger, name: str, *, level: int = logging.INFO, **fields: Value) -> None:
    """Log the event `name` with its fields and those of `each_with`; fields that are None are left out."""
    if logger.isEnabledFor(level):
        found = {k: _plain(v) for k, v in fields.items() if v is not None}
        # as `logger.log` does, which looks in vain for a caller: it would find this line
        record = logger.makeRecord(logger.name, level, "", 0, name, (), None)
        setattr(record, _FIELDS, {**found, **_common.get()})
        logger.handle(record)


def each_with(**fields: str) -> AbstractContextManager[None]:
    """Give these fields to every event that is logged inside this context, in functions that it calls and in tasks that
    it creates, so that the lines of one piece of work can be found. They come last, and replace one of their name.
    """
    return _CommonFields(fields)


class _CommonFields(AbstractContextManager[None]):
    """What `each_with` returns: a generator's context takes three times as long, twice for each certificate."""

    __slots__ = ("_fields", "_token")

    def __init__(self, fields: Mapping[str, str]) -> None:
        self._fields = fields

    def __enter__(self) -> None:
        self._token = _common.set({**_common.get(), **self._fields})

    def __exit__(self, *_: object) -> None:
        _common.reset(self._token)


def fault(logger: logging.Logger, part: str, error: BaseException, **fields: Value) -> None:
    """Log an exception that no code foresaw as `fault`, at the level error: a bug of ours or of a library.

    `part` is the part of the program that it ended, such as "sds stream". What an exception says may hold a secret of a
    CA's or a user's, as may the values of its frames' variables, so the event has none of them: `type` is the
    exception's qualified name, `at` the file and line where it was raised, and `frames` says how the program came
    there, the innermost first. An exception group is logged by the exceptions in it. A program around this one that
    logs tracebacks gets the whole exception.
    """
    for leaf in islice(leaves(error), MOST_LEAVES):
        given = {k: _plain(v) for k, v in fields.items() if v is not None}
        found = {_FIELDS: {"part": part, **_place(leaf), **given, **_common.get()}}
        logger.error("fault", exc_info=leaf, extra=found)


def _place(error: BaseException) -> dict[str, str | list[str]]:
    """The fields of a fault that the exception itself gives."""
    kind = type(error)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    frames = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__)][::-1]
    if not frames:
        return {"type": name}
    innermost, line = frames[0]
    return {"type": name, "at": f"{_file(innermost)}:{line}", "frames": list(islice(_above(frames), MOST_FRAMES))}


def _above(frames: list[tuple[FrameType, int]]) -> Iterator[str]:
    """The frames but those of Python's own library: an adapter of another package is of interest too."""
    for frame, line in frames:
        module = _module(frame)
        if module.partition(".")[0] not in sys.stdlib_module_names:
            yield f"{module}:{line} {frame.f_code.co_qualname}"


def _file(frame: FrameType) -> str:
    """The frame's file, from the package that it belongs to on: where that is installed says nothing."""
    parts = Path(frame.f_code.co_filename).parts
    depth = _module(frame).count(".") + 1 + (parts[-1] == "__init__.py")
    return "/".join(parts[-depth:])


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "unknown"))


class Event(Struct, frozen=True):
    """What one line of the log says."""

    at: datetime
    level: str
    name: str
    fields: Mapping[str, "str | int | float | bool | list[str]"]


@contextmanager
def watching(watcher: Callable[[Event], None]) -> Iterator[None]:
    """Call `watcher` with each event that is logged, until the context is left. It must not wait, raise or log.

    It is called on the thread that logs.
    """
    handler = _Watching(watcher)
    root = logging.getLogger(ROOT)
    root.addHandler(handler)
    try:
        yield
    finally:
        root.removeHandler(handler)


def divert(watcher: Callable[[Event], None], level: str) -> None:
    """Give the package's events from that level on to `watcher` alone, as with `watching`: another process logs them.

    It gets faults of other libraries too, as `configure` has them.
    """
    configure("json", level)
    logging.getLogger(ROOT).handlers[:] = [_Watching(watcher)]


def repeat(said: Event, **fields: Value) -> None:
    """Log the event of another process as it was there, with these fields beside its own."""
    number = logging.getLevelNamesMapping().get(said.level.upper(), logging.ERROR)
    logger = logging.getLogger(ROOT)
    if logger.isEnabledFor(number):
        record = logger.makeRecord(ROOT, number, "", 0, said.name, (), None)
        record.created = said.at.timestamp()
        setattr(record, _FIELDS, {**said.fields, **{k: _plain(v) for k, v in fields.items() if v is not None}})
        logger.handle(record)


class _Watching(logging.Handler):
    def __init__(self, watcher: Callable[[Event], None]) -> None:
        super().__init__()
        self._watcher = watcher

    def emit(self, record: logging.LogRecord) -> None:
        at = datetime.fromtimestamp(record.created, UTC)
        self._watcher(Event(at, record.levelname.lower(), record.getMessage(), _fields(record)))


class LogOnChange:
    """Logs one kind of error when it begins and when its cause changes, and again once it was over in between.

    For what is tried again and again, at times whenever a peer asks: a line for each attempt would fill the log.
    """

    def __init__(self, logger: logging.Logger, name: str) -> None:
        self._logger = logger
        self._name = name
        self._logged: str | tuple[str, ...] = ""

    def report(self, cause: str | tuple[str, ...], **fields: Value) -> bool:
        """Log the event as an error with its `cause`, or its `causes` where it is a tuple, if that has changed; returns
        whether it was logged.

        An empty cause says that the error is over.
        """
        news = bool(cause) and cause != self._logged
        if news:
            named = {"cause": cause} if isinstance(cause, str) else {"causes": cause}
            event(self._logger, self._name, level=logging.ERROR, **fields, **named)
        self._logged = cause
        return news

    def resolved(self) -> None:
        """The error is over."""
        self._logged = ""


def configure(form: Format = "auto", level: str = "info", stream: TextIO | None = None) -> None:
    """Send the package's events to `stream`, by default standard error."""
    stream = sys.stderr if stream is None else stream
    text = form == "text" or (form == "auto" and stream.isatty())
    handler = _handler(stream)
    handler.setFormatter(_Text() if text else _Json())
    root = logging.getLogger(ROOT)
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    root.propagate = False
    for name, part in (("asyncio", "event loop"), ("grpc", "gRPC")):
        foreign = logging.getLogger(name)
        foreign.handlers[:] = [_Unclaimed(part)]
        foreign.setLevel(logging.ERROR)
        foreign.propagate = False


def aside(text: str) -> None:
    """Write text for a person to where the log goes, after its lines so far; it waits for no reader either."""
    for handler in logging.getLogger(ROOT).handlers:
        if isinstance(handler, NonBlockingHandler):
            handler.write(text.encode(errors="backslashreplace"))
        elif isinstance(handler, logging.StreamHandler):
            handler.stream.write(text)


def change(form: Format, level: str) -> None:
    """Write further events in that form and from that level on, to where `configure` sends them."""
    root = logging.getLogger(ROOT)
    root.setLevel(level.upper())
    for handler in root.handlers:
        if isinstance(handler, logging.StreamHandler):
            text = form == "text" or (form == "auto" and handler.stream.isatty())
            handler.setFormatter(_Text() if text else _Json())


class _Unclaimed(logging.Handler):
    """Logs, as a fault, each exception that a library logs because no caller catches it, once for each place.

    Such are exceptions in a callback of asyncio's, in a task whose result is not awaited, or out of a gRPC handler. The
    library's own words are dropped: they show objects, and a coroutine's repr can hold its arguments.
    """

    def __init__(self, part: str) -> None:
        super().__init__(logging.ERROR)
        self._part = part
        self._places: set[str] = set()  # a peer may be able to cause one again and again

    def emit(self, record: logging.LogRecord) -> None:
        """Log its exception, if it has one."""
        error = record.exc_info[1] if record.exc_info else None
        if error is None or len(self._places) >= MOST_PLACES:
            return
        place = str(found := _place(error))
        if place not in self._places and not _is_of_peer(found):
            self._places.add(place)
            fault(logging.getLogger(ROOT), self._part, error)


def _is_of_peer(found: Mapping[str, str | list[str]]) -> bool:
    """Whether what a library logged is what a peer did, by the fields of the fault that it would be."""
    innermost = next(iter(found.get("frames", ())), "")
    return found["type"] == ENDED_CALL or (
        found["type"] == UnicodeDecodeError.__name__ and innermost.endswith(f" {READS_TEXT}")
    )


def counts() -> Mapping[str, int]:
    """How many events the program has logged at each level since `configure`, by the level's name, whether their lines
    were read or dropped. A level at which none was is left out.
    """
    found = (each.counts for each in logging.getLogger(ROOT).handlers if isinstance(each, NonBlockingHandler))
    return dict(next(found, {}))


def _handler(stream: TextIO) -> "logging.StreamHandler[TextIO]":
    try:
        return NonBlockingHandler(stream)
    except OSError:  # no file descriptor is behind it
        return logging.StreamHandler(stream)


class NonBlockingHandler(logging.StreamHandler[TextIO]):
    """Writes to a stream's descriptor and never waits for its reader.

    What a full pipe does not take is queued, up to `MOST_QUEUED` bytes, and a thread waits to write it; further lines
    are dropped and counted. While the reader keeps up there is no thread, and each line is written at once. Where no
    thread can be started, the queue is written with the next line for which there is room.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._descriptor = stream.fileno()
        self._ready = never_waiting(self._descriptor)
        self._guard = threading.RLock()  # what Python frees in the midst of a write may log, in the same thread
        self._is_writing = False
        self._queue: deque[bytes] = deque()
        self._size = 0
        self._dropped = 0
        self._waiter: threading.Lock | None = None  # locked while a thread waits to write the queue
        self.counts: dict[str, int] = {}
        """Records by their level's name, in lower case."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write the record, queue it, or drop it."""
        level = record.levelname.lower()
        self.counts[level] = self.counts.get(level, 0) + 1
        self.write(self._line(record))

    def write(self, line: bytes) -> None:
        """Write the line, or several, queue them, or drop them."""
        with self._guard:
            if self._is_writing:  # the line around this one is written first
                self._store(line)
                return
            self._is_writing = True
            try:
                self._write_in_turn(line)
            finally:
                self._is_writing = False

    def _write_in_turn(self, line: bytes) -> None:
        if self._waiter is None:
            self._write_queue_ready()
        if self._waiter is not None or self._queue:
            self._store(line)
        elif rest := self._write_ready(line):
            self._put_back(rest)
        if self._queue and self._waiter is None:
            self._start_waiter()

    def flush(self) -> None:
        """Wait a moment for the queue to be written."""
        if (waiter := self._waiter) is not None:
            if waiter.acquire(timeout=TIMEOUT):
                waiter.release()
        elif self._queue:
            has_room(self._descriptor, TIMEOUT)
            with self._guard:
                self._write_queue_ready()

    def _line(self, record: logging.LogRecord) -> bytes:
        return f"{self.format(record)}{self.terminator}".encode(errors="backslashreplace")

    def _store(self, line: bytes) -> None:
        if self._size + len(line) > MOST_QUEUED:
            self._dropped += 1
        elif line:
            self._queue.append(line)
            self._size += len(line)

    def _put_back(self, rest: bytes) -> None:
        """The rest of a line of which the beginning is written: nothing may come between."""
        self._queue.appendleft(rest)
        self._size += len(rest)

    def _start_waiter(self) -> None:
        """Start a thread to write the queue. A `Thread` waits for its beginning, and may have something to log before
        that, which waits for this thread.
        """
        self._waiter = threading.Lock()
        self._waiter.acquire()
        try:
            _thread.start_new_thread(self._write_queue, (self._waiter,))
        except RuntimeError:  # a log must not end the program, and there is no other place to say so
            self._waiter = None

    def _write_queue_ready(self) -> None:
        """Write the queue, as far as the stream takes it at once."""
        while line := self._next():
            if rest := self._write_ready(line):
                self._put_back(rest)
                return

    def _write_ready(self, line: bytes) -> bytes:
        """Write what the stream takes at once; returns the rest."""
        while line and (taken := self._write(self._ready, line, 0)):
            line = line[taken:]
        return line

    def _write(self, descriptor: int, line: bytes, seconds: float | None) -> int:
        try:
            return write_some(descriptor, line, seconds)
        except OSError:  # the reader has left or the disk is full, and there is no other place to say so
            return len(line)

    def _write_queue(self, waiter: threading.Lock) -> None:
        while line := self._next_or_end():
            while line:
                line = line[self._write(self._descriptor, line, None) :]
        waiter.release()

    def _next_or_end(self) -> bytes:
        with self._guard:
            line = self._next()
            if not line:
                self._waiter = None
            return line

    def _next(self) -> bytes:
        """Take the next line from the queue, and at its end the count of dropped lines; nothing when it is empty."""
        if self._queue:
            line = self._queue.popleft()
            self._size -= len(line)
            return line
        if self._dropped:
            fields, self._dropped = {"lines": self._dropped}, 0
            level = {"levelno": logging.ERROR, "levelname": "ERROR"}
            return self._line(logging.makeLogRecord({"msg": "log_lines_dropped", _FIELDS: fields, **level}))
        return b""


def _plain(value: Value) -> str | int | float | bool | list[str]:
    match value:
        case str():
            return cut(value, LONGEST_VALUE, count=True)
        case datetime():
            return timestamp(value)
        case timedelta():
            return round(value.total_seconds(), 3)
        case list() | tuple():
            return [cut(v, LONGEST_VALUE, count=True) for v in first(value, MOST_VALUES)]
        case None:
            return ""
        case _:
            return value


def _fields(record: logging.LogRecord) -> dict[str, str | int | float | bool | list[str]]:
    fields: dict[str, str | int | float | bool | list[str]] = getattr(record, _FIELDS, {})
    if "type" not in fields and record.exc_info and record.exc_info[1] is not None:  # `logger.exception` of an adapter
        fields = {**fields, **_place(record.exc_info[1])}
    return fields


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        line = {"time": _time(record), "level": record.levelname.lower(), "event": record.getMessage()}
        return ascii_json({**line, **_fields(record)})


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        pairs = [f"{key}={_quoted(value)}" for key, value in _fields(record).items()]
        return " ".join([_time(record), f"{record.levelname.lower():7}", record.getMessage(), *pairs])


def _time(record: logging.LogRecord) -> str:
    return timestamp(datetime.fromtimestamp(record.created, UTC))


def timestamp(moment: datetime) -> str:
    """The time as log lines have it: in UTC, to the millisecond (RFC 3339)."""
    utc = moment.astimezone(UTC)
    second = _second(utc.year, utc.month, utc.day, utc.hour, utc.minute, utc.second)
    return f"{second}.{utc.microsecond // 1000:03d}Z"


@lru_cache(maxsize=16)
def _second(*parts: int) -> str:
    """Remembered: lines of one moment have their times in common, and to write these took a third of a line's cost."""
    return "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}".format(*parts)


def _quoted(value: str | float | bool | list[str]) -> str:
    if isinstance(value, list):
        return ",".join(_quoted(v) for v in value) or '""'
    text = str(value).lower() if isinstance(value, bool) else str(value)
    plain = text.isascii() and text.isprintable() and not any(c in ' "=,' for c in text) and text != ""
    return text if plain else ascii_json(text)
