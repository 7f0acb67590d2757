"""A stand-in for a server of secrets, as floor.py is, on gRPC's core without grpc.aio: `floor.py SOCKET --core`.

It shows what grpc.aio costs. One thread waits for gRPC's completions and hands them to asyncio, as many at a time as
there are; a call is an object and no task.

It is a prototype, and stands on a module that grpcio keeps private: any release may change it. It lacks the ends of
calls in order, deadlines, statuses, unary calls, a shutdown, and what a task in each call gives: cancellation.
"""

import asyncio
import signal
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from grpc._cython import cygrpc  # type: ignore[attr-defined]  # it has no types

NO_FLAGS = 0
OPTIONS = (("grpc.http2.bdp_probe", 0),)
"""As the agent sets it."""
Done = Callable[[Any], None]
"""What a completion's tag is here: it is called with the completion."""


def _sent(_event: Any) -> None:
    """There is nothing to do."""


class Stream:
    """One call: it answers the first message, reads the others, and looks at none of them."""

    __slots__ = ("_answered", "_call", "_response", "_streams")

    def __init__(self, call: Any, response: bytes, streams: set["Stream"]) -> None:
        self._call = call
        self._response = response
        self._streams = streams
        self._answered = False
        call.start_server_batch((cygrpc.ReceiveCloseOnServerOperation(NO_FLAGS),), _sent)
        self._read()

    def push(self) -> None:
        """Write the response."""
        self._call.start_server_batch((cygrpc.SendMessageOperation(self._response, NO_FLAGS),), _sent)

    def _read(self) -> None:
        self._call.start_server_batch((cygrpc.ReceiveMessageOperation(NO_FLAGS),), self._has_read)

    def _has_read(self, event: Any) -> None:
        if event.batch_operations[0].message() is None:  # the client has left
            self._streams.discard(self)
            return
        if not self._answered:
            self._answered = True
            self._streams.add(self)
            self._call.start_server_batch((cygrpc.SendInitialMetadataOperation(None, NO_FLAGS),), _sent)
            self.push()
        self._read()


class Core:
    """A server of gRPC's core on a Unix socket, and the thread that waits for it."""

    def __init__(self, path: str, responses: tuple[bytes, bytes], options: Sequence[tuple[str, int]]) -> None:
        self._loop = asyncio.get_running_loop()
        self._sotw, self._delta = responses
        self._streams = set[Stream]()
        self._events = deque[Any]()
        self._told = False  # the loop has yet to look at the events
        self._queue = cygrpc.CompletionQueue()
        self._server = cygrpc.Server((*options, *OPTIONS), False)
        self._server.register_completion_queue(self._queue)
        self._server.add_http2_port(f"unix:{path}".encode())
        self._server.start()
        self._next_call()
        threading.Thread(target=self._wait, daemon=True).start()

    def push(self) -> None:
        """Write to every stream."""
        for each in tuple(self._streams):
            each.push()

    def _next_call(self) -> None:
        self._server.request_call(self._queue, self._queue, self._called)

    def _called(self, event: Any) -> None:
        self._next_call()
        delta = event.call_details.method.endswith(b"/DeltaSecrets")
        Stream(event.call, self._delta if delta else self._sotw, self._streams)

    def _wait(self) -> None:
        while True:
            event = self._queue.poll(None)
            if event.tag is _sent:
                continue
            self._events.append(event)
            if not self._told:
                self._told = True
                self._loop.call_soon_threadsafe(self._take)

    def _take(self) -> None:
        self._told = False  # before the events are taken: one that comes meanwhile is told of anew
        while self._events:
            event = self._events.popleft()
            event.tag(event)


async def serve(path: str, responses: tuple[bytes, bytes], options: Sequence[tuple[str, int]]) -> None:
    """Answer until ended. SIGUSR1 has it push."""
    core = Core(path, responses, options)
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, core.push)
    await asyncio.Event().wait()
