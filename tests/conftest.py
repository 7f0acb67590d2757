"""Settings for all tests."""

import ctypes
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
    """Undo what a test configures, such as a handler on a stream that pytest closes."""
    logger = logging.getLogger("sds_agent")
    before = list(logger.handlers), logger.level, logger.propagate
    yield
    logger.handlers[:], logger.level, logger.propagate = before


@pytest.fixture(autouse=True)
def memory_as_it_was() -> Iterator[None]:
    """Undo what a command does to this process: it closes the memory to debuggers and to `/proc/self/io`."""
    before = resource.getrlimit(resource.RLIMIT_CORE)
    yield
    resource.setrlimit(resource.RLIMIT_CORE, before)
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE
