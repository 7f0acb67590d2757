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
    """`due` counts the names that are still to be sent to streams, `outstanding` the streams that have not replied;
    `reached` are those to which an answer went.
    """

    __slots__ = ("acked", "began", "due", "last_ack", "left", "nacked", "names", "outstanding", "reached", "version")

    def __init__(self, version: str, began: float) -> None:
        self.version = version
        self.began = began
        self.names: dict[str, None] = {}
        self.reached: set[int] = set()
        self.due = self.outstanding = 0
        self.acked = self.nacked = self.left = 0
        self.last_ack: float | None = None

    def outcome(self, waiting: int) -> PushOutcome:
        """What is known of it now; `waiting` streams are waited for."""
        took = None if self.last_ack is None else round((self.last_ack - self.began) * 1000, 1)
        return PushOutcome(
            tuple(self.names), self.version, len(self.reached), self.acked, self.nacked, self.left, waiting, took
        )


class Pushes:
    """The pushes under way, by the version that they bring. Streams are known by their numbers.

    A step takes a time that depends neither on how many streams there are nor on how many pushes are under way.
    """

    def __init__(self) -> None:
        self._open: dict[str, _Push] = {}  # by age
        # by stream: of each name the push that is to bring it, and of each version the push that waits for the reply;
        # a push is in neither once it is over
        self._due: dict[int, dict[str, _Push]] = {}
        self._outstanding: dict[int, dict[str, _Push]] = {}
        self._finished: list[PushOutcome] = []

    def due(self, stream: int, name: str, version: str | None, now: float) -> None:
        """A secret has changed to that version, and the stream subscribes to it by that name.

        None where the stream is to be sent nothing: the secret was withheld, or is again what the stream has.
        """
        push = None if version is None else self._open.get(version)
        if push is not None and self._due.get(stream, {}).get(name) is push:
            return
        self._not_due(stream, name)
        if version is None:
            return
        if push is not None and stream in push.reached:
            self._end(push)  # the same content once more, after other content
            push = None
        if push is None:
            push = self._open[version] = _Push(version, now)
            if len(self._open) > MOST:
                self._end(next(iter(self._open.values())))
        push.names[name] = None
        push.due += 1
        self._due.setdefault(stream, {})[name] = push

    def sent(self, stream: int, name: str, version: str) -> bool:
        """An answer with that version of the name goes out to the stream; whether it is part of a push."""
        due = self._due.get(stream)
        if due is None or (push := due.get(name)) is None or push.version != version:
            return False
        if stream not in push.reached:
            push.reached.add(stream)
            push.outstanding += 1
            self._outstanding.setdefault(stream, {})[version] = push
        self._not_due(stream, name)
        return True

    def replied(self, stream: int, version: str, *, acked: bool, now: float) -> None:
        """The stream's client took that version, or refused it."""
        awaited = self._outstanding.get(stream)
        if awaited is None or (push := awaited.pop(version, None)) is None:
            return
        if not awaited:
            del self._outstanding[stream]
        push.outstanding -= 1
        if acked:
            push.acked += 1
            push.last_ack = now
        else:
            push.nacked += 1
        self._end_if_over(push)

    def gone(self, stream: int) -> None:
        """The stream has ended."""
        for push in self._outstanding.pop(stream, {}).values():
            push.outstanding -= 1
            push.left += 1
            self._end_if_over(push)
        self.unsubscribed(stream, tuple(self._due.get(stream, ())))

    def unsubscribed(self, stream: int, names: Iterable[str]) -> None:
        """The stream's client does not want these names any more."""
        for name in names:
            self._not_due(stream, name)

    def finished(self, now: float) -> Iterator[PushOutcome]:
        """The pushes that are over since the last call, those that have waited too long among them."""
        while self._open and now - (oldest := next(iter(self._open.values()))).began >= LONGEST:
            self._end(oldest)
        done, self._finished = self._finished, []
        return iter(done)

    @property
    def under_way(self) -> int:
        """How many are not over."""
        return len(self._open)

    def _not_due(self, stream: int, name: str) -> None:
        """No push sends this name to the stream any more."""
        due = self._due.get(stream)
        if due is None or (push := due.pop(name, None)) is None:
            return
        if not due:
            del self._due[stream]
        push.due -= 1
        self._end_if_over(push)

    def _end_if_over(self, push: _Push) -> None:
        if not push.due and not push.outstanding:
            self._end(push)

    def _end(self, push: _Push) -> None:
        del self._open[push.version]
        waiting = self._given_up(push) if push.due or push.outstanding else set()
        if push.reached or push.due:  # or else every stream has left, or was overtaken
            self._finished.append(push.outcome(len(waiting)))

    def _given_up(self, push: _Push) -> set[int]:
        """The streams that are waited for, and are not any more."""
        found = set()
        for waiting in (self._due, self._outstanding):
            for stream, pushes in tuple(waiting.items()):
                kept = {key: each for key, each in pushes.items() if each is not push}
                if len(kept) < len(pushes):
                    found.add(stream)
                    _keep(waiting, stream, kept)
        return found


def _keep(waiting: dict[int, dict[str, _Push]], stream: int, kept: dict[str, _Push]) -> None:
    if kept:
        waiting[stream] = kept
    else:
        del waiting[stream]
