"""grpc.health.v1 on the SDS socket: whether the agent is ready, for `sds-agent ready` and every other prober.

Source: gRPC's health checking protocol. `Check` alone is served: probers poll, and what changes is in the log.
"""

from collections.abc import Callable

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from sds_agent_proto.health_pb2 import HealthCheckRequest, HealthCheckResponse

from sds_agent.errors import SdsAgentError

SERVICE = "grpc.health.v1.Health"


def handler(ready: Callable[[], bool], services: frozenset[str]) -> grpc.GenericRpcHandler:
    """Answer for the server as a whole (the empty name) and for `services`: SERVING while `ready` says so."""

    async def check(data: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        try:
            request = HealthCheckRequest.FromString(data)
        except DecodeError:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the message is not a HealthCheckRequest")
        if request.service and request.service not in services:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no service of that name is here")
        status = HealthCheckResponse.SERVING if ready() else HealthCheckResponse.NOT_SERVING
        return HealthCheckResponse(status=status).SerializeToString()

    return grpc.method_handlers_generic_handler(SERVICE, {"Check": grpc.unary_unary_rpc_method_handler(check)})


class NoAnswerError(SdsAgentError):
    """No agent answers at the socket."""


async def check(address: str, patience: float) -> bool:
    """Whether the server at a gRPC address is ready. Raises NoAnswerError if it does not say in `patience` seconds."""
    async with grpc.aio.insecure_channel(address) as channel:
        ask: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"/{SERVICE}/Check")
        try:
            data = await ask(HealthCheckRequest().SerializeToString(), timeout=patience)
        except grpc.aio.AioRpcError as error:
            raise NoAnswerError(f"no agent answers ({error.code().name.lower()}); is it running?") from error
    return HealthCheckResponse.FromString(data).status == HealthCheckResponse.SERVING
