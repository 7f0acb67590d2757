"""Settings for all tests."""

import ctypes
import gc
import logging
import resource
import signal
from collections.abc import Iterator

import pytest
from fakes.ports import reserved_port
from hypothesis import HealthCheck, settings

from sds_agent.rpc import core

core.set_up()  # servers in the tests' own process are to be what the command's are

# the time that an example takes depends on how busy the machine is
settings.register_profile("tests", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("tests")


if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a program that a shell started in the background
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # as under nohup: programs that tests start are not to inherit it
    signal.signal(signal.SIGHUP, lambda *_: None)


LONGEST = {"test_two_envoys.py", "test_walk_beside_envoy.py", "test_istio_ca.py", "test_demo.py"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Those that take longest begin first: else one process runs them in the end, while the others have none left."""
    items.sort(key=lambda item: item.path.name not in LONGEST)


@pytest.fixture
def anyio_backend() -> str:
    """The server is grpc.aio's, which runs on asyncio only."""
    return "asyncio"


@pytest.fixture
def port() -> Iterator[int]:
    """A port of 127.0.0.1 at which nobody listens and that nobody else is given (`fakes.ports`)."""
    with reserved_port() as reserved:
        yield reserved


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """Undo what a test configures, such as a handler on a stream that pytest closes, and what asyncio and gRPC have to
    say of a later test's faults goes where pytest sees it.
    """
    loggers = [logging.getLogger(name) for name in ("sds_agent", "asyncio", "grpc")]
    before = [(list(each.handlers), each.level, each.propagate) for each in loggers]
    yield
    for each, (handlers, level, propagate) in zip(loggers, before, strict=True):
        each.handlers[:], each.propagate = handlers, propagate
        each.setLevel(level)


@pytest.fixture(autouse=True)
def process_as_it_was() -> Iterator[None]:
    """Undo what a command does to its process: it closes the memory to debuggers and to `/proc/self/io`, holds SIGHUP
    back, and has no garbage collected while it starts.
    """
    core, hang_up = resource.getrlimit(resource.RLIMIT_CORE), signal.getsignal(signal.SIGHUP)
    yield
    resource.setrlimit(resource.RLIMIT_CORE, core)
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE
    signal.signal(signal.SIGHUP, hang_up)
    gc.enable()
