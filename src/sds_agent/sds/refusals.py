"""What an Envoy has refused, and what makes it take the rest: pure.

Source: runs of real Envoys. An Envoy keeps a secret that it has refused (NACK) as the newest that it has, beside the
one that it uses. From then on:

- It refuses other secrets too, good ones, with the words that it had for the first.
- A good secret may have reached some of its listeners by then, and the same bytes once more reach no other.
- What it took before, sent once more, it takes, and the next secrets too.

So of a connection, which is one Envoy's:

1. What it refuses is taken back, one secret after the other: each is sent the one before again, which the client has
   acknowledged on that stream. If that is refused too, because of another, it is sent with other bytes in its turn.
2. Once nothing is left to be taken back, what was refused while others were may be good. It is sent anew with other
   bytes, one secret after the other. One that is refused then, and no other, was refused for its own sake: it is taken
   back, and stays so until it changes.
3. What cannot be taken back, because nothing was acknowledged before, is sent anew when another secret has changed and
   was taken: the first secrets of an Envoy are refused for each other, whatever the names.

Each step follows a reply of the client and waits for the next, and `MOST_SENT` bounds the steps for a version until the
next change that is taken.
"""

from collections.abc import Iterable
from enum import Enum, auto
from math import inf
from typing import Protocol

from msgspec import Struct
from msgspec.structs import replace

from sds_agent.sds.protocol import Absence, Acked, Nacked, Resource, View
from sds_agent.sds.status import Nack, NameStatus

MOST_SENT = 3
"""How often a version that was refused is sent anew on a stream, and how often the one before it, until another secret
changes: that may have been the cause.
"""

MOST_REFUSALS = 2000
"""Refusals of a connection that are looked after, because each reply costs a look at all of them. Others stay as they
are until their secrets change.
"""


class Refuser(Protocol):
    """A stream, as far as it can send what its session would not."""

    def take_back(self, name: str, version: str, count: int) -> str | None:
        """Send what the client acknowledged before this version of the name, which it has refused; with so many bytes
        more. Returns the version that is sent; None where there is none, or where the secret has changed since.
        """
        ...

    def send_anew(self, name: str, version: str, count: int) -> bool:
        """Send this version once more, with so many bytes more. False where the secret has changed since."""
        ...


class _State(Enum):
    REFUSED = auto()
    """It is to be taken back."""
    TAKING_BACK = auto()
    TAKEN_BACK = auto()
    LEFT = auto()
    """It cannot be taken back."""
    SENDING_ANEW = auto()
    CHANGING = auto()
    """Newer content is on its way."""


_AWAITED = {_State.TAKING_BACK, _State.SENDING_ANEW, _State.CHANGING}
"""The client will reply to what is on its way."""


class _Refusal:
    """A version of a name that the client of a stream refuses, and what was done about it."""

    __slots__ = ("beside", "is_next", "more", "more_back", "sent", "sent_back", "state", "version")

    def __init__(self, version: str) -> None:
        self.version = version
        self.state = _State.REFUSED
        self.is_next = ""
        """The version to which a reply is awaited."""
        self.beside = False
        """Whether it may have been refused for the sake of another."""
        self.sent = self.sent_back = 0
        """How often it was sent anew, and how often the one before it in a row, since another secret changed."""
        self.more = 1
        self.more_back = 0
        """The bytes more with which either is sent the next time: never those of the last time."""


class Refusals:
    """Those of one connection."""

    def __init__(self) -> None:
        self._open: dict[tuple[Refuser, str], _Refusal] = {}  # by age
        self._mended_at = -inf  # what was sent until then may have been refused for the sake of what was mended

    def replied(
        self, stream: Refuser, reply: Acked | Nacked, *, changed: bool, sent_at: float | None, now: float
    ) -> None:
        """A client has replied to an answer; `changed` if that had a secret that had changed. `sent_at` is the
        monotonic time of the answer, None where that is forgotten.
        """
        late = (0.0 if sent_at is None else sent_at) <= self._mended_at
        for name, version in reply.versions.items():
            refusal = self._open.get((stream, name))
            if refusal is not None and refusal.state is _State.CHANGING and version != refusal.is_next:
                continue  # which is on its way
            if isinstance(reply, Acked):
                self._taken(stream, name, version, now)
            elif version:  # or else Delta's answer that the name is not served
                self._refused(stream, name, version, late=late)
        not_taken_back = [each for each in self._open.values() if each.state is not _State.TAKEN_BACK]
        if isinstance(reply, Nacked) and len(not_taken_back) > 1:
            for each in not_taken_back:
                each.beside = True
        elif isinstance(reply, Acked) and changed:
            self._mended_at = now
            for each in not_taken_back:
                each.beside, each.sent, each.sent_back = True, 0, 0
        self._go_on()

    def changing(self, stream: Refuser, name: str, version: str | None) -> None:
        """The secret has changed to that version, which is on its way to the stream; None where nothing is."""
        if version is None:
            if self._open.pop((stream, name), None) is not None:
                self._go_on()
        elif (refusal := self._open.get((stream, name))) is not None:
            refusal.state, refusal.is_next = _State.CHANGING, version

    def keep(self, stream: Refuser, names: Iterable[str]) -> None:
        """The stream subscribes to these names, and to no others any more."""
        kept = frozenset(names)  # there may be thousands
        gone = [key for key in self._open if key[0] is stream and key[1] not in kept]
        for key in gone:
            del self._open[key]
        if gone:
            self._go_on()

    def _taken(self, stream: Refuser, name: str, version: str, now: float) -> None:
        refusal = self._open.get((stream, name))
        if refusal is None:
            return
        self._mended_at = now
        if refusal.state is _State.TAKING_BACK and version == refusal.is_next:
            refusal.state, refusal.sent_back, refusal.more_back = _State.TAKEN_BACK, 0, 0
        else:
            del self._open[stream, name]

    def _refused(self, stream: Refuser, name: str, version: str, *, late: bool) -> None:
        refusal = self._open.get((stream, name))
        if refusal is None and len(self._open) >= MOST_REFUSALS:
            return
        if refusal is None or version not in {refusal.version, refusal.is_next} or refusal.state is _State.CHANGING:
            refusal = self._open[stream, name] = _Refusal(version)
        refusal.state = _State.REFUSED
        refusal.beside = refusal.beside or late

    def _go_on(self) -> None:
        """Take the next step, unless the reply to one is awaited."""
        if any(each.state in _AWAITED for each in self._open.values()):
            return
        refused = [each for each in self._open.items() if each[1].state is _State.REFUSED]
        for (stream, name), refusal in sorted(refused, key=lambda each: each[1].sent_back):  # each in its turn
            if _take_back(stream, name, refusal):
                return
        beside = [each for each in self._open.items() if each[1].beside]
        for (stream, name), refusal in sorted(beside, key=lambda each: each[1].sent):  # likewise
            if _send_anew(stream, name, refusal):
                return


def _take_back(stream: Refuser, name: str, refusal: _Refusal) -> bool:
    """Whether it is being taken back."""
    before = None
    if refusal.sent_back < MOST_SENT:
        before = stream.take_back(name, refusal.version, refusal.more_back)
    if before is None:
        refusal.state = _State.LEFT
        return False
    refusal.state, refusal.is_next = _State.TAKING_BACK, before
    refusal.sent_back += 1
    refusal.more_back = (refusal.more_back + 1) % (1 + MOST_SENT)
    return True


def _send_anew(stream: Refuser, name: str, refusal: _Refusal) -> bool:
    """Whether it is being sent anew."""
    refusal.beside = False
    if refusal.sent == MOST_SENT or not stream.send_anew(name, refusal.version, refusal.more):
        return False
    refusal.state, refusal.is_next = _State.SENDING_ANEW, refusal.version
    refusal.sent += 1
    refusal.more = 1 + refusal.more % MOST_SENT
    return True


class Replacement(Struct):
    """What goes out in place of that version of its name; `nack` is the refusal of it, where it was taken back."""

    version: str
    resource: Resource
    nack: Nack | None
    is_sent: bool = False


class Replacements:
    """What is served, as one stream sees it (`protocol.View`): with other resources in place of what it refuses, each
    until the secret changes.
    """

    def __init__(self, served: View) -> None:
        self._served = served
        self._by_name: dict[str, Replacement] = {}

    def __getitem__(self, name: str) -> Resource | Absence:
        """The resource of this exact name, or why there is none."""
        found = self._served[name]
        replacement = self._by_name.get(name)
        if replacement is None or not isinstance(found, Resource) or found.version != replacement.version:
            return found
        return replacement.resource

    def put(self, version: str, resource: Resource, nack: Nack | None = None) -> None:
        """Send `resource` in place of this version of its name."""
        self._by_name[resource.name] = Replacement(version, resource, nack)

    def has(self, resource: Resource) -> bool:
        """Whether this goes out in place of what is served."""
        return self._by(resource) is not None

    def nack(self, name: str, version: str) -> Nack | None:
        """The refusal of this version of the name that was taken back."""
        replacement = self._by_name.get(name)
        return None if replacement is None or replacement.version != version else replacement.nack

    def sent(self, resources: Iterable[Resource]) -> list[Replacement]:
        """These have gone out. Returns the replacements among them that went out for the first time."""
        new = []
        for each in resources:
            replacement = self._by(each)
            if replacement is not None and not replacement.is_sent:
                replacement.is_sent = True
                new.append(replacement)
        return new

    def drop(self, name: str) -> None:
        """The secret has changed: forget what was sent in its place, with its key."""
        self._by_name.pop(name, None)

    def keep(self, names: Iterable[str]) -> None:
        """The stream subscribes to these names, and to no others any more."""
        for name in self._by_name.keys() - frozenset(names):
            del self._by_name[name]

    def shown(self, names: Iterable[str], statuses: Iterable[NameStatus]) -> tuple[NameStatus, ...]:
        """The status of these names: who was sent what it had, refuses the newer version still."""
        return tuple(map(self._shown, names, statuses))

    def _by(self, resource: Resource) -> Replacement | None:
        """The replacement that this is."""
        found = self._by_name.get(resource.name)
        return None if found is None or found.resource is not resource else found

    def _shown(self, name: str, status: NameStatus) -> NameStatus:
        replacement = self._by_name.get(name)
        if replacement is None or replacement.nack is None:
            return status
        if status.nacked is not None and status.nacked.version == replacement.version:
            return status  # with the newest reason
        return replace(status, nacked=replacement.nack)
