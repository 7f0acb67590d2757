"""One connection, relayed between its peer and gRPC, so that what the peer sends is inspected before gRPC has it.

gRPC decodes a header block that does not end, at some hundred bytes of memory for each of its headers, and none of its
settings bounds that: a connection that sent 1.6 MB made it take 26 MB, and one that goes on makes it take more. It does
so behind its own socket, so the relay reads the peer's bytes first (see `rpc.frames`) and ends a connection that would
cost too much; it took nothing then.

The price: some 16 microseconds of CPU for a push and its ACK, 4 of them to follow their messages.

gRPC keeps a buffer for what a connection may send next: 64 KB as long as the connection lives, once more than some
10 KB were there to be read at one time. An Envoy begins with a request of 61 KB for each of its secrets, and says a
hundred bytes a day after it. So the relay gives gRPC the first bytes of a connection in small pieces, each when the one
before is taken: 0.1 ms of CPU more for an Envoy, and up to 30 KB less for as long as it is there.

The relay works on the sockets themselves. A chunk is written before the next is read, so it holds no more than one for
each direction, and it notices a peer that leaves while it is not read from. asyncio's transports promise neither, and
cost as much CPU.
"""

import asyncio
import fcntl
import select
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from sds_agent.rpc.frames import Inspection

CLOSE_AFTER = 1.0
"""Seconds from the end of gRPC's connection to the end of the peer's, in which a peer that is just writing may read how
its calls ended. A Unix socket that is closed at once takes from a writer what it has not read yet.
"""

_BUFFER: Final = memoryview(bytearray(1 << 16))
"""What one read may bring, for all relays: each writes or copies it before the next read."""

CHUNK: Final = 1 << 14
"""Bytes of a peer that are read at once: that many can hold a thousand calls, each of fifteen bytes."""

BEGINNING: Final = 1 << 17
"""First bytes of a connection that gRPC gets in small pieces: an Envoy's requests for a certificate and for its roots.
"""

PIECE: Final = 8192
"""Bytes of one of these pieces: as many as fill one of gRPC's small buffers, so that none is kept half full."""

READ_ESTIMATE: Final = 12_200
"""What gRPC is to expect of one read in the beginning (`grpc.experimental.tcp_read_chunk_size`). It doubles that where
it finds more than 0.8 of it, and lowers it by a hundredth of the difference where it finds less; from 12,288 on its
buffers are the large ones. With these pieces it stays between 10,240 and that in the beginning.
"""

_SMALL_BUFFER: Final = 9000
"""Of the socket to gRPC while it gets these pieces (SO_SNDBUF): it takes one at a time, and Linux calls it writable
once gRPC has taken that.
"""

OnClose = Callable[["Relay", str | None], None]
Pace = Callable[[int], float]
"""Takes how many calls more a peer has made; returns for how many seconds the relay does not read from it."""
CHECK_INTERVAL = 1.0
"""Seconds from one check of an end that is not read from to the next: it may have left."""


class Relay:
    """Relays from `begin` on, until either end closes or the inspection finds a fault.

    `on_close` is called once with the relay, and with the fault or None.
    """

    __slots__ = (
        "_back",
        "_calls",
        "_closed",
        "_closing",
        "_inbound",
        "_inspection",
        "_on_close",
        "_outbound",
        "_pace",
        "_peer",
    )

    def __init__(
        self, peer: socket.socket, back: socket.socket, inspection: Inspection, pace: Pace, on_close: OnClose
    ) -> None:
        self._peer = peer
        self._back = back
        self._on_close = on_close
        self._inspection = inspection
        self._pace = pace
        self._calls = 0
        self._inbound = _Direction(
            peer, back, chunk=CHUNK, beginning=BEGINNING, inspect=self._inspect, wait=self._wait, ended=self.close
        )
        self._outbound = _Direction(
            back,
            peer,
            chunk=len(_BUFFER),
            beginning=0,
            inspect=inspection.answered,
            wait=_at_once,
            ended=self._grpc_closed,
        )
        self._closing: asyncio.TimerHandle | None = None
        self._closed = False

    def on_stuck(self, call: Callable[[], None]) -> None:
        """Let `call` be called each time that the peer does not take what it is sent."""
        self._outbound.when_held = call

    def begin(self) -> None:
        """Relay from this moment."""
        self._inbound.begin()
        self._outbound.begin()

    @property
    def peer(self) -> socket.socket:
        """The connection to the peer."""
        return self._peer

    @property
    def is_stuck(self) -> bool:
        """Whether the peer does not take what it was sent, so that gRPC keeps what follows."""
        return self._outbound.holds

    @property
    def waiting(self) -> int:
        """Bytes that wait between the peer and gRPC, here and in the system, which counts what they cost it."""
        import termios  # noqa: PLC0415 - not before the first secret

        def asked(end: socket.socket, what: int) -> int:
            return int.from_bytes(fcntl.ioctl(end, what, bytes(4)), sys.byteorder)

        if self._closed:
            return 0
        in_the_system = asked(self._peer, termios.TIOCOUTQ) + asked(self._back, termios.TIOCOUTQ)
        return in_the_system + asked(self._back, termios.FIONREAD) + self._outbound.rest + self._inbound.rest

    def say(self, frames: bytes) -> None:
        """Send the peer this after what gRPC has said, unless the peer has yet to take that."""
        if not (self._closed or self._outbound.rest):
            with suppress(OSError):  # it has left, or takes nothing
                self._peer.send(frames)

    def discard(self) -> None:
        """Give gRPC nothing more of what the peer sends: it goes on reading, and may read how its calls ended."""
        if not self._closed:
            self._inbound.discard()

    def close(self, why: str | None = None) -> None:
        """Close both ends at once, whatever is left to write."""
        if self._closed:
            return
        self._closed = True
        if self._closing is not None:
            self._closing.cancel()
            self._closing = None
        for each in (self._inbound, self._outbound):
            each.end()
            each.forget()
        self._inspection.end()
        self._peer.close()
        self._back.close()
        self._on_close(self, why)

    def _inspect(self, data: memoryview) -> bool:
        fault = self._inspection.take(bytes(data))
        if fault is not None:
            self.close(fault)
            return False
        if self._closed or self._inbound.discards:  # since then, by who was told of what was found
            return False
        if calls := self._inspection.calls - self._calls:
            self._calls += calls
            self._pace(calls)
            self._inbound.begin()
        return True

    def _wait(self) -> float:
        return self._pace(0)

    def _grpc_closed(self) -> None:
        """gRPC has closed the connection and the peer has been sent everything: let it read that, then close."""
        if self._closed or self._closing is not None:
            return
        self._closing = asyncio.get_running_loop().call_later(CLOSE_AFTER, self.close)
        self._outbound.end()
        self._inbound.discard()
        try:
            self._peer.shutdown(socket.SHUT_WR)
        except OSError:  # the peer has left
            self.close()


class _Direction:
    """One direction of a relay, in pieces of `chunk` bytes; the first `beginning` bytes in pieces of `PIECE`, each when
    the target has taken the one before.

    `inspect` says whether a piece may pass, `wait` for how many seconds nothing is read. `ended` is called when the
    source has no more to read, or has left while the target does not take its last bytes.
    """

    __slots__ = (
        "_beginning",
        "_buffer",
        "_chunk",
        "_ended",
        "_held",
        "_inspect",
        "_loop",
        "_rest",
        "_source",
        "_target",
        "_timer",
        "_wait",
        "discards",
        "when_held",
    )

    def __init__(
        self,
        source: socket.socket,
        target: socket.socket,
        *,
        chunk: int,
        beginning: int,
        inspect: Callable[[memoryview], bool],
        wait: Callable[[], float],
        ended: Callable[[], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._source = source
        self._target = target
        self._chunk = chunk
        self._beginning = beginning  # bytes that are left of it
        self._buffer = _shrunk(target) if beginning else 0
        self._inspect = inspect
        self._wait = wait
        self._ended = ended
        self.when_held = _nothing
        """Called when the target does not take all."""
        self._rest = b""
        self._held = False  # while the target is to take something before more is read
        self.discards = False
        """Whether what is read is discarded."""
        self._timer: asyncio.TimerHandle | None = None  # while nothing is read

    @property
    def holds(self) -> bool:
        """Whether the target has to take something before more is read."""
        return self._held

    @property
    def rest(self) -> int:
        """Bytes that it has read and the target has not taken."""
        return len(self._rest)

    def begin(self) -> None:
        """Read, or go on reading, unless there is something to wait for first."""
        if self._timer is not None:
            return
        if not self.discards and (wait := self._wait()):
            self._loop.remove_reader(self._source.fileno())
            self._timer = self._loop.call_later(min(wait, CHECK_INTERVAL), self._check)
        else:
            self._loop.add_reader(self._source.fileno(), self._read)

    def end(self) -> None:
        """Stop reading and writing."""
        self._loop.remove_reader(self._source.fileno())
        self._loop.remove_writer(self._target.fileno())
        self._rest = b""
        self._held = False
        self._stop_timer()

    def forget(self) -> None:
        """Know the relay no more, so that both are freed at once, and not when Python next looks for cycles."""
        self._inspect, self._wait, self._ended, self.when_held = _pass, _at_once, _nothing, _nothing

    def discard(self) -> None:
        """Go on reading, and discard what is read."""
        self.discards = True
        self.end()
        self.begin()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _check(self) -> None:
        """Check a source that is not read from, because the target takes nothing or `wait` says so."""
        self._timer = None
        if _has_left(self._source):
            self._ended()
        elif self._held:
            self._timer = self._loop.call_later(CHECK_INTERVAL, self._check)
        else:
            self.begin()

    def _read(self) -> None:
        try:
            count = self._source.recv_into(_BUFFER, PIECE if self._beginning else self._chunk)
        except (BlockingIOError, InterruptedError):
            self._release()
            return
        except OSError:  # reset, which is as good as closed
            count = 0
        if not count:
            self._ended()
        elif not self.discards and self._inspect(_BUFFER[:count]):
            self._write(_BUFFER[:count])

    def _write(self, data: memoryview) -> None:
        sent = self._send(data)
        if sent < len(data):
            self._rest = bytes(data[sent:])
            self._hold()
        elif self._beginning and len(data) == PIECE:
            self._hold()
        else:
            self._release()
        if self._beginning:
            self._begun(len(data))

    def _begun(self, count: int) -> None:
        """So many bytes of the beginning are over."""
        self._beginning = max(self._beginning - count, 0)
        if not self._beginning:
            self._target.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, self._buffer)

    def _hold(self) -> None:
        """Read no more until the target has taken what it was sent."""
        if self._held:
            return
        self._held = True
        self._loop.remove_reader(self._source.fileno())
        self._loop.add_writer(self._target.fileno(), self._go_on)
        self._stop_timer()
        self._timer = self._loop.call_later(CHECK_INTERVAL, self._check)
        self.when_held()

    def _release(self) -> None:
        """Read again when there is something to read."""
        if not self._held:
            return
        self._held = False
        self._loop.remove_writer(self._target.fileno())
        self._stop_timer()
        self.begin()

    def _go_on(self) -> None:
        """The target takes more: the rest, or else what comes next, without a turn for the source to tell of it."""
        if self._rest:
            self._rest = self._rest[self._send(self._rest) :]
        if self._rest:
            return
        if self._beginning and not self._wait():
            self._read()
        else:
            self._release()

    def _send(self, data: memoryview | bytes) -> int:
        """How many bytes the target took. One that has left takes all: reading from it will show that it left."""
        try:
            return self._target.send(data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError:
            return len(data)


def _has_left(end: socket.socket) -> bool:
    """Whether the other side has closed it, though there may still be something to read."""
    poll = select.poll()
    poll.register(end, 0)  # poll(2) reports a hang-up whatever is asked for
    return bool(poll.poll(0))


def _shrunk(target: socket.socket) -> int:
    """Give it the small buffer; returns the size for SO_SNDBUF that gives it back the one it had."""
    had = target.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
    target.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SMALL_BUFFER)
    return had // 2  # Linux doubles what it is given, for its own bookkeeping (socket(7))


def _pass(_data: memoryview) -> bool:
    return True


def _at_once() -> float:
    return 0.0


def _nothing() -> None:
    pass
