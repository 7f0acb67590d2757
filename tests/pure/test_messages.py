"""What a client has begun to say and not ended, counted before gRPC stores it; and what frees it."""

from collections.abc import Iterator

import pytest
from fakes.raw_http2 import DATA, END_HEADERS, END_STREAM, HEADERS, PREFACE, RST_STREAM, SETTINGS, frame, message
from hypothesis import given
from hypothesis import strategies as st

from sds_agent.rpc.frames import ENHANCE_YOUR_CALM, PIECE_COST, Bounds, Inspection, Messages

BOUNDS = Bounds(block=20_000, frames=1 << 30)
BEGIN = PREFACE + frame(SETTINGS, 0, 0)
CALL = b"\x82"
RESERVED = 1 << 31


class Followed:
    """A connection whose messages are followed: the bytes that count now, as its owner has been told."""

    def __init__(self) -> None:
        self.stored = self.sent = self.calls = 0
        self.messages = Messages(self)
        self._inspection = Inspection(BOUNDS, self.messages)
        self.says(BEGIN)

    def came(self, count: int) -> None:
        """So many bytes have come."""
        self.sent += count

    def moved(self, count: int) -> None:
        """There are so many more, or less."""
        self.stored += count
        assert self.stored >= 0

    def called(self) -> None:
        """A call has begun."""
        self.calls += 1

    def says(self, data: bytes) -> None:
        """The client sends this, in one piece."""
        assert self.fault(data) is None

    def fault(self, data: bytes) -> str | None:
        """The client sends this, in one piece: why the connection has to end."""
        return self._inspection.take(data)

    def begins(self, *streams: int) -> None:
        """The client begins calls."""
        for stream in streams:
            self.says(frame(HEADERS, END_HEADERS, stream, CALL))

    def answers(self, *data: bytes) -> None:
        """The server sends this."""
        for each in data:
            assert self._inspection.answered(memoryview(each))


def pieces(data: bytes, cuts: list[int]) -> Iterator[bytes]:
    """The data, cut at these places."""
    ends = sorted({min(cut, len(data)) for cut in cuts} | {len(data)})
    for begin, end in zip([0, *ends], ends, strict=False):
        yield data[begin:end]


saids = st.lists(st.tuples(st.sampled_from([1, 3, 5]), st.binary(max_size=80)), max_size=6)
cuts = st.lists(st.integers(0, 1500), max_size=30)


@given(saids, st.integers(0, 30), st.lists(st.integers(1, 60), min_size=1, max_size=20), cuts)
def test_what_counts_is_what_has_come_of_messages_that_have_not_ended(
    said: list[tuple[int, bytes]], missing: int, sizes: list[int], at: list[int]
) -> None:
    """However the messages are cut into frames, and the frames into what is read at once."""
    streams = {number: b"".join(message(data) for stream, data in said if stream == number) for number in (1, 3, 5)}
    sent = {number: data[: max(0, len(data) - missing)] for number, data in streams.items()}
    frames, left, turn = b"", dict(sent), 0
    while any(left.values()):
        for number, data in left.items():
            size = sizes[turn % len(sizes)]
            turn += 1
            frames += frame(DATA, 0, number, data[:size]) if data else b""
            left[number] = data[size:]
    here = Followed()
    here.begins(1, 3, 5)
    for piece in pieces(frames, at):
        here.says(piece)
    assert here.sent == len(BEGIN) + 3 * len(frame(HEADERS, END_HEADERS, 1, CALL)) + len(frames)
    begun = sum(_begun([message(data) for stream, data in said if stream == n], len(sent[n])) for n in sent)
    assert here.stored % PIECE_COST == begun % PIECE_COST, "beside what each piece costs"
    assert begun <= here.stored <= begun + PIECE_COST * begun
    for number in (1, 3, 5):
        here.answers(frame(HEADERS, END_STREAM | END_HEADERS, number))
    assert here.stored == 0


def _begun(messages: list[bytes], sent: int) -> int:
    """How much of these was sent of the one in which that many bytes end."""
    for each in messages:
        if sent < len(each):
            return sent
        sent -= len(each)
    return 0


def test_whole_messages_store_nothing() -> None:
    here = Followed()
    here.begins(1)
    here.says(frame(DATA, 0, 1, message(b"an ACK")) * 3)
    here.says(frame(DATA, 0, 1, message(b"one") + message(b"") + message(b"three")))
    here.says(frame(DATA, END_STREAM, 1))
    assert here.stored == 0


BEGUN = message(b"x" * 1000)[:500]


@pytest.mark.parametrize(
    "end",
    [
        lambda here: here.says(frame(RST_STREAM, 0, 1, bytes(4))),
        lambda here: here.says(frame(DATA, 0, 1, bytes(505))),
        lambda here: here.answers(frame(RST_STREAM, 0, 1, bytes(4))),
        lambda here: here.answers(frame(HEADERS, END_HEADERS | END_STREAM, 1, CALL)),
        lambda here: here.answers(frame(DATA, 0, 1, bytes(9)), frame(HEADERS, END_STREAM, 1)[:5], b"\0\0\0\1\0"),
    ],
    ids=["reset by the client", "the rest", "reset by the server", "ended by the server", "ended in pieces"],
)
def test_a_message_counts_until_it_or_its_call_ends(end: object) -> None:
    here = Followed()
    here.begins(1, 3)
    here.says(frame(DATA, 0, 1, BEGUN) + frame(DATA, 0, 3, BEGUN))
    assert here.stored == 2 * (500 + PIECE_COST)
    here.answers(frame(SETTINGS, 1, 0), frame(DATA, 0, 1, b"an answer"), frame(HEADERS, END_HEADERS, 3, CALL))
    assert here.stored == 2 * (500 + PIECE_COST), "nothing of that ends a call"
    assert callable(end)
    end(here)
    assert here.stored == 500 + PIECE_COST


def test_a_call_is_told_by_its_number_without_the_bit_that_grpc_ignores() -> None:
    here = Followed()
    here.begins(1)
    here.says(frame(DATA, 0, RESERVED | 1, BEGUN))
    assert here.stored == 500 + PIECE_COST
    here.answers(frame(RST_STREAM, 0, 1, bytes(4)))
    assert here.stored == 0


@pytest.mark.parametrize("number", [2, (1 << 31) - 2, RESERVED | 2])
def test_call_with_an_even_number_ends_the_connection(number: int) -> None:
    """gRPC ignores it. If it counted as a call, those with lower numbers would not count, though gRPC takes them."""
    fault = Followed().fault(frame(HEADERS, END_HEADERS, number, CALL))
    assert fault == "a client cannot begin a stream with an even number (RFC 9113 section 5.1.1)"


@pytest.mark.parametrize("first", [7, (1 << 31) - 1])
def test_call_with_a_lower_number_ends_the_connection(first: int) -> None:
    """gRPC takes it if it refused the one before, because there were too many."""
    here = Followed()
    here.begins(1, first)
    assert here.messages.calls == 2
    here.answers(frame(RST_STREAM, 0, first, b"\0\0\0\x07"))
    here.says(frame(HEADERS, END_HEADERS | END_STREAM, 1, CALL) + frame(HEADERS, END_HEADERS | END_STREAM, first, CALL))
    assert here.messages.calls == 1
    assert here.calls == 2
    for number in (0, 3, 5, first):
        other = Followed()
        other.begins(1, first)
        other.answers(frame(RST_STREAM, 0, first, b"\0\0\0\x07"))
        fault = other.fault(frame(HEADERS, END_HEADERS, number, CALL))
        assert fault == "a stream begins with a lower number than one before it (RFC 9113 section 5.1.1)"


def test_what_comes_for_a_call_that_is_over_does_not_count() -> None:
    """A client that is just writing has not read yet that its call has ended."""
    here = Followed()
    here.begins(1)
    here.says(frame(DATA, 0, 1, BEGUN))
    here.answers(frame(HEADERS, END_HEADERS | END_STREAM, 1, CALL))
    here.says(frame(DATA, 0, 1, bytes(200)) + frame(DATA, 0, 7, BEGUN))
    here.says(frame(HEADERS, END_HEADERS | END_STREAM, 1, CALL) + frame(DATA, 0, 1, BEGUN))
    assert here.stored == 0


def test_open_calls_can_be_reset_between_two_frames_of_the_server() -> None:
    here = Followed()
    here.begins(1, 3, 5)
    here.answers(frame(HEADERS, END_HEADERS | END_STREAM, 3, CALL))
    answer = frame(DATA, 0, 1, bytes(100))
    resets = frame(RST_STREAM, 0, 1, b"\0\0\0\x0b") + frame(RST_STREAM, 0, 5, b"\0\0\0\x0b")
    assert here.messages.resets(ENHANCE_YOUR_CALM) == resets
    for cut in range(1, len(answer)):
        here.answers(answer[:cut])
        assert here.messages.resets(ENHANCE_YOUR_CALM) == b""
        here.answers(answer[cut:])
        assert here.messages.resets(ENHANCE_YOUR_CALM) == resets


def test_many_small_pieces_count_for_more_than_their_bytes() -> None:
    here = Followed()
    here.begins(1)
    here.says(frame(DATA, 0, 1, message(b"x" * 2000)[:5]))
    here.says(frame(DATA, 0, 1, b"x") * 1000)
    assert here.stored == 1005 + 1001 * PIECE_COST


@given(st.lists(st.binary(max_size=300), max_size=8), cuts)
def test_the_bytes_of_answers_are_counted_however_they_are_cut(parts: list[bytes], at: list[int]) -> None:
    here = Followed()
    sent = b"".join(frame(DATA, 0, 1, part) + frame(SETTINGS, 0, 0, bytes(12)) for part in parts)
    here.answers(*pieces(sent, at))
    assert here.messages.answers >= sum(map(len, parts))
    here.answers(frame(SETTINGS, 1, 0))
    assert here.messages.answers == sum(map(len, parts))
