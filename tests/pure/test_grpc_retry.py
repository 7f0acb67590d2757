"""How long a CA asks not to be asked again: in the bytes that gRPC's libraries and HTTP's proxies send."""

import pytest
from google.protobuf.any_pb2 import Any
from google.protobuf.duration_pb2 import Duration
from hypothesis import given
from hypothesis import strategies as st
from sds_agent_proto.rpc_pb2 import RetryInfo, Status

from sds_agent.authority.grpc_retry import retry_after

DETAILS = "grpc-status-details-bin"


def details(delay: Duration, kind: str = "type.googleapis.com/google.rpc.RetryInfo") -> bytes:
    other = Any(type_url="type.googleapis.com/google.rpc.ErrorInfo", value=b"\x0a\x01x")
    return Status(
        details=[other, Any(type_url=kind, value=RetryInfo(retry_delay=delay).SerializeToString())]
    ).SerializeToString()


@pytest.mark.parametrize(
    ("metadata", "seconds"),
    [
        ([], None),
        ([(DETAILS, details(Duration(seconds=7, nanos=500_000_000)))], 7.5),
        ([(DETAILS, details(Duration(nanos=1_000_000)))], 0.001),
        ([("retry-after", "120")], 120),
        ([("retry-after", "120"), (DETAILS, details(Duration(seconds=7)))], 7),
        ([(DETAILS, details(Duration())), ("retry-after", "120")], 120),
        ([(DETAILS, details(Duration(seconds=-7)))], None),
        ([(DETAILS, details(Duration(seconds=2**62)))], None),
        ([(DETAILS, details(Duration(seconds=7), "type.googleapis.com/google.rpc.Help"))], None),
        ([(DETAILS, details(Duration(seconds=7)) + bytes(20_000))], None),
        ([(DETAILS, b"\x1a\xff")], None),
        ([(DETAILS, "text")], None),
        ([("retry-after", b"120")], None),
        ([("retry-after", "0")], None),
        ([("retry-after", "-1")], None),
        ([("retry-after", "nan")], None),
        ([("retry-after", "1e9")], None),
        ([("retry-after", "9" * 30)], None),
        ([("retry-after", "\u0663")], None),
        ([("retry-after", "Fri, 31 Dec 1999 23:59:59 GMT")], None),
    ],
)
def test_the_time_that_is_asked_for(metadata: list[tuple[str, str | bytes]], seconds: float | None) -> None:
    assert retry_after(metadata) == seconds


@given(st.lists(st.tuples(st.sampled_from([DETAILS, "retry-after"]), st.binary() | st.text())))
def test_whatever_a_server_sends_is_a_bounded_time_or_none(metadata: list[tuple[str, str | bytes]]) -> None:
    seconds = retry_after(metadata)
    assert seconds is None or 0 < seconds < 10**12
