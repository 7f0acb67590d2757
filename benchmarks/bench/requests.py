"""What an Envoy asks for on a stream of secrets, and how it acknowledges: the bytes of both, for both variants."""

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Final

from msgspec import Struct
from sds_agent_proto import sds_pb2 as wire

SERVICE: Final = "envoy.service.secret.v3.SecretDiscoveryService"
REAL: Final = Path(__file__).parents[2] / "tests" / "data" / "envoy-1.40-first-request.bin"
"""The first DiscoveryRequest of an Envoy 1.40: 61,167 bytes, all but a few of them its Node with 516 extensions."""


class Variant(StrEnum):
    """The two variants of the protocol, by the words that are in use for them."""

    SOTW = "sotw"
    DELTA = "delta"


class NodeUse(StrEnum):
    """Where a client gives its whole Node, with the extensions."""

    NOWHERE = "nowhere"
    """Not at all: the first request has a Node without extensions, of 200 bytes."""
    FIRST = "first"
    """On the first request, as an Envoy does with `set_node_on_first_message_only`."""
    EVERY = "every"
    """On each request and ACK, as an Envoy does without that setting."""


class Subscription(Struct, frozen=True):
    """What a stream says. `acknowledge` reads a response and makes the ACK of it; it raises DecodeError."""

    path: str
    """/SERVICE/METHOD."""
    first: bytes
    acknowledge: Callable[[bytes], bytes]


def subscription(variant: Variant, node: NodeUse, *names: str) -> Subscription:
    """What a real Envoy says that subscribes to these names, or to `default` where there are none."""
    request = wire.DiscoveryRequest.FromString(REAL.read_bytes())
    if node is NodeUse.NOWHERE:
        request.node.DiscardUnknownFields()
    if names:
        request.resource_names[:] = names
    if variant is Variant.SOTW:
        first, acked = request, wire.DiscoveryRequest()
        acked.CopyFrom(request)
        if node is not NodeUse.EVERY:
            acked.ClearField("node")
        return Subscription(f"/{SERVICE}/StreamSecrets", first.SerializeToString(), _sotw(acked.SerializeToString()))
    delta = wire.DeltaDiscoveryRequest(
        node=request.node, type_url=request.type_url, resource_names_subscribe=request.resource_names
    )
    reply = wire.DeltaDiscoveryRequest(type_url=request.type_url)
    if node is NodeUse.EVERY:
        reply.node.CopyFrom(request.node)
    return Subscription(f"/{SERVICE}/DeltaSecrets", delta.SerializeToString(), _delta(reply.SerializeToString()))


def _sotw(same: bytes) -> Callable[[bytes], bytes]:
    def acknowledge(response: bytes) -> bytes:
        read = wire.DiscoveryResponse.FromString(response)
        return b"".join((same, _text(1, read.version_info), _text(5, read.nonce)))

    return acknowledge


def _delta(same: bytes) -> Callable[[bytes], bytes]:
    def acknowledge(response: bytes) -> bytes:
        return same + _text(6, wire.DeltaDiscoveryResponse.FromString(response).nonce)

    return acknowledge


def _text(field: int, text: str) -> bytes:
    """A string field of fewer than 128 bytes. Our schema has no versions in requests: the agent does not read them."""
    data = text.encode()
    if len(data) > 127:
        raise ValueError(f"{text[:20]}... has more than 127 bytes")
    return bytes((field << 3 | 2, len(data))) + data
