"""Asks an SDS socket for secrets, as an Envoy does, and drops the private keys as they come."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from sds_agent_proto import sds_pb2 as wire

from sds_agent.inspection.secrets import InspectedSecret, certificates_only
from sds_agent.text import printable

NODE = "sds-agent-secret"
"""The node id by which the agent's log and its status name this client."""
FETCH = "/envoy.service.secret.v3.SecretDiscoveryService/FetchSecrets"
AT_ONCE = 16
LARGEST = 64 << 20
"""Bytes of an answer. A bundle with its revocation lists may be larger than the 4 MiB that gRPC takes by itself."""
LONGEST = 600


class UnreachableError(Exception):
    """No SDS server answers at the socket; the message says why."""


async def ask(socket: Path, names: Sequence[str], seconds: float) -> tuple[InspectedSecret, ...]:
    """What is served under each name, each by a call of its own, which has so many seconds. Raises UnreachableError."""
    slots = asyncio.Semaphore(AT_ONCE)
    limit = (("grpc.max_receive_message_length", LARGEST),)
    async with grpc.aio.insecure_channel(f"unix:{quote(str(socket))}", options=limit) as channel:

        async def one(name: str) -> InspectedSecret:
            async with slots:
                return await _ask(channel, name, seconds)

        return tuple(await asyncio.gather(*map(one, names)))


async def _ask(channel: grpc.aio.Channel, name: str, seconds: float) -> InspectedSecret:
    fetch: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(FETCH)
    request = wire.DiscoveryRequest(node=wire.Node(id=NODE), resource_names=[name])
    try:
        answer = wire.DiscoveryResponse.FromString(await fetch(request.SerializeToString(), timeout=seconds))
        secrets = [wire.Secret.FromString(each.value) for each in answer.resources]
    except grpc.aio.AioRpcError as error:
        return _refused(name, error, seconds)
    except DecodeError as error:
        raise UnreachableError("what answers there does not speak SDS") from error
    for secret in secrets:
        if secret.name == name:
            return _found(secret, printable(answer.version_info, LONGEST))
    return InspectedSecret(name=name, state="WARMING", detail="the answer is empty")


def _refused(name: str, error: grpc.aio.AioRpcError, seconds: float) -> InspectedSecret:
    detail = printable(error.details() or error.code().name, LONGEST)
    if error.code() is grpc.StatusCode.NOT_FOUND:
        return InspectedSecret(name=name, state="UNKNOWN", detail=detail)
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        detail = f"no answer came within {seconds:g} s: it is not issued yet, or what listens there hangs"
        return InspectedSecret(name=name, state="WARMING", detail=detail)
    if "not issued yet" in detail:
        return InspectedSecret(name=name, state="WARMING", detail="it is not issued yet")
    raise UnreachableError(detail) from error


def _found(secret: wire.Secret, version: str) -> InspectedSecret:
    if secret.HasField("tls_certificate"):
        pem = certificates_only(secret.tls_certificate.certificate_chain.inline_bytes)
        return InspectedSecret(name=secret.name, state="ACTIVE", kind="certificate", pem=pem, version=version)
    pem = certificates_only(secret.validation_context.trusted_ca.inline_bytes)
    return InspectedSecret(name=secret.name, state="ACTIVE", kind="bundle", pem=pem, version=version)
