"""A call that has just come when its server stops is no fault of the agent's, and the log must not call it one."""

import asyncio
import logging
from pathlib import Path
from typing import Any

import anyio
import grpc
import grpc.aio
import pytest
from fakes.events import recorded

from sds_agent.rpc.health import Health
from sds_agent.sds.service import SERVICE, SecretDiscoveryService
from sds_agent.secrets.store import SecretStore

METHODS = (
    f"/{SERVICE}/StreamSecrets",
    f"/{SERVICE}/DeltaSecrets",
    f"/{SERVICE}/FetchSecrets",
    "/grpc.health.v1.Health/Check",
    "/grpc.health.v1.Health/Watch",
)


class Late(grpc.GenericRpcHandler):
    """Lets the handlers of a service look at a call once `stopped` is set, as on a machine that has much to do."""

    def __init__(self, handlers: grpc.GenericRpcHandler) -> None:
        self.come, self.stopped, self.over = asyncio.Event(), asyncio.Event(), asyncio.Event()
        self._handlers = handlers

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> "grpc.RpcMethodHandler[Any, Any] | None":
        handler: Any = self._handlers.service(handler_call_details)
        if handler is None:
            return None

        async def late(requests: object, context: grpc.aio.ServicerContext[bytes, bytes]) -> None:
            self.come.set()
            while not self.stopped.is_set():
                try:
                    await self.stopped.wait()
                except asyncio.CancelledError:  # gRPC ends the calls of a server that stops
                    continue
            try:
                await handler.stream_stream(requests, context)
            finally:
                self.over.set()

        return grpc.stream_stream_rpc_method_handler(late)


@pytest.mark.parametrize("method", METHODS)
async def test_call_that_is_looked_at_when_its_server_has_stopped_is_no_fault(
    method: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sds = SecretDiscoveryService(SecretStore())
    health = Health(lambda: True, frozenset(), hang_up=sds.hang_up, holder=sds.holder)
    late = [Late(sds.handler()), Late(health.handler())]
    this = late["health" in method]
    server = grpc.aio.server(handlers=late)
    server.add_insecure_port(f"unix:{tmp_path / 'sds.sock'}")
    await server.start()
    with recorded() as events, anyio.fail_after(10):
        async with grpc.aio.insecure_channel(f"unix:{tmp_path / 'sds.sock'}") as channel:
            call: grpc.aio.StreamStreamCall[bytes, bytes] = channel.stream_stream(method)()
            await call.write(b"")
            await this.come.wait()
            await server.stop(None)
            this.stopped.set()
            await this.over.wait()
            await call.code()  # nothing of gRPC's is to outlive the event loop
    assert events.named("fault") == []
    assert [each.getMessage() for each in caplog.records if each.levelno >= logging.ERROR] == []
