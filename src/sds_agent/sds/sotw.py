"""StreamSecrets: the state-of-the-world variant of the xDS protocol, as it applies to secrets.

Source: Envoy's "xDS REST and gRPC protocol", and runs of real Envoys where that text is silent. Every rule on nonces,
versions and subscriptions of this variant is in this file.

A client's message means up to three things at once: an ACK or NACK of an answer, a new list of names, and nothing at
all about versions (which only say what the client has). Its nonce says which of these it means:

- Before the first answer on this stream any nonce, version or error is about an earlier stream. The message is a
  subscription.
- Afterwards, the nonce of the newest answer makes it an ACK or, if it carries an error, a NACK. It also brings names.
- Another non-empty nonce is stale: the message crossed a newer answer. Its names are ignored; the client's reply to the
  newer answer repeats them. Where it is the first reply to an earlier answer of this stream, it is the ACK or NACK of
  that one all the same: no other message will be, and certificates wait for the ACK of their roots.
- An empty nonce is neither ACK nor NACK, but its names count.

What is sent, and when:

- Names that are new in the list are answered at once, even while an answer is outstanding. Names that are still in
  the list are not answered again; names that left it are forgotten silently. An empty list after a non-empty one
  leaves nothing; an empty first list subscribes to nothing (there is no wildcard for secrets: a message of zero bytes
  must not fetch a key).
- A change of a subscribed secret is pushed, but only when no answer is outstanding. What goes out then is the newest
  content, however many changes the client missed. An answer contains what changed, never a name that is not
  subscribed.
- Content that was sent on this stream is not sent again, whether the client took or refused it: resending what was
  NACKed would loop. `resend` makes an exception (see `refusals`).
- A name whose secret does not exist yet gets no answer; the secret is pushed as soon as it exists. A secret that is
  withheld later is not taken back: SotW cannot say "deleted".
- A name that is not served ends the stream with NOT_FOUND when all names are such; asked for among others it is
  reported and the others are answered. The same holds when a name stops being served in mid-stream.
"""

from collections.abc import Iterator, Mapping

from sds_agent.sds.protocol import (
    Absence,
    Action,
    Finish,
    Outstanding,
    Refused,
    Resource,
    Respond,
    SotwRequest,
    Stale,
    StatusCode,
    Subscribed,
    Unsubscribed,
    View,
    stored_in,
    unacceptable,
    unique,
)
from sds_agent.sds.status import NameStatus, Replies

MOST_EARLIER = 32
"""Answers without a reply, beside the newest, that a session remembers. It forgets the oldest."""


class SotwSession:
    """One StreamSecrets stream. `nonces` must never yield a value twice."""

    def __init__(self, nonces: Iterator[str], *, most_names: int = 100) -> None:
        self._nonces = nonces
        self._most_names = most_names
        self._names: tuple[str, ...] = ()
        self._sent: dict[str, str] = {}  # name -> version last sent, taken or refused
        self._refused: frozenset[str] = frozenset()  # subscribed and not served: reported once
        self._newest: str | None = None  # nonce of the newest answer
        self._outstanding: Outstanding | None = None
        self._earlier: dict[str, Outstanding] = {}  # those that a newer answer crossed, by nonce
        self._replies = Replies()
        self.stored = 0
        """Bytes of the names that the client makes it remember."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names subscribed to."""
        return self._names

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

    def receive(self, request: SotwRequest, view: View) -> list[Action]:
        """Take a message of the client."""
        names = self._names if request.names == self._names else unique(request.names)
        if finish := unacceptable(request.type_url, len(names), self._most_names):
            return [finish]
        actions: list[Action] = []
        if self._newest is not None and request.nonce:
            if request.nonce != self._newest:
                return [self._settled(self._earlier.pop(request.nonce, None), request)]
            self._earlier.clear()  # a stream keeps its order: the client has dealt with those
            if self._outstanding is not None:
                actions.append(self._settled(self._outstanding, request))
                self._outstanding = None
        if names == self._names:
            return actions + self._refuse(view) + self._answer(() if self._outstanding else names, view)
        before = frozenset(self._names)  # there may be thousands
        added = tuple(name for name in names if name not in before)
        actions += self._subscribe(names, added, view)
        actions += self._refuse(view) + self._answer(added if self._outstanding else names, view)
        # an answer that has no reply has names of its own
        unsettled = (*self._earlier.values(), self._outstanding)
        self.stored = stored_in(names, *(each.versions for each in unsettled if each is not None))
        return actions

    def refresh(self, view: View) -> list[Action]:
        """Look for changes of the subscribed secrets."""
        return self._refuse(view) + self._answer(() if self._outstanding else self._names, view)

    def resend(self, name: str) -> None:
        """Let the next `refresh` send the name although its version was sent."""
        self._sent.pop(name, None)

    def _settled(self, answer: Outstanding | None, request: SotwRequest) -> Action:
        if answer is None:
            return Stale(request.nonce, request.error)
        reply = answer.settled(request.error)
        self._replies.take(reply, frozenset(self._names))
        return reply

    def _subscribe(self, names: tuple[str, ...], added: tuple[str, ...], view: View) -> list[Action]:
        notes: list[Action] = []
        kept = frozenset(names)
        removed = tuple(name for name in self._names if name not in kept)
        self._names = names
        for name in removed:
            self._sent.pop(name, None)
        self._replies.forget(removed)
        if added:
            notes.append(Subscribed(added, tuple(n for n in added if view[n] is Absence.PENDING)))
        if removed:
            notes.append(Unsubscribed(removed))
        return notes

    def _refuse(self, view: View) -> list[Action]:
        unknown = tuple([name for name in self._names if view[name] is Absence.UNKNOWN])
        if not unknown and not self._refused:
            return []
        new = tuple(name for name in unknown if name not in self._refused)
        self._refused = frozenset(unknown)
        for name in new:
            self._sent.pop(name, None)
        if unknown and unknown == self._names:
            return [Finish(StatusCode.NOT_FOUND, unknown)]
        return [Refused(new)] if new else []

    def _answer(self, candidates: tuple[str, ...], view: View) -> list[Action]:
        found = [view[name] for name in candidates]
        due = tuple([r for r in found if isinstance(r, Resource) and self._sent.get(r.name) != r.version])
        if not due:
            return []
        versions = {resource.name: resource.version for resource in due}
        self._sent.update(versions)
        if self._outstanding is not None:
            self._earlier[self._outstanding.nonce] = self._outstanding
            if len(self._earlier) > MOST_EARLIER:
                del self._earlier[next(iter(self._earlier))]
        self._newest = next(self._nonces)
        self._outstanding = Outstanding(self._newest, versions)
        return [Respond(self._newest, due)]
