"""Functions of the C library that Python has no name for, called through the core of `ctypes`.

All of `ctypes` would take 2 ms of the way to the first secret, and a third of a megabyte for as long as the process
runs.
"""

import errno
import os
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _ctypes import CFuncPtr


def call(name: str, *arguments: int | bytes | None) -> int:
    """What a function returns that returns an int and takes ints and pointers to bytes.

    Raises OSError where that is less than 0, with errno, and where there is no such function.
    """
    try:
        from _ctypes import dlopen, dlsym, get_errno  # noqa: PLC0415 - missing where Python was built without libffi

        address = dlsym(dlopen(None, 0), name)  # type: ignore[arg-type]  # no name is the program itself (dlopen(3))
    except (ImportError, OSError) as error:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from error
    result: int = _kind()(address)(*arguments)
    if result < 0:
        raise OSError(get_errno(), os.strerror(get_errno()))
    return result


@cache
def _kind() -> "type[CFuncPtr]":
    from _ctypes import FUNCFLAG_CDECL, FUNCFLAG_USE_ERRNO, CFuncPtr  # noqa: PLC0415 - as above

    class Function(CFuncPtr):
        """One that returns an int and sets errno."""

        _flags_ = FUNCFLAG_CDECL | FUNCFLAG_USE_ERRNO

    return Function
