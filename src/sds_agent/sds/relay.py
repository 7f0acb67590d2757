"""One connection, relayed between its peer and gRPC, so that what the peer sends is inspected before gRPC has it.

gRPC decodes a header block that does not end, at some hundred bytes of memory for each of its headers, and none of its
settings bounds that: a connection that sent 1.6 MB made it take 26 MB, and one that goes on makes it take more. It does
so behind its own socket, so the relay reads the peer's bytes first (see `rpc.frames`) and ends a connection that would
cost too much; it took nothing then.

The price: 50 microseconds of CPU for a push and its ACK, a tenth of what they cost with gRPC and the log, and up to
32 KB of resident memory for a connection that begins with an Envoy's request of 61 KB, which reaches gRPC in pieces.

The relay works on the sockets themselves. A chunk is written before the next is read, so it holds no more than one for
each direction, and it notices a peer that leaves while it is not read from. asyncio's transports promise neither, and
cost as much CPU.
"""

import asyncio
import select
import socket
from collections.abc import Callable
from typing import Final

from sds_agent.rpc.frames import Inspection

FAREWELL = 1.0
"""Seconds in which a peer that is just writing may read what was said last, once gRPC has closed the connection. Closed
at once, a Unix socket takes from a writer what it has not read.
"""

_BUFFER: Final = memoryview(bytearray(1 << 16))
"""What one read may bring, for all relays: it is written, or copied, before anything else is read."""

CHUNK: Final = 1 << 14
"""Bytes of a peer that are taken at once: in so many it can make a thousand calls, each of fifteen."""

Over = Callable[["Relay", str | None], None]
Pace = Callable[[int], float]
"""For how many seconds a peer that has made so many calls more is not to be read from."""
LOOK_EVERY = 1.0
"""Seconds from one look at an end that is not read from to the next: it may have left."""


class Relay:
    """Relays from `begin` on, until either end closes or the inspection objects; then `over` is called, with why."""

    def __init__(
        self, peer: socket.socket, back: socket.socket, inspection: Inspection, pace: Pace, over: Over
    ) -> None:
        self._peer = peer
        self._back = back
        self._over = over
        self._inspection = inspection
        self._pace = pace
        self._calls = 0
        self._there = _Way(peer, back, chunk=CHUNK, look=self._look, wait=self._wait, over=self.close)
        self._here = _Way(back, peer, chunk=len(_BUFFER), look=_pass, wait=_at_once, over=self._answered)
        self._farewell: asyncio.TimerHandle | None = None
        self._closed = False

    def begin(self) -> None:
        """Relay from this moment."""
        self._there.begin()
        self._here.begin()

    def close(self, why: str | None = None) -> None:
        """Close both ends at once, whatever is left to write."""
        if self._closed:
            return
        self._closed = True
        if self._farewell is not None:
            self._farewell.cancel()
        self._there.end()
        self._here.end()
        self._peer.close()
        self._back.close()
        self._over(self, why)

    def _look(self, data: memoryview) -> bool:
        fault = self._inspection.take(bytes(data))
        if fault is not None:
            self.close(fault)
            return False
        if calls := self._inspection.calls - self._calls:
            self._calls += calls
            self._pace(calls)
            self._there.begin()
        return True

    def _wait(self) -> float:
        return self._pace(0)

    def _answered(self) -> None:
        """gRPC has closed the connection, and the peer has been sent all: let it read that, and close too."""
        if self._closed or self._farewell is not None:
            return
        self._farewell = asyncio.get_running_loop().call_later(FAREWELL, self.close)
        self._here.end()
        self._there.forget()
        try:
            self._peer.shutdown(socket.SHUT_WR)
        except OSError:  # the peer has left
            self.close()


class _Way:
    """One direction of a relay, in pieces of `chunk` bytes.

    `look` says of each piece whether it may go on, `wait` for how many seconds nothing is to be read; `over` is called
    when the source has no more, or has left while its last bytes are not taken.
    """

    def __init__(
        self,
        source: socket.socket,
        target: socket.socket,
        *,
        chunk: int,
        look: Callable[[memoryview], bool],
        wait: Callable[[], float],
        over: Callable[[], None],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._source = source
        self._target = target
        self._chunk = chunk
        self._look = look
        self._wait = wait
        self._over = over
        self._rest = b""
        self._forgets = False
        self._timer: asyncio.TimerHandle | None = None  # while nothing is read

    def begin(self) -> None:
        """Read, or go on reading, unless there is something to wait for first."""
        if self._timer is not None:
            return
        if not self._forgets and (wait := self._wait()):
            self._loop.remove_reader(self._source.fileno())
            self._timer = self._loop.call_later(min(wait, LOOK_EVERY), self._look_again)
        else:
            self._loop.add_reader(self._source.fileno(), self._read)

    def end(self) -> None:
        """Neither read nor write any more."""
        self._loop.remove_reader(self._source.fileno())
        self._loop.remove_writer(self._target.fileno())
        self._rest = b""
        self._stop_timer()

    def forget(self) -> None:
        """Go on reading, and write nothing any more."""
        self._forgets = True
        self.end()
        self.begin()

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look_again(self) -> None:
        """The source is not read from: because the target takes nothing, or for a time."""
        self._timer = None
        if _has_left(self._source):
            self._over()
        elif self._rest:
            self._timer = self._loop.call_later(LOOK_EVERY, self._look_again)
        else:
            self.begin()

    def _read(self) -> None:
        try:
            count = self._source.recv_into(_BUFFER, self._chunk)
        except (BlockingIOError, InterruptedError):
            return
        except OSError:  # reset, which is as good as closed
            count = 0
        if not count:
            self._over()
        elif not self._forgets and self._look(_BUFFER[:count]):
            self._write(_BUFFER[:count])

    def _write(self, data: memoryview) -> None:
        sent = self._send(data)
        if sent < len(data):
            self._rest = bytes(data[sent:])
            self._loop.remove_reader(self._source.fileno())
            self._loop.add_writer(self._target.fileno(), self._write_rest)
            self._stop_timer()
            self._timer = self._loop.call_later(LOOK_EVERY, self._look_again)

    def _write_rest(self) -> None:
        self._rest = self._rest[self._send(self._rest) :]
        if not self._rest:
            self._loop.remove_writer(self._target.fileno())
            self._stop_timer()
            self.begin()

    def _send(self, data: memoryview | bytes) -> int:
        """Bytes that were taken. What goes to who has left is; that will be seen where it is read from."""
        try:
            return self._target.send(data)
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError:
            return len(data)


def _has_left(end: socket.socket) -> bool:
    """Whether the other side has closed it, though there may still be something to read."""
    poll = select.poll()
    poll.register(end, 0)  # a hang-up is told whatever is asked for (poll(2))
    return bool(poll.poll(0))


def _pass(_data: memoryview) -> bool:
    return True


def _at_once() -> float:
    return 0.0
