"""DeltaSecrets: the incremental variant of the xDS protocol, as it applies to secrets.

Source: Envoy's "xDS REST and gRPC protocol", and runs of real Envoys where that text is silent. Every rule on nonces,
versions and subscriptions of this variant is in this file.

Here a message says what to add to the subscription and what to take out of it, and, apart from that, may ACK or NACK
an answer by its nonce:

- A subscription change always counts, whatever the nonce. A nonce that is not outstanding on this stream is stale and
  says nothing.
- Every name in `resource_names_subscribe` is answered at once: also when it was subscribed before (the client has
  lost it), and whatever `initial_resource_versions` says that the client has, which is not even decoded. Silence for
  an equal version would leave a client that waits for its first answer waiting; a client that gets what it has ACKs
  it without reloading.
- Taking out what was never subscribed is not an error. A name in both lists is subscribed.
- There is no wildcard for secrets: a first message without names subscribes to nothing, and "*" is a name that is not
  served.
- Changes are pushed only when no answer is outstanding, and then the newest content goes out. Content that was sent
  on this stream is not pushed again, whether the client took or refused it. `resend` makes an exception (see
  `refusals`).
- A name whose secret does not exist yet gets no answer. It is never "removed": Envoy would finish warming without a
  certificate. `removed_resources` says that a name is not served, at once when it is asked for and by a push when that
  happens in mid-stream. The subscription stays, so that the name is pushed if it comes to be served. The stream never
  ends with a status for it.
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import takewhile

from sds_agent.sds.protocol import (
    Absence,
    Action,
    DeltaRequest,
    Outstanding,
    Refused,
    Resource,
    Respond,
    Stale,
    Subscribed,
    Unsubscribed,
    View,
    stored_in,
    unacceptable,
    unique,
)
from sds_agent.sds.status import NameStatus, Replies

REMOVED = ""
"""Stands in the place of a version where the answer was that the name is not served."""

MOST_OUTSTANDING = 32
"""Answers without a reply that a session remembers. Of a client that subscribes again and again and never replies it
forgets the oldest, as if the client had taken them.
"""


class DeltaSession:
    """One DeltaSecrets stream. `nonces` must never yield a value twice."""

    def __init__(self, nonces: Iterator[str], *, most_names: int = 100) -> None:
        self._nonces = nonces
        self._most_names = most_names
        self._names: dict[str, None] = {}  # a set that keeps its order
        self._sent: dict[str, str] = {}  # name -> version last sent, or REMOVED
        self._outstanding: dict[str, Outstanding] = {}
        self._replies = Replies()
        self.stored = 0
        """Bytes of the names that the client makes it remember."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names subscribed to."""
        return tuple(self._names)

    @property
    def sent(self) -> Mapping[str, str]:
        """The version last sent of each name that has one."""
        return self._sent

    @property
    def acknowledged(self) -> Mapping[str, str]:
        """The version of each subscribed name that the client has acknowledged, the empty one where there is none."""
        return self._replies.acknowledged(self._names)

    def version_in_use(self, name: str) -> str:
        """The version of the name that the client has acknowledged, the empty one where there is none."""
        return self._replies.version_in_use(name)

    @property
    def status(self) -> tuple[NameStatus, ...]:
        """The status of each name."""
        return self._replies.status(self._names, self._sent)

    def receive(self, request: DeltaRequest, view: View) -> list[Action]:
        """Take a message of the client."""
        subscribe = unique(request.subscribe)
        wanted = set(subscribe)  # a message may have a hundred thousand names
        unsubscribe = tuple(n for n in unique(request.unsubscribe) if n in self._names and n not in wanted)
        size = len(self._names.keys() - set(unsubscribe) | wanted)
        if finish := unacceptable(request.type_url, size, self._most_names):
            return [finish]
        actions = self._settle(request)
        actions += self._subscribe(subscribe, unsubscribe, view)
        changed = () if self._outstanding else self._changed(view)
        actions += self._answer((*subscribe, *changed), view)
        if subscribe or unsubscribe:  # an answer has names of its own, where the client has asked for them once more
            self.stored = stored_in(self._names, self._sent, *(each.versions for each in self._outstanding.values()))
        return actions

    def refresh(self, view: View) -> list[Action]:
        """Look for changes of the subscribed secrets."""
        if self._outstanding:
            return []
        return self._answer(self._changed(view), view)

    def resend(self, name: str) -> None:
        """Let the next `refresh` send the name although its version was sent."""
        self._sent.pop(name, None)

    def _settle(self, request: DeltaRequest) -> list[Action]:
        if not request.nonce:
            return []
        answered = self._outstanding.get(request.nonce)
        if answered is None:
            return [Stale(request.nonce, request.error)]
        # A stream keeps its order: a client that replies to this answer has dealt with those before it.
        for nonce in tuple(takewhile(lambda older: older != request.nonce, self._outstanding)):
            del self._outstanding[nonce]
        del self._outstanding[request.nonce]
        reply = answered.settled(request.error)
        self._replies.take(reply, self._names)
        return [reply]

    def _subscribe(self, subscribe: tuple[str, ...], unsubscribe: tuple[str, ...], view: View) -> list[Action]:
        for name in unsubscribe:
            del self._names[name]
        for name in (*subscribe, *unsubscribe):
            self._sent.pop(name, None)
        self._replies.forget((*subscribe, *unsubscribe))
        self._names.update(dict.fromkeys(subscribe))
        actions: list[Action] = []
        if subscribe:
            actions.append(Subscribed(subscribe, tuple(n for n in subscribe if view[n] is Absence.PENDING)))
        if unsubscribe:
            actions.append(Unsubscribed(unsubscribe))
        return actions

    def _changed(self, view: View) -> tuple[str, ...]:
        return tuple(name for name in self._names if _version(view[name]) not in {None, self._sent.get(name)})

    def _answer(self, names: Iterable[str], view: View) -> list[Action]:
        found = {name: view[name] for name in names}
        resources = tuple(r for r in found.values() if isinstance(r, Resource))
        removed = tuple(name for name, r in found.items() if r is Absence.UNKNOWN)
        if not resources and not removed:
            return []
        versions = {r.name: r.version for r in resources} | dict.fromkeys(removed, REMOVED)
        self._sent.update(versions)
        nonce = next(self._nonces)
        self._outstanding[nonce] = Outstanding(nonce, versions)
        if len(self._outstanding) > MOST_OUTSTANDING:
            del self._outstanding[next(iter(self._outstanding))]
        refused: list[Action] = [Refused(removed)] if removed else []
        return [*refused, Respond(nonce, resources, removed)]


def _version(found: Resource | Absence) -> str | None:
    """What `_sent` has for it once it is sent; None for what is not to be sent."""
    match found:
        case Resource():
            return found.version
        case Absence.UNKNOWN:
            return REMOVED
        case _:
            return None
