"""What an Envoy has refused, and what makes it take the rest: pure.

Source: runs of real Envoys. An Envoy keeps a secret that it has refused (NACK) as the newest that it has, beside the
one that it uses. From then on:

- It refuses other secrets too, good ones, with the words that it had for the first.
- A good secret may have reached some of its listeners by then, and the same bytes once more reach no other.
- What it took before, sent once more, it takes, and the next secrets too.

So of a connection, which is one Envoy's:

- A secret that it refuses while it refuses no other is taken back: it is sent the one before again, which it has
  acknowledged on this stream. Each refused version is taken back once, and only one at a time, because the answer says
  whether that was the cause. It stays so until the secret changes: what was refused for its own sake is not sent again.
- A secret that it refuses beside others may be good. Once it takes what stood in the way, what was taken back or new
  content, that secret is sent anew, with other bytes of the same meaning. If it is refused then, it is taken back.
- What cannot be taken back, because nothing was acknowledged before, is sent anew when another secret has changed and
  was taken: the first secrets of an Envoy are refused for each other, whatever the names. `MOST_ANEW` bounds that.

Each step follows a reply of the client, and each reply leads to no more than what is refused just then.
"""

from collections.abc import Container, Iterable
from typing import Protocol

from msgspec import Struct
from msgspec.structs import replace

from sds_agent.sds.protocol import Absence, Acked, Nacked, Resource, View
from sds_agent.sds.status import Nack, NameStatus

MOST_ANEW = 3
"""How often a version that was refused is sent anew on a stream."""


class Refuser(Protocol):
    """A stream, as far as it can send what its session would not."""

    def take_back(self, name: str, version: str) -> str | None:
        """Send what the client acknowledged before this version of the name, which it has refused. Returns the version
        that is sent; None where there is none, or where the secret has changed since.
        """
        ...

    def send_anew(self, name: str, version: str, attempt: int) -> bool:
        """Send this version once more with other bytes, other ones for each attempt. False where the secret has changed
        since.
        """
        ...


class _Refusal:
    """A version of a name that the client of a stream refuses, and what was done about it."""

    __slots__ = ("anew", "awaited", "taking_back", "tried", "version")

    def __init__(self, version: str) -> None:
        self.version = version
        self.taking_back: str | None = None
        """The version before, while its reply is awaited."""
        self.tried = False
        """Whether it was taken back in vain, or cannot be."""
        self.awaited = False
        """Whether the reply to it is awaited, as it was sent anew."""
        self.anew = 0


class Refusals:
    """Those of one connection."""

    def __init__(self) -> None:
        self._open: dict[tuple[Refuser, str], _Refusal] = {}  # by age

    def replied(self, stream: Refuser, reply: Acked | Nacked, *, changed: bool) -> None:
        """A client has replied to an answer; `changed` if that went out because a secret had changed."""
        for name, version in reply.versions.items():
            if isinstance(reply, Nacked):
                self._refused(stream, name, version)
            else:
                self._taken(stream, name, changed=changed)

    def keep(self, stream: Refuser, names: Container[str]) -> None:
        """The stream subscribes to these names, and to no others any more."""
        for key in [key for key in self._open if key[0] is stream and key[1] not in names]:
            del self._open[key]

    def _refused(self, stream: Refuser, name: str, version: str) -> None:
        known = self._open.get((stream, name))
        if known is not None and known.taking_back == version:
            known.taking_back, known.tried = None, True  # another one is the cause
        elif known is not None and known.version == version:
            known.awaited = False
        elif version:  # or else Delta's answer that the name is not served
            self._open.pop((stream, name), None)
            self._open[stream, name] = _Refusal(version)
        self._take_back()

    def _taken(self, stream: Refuser, name: str, *, changed: bool) -> None:
        if self._open.pop((stream, name), None) is None and not changed:
            return
        for (other, its_name), refusal in self._open.items():
            waits = refusal.awaited or refusal.taking_back is not None
            if not waits and refusal.anew < MOST_ANEW and other.send_anew(its_name, refusal.version, refusal.anew + 1):
                refusal.anew += 1
                refusal.awaited = True

    def _take_back(self) -> None:
        """The oldest that was not tried yet, unless the reply to another is awaited."""
        if any(each.taking_back is not None for each in self._open.values()):
            return
        for (stream, name), refusal in self._open.items():
            if refusal.tried or refusal.awaited:
                continue
            refusal.taking_back = stream.take_back(name, refusal.version)
            if refusal.taking_back is not None:
                return
            refusal.tried = True


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

    def sent(self, resources: Iterable[Resource]) -> list[Replacement]:
        """These have gone out. Returns the replacements among them that went out for the first time."""
        new = []
        for each in resources:
            replacement = self._by_name.get(each.name)
            if replacement is not None and replacement.resource is each and not replacement.is_sent:
                replacement.is_sent = True
                new.append(replacement)
        return new

    def drop(self, name: str) -> None:
        """The secret has changed: forget what was sent in its place, with its key."""
        self._by_name.pop(name, None)

    def keep(self, names: Container[str]) -> None:
        """The stream subscribes to these names, and to no others any more."""
        for name in [name for name in self._by_name if name not in names]:
            del self._by_name[name]

    def shown(self, names: Iterable[str], statuses: Iterable[NameStatus]) -> tuple[NameStatus, ...]:
        """The status of these names: who took back what it had, refuses the newer version still."""
        return tuple(map(self._shown, names, statuses))

    def _shown(self, name: str, status: NameStatus) -> NameStatus:
        replacement = self._by_name.get(name)
        if replacement is None or replacement.nack is None or status.nacked is not None:
            return status
        return replace(status, nacked=replacement.nack)
