"""The client's side of an HTTP/2 connection with one gRPC call on it, without I/O (RFC 9113, gRPC over HTTP2).

It costs a fraction of a gRPC library's client, so that thousands fit into one process beside the server that is
measured. What the server's headers say is not decoded: a call that ends is a failure, whatever its status.
"""

import struct
from collections.abc import Mapping
from typing import Final

PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
WINDOW: Final = 1 << 20
"""Bytes that the server may send before it hears that they were read, on the call as on the connection."""
FIRST_WINDOW: Final = (1 << 16) - 1
"""Both windows of either side before it says another size (section 6.9.2)."""
CALL: Final = 1
"""The number of the only stream."""

_DATA, _HEADERS, _RST_STREAM, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_ACK = _END_STREAM = 0x1
_END_HEADERS = 0x4
_PADDED = 0x8
_INITIAL_WINDOW_SIZE, _MAX_FRAME_SIZE = 4, 5
_HEAD = struct.Struct(">HBBBI")
"""The length in two parts, the kind, the flags and the stream (section 4.1)."""
_PREFIX = struct.Struct(">BI")
"""What stands before each gRPC message: whether it is compressed, and its length."""


class CallEndedError(Exception):
    """The server has ended the call or the connection, or broke the protocol. The text says how."""


class Call:
    """A call that has just begun: `outgoing` has what opens the connection.

    Bytes that arrive go into `take`; after that, and after `say`, whatever `outgoing` returns is to be sent.
    """

    __slots__ = ("_call_window", "_frame_size", "_message", "_opening", "_out", "_read", "_unsent", "_window", "_wire")

    def __init__(self, path: str) -> None:
        """`path` is /SERVICE/METHOD."""
        self._out = bytearray(_opening(path))
        self._unsent = bytearray()
        self._window = self._call_window = self._opening = FIRST_WINDOW
        self._frame_size = 1 << 14
        self._wire = b""
        self._message = b""
        self._read = 0

    def say(self, message: bytes) -> None:
        """Send a message of the call, once the server's windows allow it."""
        self._unsent += _PREFIX.pack(0, len(message)) + message

    def outgoing(self) -> bytes:
        """What is to be sent now. It counts as sent."""
        while self._unsent and (room := min(self._window, self._call_window, self._frame_size)) > 0:
            piece = bytes(self._unsent[:room])
            del self._unsent[:room]
            self._window -= len(piece)
            self._call_window -= len(piece)
            self._out += frame(_DATA, 0, CALL, piece)
        out = bytes(self._out)
        self._out.clear()
        return out

    def take(self, data: bytes) -> list[bytes]:
        """Take what has arrived; returns the messages that are complete with it. Raises CallEndedError."""
        wire = self._wire + data if self._wire else data
        at, messages = 0, list[bytes]()
        while len(wire) - at >= _HEAD.size:
            high, low, kind, flags, stream = _HEAD.unpack_from(wire, at)
            end = at + _HEAD.size + (high << 8 | low)
            if len(wire) < end:
                break
            payload = wire[at + _HEAD.size : end]
            at = end
            if kind == _DATA:
                messages += self._data(flags, payload)
            else:
                self._control(kind, flags, stream, payload)
        self._wire = wire[at:]
        return messages

    def _data(self, flags: int, payload: bytes) -> list[bytes]:
        if flags & _END_STREAM:
            raise CallEndedError("the server ended the call")
        self._read += len(payload)
        if self._read >= WINDOW // 2:
            for stream in (0, CALL):
                self._out += frame(_WINDOW_UPDATE, 0, stream, struct.pack(">I", self._read))
            self._read = 0
        self._message += payload[1 : len(payload) - payload[0]] if flags & _PADDED else payload
        messages = list[bytes]()
        while len(self._message) >= _PREFIX.size:
            compressed, length = _PREFIX.unpack_from(self._message)
            if compressed:
                raise CallEndedError("the server sent a compressed message, which was not offered to it")
            end = _PREFIX.size + length
            if len(self._message) < end:
                break
            messages.append(self._message[_PREFIX.size : end])
            self._message = self._message[end:]
        return messages

    def _control(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        if kind == _SETTINGS and not flags & _ACK:
            self._settings(payload)
            self._out += frame(_SETTINGS, _ACK, 0)
        elif kind == _PING and not flags & _ACK:
            self._out += frame(_PING, _ACK, 0, payload)
        elif kind == _WINDOW_UPDATE:
            (more,) = struct.unpack(">I", payload)
            if stream:
                self._call_window += more
            else:
                self._window += more
        elif kind == _HEADERS and flags & _END_STREAM:
            raise CallEndedError("the server ended the call")
        elif kind == _RST_STREAM:
            raise CallEndedError(f"the server reset the call: error {int.from_bytes(payload, 'big')}")
        elif kind == _GOAWAY:
            raise CallEndedError(f"the server ends the connection: error {int.from_bytes(payload[4:8], 'big')}")

    def _settings(self, payload: bytes) -> None:
        for key, value in struct.iter_unpack(">HI", payload):
            if key == _INITIAL_WINDOW_SIZE:  # it changes the windows of calls that are open, too (section 6.9.2)
                self._call_window += value - self._opening
                self._opening = value
            elif key == _MAX_FRAME_SIZE:
                self._frame_size = value


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One frame (section 4.1)."""
    return _HEAD.pack(len(payload) >> 8, len(payload) & 0xFF, kind, flags, stream) + payload


def _opening(path: str) -> bytes:
    settings = struct.pack(">HI", _INITIAL_WINDOW_SIZE, WINDOW)
    fields = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        ":authority": "localhost",
        "te": "trailers",
        "content-type": "application/grpc",
    }
    return b"".join(
        (
            PREFACE,
            frame(_SETTINGS, 0, 0, settings),
            frame(_WINDOW_UPDATE, 0, 0, struct.pack(">I", WINDOW - FIRST_WINDOW)),
            frame(_HEADERS, _END_HEADERS, CALL, _block(fields)),
        )
    )


def _block(fields: Mapping[str, str]) -> bytes:
    """A header block of literals that are not indexed (RFC 7541 section 6.2.2); each is shorter than 127 bytes."""
    return b"".join(
        b"\x00" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()
        for name, value in fields.items()
    )
