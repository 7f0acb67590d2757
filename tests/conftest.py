"""Settings for all tests."""

import os

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # gRPC's core writes lines of its own to standard error


import pytest


@pytest.fixture
def anyio_backend() -> str:
    """The server is grpc.aio's, which runs on asyncio alone."""
    return "asyncio"
