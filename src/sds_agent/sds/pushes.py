"""What came of each push, for one line in the log however many streams it went to: pure, with the time as an argument.

A push is a secret that has changed, on its way to every stream that subscribes to one of its names. It is over when
each of these streams has replied, has left, or was overtaken by the next change; or after LONGEST, because a client
need not reply at all. What is known of it then is its outcome.

The order of steps for a stream is: `due` when the secret changes, `sent` when the answer goes out, `replied` for its
ACK or NACK. All streams are `due` before the first answer goes out, so no push is over before it has reached everybody.
"""

from collections.abc import Collection, Iterator

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
    """`due` has the names that are still to be sent to a stream, `reached` the streams to which an answer went."""

    __slots__ = ("acked", "began", "due", "last_ack", "left", "nacked", "names", "outstanding", "reached")

    def __init__(self, began: float) -> None:
        self.began = began
        self.names: dict[str, None] = {}
        self.due: dict[int, set[str]] = {}
        self.reached: set[int] = set()
        self.outstanding: set[int] = set()
        self.acked = self.nacked = self.left = 0
        self.last_ack: float | None = None

    @property
    def over(self) -> bool:
        """Whether no stream is waited for."""
        return not self.due and not self.outstanding

    def not_due(self, stream: int, names: Collection[str]) -> bool:
        """These names are not to be sent to the stream any more; whether any of them was."""
        due = self.due.get(stream)
        if due is None or due.isdisjoint(names):
            return False
        due.difference_update(names)
        if not due:
            del self.due[stream]
        return True

    def outcome(self, version: str) -> PushOutcome:
        """What is known of it now."""
        took = None if self.last_ack is None else round((self.last_ack - self.began) * 1000, 1)
        waiting = len(self.due.keys() | self.outstanding)
        streams = len(self.reached)
        return PushOutcome(tuple(self.names), version, streams, self.acked, self.nacked, self.left, waiting, took)


class Pushes:
    """The pushes under way, by the version that they bring. Streams are known by their numbers."""

    def __init__(self) -> None:
        self._open: dict[str, _Push] = {}  # by age
        self._finished: list[PushOutcome] = []

    def due(self, stream: int, name: str, version: str | None, now: float) -> None:
        """A secret has changed to that version, and the stream subscribes to it by that name.

        None where the stream is to be sent nothing: the secret was withheld, or is again what the stream has.
        """
        self._not_due(stream, (name,), but=version)
        if version is None:
            return
        push = self._open.get(version)
        if push is not None and stream in push.reached:
            self._end(version)  # the same content once more, after other content
            push = None
        if push is None:
            push = self._open[version] = _Push(now)
            if len(self._open) > MOST:
                self._end(next(iter(self._open)))
        push.names[name] = None
        push.due.setdefault(stream, set()).add(name)

    def sent(self, stream: int, name: str, version: str) -> bool:
        """An answer with that version of the name goes out to the stream; whether it is part of a push."""
        push = self._open.get(version)
        if push is None or not push.not_due(stream, (name,)):
            return False
        if stream not in push.reached:
            push.reached.add(stream)
            push.outstanding.add(stream)
        self._end_if_over(version, push)
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
                push.due.pop(stream, None)
                push.outstanding.discard(stream)
                self._end_if_over(version, push)

    def unsubscribed(self, stream: int, names: Collection[str]) -> None:
        """The stream's client does not want these names any more."""
        self._not_due(stream, names)

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

    def _not_due(self, stream: int, names: Collection[str], but: str | None = None) -> None:
        """No push sends these names to the stream any more, but for the one of that version."""
        for version, push in tuple(self._open.items()):
            if version != but and push.not_due(stream, names):
                self._end_if_over(version, push)

    def _end_if_over(self, version: str, push: _Push) -> None:
        if push.over:
            self._end(version)

    def _end(self, version: str) -> None:
        push = self._open.pop(version)
        if push.reached or push.due:  # or else every stream has left, or was overtaken
            self._finished.append(push.outcome(version))
