"""Thousands of clients of an SDS socket in one process: a stream each, a connection each, one epoll loop for all.

The loop runs only inside `join`, `each_has` and `run`; whoever calls these has the times of every response.
"""

import os
import select
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from bench.http2 import Call, CallEndedError
from bench.program import FailedError
from bench.requests import Subscription

PER_PROCESS = 50
"""Connections that one process makes: servers that look after each process at the other end, as ours does, are to see
those of a node, and not one that floods them.
"""
_CHUNK = 1 << 18


class LostError(FailedError):
    """A stream ended, or did not get its responses in time: what was to be measured has failed."""


class Subscriber:
    """One stream. It acknowledges each response at once."""

    __slots__ = ("_call", "_left_over", "_number", "_socket", "_subscription", "received", "sent_bytes")

    def __init__(self, connected: socket.socket, subscription: Subscription, number: int) -> None:
        connected.setblocking(False)
        self._socket = connected
        self._subscription = subscription
        self._number = number
        self._call = Call(subscription.path)
        self._call.say(subscription.first(number))
        self._left_over = b""
        self.received: list[float] = []
        """When each response was complete, in seconds of `time.perf_counter`."""
        self.sent_bytes = 0

    def fileno(self) -> int:
        """The descriptor of its connection."""
        return self._socket.fileno()

    def receive(self) -> int:
        """Take what has arrived; returns how many responses are complete with it. Raises CallEndedError."""
        try:
            data = self._socket.recv(_CHUNK)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise CallEndedError(f"the connection was lost: {error.strerror}") from error
        if not data:
            raise CallEndedError("the server closed the connection")
        responses = self._call.take(data)
        if responses:
            self.received += [time.perf_counter()] * len(responses)
            for each in responses:
                self._call.say(self._subscription.acknowledge(each, self._number))
        return len(responses)

    def send(self) -> None:
        """Send what may be sent. Raises CallEndedError."""
        data = self._left_over + self._call.outgoing()
        try:
            sent = self._socket.send(data) if data else 0
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise CallEndedError(f"the connection was lost: {error.strerror}") from error
        self.sent_bytes += sent
        self._left_over = data[sent:]

    @property
    def blocked(self) -> bool:
        """Whether the connection took less than it was to send."""
        return bool(self._left_over)

    def close(self) -> None:
        """Close the connection."""
        self._socket.close()


class Subscribers:
    """The streams, in the order in which they joined."""

    def __init__(self, path: Path, subscription: Subscription, *, per_process: int | None = PER_PROCESS) -> None:
        """Streams of the server at the path. Each `per_process` connections are those of one process, which has ended;
        with None this process makes them, which a program with several threads has to ask for.
        """
        self._path = str(path)
        self._subscription = subscription
        self._per_process = per_process
        self._epoll = select.epoll()
        self._streams: dict[int, Subscriber] = {}
        self._have = Counter[int]()  # how many streams have had so many responses, or more

    def __len__(self) -> int:
        return len(self._streams)

    def __iter__(self) -> Iterator[Subscriber]:
        return iter(tuple(self._streams.values()))

    def join(self, count: int) -> None:
        """Have so many streams more: connect them, and begin to ask. Raises LostError."""
        for begin in range(0, count, self._per_process or count):
            for each in self._connected(min(count - begin, self._per_process or count)):
                self._streams[each.fileno()] = each
                self._epoll.register(each, select.EPOLLIN)
                self._send(each)
            self._turn(0)

    def leave(self, count: int | None = None) -> None:
        """Close so many, the oldest first; all without a number."""
        for each in tuple(self)[:count]:
            self._epoll.unregister(each)
            del self._streams[each.fileno()]
            self._have.subtract(range(1, len(each.received) + 1))
            each.close()

    def start_over(self) -> None:
        """Forget the responses that there were: the next one of each stream is its first."""
        self._have.clear()
        for each in self:
            each.received.clear()

    def each_has(self, responses: int, within: float) -> list[float]:
        """Wait until each stream has had so many responses; returns when each got that one, in seconds of
        `time.perf_counter`. Raises LostError if that takes more than `within` seconds.
        """
        if not self._run(lambda: self._have[responses] >= len(self), within):
            missing = sum(1 for each in self if len(each.received) < responses)
            raise LostError(f"{missing} of {len(self)} streams have no response {responses} after {within:g} s")
        return [each.received[responses - 1] for each in self]

    def any_has(self, responses: int, within: float) -> bool:
        """Wait until some stream has had so many responses; whether one has after that time. Raises LostError."""
        return self._run(lambda: self._have[responses] > 0, within)

    def run(self, seconds: float) -> None:
        """Answer whatever arrives in that time. Raises LostError."""
        self._run(lambda: False, seconds)

    def close(self) -> None:
        """Close all streams; there will be no others."""
        self.leave()
        self._epoll.close()

    def _run(self, done: Callable[[], bool], seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while not done():
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            self._turn(left)
        return True

    def _turn(self, seconds: float) -> None:
        for descriptor, _ in self._epoll.poll(seconds):
            each = self._streams[descriptor]
            try:
                before = len(each.received)
                more = each.receive()
            except CallEndedError as error:
                raise LostError(f"a stream was lost: {error}") from error
            for number in range(before + 1, before + more + 1):
                self._have[number] += 1
            self._send(each)

    def _send(self, stream: Subscriber) -> None:
        was_blocked = stream.blocked
        try:
            stream.send()
        except CallEndedError as error:
            raise LostError(f"a stream was lost: {error}") from error
        if stream.blocked != was_blocked:
            self._epoll.modify(stream, select.EPOLLIN | (select.EPOLLOUT if stream.blocked else 0))

    def _connected(self, count: int) -> Sequence[Subscriber]:
        """So many new connections. One that a child makes stays, in the name of the child, when that has ended."""
        made = [socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) for _ in range(count)]
        try:
            if self._per_process is None:
                _connect(made, self._path)
            else:
                _in_a_child(partial(_connect, made, self._path))
        except OSError as error:
            for each in made:
                each.close()
            raise LostError(f"{self._path} takes no connection: {error.strerror}") from error
        return [Subscriber(each, self._subscription, number) for number, each in enumerate(made, len(self) + 1)]


@contextmanager
def subscribed(
    path: Path, subscription: Subscription, *, per_process: int | None = PER_PROCESS
) -> Iterator[Subscribers]:
    """No streams yet; those that join are closed when the context is left."""
    streams = Subscribers(path, subscription, per_process=per_process)
    try:
        yield streams
    finally:
        streams.close()


def _connect(sockets: Iterable[socket.socket], path: str) -> None:
    for each in sockets:
        each.connect(path)


def _in_a_child(act: Callable[[], None]) -> None:
    """Call it in a child of this process, which ends with it. Raises its OSError."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            act()
            code = 0
        except OSError as error:
            code = error.errno or 1
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if code := os.waitstatus_to_exitcode(status):
        raise OSError(code, os.strerror(code) if code > 0 else "the child was ended")
