"""Messages, and open descriptors with them, over a Unix stream socket between two processes of ours (unix(7)).

A frame is four bytes with the length of what follows. A descriptor is sent with the first bytes of its frame; what
comes with one ends a read, so descriptors arrive in the order of their frames.

The module is asyncio's: it reads and writes in the event loop's callbacks, and no task waits for either.
"""

import asyncio
import os
import socket
from array import array
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Generic, TypeVar

import msgspec

from sds_agent.ca.workers.messages import ToParent, ToWorker, encode
from sds_agent.errors import SdsAgentError

READ = 256 << 10
"""Bytes of one read."""
CONTROL = socket.CMSG_SPACE(array("i").itemsize)
"""Bytes for the descriptor of one read, which ends with it."""
_LENGTH = 4

M = TypeVar("M")


class _Piece:
    """Bytes that wait to be written, and the descriptor that goes with the first of them."""

    def __init__(self, data: bytes, descriptor: int | None) -> None:
        self.data = bytearray(data)
        self.descriptor = descriptor


class Channel(Generic[M]):
    """One end. `receive` gets each message, with the descriptor that came with it; `lost` is called once, at the end.

    `decode` makes a message of a frame's bytes; where it raises, the channel is lost. A descriptor belongs to
    `receive`; one that did not arrive, for want of a free one, is -1.
    """

    def __init__(
        self,
        connection: socket.socket,
        decode: Callable[[memoryview], M],
        receive: Callable[[M, Callable[[], int]], None],
        lost: Callable[[], None],
    ) -> None:
        self._socket = connection
        self._decode = decode
        self._receive = receive
        self._lost = lost
        self._loop = asyncio.get_running_loop()
        self._incoming = bytearray()
        self._descriptors = deque[int]()
        self._outgoing = deque[_Piece]()
        self._flush_is_due = False
        self._waits = False
        self._closed = False
        connection.setblocking(False)
        self._loop.add_reader(connection, self._read)

    @property
    def pending(self) -> int:
        """Bytes that the other end has not taken yet."""
        return sum(len(piece.data) for piece in self._outgoing)

    def send(self, message: ToWorker | ToParent, descriptor: int | None = None) -> None:
        """Send it as soon as may be, with a copy of the descriptor. Once the channel is lost this does nothing.

        Raises OSError where there is no descriptor left for the copy; nothing is sent then.
        """
        if self._closed:
            return
        data = encode(message)
        frame = len(data).to_bytes(_LENGTH, "big") + data
        if descriptor is None and self._outgoing and self._outgoing[-1].descriptor is None:
            self._outgoing[-1].data += frame
        else:
            self._outgoing.append(_Piece(frame, None if descriptor is None else os.dup(descriptor)))
        if not self._flush_is_due and not self._waits:  # all that one turn of the loop sends goes out at once
            self._flush_is_due = True
            self._loop.call_soon(self._flush)

    def close(self) -> None:
        """Close this end; what was not written yet is dropped."""
        if self._closed:
            return
        self._closed = True
        self._loop.remove_reader(self._socket)
        self._loop.remove_writer(self._socket)
        self._socket.close()
        for piece in self._outgoing:
            if piece.descriptor is not None:
                os.close(piece.descriptor)
        self._outgoing.clear()
        while self._descriptors:
            _close(self._descriptors.popleft())

    def exhaust(self) -> None:
        """Receive what the other end has written: for the last messages of a process that has ended."""
        while not self._closed and self._read():
            pass

    def flush(self) -> None:
        """Write what is left and wait for it: for the last message of a process."""
        if not self._closed:
            self._socket.setblocking(True)
            self._flush()

    def _flush(self) -> None:
        self._flush_is_due = False
        while self._outgoing:
            piece = self._outgoing[0]
            try:
                del piece.data[: self._write(piece)]
            except BlockingIOError:
                if not self._waits:
                    self._waits = True
                    self._loop.add_writer(self._socket, self._flush)
                return
            except OSError:
                self._end()
                return
            if not piece.data:
                self._outgoing.popleft()
        if self._waits:
            self._waits = False
            self._loop.remove_writer(self._socket)

    def _write(self, piece: _Piece) -> int:
        if piece.descriptor is None:
            return self._socket.send(piece.data)
        sent = socket.send_fds(self._socket, [piece.data], [piece.descriptor])
        os.close(piece.descriptor)
        piece.descriptor = None
        return sent

    def _read(self) -> bool:
        """Take what has come; whether there was something."""
        try:
            # `socket.recv_fds` drops the flags that it is given
            data, control, found, _ = self._socket.recvmsg(READ, CONTROL, socket.MSG_CMSG_CLOEXEC)
        except BlockingIOError:
            return False
        except OSError:
            self._end()
            return False
        descriptors = [number for _, _, packed in control for number in array("i", packed)]
        self._descriptors.extend(descriptors or ([-1] if found & socket.MSG_CTRUNC else []))
        if not data:
            self._end()
            return False
        self._incoming += data
        try:
            self._take()
        except (msgspec.MsgspecError, SdsAgentError):
            self._end()
        return True

    def _take(self) -> None:
        begin, have = 0, len(self._incoming)
        whole = memoryview(bytes(self._incoming))
        try:
            while not self._closed and have - begin >= _LENGTH:
                start = begin + _LENGTH
                end = start + int.from_bytes(whole[begin:start], "big")
                if end > have:
                    break
                begin = end
                self._receive(self._decode(whole[start:end]), self._descriptors.popleft)
        finally:
            del self._incoming[:begin]

    def _end(self) -> None:
        if not self._closed:
            self.close()
            self._lost()


def _close(descriptor: int) -> None:
    with suppress(OSError):
        os.close(descriptor)
