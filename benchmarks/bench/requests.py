"""What an Envoy asks for on a stream of secrets, and how it acknowledges: the bytes of both, for both variants."""

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
    """What the streams of some Envoys say, each with a node id of its own, n1, n2 and so on."""

    variant: Variant
    request: bytes
    reply: bytes
    """An ACK, without what is only in the response."""
    node: NodeUse

    @property
    def path(self) -> str:
        """The path of the call, /SERVICE/METHOD."""
        return f"/{SERVICE}/{'StreamSecrets' if self.variant is Variant.SOTW else 'DeltaSecrets'}"

    def first(self, number: int) -> bytes:
        """The first request of that stream."""
        return self.request + self._id(number)

    def acknowledge(self, response: bytes, number: int) -> bytes:
        """That stream's ACK of the response. Raises DecodeError where it is none."""
        same = self.reply + self._id(number) if self.node is NodeUse.EVERY else self.reply
        if self.variant is Variant.DELTA:
            return same + field(6, wire.DeltaDiscoveryResponse.FromString(response).nonce.encode())
        read = wire.DiscoveryResponse.FromString(response)
        return b"".join((same, field(1, read.version_info.encode()), field(5, read.nonce.encode())))

    def _id(self, number: int) -> bytes:
        """A Node with this alone: protobuf merges a message field that comes twice, and what comes last counts."""
        return field(2 if self.variant is Variant.SOTW else 1, field(1, f"n{number}".encode()))


def subscription(variant: Variant, node: NodeUse, *names: str) -> Subscription:
    """What real Envoys say that subscribe to these names, or to `default` where there are none."""
    request = wire.DiscoveryRequest.FromString(REAL.read_bytes())
    if node is NodeUse.NOWHERE:
        request.node.DiscardUnknownFields()
    if names:
        request.resource_names[:] = names
    if variant is Variant.SOTW:
        reply = wire.DiscoveryRequest.FromString(request.SerializeToString())
        if node is not NodeUse.EVERY:
            reply.ClearField("node")
        return Subscription(variant, request.SerializeToString(), reply.SerializeToString(), node)
    delta = wire.DeltaDiscoveryRequest(
        node=request.node, type_url=request.type_url, resource_names_subscribe=request.resource_names
    )
    settled = wire.DeltaDiscoveryRequest(type_url=request.type_url)
    if node is NodeUse.EVERY:
        settled.node.CopyFrom(request.node)
    return Subscription(variant, delta.SerializeToString(), settled.SerializeToString(), node)


def field(number: int, data: bytes) -> bytes:
    """A field of fewer than 128 bytes. Our schema has no versions in requests: the agent does not read them."""
    if len(data) > 127:
        raise ValueError(f"{data[:20]!r}... has more than 127 bytes")
    return bytes((number << 3 | 2, len(data))) + data
