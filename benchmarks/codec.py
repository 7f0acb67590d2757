"""What it costs to read a request and to write a response.

    python benchmarks/codec.py [--rounds 15] [--calls 2000]

The requests are the first one of a real Envoy 1.40, 61 KB of it its Node, and its ACKs with and without the Node. The
response is made of a secret that was encoded once for all streams, and of the stream's nonce. The floor is protobuf
alone: it parses the request into our schema and nothing is read of it; it serializes a response that is built whole for
the stream; and it serializes the secret for SotW, where ours does so for both variants. Each value is the mean of so
many calls, in microseconds of the processor; they take turns, round by round. The budget for the first request is 10.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import TypeVar

from bench import program
from bench.figures import FLOOR, Figure, Row
from bench.requests import NodeUse, Variant, subscription
from bench.servers import AGENT
from google.protobuf.message import Message
from sds_agent_proto import sds_pb2 as wire

from sds_agent.pki.keys import KeyType, generate, to_pkcs8_pem
from sds_agent.sds import codec
from sds_agent.sds.protocol import SECRET_TYPE, Resource, Respond
from sds_agent.secrets.model import CertificateSecret

Work = Callable[[], object]
Response = TypeVar("Response", wire.DiscoveryResponse, wire.DeltaDiscoveryResponse)
NONCE = "5f3a9c01.1f4.2"


def sotw(resource: Resource, nonce: str = NONCE) -> wire.DiscoveryResponse:
    """The response with this resource, built whole."""
    value = wire.DiscoveryResponse.FromString(resource.sotw).resources[0].value
    found = [wire.Any(type_url=SECRET_TYPE, value=value)]
    return wire.DiscoveryResponse(version_info=resource.version, resources=found, type_url=SECRET_TYPE, nonce=nonce)


def delta(resource: Resource, nonce: str = NONCE) -> wire.DeltaDiscoveryResponse:
    """Likewise."""
    found = wire.DeltaDiscoveryResponse.FromString(resource.delta).resources
    return wire.DeltaDiscoveryResponse(resources=found, type_url=SECRET_TYPE, nonce=nonce)


def cases() -> Iterator[tuple[str, Variant, Work, Work]]:
    """What is done, by the agent and by protobuf alone."""
    key = to_pkcs8_pem(generate(KeyType.EC_P256))
    secret = CertificateSecret(key * 4, key, datetime(2036, 1, 1, tzinfo=UTC))  # as many bytes as a leaf and its issuer
    resource = codec.encode_secret("default", secret)
    response = Respond(NONCE, (resource,))
    yield from _cases(Variant.SOTW, codec.decode, wire.DiscoveryRequest, sotw(resource))
    yield "respond", Variant.SOTW, lambda: codec.encode(response), _serialized(sotw(resource))
    yield from _cases(Variant.DELTA, codec.decode_delta, wire.DeltaDiscoveryRequest, delta(resource))
    yield "respond", Variant.DELTA, lambda: codec.encode_delta(response), _serialized(delta(resource))
    yield "encode a secret, once", Variant.SOTW, lambda: codec.encode_secret("default", secret), _encoded(resource)


def _cases(
    variant: Variant, decode: Callable[[bytes], object], message: type[Message], response: Message
) -> Iterator[tuple[str, Variant, Work, Work]]:
    told = response.SerializeToString()
    lean, full = subscription(variant, NodeUse.FIRST), subscription(variant, NodeUse.EVERY)
    asked = {
        "read the first request": full.first(1),
        "read an ACK": lean.acknowledge(told, 1),
        "read an ACK with the Node": full.acknowledge(told, 1),
    }
    for name, data in asked.items():
        yield name, variant, lambda data=data: decode(data), lambda data=data: message.FromString(data)  # type: ignore[misc]


def _serialized(response: Response) -> Work:
    def work() -> object:
        built = type(response)()
        built.CopyFrom(response)
        built.nonce = NONCE
        return built.SerializeToString()

    return work


def _encoded(resource: Resource) -> Work:
    read = wire.DiscoveryResponse.FromString(resource.sotw).resources[0]
    secret = wire.Secret.FromString(read.value)

    def work() -> object:
        value = wire.Any(type_url=SECRET_TYPE, value=secret.SerializeToString())
        return wire.DiscoveryResponse(resources=[value]).SerializeToString()

    return work


def microseconds(work: Work, calls: int) -> float:
    """The mean of so many calls."""
    began = time.thread_time_ns()
    for _ in range(calls):
        work()
    return (time.thread_time_ns() - began) / calls / 1000


def measure(arguments: argparse.Namespace) -> Iterator[Row]:
    """A row for each of them and each case."""
    for name, variant, ours, alone in cases():
        taken: tuple[list[float], list[float]] = ([], [])
        for _ in range(arguments.rounds):
            for work, values in zip((alone, ours), taken, strict=True):
                values.append(microseconds(work, arguments.calls))
        case: dict[str, str | int] = {"step": name, "variant": variant}
        for server, values in zip((FLOOR, AGENT), taken, strict=True):
            yield Row(server, case, (Figure("processor", "us", tuple(values)),))


def main() -> None:
    """Measure and print."""
    parser = program.parser(__doc__)
    parser.add_argument("--rounds", type=int, help="by default 15")
    parser.add_argument("--calls", type=int, help="in each round; by default 2000")
    arguments = parser.parse_args()
    arguments.rounds = arguments.rounds or (3 if arguments.small else 15)
    arguments.calls = arguments.calls or (100 if arguments.small else 2000)
    program.main(__doc__, arguments, lambda: measure(arguments))


if __name__ == "__main__":
    main()
