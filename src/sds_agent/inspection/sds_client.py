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
SHORTEST = 0.1
"""Seconds that a name has which is asked for once the time is over: an agent says within the time that it is given that
a secret is not issued yet. Silence is no answer: it may be busy.
"""
LONGER = 4
"""So many times longer the next call for the same name may take, where an agent answers and was silent."""
LARGEST = 64 << 20
"""Bytes of an answer. A bundle with its revocation lists may be larger than the 4 MiB that gRPC takes by itself."""
LONGEST = 600
_SILENT = "it is not issued yet, or what listens there hangs"


class UnreachableError(Exception):
    """No SDS server answers at the socket; the message says why."""


async def ask(socket: Path, names: Sequence[str], seconds: float) -> tuple[InspectedSecret, ...]:
    """What is served under each name, each by a call of its own. For those that are not issued yet so many seconds are
    waited, for all together: one after the other, thousands would take an hour. Raises UnreachableError.
    """
    limit = (("grpc.max_receive_message_length", LARGEST),)
    async with grpc.aio.insecure_channel(f"unix:{quote(str(socket))}", options=limit) as channel:
        asking = _Asking(channel.unary_unary(FETCH), seconds)
        return tuple(await asyncio.gather(*map(asking.one, names)))


class _Asking:
    """Asks for many names within a time."""

    def __init__(self, fetch: "grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]", seconds: float) -> None:
        self._fetch = fetch
        self._seconds = seconds
        self._now = asyncio.get_running_loop().time
        self._until = self._now() + seconds
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._answers = False  # what listens there, at the last call

    async def one(self, name: str) -> InspectedSecret:
        """What is served under the name. Raises UnreachableError."""
        async with self._slots:
            patience = max(self._until - self._now(), min(SHORTEST, self._seconds))
            while (found := await self._asked(name, patience)) is None:
                if patience * 2 > self._seconds:
                    self._answers = False
                if not self._answers:
                    detail = f"no answer came within {round(patience, 2):g} s: {_SILENT}"
                    return InspectedSecret(name=name, state="WARMING", detail=detail)
                patience = min(patience * LONGER, self._seconds)
            self._answers = True
            return found

    async def _asked(self, name: str, patience: float) -> InspectedSecret | None:
        """The answer; None where there is none in that time."""
        request = wire.DiscoveryRequest(node=wire.Node(id=NODE), resource_names=[name])
        try:
            answer = wire.DiscoveryResponse.FromString(await self._fetch(request.SerializeToString(), timeout=patience))
            secrets = [wire.Secret.FromString(each.value) for each in answer.resources]
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                return None
            return _refused(name, error)
        except DecodeError as error:
            raise UnreachableError("what answers there does not speak SDS") from error
        for secret in secrets:
            if secret.name == name:
                return _found(secret, printable(answer.version_info, LONGEST))
        return InspectedSecret(name=name, state="WARMING", detail="the answer is empty")


def _refused(name: str, error: grpc.aio.AioRpcError) -> InspectedSecret:
    detail = printable(error.details() or error.code().name, LONGEST)
    if error.code() is grpc.StatusCode.NOT_FOUND:
        return InspectedSecret(name=name, state="UNKNOWN", detail=detail)
    if error.code() is grpc.StatusCode.PERMISSION_DENIED:
        return InspectedSecret(name=name, state="DENIED", detail=detail)
    if "not issued yet" in detail:
        return InspectedSecret(name=name, state="WARMING", detail="it is not issued yet, or has ended")
    raise UnreachableError(detail) from error


def _found(secret: wire.Secret, version: str) -> InspectedSecret:
    if secret.HasField("tls_certificate"):
        pem = certificates_only(secret.tls_certificate.certificate_chain.inline_bytes)
        return InspectedSecret(name=secret.name, state="ACTIVE", kind="certificate", pem=pem, version=version)
    pem = certificates_only(secret.validation_context.trusted_ca.inline_bytes)
    return InspectedSecret(name=secret.name, state="ACTIVE", kind="bundle", pem=pem, version=version)
