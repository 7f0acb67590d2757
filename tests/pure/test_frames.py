"""What a client sends over HTTP/2, judged before gRPC takes it apart; h2 and hpack say what is good."""

from collections.abc import Iterator

import pytest
from fakes.raw_http2 import CONTINUATION, DATA, END_HEADERS, HEADERS, PADDED, PREFACE, PRIORITY, SETTINGS, frame
from h2.config import H2Configuration
from h2.connection import H2Connection
from hpack import Decoder, Encoder
from hypothesis import given
from hypothesis import strategies as st

from sds_agent.rpc.frames import LONGEST_CONTROL, Bounds, Inspection

BOUNDS = Bounds(block=20_000, fields=20, frames=30, frames_per_call=10)
BEGIN = PREFACE + frame(SETTINGS, 0, 0)
FIELD = b"\x90"
PING, PUSH_PROMISE = 6, 5


def pieces(data: bytes, cuts: list[int]) -> Iterator[bytes]:
    """The data, cut at these places."""
    ends = sorted({min(cut, len(data)) for cut in cuts} | {len(data)})
    for begin, end in zip([0, *ends], ends, strict=False):
        yield data[begin:end]


def judged(data: bytes, cuts: list[int] | None = None, bounds: Bounds = BOUNDS) -> str | None:
    inspection = Inspection(bounds)
    found = [inspection.take(piece) for piece in pieces(data, cuts or [])]
    return found[-1]


def calls(count: int, headers: list[tuple[str, str]], body: bytes = b"x" * 100) -> bytes:
    """What a real client sends that makes so many calls."""
    client = H2Connection(H2Configuration(client_side=True, header_encoding="utf-8"))
    client.initiate_connection()
    usual = [(":method", "POST"), (":scheme", "https"), (":path", "/a/b"), (":authority", "ca")]
    for _ in range(count):
        stream = client.get_next_available_stream_id()
        client.send_headers(stream, usual + headers)
        client.send_data(stream, body, end_stream=True)
    return client.data_to_send()


names = st.text("abcdefghijklmnopqrstuvwxyz-", min_size=1, max_size=200)
of_callers = names.map(
    lambda name: f"x-{name}"
)  # h2 refuses to send some of HTTP's own, such as a host beside :authority
values = st.text(st.characters(min_codepoint=32, max_codepoint=126), max_size=3000).map(str.strip)
cuts = st.lists(st.integers(0, 70_000), max_size=40)


@given(st.lists(st.tuples(of_callers, values), max_size=5), cuts, st.integers(1, 5))
def test_the_calls_of_a_grpc_client_are_passed_on(headers: list[tuple[str, str]], at: list[int], count: int) -> None:
    inspection = Inspection(BOUNDS)
    for piece in pieces(calls(count, headers), at):
        assert inspection.take(piece) is None
    assert inspection.calls == count


@given(st.lists(st.tuples(names, values), min_size=1, max_size=30), st.booleans(), cuts)
def test_fields_are_counted_as_their_decoder_counts_them(
    headers: list[tuple[str, str]], huffman: bool, at: list[int]
) -> None:
    encoder = Encoder()
    block = encoder.encode(headers, huffman) + encoder.encode(headers[:3], huffman)  # which the table holds by now
    count = len(list(Decoder(1 << 30).decode(block)))
    data = BEGIN + frame(HEADERS, END_HEADERS, 1, block)
    assert judged(data, at, Bounds(1 << 20, fields=count)) is None
    assert judged(data, at, Bounds(1 << 20, fields=count - 1)) == "a header block has too many fields"


kinds = st.sampled_from([DATA, HEADERS, PRIORITY, SETTINGS, PING, CONTINUATION, PUSH_PROMISE, 99])
flags = st.sampled_from([0, END_HEADERS, END_HEADERS | 0x20, END_HEADERS | PADDED])
parts = st.sampled_from([FIELD, b"\x00\x01a\x01b", b"\x40\x01", b"\x7f", b"\xff", b"\x20", b"\x00" * 5])
payloads = st.lists(parts, max_size=30).map(b"".join) | st.binary(max_size=300)
frames = st.builds(frame, kinds, flags, st.sampled_from([1, 3]), payloads)


@given(st.lists(frames | st.binary(max_size=20), max_size=20), st.lists(st.integers(0, 2000), max_size=30))
def test_how_the_bytes_are_cut_changes_nothing(sent: list[bytes], at: list[int]) -> None:
    data = BEGIN + b"".join(sent)
    assert judged(data, at) == judged(data)


@given(st.lists(frames, max_size=5), st.binary(min_size=1, max_size=50))
def test_an_ended_connection_stays_ended(sent: list[bytes], more: bytes) -> None:
    inspection = Inspection(BOUNDS)
    found = inspection.take(b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"".join(sent))
    assert found == inspection.take(more) == "it does not begin as HTTP/2 does"


def block(*fragments: bytes, first: int = 0) -> bytes:
    """A header block in frames."""
    kinds = [HEADERS, *[CONTINUATION] * (len(fragments) - 1)]
    ends = [first, *[0] * (len(fragments) - 1)]
    ends[-1] |= END_HEADERS
    return BEGIN + b"".join(frame(kind, end, 1, each) for kind, end, each in zip(kinds, ends, fragments, strict=True))


LARGEST_BLOCK = block(Encoder().encode([("a", "x" * (20_000 - 9 - 7))], huffman=False))
"""A frame's head and the rest of the field take what is left out."""


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (BEGIN + frame(HEADERS, 0, 1, FIELD * 21), "too many fields"),
        (block(FIELD * 15, FIELD * 6), "too many fields"),
        (block(b"\x00\x7f\x80", b"\x80\x80\x80\x80"), "too large"),
        (BEGIN + frame(HEADERS, END_HEADERS, 1, bytes(20_000 - 9 + 1)), "more than 20000 bytes"),
        (BEGIN + frame(HEADERS, 0, 1) + frame(CONTINUATION, 0, 1) * 2300, "frames"),
        (BEGIN + frame(HEADERS, 0, 1) + frame(CONTINUATION, 0, 3), "in the middle"),
        (BEGIN + frame(HEADERS, 0, 1) + frame(PING, 0, 0, bytes(8)), "in the middle"),
        (BEGIN + frame(HEADERS, END_HEADERS | PADDED, 1, b"\x05\x90"), "padding"),
        (BEGIN + frame(CONTINUATION, END_HEADERS, 1), "outside"),
        (BEGIN + frame(PUSH_PROMISE, END_HEADERS, 1), "push"),
        (BEGIN + frame(PING, 0, 0, bytes(LONGEST_CONTROL + 1)), "kind 6"),
        (BEGIN + frame(PING, 0, 0, bytes(8)) * 30, "too many frames"),
        (BEGIN + frame(DATA, 0, 1) * 30, "too many frames"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\r", "begin"),
    ],
)
def test_frames_that_cost_grpc_too_much_end_the_connection(data: bytes, words: str) -> None:
    assert words in (judged(data) or "")


@pytest.mark.parametrize(
    "data",
    [
        block(FIELD * 15, b"", FIELD * 5),
        block(b"\x05" + FIELD * 20 + b"\0" * 5, first=PADDED),
        block(b"\x05" + bytes(5) + FIELD * 20 + b"\0" * 5, first=PADDED | 0x20),
        block(b"\x00\x05abc", b"de\x7f", b"\x01" + b"x" * 128),
        LARGEST_BLOCK,
        BEGIN + frame(PING, 0, 0, bytes(8)) * 29,
        BEGIN + frame(SETTINGS, 0, 0, bytes(LONGEST_CONTROL)),
        BEGIN + frame(HEADERS, END_HEADERS, 1, FIELD) + frame(PING, 0, 0, bytes(8)) * 38,
    ],
)
@given(at=st.lists(st.integers(0, 300), max_size=30))
def test_frames_that_the_rfc_allows_are_passed_on(data: bytes, at: list[int]) -> None:
    assert judged(data, at) is None


def test_a_client_that_is_allowed_more_frames_can_send_them() -> None:
    inspection = Inspection(BOUNDS)
    inspection.allow(5)
    assert inspection.take(BEGIN + frame(PING, 0, 0, bytes(8)) * 34) is None
    assert inspection.take(frame(PING, 0, 0, bytes(8))) == "it sent too many frames for the calls that it made"


def test_an_endless_header_block_is_refused_before_grpc_receives_more_than_the_limit() -> None:
    """Each field costs gRPC some hundred bytes, whether or not the block ever ends."""
    inspection = Inspection(BOUNDS)
    assert inspection.take(BEGIN + frame(HEADERS, 0, 1, FIELD * 10_000)[: 9 + 20]) is None
    assert inspection.take(FIELD) == "a header block has too many fields"
