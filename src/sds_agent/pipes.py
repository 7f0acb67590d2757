"""Writing to a stream without waiting for its reader, such as a collector of logs that stands still.

Both logs use it: the events' (`log`), whose lines wait in memory then, and the audit log's (`ca.audit`), whose line is
given up after half a second. A plain write to a full pipe returns when the reader goes on, and in the meantime neither
renews a certificate nor sees SIGTERM.
"""

import os
import select


def never_waiting(descriptor: int) -> int:
    """The descriptor, or for a terminal another one that is open on it, where a write takes what there is room for.

    A terminal that is ready takes a byte at least, and makes the writer wait with what does not fit. The descriptor
    itself stays as it is: other programs share it, such as the shell.
    """
    if not os.isatty(descriptor):
        return descriptor
    try:
        flags = os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        return os.open(f"/proc/self/fd/{descriptor}", flags)
    except OSError:  # it is another user's, as behind su
        return descriptor


def write_some(descriptor: int, data: bytes, seconds: float | None = 0) -> int:
    """Write the beginning of `data`, PIPE_BUF bytes at most, once there is room for so many; returns how many.

    Waits at most `seconds` for that, and returns 0 when there is no room then; None waits for ever. Raises OSError.
    """
    if not has_room(descriptor, seconds):
        return 0
    try:
        return os.write(descriptor, data[: select.PIPE_BUF])  # a pipe that is ready takes that many
    except BlockingIOError:  # another program that shares the stream has made it not wait
        return 0


def has_room(descriptor: int, seconds: float | None = 0) -> bool:
    """Whether the stream takes PIPE_BUF bytes, or an error, within these seconds; None waits for ever."""
    room = select.poll()
    room.register(descriptor, select.POLLOUT)
    return bool(room.poll(None if seconds is None else seconds * 1000))
