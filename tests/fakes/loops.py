"""One event loop for all tests of a module that speak gRPC.

What gRPC has under way when a test ends is finished by its own thread, and handed to the loop that the test had; a loop
that is closed by then makes the next test fail.
"""

from collections.abc import AsyncIterator

import anyio
import pytest


@pytest.fixture(scope="module")
def anyio_backend() -> str:
    """The backend of the whole module."""
    return "asyncio"


@pytest.fixture(scope="module", autouse=True)
async def one_loop() -> AsyncIterator[None]:
    """As long as this lives, so does the loop."""
    yield
    await anyio.wait_all_tasks_blocked()
