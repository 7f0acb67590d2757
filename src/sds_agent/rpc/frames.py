"""The client's side of an HTTP/2 connection, read far enough to end it before it costs the gRPC server too much.

gRPC's core decodes what a client sends before any code of ours sees it. It bounds neither a header block that does not
end nor the number of headers in one, at some hundred bytes of memory for each header, which a client can send as one
byte; nor does it bound frames that ask for nothing. So a relay that sees the plain bytes hands them to an `Inspection`
first. That follows the frames (RFC 9113 section 4.1) and counts the fields of header blocks (RFC 7541 section 6),
without decoding either: it skips payloads by their length. gRPC also stores what has come of a message until all of it
has, so an inspection can follow the messages in DATA frames as well (`Messages`). Other faults in the protocol are left
to gRPC, except those that would let the two see different frames, blocks or calls.
"""

import struct
from collections.abc import Callable, Generator
from typing import Final, Protocol

from msgspec import Struct

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
"""RFC 9113 section 3.4."""
LONGEST_CONTROL: Final = 1 << 14
"""Bytes of a frame that is neither DATA nor part of a header block; every receiver takes so many (section 4.2)."""

_HEAD: Final = struct.Struct(">HBBBI")
"""The length in two parts, the kind, the flags and the stream (RFC 9113 section 4.1)."""
_DATA: Final = 0x0
_HEADERS: Final = 0x1
_RST_STREAM: Final = 0x3
_PUSH_PROMISE: Final = 0x5
_CONTINUATION: Final = 0x9
_END_STREAM: Final = 0x1
_END_HEADERS: Final = 0x4
_PADDED: Final = 0x8
_PRIORITY: Final = 0x20
_PRIORITY_BYTES: Final = 5
_MOST_DIGITS: Final = 4
"""Bytes of an integer after its prefix (RFC 7541 section 5.1): 2^28 is more than any length may be here."""

_ENDING: Final = (_DATA, _HEADERS)
"""Frames with END_STREAM. Of other kinds that flag means something else."""
_STREAM: Final = (1 << 31) - 1
"""The bits of a stream's number; the one above them is to be ignored (section 4.1)."""

ENHANCE_YOUR_CALM: Final = 0xB
"""The error that clients of gRPC read as RESOURCE_EXHAUSTED (RFC 9113 section 7)."""

_PREFIX: Final = 5
"""Bytes before a message of gRPC, with its length in the last four."""
_LENGTH: Final = struct.Struct(">I")
PIECE_COST: Final = 48
"""Bytes that gRPC needs for a piece of a message beside what is in it. Measured with grpcio 1.85: a message in frames
of 24 bytes takes 65 for each; smaller pieces are joined.
"""

_Head = tuple[int, int, int, int, int]


class Bounds(Struct, frozen=True):
    """What a client may send: `block` bytes in one header block, with the heads and padding of its frames; `fields` in
    one block; and `frames` in all, with `frames_per_call` more for each call that it begins.
    """

    block: int
    fields: int = 128
    frames: int = 4096
    frames_per_call: int = 64


class _TooMuchError(Exception):
    """The connection has to end; the message says why."""


class Inspection:
    """One connection. It takes what the client sends, in pieces of any size, and stores less than one field of it.

    `answered` is to be called with what the server sends, in such pieces too, and returns True.
    """

    __slots__ = (
        "_at",
        "_bounds",
        "_data",
        "_fault",
        "_frames_left",
        "_is_between",
        "_messages",
        "_walk",
        "answered",
        "calls",
    )

    def __init__(self, bounds: Bounds, messages: "Messages | None" = None) -> None:
        self.calls = 0
        self._bounds = bounds
        self._messages = messages
        self.answered: Callable[[memoryview], bool] = _pass if messages is None else messages.answered
        self._frames_left = bounds.frames
        self._fault: str | None = None
        self._is_between = False  # the client has sent all of a frame and nothing of the next
        self._data = b""
        self._at = 0
        self._walk = self._connection()
        next(self._walk)

    def take(self, data: bytes) -> str | None:
        """Why the connection has to end, and these bytes must not be passed on; None while it may go on."""
        if self._fault is None:
            self._data, self._at = data, 0
            if self._messages is not None:
                self._messages.owner.came(len(data))
            try:
                if not (self._is_between and self._passes_whole_frames()):
                    next(self._walk)
            except _TooMuchError as error:
                self._fault = str(error)
            self._data = b""
        return self._fault

    def allow(self, frames: int) -> None:
        """Let the client send so many frames more."""
        self._frames_left += frames

    def end(self) -> None:
        """The connection is over; there is nothing more to take. What was stored is freed at once."""
        self._fault = self._fault or "the connection is over"
        self._walk.close()

    def _passes_whole_frames(self) -> bool:
        """Skip frames without a header block that are here as a whole: an acknowledgement is one. Whether that is all
        that is here.
        """
        data, end, messages = self._data, len(self._data), self._messages
        while (begins := self._at + _HEAD.size) <= end:
            high, low, kind, flags, stream = _HEAD.unpack_from(data, self._at)
            ends = begins + (high << 8) + low
            if kind == _HEADERS or ends > end:
                break
            self._count((high, low, kind, flags, stream))
            if kind != _DATA:
                self._control(kind, stream, ends - begins)
            elif messages is not None:
                messages.take(stream, data, begins, ends)
            self._at = ends
        return self._at == end

    # Each generator below continues where it is when more bytes have come. Bytes that are there already are read
    # without one where that takes one line: making a generator takes longer than everything else for a frame.

    def _connection(self) -> Generator[None, None, None]:
        yield
        if (yield from self._read(len(PREFACE))) != PREFACE:
            raise _TooMuchError("it does not begin as HTTP/2 does")
        while True:
            if self._at == len(self._data):
                self._is_between = True
                yield
                self._is_between = False
            if self._at + _HEAD.size <= len(self._data):
                high, low, kind, flags, stream = self._count(_HEAD.unpack_from(self._data, self._at))
                self._at += _HEAD.size
            else:
                high, low, kind, flags, stream = self._count(_HEAD.unpack((yield from self._read(_HEAD.size))))
            length = (high << 8) + low
            if kind == _HEADERS:
                yield from self._block(length, flags, stream)
                continue
            if kind != _DATA:
                self._control(kind, stream, length)
            elif self._messages is not None:
                yield from self._follow(length, stream, self._messages)
                continue
            if self._at + length <= len(self._data):
                self._at += length
            else:
                yield from self._pass(length)

    def _control(self, kind: int, stream: int, length: int) -> None:
        if kind == _CONTINUATION:
            raise _TooMuchError("a CONTINUATION frame stands outside of a header block")
        if kind == _PUSH_PROMISE:
            raise _TooMuchError("a client cannot push (RFC 9113 section 8.4)")
        if length > LONGEST_CONTROL:
            raise _TooMuchError(f"a frame of kind {kind} has {length} bytes")
        if kind == _RST_STREAM and self._messages is not None:
            self._messages.ended(stream)

    def _count(self, head: _Head) -> _Head:
        if head[2] == _HEADERS:
            self.calls += 1
            if self._messages is not None:
                self._messages.begin(head[4], head[3])
            self._frames_left += self._bounds.frames_per_call
        self._frames_left -= 1
        if self._frames_left < 0:
            raise _TooMuchError("it sent too many frames for the calls that it made")
        return head

    def _block(self, length: int, flags: int, stream: int) -> Generator[None, None, None]:
        """A header block: HEADERS, and CONTINUATION until END_HEADERS (RFC 9113 sections 6.2 and 6.10)."""
        fields, size = _Fields(self._bounds.fields), self._grown(0, length)
        yield from self._first_fragment(length, flags, fields)
        while not flags & _END_HEADERS:
            high, low, kind, flags, on = self._count(_HEAD.unpack((yield from self._read(_HEAD.size))))
            if kind != _CONTINUATION or on != stream:
                raise _TooMuchError("another frame stands in the middle of a header block")
            length = (high << 8) + low
            size = self._grown(size, length)
            yield from self._fragment(length, fields)

    def _grown(self, size: int, length: int) -> int:
        size += _HEAD.size + length
        if size > self._bounds.block:
            raise _TooMuchError(f"a header block has more than {self._bounds.block} bytes")
        return size

    def _first_fragment(self, length: int, flags: int, fields: "_Fields") -> Generator[None, None, None]:
        """HEADERS may hold a priority, and padding, which is no part of the block."""
        padding = 0
        if flags & _PADDED and length:
            padding = (yield from self._read(1))[0]
            length -= 1
        priority = _PRIORITY_BYTES if flags & _PRIORITY else 0
        length -= priority + padding
        if length < 0:
            raise _TooMuchError("a HEADERS frame is shorter than its padding")
        yield from self._pass(priority)
        yield from self._fragment(length, fields)
        yield from self._pass(padding)

    def _fragment(self, length: int, fields: "_Fields") -> Generator[None, None, None]:
        while True:
            part = self._data[self._at : self._at + length]
            self._at += len(part)
            length -= len(part)
            fields.take(part)
            if not length:
                return
            yield

    def _follow(self, length: int, stream: int, messages: "Messages") -> Generator[None, None, None]:
        """A DATA frame, whose bytes belong to messages."""
        while True:
            ends = min(self._at + length, len(self._data))
            messages.take(stream, self._data, self._at, ends)
            length -= ends - self._at
            self._at = ends
            if not length:
                return
            yield

    def _read(self, count: int) -> Generator[None, None, bytes]:
        """The next `count` bytes, which are few."""
        found = self._data[self._at : self._at + count]
        self._at += len(found)
        while len(found) < count:
            yield
            more = self._data[: count - len(found)]
            self._at = len(more)
            found += more
        return found

    def _pass(self, count: int) -> Generator[None, None, None]:
        """Skip the next `count` bytes."""
        while (here := len(self._data) - self._at) < count:
            count -= here
            self._at = 0
            yield
        self._at += count


class MessageOwner(Protocol):
    """Who is told what a client makes gRPC store."""

    def came(self, count: int) -> None:
        """The client has sent so many bytes, of whatever."""
        ...

    def moved(self, count: int) -> None:
        """The client has sent so many bytes more, or less, of messages that have not ended."""
        ...

    def called(self) -> None:
        """The client has begun a call."""
        ...


class Messages:
    """The messages on a connection, with what the server answers. `owner` is told of each change of the bytes that the
    client has sent of messages which have not ended yet: gRPC stores them.

    Only calls that are open count, because gRPC drops what comes for others. `answers` are the bytes in the server's
    DATA frames.
    """

    __slots__ = ("_begun", "_head", "_last", "_open", "_skip", "answers", "owner")

    def __init__(self, owner: MessageOwner) -> None:
        self.answers = 0
        self._head = b""  # of a frame of the server's, which has not come whole
        self._skip = 0  # bytes left of a frame whose head has passed
        self.owner = owner
        self._open: dict[int, None] = {}  # a set, which Python's garbage collector need not look at
        self._begun = dict[int, _Unfinished]()
        self._last = 0

    def begin(self, stream: int, flags: int) -> None:
        """A header block has come: it begins a call if it is on a new stream, whose number has to be odd and higher
        than all before it (RFC 9113 section 5.1.1).

        gRPC ignores some streams that break this rule, and never says that they are over. It takes others, as after one
        that it refused. So such a connection has to end. A block that ends its stream may come late, as trailers.
        """
        stream &= _STREAM
        if stream > self._last:
            if not stream & 1:
                raise _TooMuchError("a client cannot begin a stream with an even number (RFC 9113 section 5.1.1)")
            self._last = stream
            self._open[stream] = None
            self.owner.called()
        elif stream not in self._open and not flags & _END_STREAM:
            raise _TooMuchError("a stream begins with a lower number than one before it (RFC 9113 section 5.1.1)")

    @property
    def calls(self) -> int:
        """How many calls are open: neither has the client reset them, nor the server sent how they ended."""
        return len(self._open)

    def ended(self, stream: int) -> None:
        """The call is over: nothing of it is stored any more."""
        stream &= _STREAM
        self._open.pop(stream, None)
        if (message := self._begun.pop(stream, None)) is not None:
            self.owner.moved(-message.stored)

    def resets(self, error: int) -> bytes:
        """Frames that end every open call with that error, for the client. Nothing while a frame of the server's is
        under way, which may never end.
        """
        if self._skip or self._head:
            return b""
        code = error.to_bytes(4, "big")
        return b"".join(_HEAD.pack(0, len(code), _RST_STREAM, 0, stream) + code for stream in self._open)

    def take(self, stream: int, data: bytes, at: int, end: int) -> None:
        """These bytes of the data belong to the stream's messages."""
        stream &= _STREAM
        message = self._begun.get(stream)
        if message is None:
            if end - at >= _PREFIX and _LENGTH.unpack_from(data, at + 1)[0] == end - at - _PREFIX:
                return  # a whole one, as an acknowledgement nearly always is
            if at == end or stream not in self._open:
                return
            message = self._begun[stream] = _Unfinished()
        before = message.stored
        message.take(data, at, end)
        if not message.stored:
            del self._begun[stream]
        self.owner.moved(message.stored - before)

    def answered(self, data: bytes | memoryview) -> bool:
        """Follow what the server sends, in pieces of any size. Always True: it may pass."""
        if self._head:
            data, self._head = self._head + bytes(data), b""
        at, end = self._skip, len(data)
        while at + _HEAD.size <= end:
            high, low, kind, flags, stream = _HEAD.unpack_from(data, at)
            length = (high << 8) + low
            at += _HEAD.size + length
            if kind == _DATA:
                self.answers += length
            if kind == _RST_STREAM or (flags & _END_STREAM and kind in _ENDING):
                self.ended(stream)
        if at < end:
            self._head = bytes(data[at:])
            at = end
        self._skip = at - end
        return True


class _Unfinished:
    """The message that a stream is in: so much of it is `stored`, nothing between two of them."""

    __slots__ = ("_left", "_prefix", "stored")

    def __init__(self) -> None:
        self._prefix = b""
        self._left = 0
        self.stored = 0

    def take(self, data: bytes, at: int, end: int) -> None:
        """Follow these bytes, in which it may end, and others may begin."""
        began = at
        while at < end:
            if (missing := _PREFIX - len(self._prefix)) > 0:
                self._prefix += data[at : min(at + missing, end)]
                at = min(at + missing, end)
                if len(self._prefix) < _PREFIX:
                    break
                (self._left,) = _LENGTH.unpack_from(self._prefix, 1)
            here = min(self._left, end - at)
            self._left -= here
            at += here
            if not self._left:
                self._prefix, self.stored, began = b"", 0, at
        if at > began:
            self.stored += at - began + PIECE_COST


class _Fields:
    """Counts the fields of a block that comes in pieces. A change of the table's size counts as one."""

    def __init__(self, most: int) -> None:
        self._left = most
        self._incomplete = b""

    def take(self, part: bytes) -> None:
        block = self._incomplete + part if self._incomplete else part
        at = 0
        while (end := _end_of_field(block, at)) > 0:
            at = end
            self._left -= 1
            if self._left < 0:
                raise _TooMuchError("a header block has too many fields")
        self._incomplete = block[at:]


def _strings(first: int) -> int:
    """How many strings follow a field's first byte (RFC 7541 section 6); `_LONG` more where its number goes on."""
    if first & 0x80:
        mask, least = 0x7F, 0
    elif first & 0x60 == 0x20:
        mask, least = 0x1F, 0
    else:  # a value, and before it a name that is in no table
        mask, least = (0x3F if first & 0x40 else 0x0F), 1
    number = first & mask
    return least + (least and not number) + (_LONG if number == mask else 0)


_LONG: Final = 8
_STRINGS: Final = bytes(_strings(first) for first in range(256))


def _end_of_field(block: bytes, at: int) -> int:
    """Where the field that begins at `at` ends; 0 if its end has not come yet."""
    try:
        strings = _STRINGS[block[at]]
        at += 1
        if strings >= _LONG:
            strings -= _LONG
            _, at = _integer(block, at)
        while strings:
            length = block[at] & 0x7F
            at += 1
            if length == 0x7F:
                length, at = _integer(block, at)
            at += length
            strings -= 1
    except IndexError:
        return 0
    return at if at <= len(block) else 0


def _integer(block: bytes, at: int) -> tuple[int, int]:
    """A string's length, whose prefix is full, and where it ends (RFC 7541 section 5.1). Raises IndexError."""
    value = 0x7F
    for shift in range(0, 7 * _MOST_DIGITS, 7):
        digit = block[at]
        at += 1
        value += (digit & 0x7F) << shift
        if digit < 0x80:
            return value, at
    raise _TooMuchError("a number in a header block is too large")


def _pass(_data: memoryview) -> bool:
    return True
