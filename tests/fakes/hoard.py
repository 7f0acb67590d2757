"""A stand-in for a hostile peer in a process of its own: it makes connections, begins a request on each and never ends
it.

    python -m fakes.hoard SOCKET CONNECTIONS BYTES

It says "hoarding" once each connection has sent so many bytes or was closed, and after a line on its standard input how
many were told RESOURCE_EXHAUSTED and how many were closed. It imports nothing of the project, so that it is there at
once, and keeps to HTTP/2's flow control as far as it needs to: what it sends on one connection fits the first window.
"""

import os
import socket
import sys
from contextlib import suppress

from fakes.flood import PREFACE, call, frame

TOLD = b"grpc-status\x018"
"""How gRPC writes RESOURCE_EXHAUSTED as the first status of a connection."""


def begin(path: str, size: int) -> socket.socket:
    """A connection with a request that has begun: a megabyte is announced, and so many bytes come."""
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    data = b"\x00\x00\x0f\xff\xff".ljust(size, b"x")
    frames = b"".join(frame(0, 0, 1, data[at : at + 16_384]) for at in range(0, size, 16_384))
    with suppress(OSError):
        connection.sendall(PREFACE + frame(4, 0, 0, b"") + call(1, reset=False) + frames)
    return connection


def told(connection: socket.socket) -> tuple[bool, bool]:
    """Whether the server has sent that status, and whether it has closed the connection."""
    read, closed = b"", False
    connection.setblocking(False)
    try:
        while more := connection.recv(1 << 16):
            read += more
        closed = True
    except BlockingIOError:
        pass
    except ConnectionResetError:
        closed = True
    return TOLD in read, closed


if __name__ == "__main__":
    connections = [begin(sys.argv[1], int(sys.argv[3])) for _ in range(int(sys.argv[2]))]
    os.write(1, b"hoarding\n")
    sys.stdin.readline()
    answers = [told(each) for each in connections]
    os.write(1, f"{sum(a for a, _ in answers)} {sum(b for _, b in answers)}\n".encode())
