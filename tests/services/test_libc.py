"""Functions of the C library: what they return, and what is raised where they fail or are not there."""

import errno
import os
import sys

import pytest

from sds_agent import libc


def test_a_function_is_called_with_its_arguments() -> None:
    assert libc.call("getpid") == os.getpid()
    assert libc.call("strcmp", b"b", b"a") > 0
    assert libc.call("time", None) > 0


def test_a_failure_has_the_functions_errno() -> None:
    with pytest.raises(OSError, match="Bad file descriptor") as raised:
        libc.call("close", -1)
    assert raised.value.errno == errno.EBADF


def test_a_function_that_is_not_there_is_said_not_to_be() -> None:
    with pytest.raises(OSError, match="Function not implemented") as raised:
        libc.call("no_function_of_this_name")
    assert raised.value.errno == errno.ENOSYS


def test_a_python_without_libffi_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "_ctypes", None)
    with pytest.raises(OSError, match="Function not implemented"):
        libc.call("getpid")
