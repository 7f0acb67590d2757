"""One event loop for all tests of a module that speak gRPC.

gRPC's own thread finishes what a test leaves under way, and hands it to the loop of that test; if that loop is closed
by then, the next test fails.
"""

import inspect
from collections.abc import AsyncIterator

import anyio
import pytest


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """The backend of the whole module."""
    return "asyncio"


@pytest.fixture(scope="module")
async def loop_of_the_module() -> AsyncIterator[None]:
    """As long as this lives, so does the loop."""
    yield
    await anyio.wait_all_tasks_blocked()


@pytest.fixture(autouse=True)
def one_loop(request: pytest.FixtureRequest) -> None:
    """Begins the loop with the first test that needs it: one without a loop may be the first of its module."""
    if inspect.iscoroutinefunction(request.function):
        request.getfixturevalue("loop_of_the_module")
