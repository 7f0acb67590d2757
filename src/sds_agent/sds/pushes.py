"""What came of each push, for one line in the log however many streams it went to: pure, with the time as an argument.

A push is a secret that has changed, on its way to every stream that subscribes to one of its names. It is over when
each of these streams has replied, has left, or was overtaken by the next change; or after LONGEST, because a client
need not reply at all. What is known of it then is its outcome.

The order of steps for a stream is: `due` when the secret changes, `sent` when the answer goes out, `replied` for its
ACK or NACK. All streams are `due` before the first answer goes out, so no push is over before it has reached everybody.
"""

from collections.abc import Iterable, Iterator

from msgspec import Struct

LONGEST = 10.0
"""Seconds that a push waits for replies."""
MOST = 1000
"""Pushes under way at one time. The oldest is given up when there are more."""


class PushOutcome(Struct, frozen=True):
    """What came of a push: its names and its version, to how many streams it was sent, and how many of them took it,
    refused it, or left. `waiting` have not replied, or not been sent it. `last_ack_ms` are the milliseconds from the
    change to the last ACK, None without one.
    """

    names: tuple[str, ...]
    version: str
    streams: int
    acked: int
    nacked: int
    left: int
    waiting: int
    last_ack_ms: float | None


class _Push:
    __slots__ = ("acked", "began", "due", "last_ack", "left", "nacked", "names", "outstanding", "sent")

    def __init__(self, began: float) -> None:
        self.began = began
        self.names: dict[str, None] = {}
        self.due: set[int] = set()
        self.outstanding: set[int] = set()
        self.sent = self.acked = self.nacked = self.left = 0
        self.last_ack: float | None = None

    @property
    def over(self) -> bool:
        """Whether no stream is waited for."""
        return not self.due and not self.outstanding

    def outcome(self, version: str) -> PushOutcome:
        """What is known of it now."""
        took = None if self.last_ack is None else round((self.last_ack - self.began) * 1000, 1)
        waiting = len(self.due) + len(self.outstanding)
        return PushOutcome(tuple(self.names), version, self.sent, self.acked, self.nacked, self.left, waiting, took)


class Pushes:
    """The pushes under way, by the version that they bring. Streams are known by their numbers."""

    def __init__(self) -> None:
        self._open: dict[str, _Push] = {}  # by age
        self._finished: list[PushOutcome] = []

    def due(self, stream: int, name: str, version: str, now: float) -> None:
        """A secret has changed to that version, and the stream subscribes to it by that name."""
        self._overtaken(stream, name, version)
        push = self._open.get(version)
        if push is None:
            push = self._open[version] = _Push(now)
            if len(self._open) > MOST:
                self._end(next(iter(self._open)))
        push.names[name] = None
        push.due.add(stream)

    def sent(self, stream: int, version: str) -> bool:
        """An answer with that version goes out to the stream; whether it is part of a push."""
        push = self._open.get(version)
        if push is None or stream not in push.due:
            return False
        push.due.discard(stream)
        push.outstanding.add(stream)
        push.sent += 1
        return True

    def replied(self, stream: int, version: str, *, acked: bool, now: float) -> None:
        """The stream's client took that version, or refused it."""
        push = self._open.get(version)
        if push is None or stream not in push.outstanding:
            return
        push.outstanding.discard(stream)
        if acked:
            push.acked += 1
            push.last_ack = now
        else:
            push.nacked += 1
        self._end_if_over(version, push)

    def gone(self, stream: int) -> None:
        """The stream has ended."""
        for version, push in tuple(self._open.items()):
            if stream in push.due or stream in push.outstanding:
                push.left += stream in push.outstanding
                push.due.discard(stream)
                push.outstanding.discard(stream)
                self._end_if_over(version, push)

    def unsubscribed(self, stream: int, names: Iterable[str]) -> None:
        """The stream's client does not want these names any more."""
        wanted = frozenset(names)
        for version, push in tuple(self._open.items()):
            if stream in push.due and not wanted.isdisjoint(push.names):
                push.due.discard(stream)
                self._end_if_over(version, push)

    def finished(self, now: float) -> Iterator[PushOutcome]:
        """The pushes that are over since the last call, those that have waited too long among them."""
        for version, push in tuple(self._open.items()):
            if now - push.began < LONGEST:
                break  # the others are younger
            self._end(version)
        done, self._finished = self._finished, []
        return iter(done)

    @property
    def under_way(self) -> int:
        """How many are not over."""
        return len(self._open)

    def _overtaken(self, stream: int, name: str, version: str) -> None:
        """What the stream was to be sent under that name goes out no more: the newest content does."""
        for other, push in tuple(self._open.items()):
            if other != version and name in push.names and stream in push.due:
                push.due.discard(stream)
                self._end_if_over(other, push)

    def _end_if_over(self, version: str, push: _Push) -> None:
        if push.over:
            self._end(version)

    def _end(self, version: str) -> None:
        push = self._open.pop(version)
        if push.sent or push.due:  # or else every stream has left, or was overtaken
            self._finished.append(push.outcome(version))
