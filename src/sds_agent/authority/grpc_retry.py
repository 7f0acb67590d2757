"""The delay that a gRPC server asks for in the metadata of a refusal. No I/O."""

import re
from collections.abc import Iterable

from google.protobuf.message import DecodeError
from sds_agent_proto.rpc_pb2 import RetryInfo, Status

_DETAILS = "grpc-status-details-bin"
_RETRY_INFO = "/google.rpc.RetryInfo"
_RETRY_AFTER = "retry-after"
_SECONDS = re.compile(r"[0-9]{1,9}")
_LONGEST_DURATION = 315_576_000_000
"""Seconds; google.protobuf.Duration allows no more."""
_LARGEST_DETAILS = 16 << 10


def retry_after(metadata: Iterable[tuple[str, str | bytes]]) -> float | None:
    """The delay in seconds; None where the metadata names none, or none that this understands.

    Two forms are read, and the first that is there decides: google.rpc.RetryInfo (google/rpc/error_details.proto), as
    gRPC's libraries send it, and Retry-After in seconds (RFC 9110 section 10.2.3), as HTTP proxies send it. A date in
    Retry-After is not read.
    """
    pairs = list(metadata)
    found = [_of_details(value) for key, value in pairs if key == _DETAILS and isinstance(value, bytes)]
    found += [_of_header(value) for key, value in pairs if key == _RETRY_AFTER and isinstance(value, str)]
    return next((seconds for seconds in found if seconds is not None and seconds > 0), None)


def _of_details(data: bytes) -> float | None:
    if len(data) > _LARGEST_DETAILS:
        return None
    try:
        for detail in Status.FromString(data).details:
            if detail.type_url.endswith(_RETRY_INFO):
                delay = RetryInfo.FromString(detail.value).retry_delay
                return delay.seconds + delay.nanos / 1e9 if delay.seconds <= _LONGEST_DURATION else None
    except DecodeError:
        return None
    return None


def _of_header(value: str) -> float | None:
    return float(value) if _SECONDS.fullmatch(value) else None
