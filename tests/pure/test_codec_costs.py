"""What it takes to read what an Envoy says first: 61 KB, of which a dozen values matter.

Counted are the values that the schema makes objects of, and the calls around it; benchmarks/codec.py has the time.
"""

import sys
import tracemalloc
from pathlib import Path
from types import FrameType

from google.protobuf.message import Message
from sds_agent_proto import sds_pb2 as wire

from sds_agent.sds.codec import decode

FIRST_REQUEST = (Path(__file__).parents[1] / "data" / "envoy-1.40-first-request.bin").read_bytes()


def values(message: Message) -> int:
    """How many values of a message were read, with those of the messages in it."""
    count = 0
    for field, value in message.ListFields():
        repeated = list(value) if field.is_repeated else [value]
        count += len(repeated) + sum(values(each) for each in repeated if isinstance(each, Message))
    return count


def test_of_the_61_kb_of_a_first_request_only_what_the_agent_uses_is_read() -> None:
    """A schema that knew the Node's 516 extensions would read each of them, at every start of an Envoy, and with every
    ACK of one that repeats its Node.
    """
    assert len(FIRST_REQUEST) > 60_000
    assert values(wire.DiscoveryRequest.FromString(FIRST_REQUEST)) <= 12


def test_a_request_is_read_with_few_calls() -> None:
    calls: list[str] = []

    def count(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            calls.append(frame.f_code.co_name)
        elif event == "c_call":
            calls.append(getattr(argument, "__name__", ""))

    sys.setprofile(count)
    try:
        decode(FIRST_REQUEST)
    finally:
        sys.setprofile(None)
    assert len(calls) <= 10, calls


def test_nothing_of_a_request_is_kept_but_what_was_read() -> None:
    """A stream keeps what was asked for as long as it lives."""
    decode(FIRST_REQUEST)
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        request = decode(FIRST_REQUEST)
        kept = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert request.names == ("default",)
    assert kept < 2_000
