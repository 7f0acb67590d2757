"""Memory that the C library keeps for later, given back to the system.

Envoys come all at once, each with a first request of 61 KB. The C library keeps what gRPC has freed of it, in pieces
between what is still in use, and a node's agent would stay as large as it was at its busiest moment.
"""

from contextlib import suppress

from sds_agent import libc


def give_back() -> None:
    """Give free pages back to the system, where the C library can (malloc_trim(3), glibc). Takes some milliseconds, and
    holds no lock of Python's meanwhile: to be called in a thread.
    """
    with suppress(OSError):
        libc.call("malloc_trim", 0)
