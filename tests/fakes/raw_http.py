"""A stand-in for an HTTP server that is broken or means harm: it answers each request with the bytes of a test."""

import socket
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from threading import Event, Thread

PAUSE = 0.005
"""Seconds between two pieces of an answer that drips."""


class RawServer:
    """Where it listens, and how many bytes it has sent."""

    def __init__(self, listener: socket.socket, answer: Callable[[], Iterable[bytes]], *, drips: bool) -> None:
        self.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.sent = 0
        self._listener = listener
        self._answer = answer
        self._drips = drips
        self._ends = Event()

    def run(self) -> None:
        """Answer one connection after another."""
        while not self._ends.is_set():
            with suppress(OSError):  # the client has left, as it should
                connection, _ = self._listener.accept()
                with closing(connection):
                    self._serve(connection)

    def _serve(self, connection: socket.socket) -> None:
        received = b""
        while b"\r\n\r\n" not in received:
            received += (data := connection.recv(65536))
            if not data:
                return
        for piece in self._answer():
            if self._ends.is_set():
                return
            connection.sendall(piece)
            self.sent += len(piece)
            if self._drips:
                self._ends.wait(PAUSE)

    def end(self) -> None:
        """Return from `run`."""
        self._ends.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)


@contextmanager
def raw_server(answer: Callable[[], Iterable[bytes]], *, drips: bool = False) -> Iterator[RawServer]:
    """Answer each connection's first request with these pieces, until the client leaves; then close the connection.

    The pieces may never end. With `drips` there is a pause after each.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = RawServer(listener, answer, drips=drips)
        thread = Thread(target=server.run)
        thread.start()
        try:
            yield server
        finally:
            server.end()
            thread.join()


def ok(body: bytes, *headers: str) -> Callable[[], Iterable[bytes]]:
    """An answer 200 with that body."""
    head = "".join(f"{each}\r\n" for each in ("HTTP/1.1 200 OK", *headers, f"content-length: {len(body)}", ""))
    return lambda: [head.encode() + body]
