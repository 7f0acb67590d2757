"""A port that a test names before anything listens there, or while nothing does."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def reserved_port() -> Iterator[int]:
    """A port of 127.0.0.1 that the kernel gives to nobody else inside this context, also where it is closed meanwhile.

    Who is told of it can listen there with SO_REUSEADDR, as our servers and asyncio's do, or with SO_REUSEPORT, as
    gRPC's and Envoy's do; until then connections to it are refused. A port that was only found free may at any time
    become the near end of a connection that a test beside makes.
    """
    with socket.socket() as reservation:
        for option in (socket.SO_REUSEADDR, socket.SO_REUSEPORT):
            reservation.setsockopt(socket.SOL_SOCKET, option, 1)
        reservation.bind(("127.0.0.1", 0))
        yield reservation.getsockname()[1]
