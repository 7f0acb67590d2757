"""One gRPC stream: it carries bytes between the wire and a session, and the session's notes to the log.

gRPC's rules that shape this file: one read and one write at a time on a stream; a cancelled read loses the next
message; gRPC cancels the task of a stream whose peer has left; a status is only sent by returning or aborting, outside
any task group.

So the task in which gRPC calls the handler reads, answers what it reads, and is all that a stream needs while nothing
happens. A change of a secret begins a second task, which ends once the new secret is sent: a node has hundreds of
streams, and each of them is idle for hours. The two take turns, so there is one write at a time:

- The handler waits for the push to end before it looks at what it has read.
- A change that comes while either of them is at work is left to that one.
"""

import asyncio
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import grpc.aio
from msgspec import Struct
from msgspec.structs import replace

from sds_agent.rpc.calls import Context, has_stopped
from sds_agent.sds.acceptor import Connection
from sds_agent.sds.audience import Audience
from sds_agent.sds.catalog import Catalog
from sds_agent.sds.codec import MalformedMessageError, varied
from sds_agent.sds.journal import StreamJournal
from sds_agent.sds.protocol import (
    Absence,
    Acked,
    Action,
    DeltaRequest,
    Finish,
    Nacked,
    Resource,
    Respond,
    SotwRequest,
    StatusCode,
    View,
)
from sds_agent.sds.status import Nack, NameStatus, StreamStatus
from sds_agent.secrets.store import SecretStore

if TYPE_CHECKING:
    from sds_agent.sds.permissions import Rule, VisibleCatalog
    from sds_agent.sds.refusals import Replacements

FULL = Finish(StatusCode.RESOURCE_EXHAUSTED, detail="there are more streams than sds.limits.streams allows")
"""How a stream ends that gives way to another."""

BEHIND = 3 << 16
"""What further requests may cost on a stream from which the agent does not read just now: gRPC makes room for 64 KB,
and needs almost three times as much where they come in small pieces.
"""

R = TypeVar("R", SotwRequest, DeltaRequest)
R_contra = TypeVar("R_contra", contravariant=True)


class Session(Protocol[R_contra]):
    """What the sessions of both variants offer."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names subscribed to."""
        ...

    @property
    def sent(self) -> Mapping[str, str]:
        """The version last sent of each name that has one."""
        ...

    @property
    def acknowledged(self) -> Mapping[str, str]:
        """The version of each of these names that the client has acknowledged."""
        ...

    def version_in_use(self, name: str) -> str:
        """The version of the name that the client has acknowledged, the empty one where there is none."""
        ...

    @property
    def status(self) -> tuple[NameStatus, ...]:
        """The status of each name."""
        ...

    @property
    def stored(self) -> int:
        """Bytes of the names that the client made it remember when it last changed them."""
        ...

    def receive(self, request: R_contra, view: View) -> list[Action]:
        """Take a message of the client."""
        ...

    def resend(self, name: str) -> None:
        """Let the next `refresh` send the name although its version was sent."""
        ...

    def refresh(self, view: View) -> list[Action]:
        """Look for changes of the subscribed secrets."""
        ...


class Conversation(Struct, Generic[R], frozen=True):
    """A session of either variant, and how its messages are written."""

    session: Session[R]
    decode: Callable[[bytes], R]
    encode: Callable[[Respond], bytes]


class Stream(Generic[R]):
    """Runs one stream until the peer leaves, the session ends it, or the service drains it."""

    __slots__ = (
        "_at_work",
        "_audience",
        "_awaited",
        "_catalog",
        "_changed",
        "_context",
        "_conversation",
        "_draining",
        "_fault",
        "_instead",
        "_interrupted",
        "_journal",
        "_kept",
        "_last",
        "_names",
        "_push",
        "_reading",
        "_store",
        "_task",
        "account",
        "waits_since",
        "writing",
    )

    def __init__(
        self,
        context: Context,
        conversation: Conversation[R],
        *,
        audience: Audience["Stream[Any]"],
        catalog: "Catalog | VisibleCatalog",
        store: SecretStore,
        journal: StreamJournal,
        account: Connection | None = None,
    ) -> None:
        self.account = account or Connection("unknown")
        """The connection that it is on, which counts what its client makes the agent store."""
        self.writing = 0
        """Bytes of the answer that gRPC has not taken yet, because the client does not read."""
        self.waits_since: float | None = None
        """From when on it waits, by the event loop's clock, and the stream is not read from."""
        self._context = context
        self._conversation: Conversation[R] = conversation
        self._audience = audience
        self._catalog = catalog
        self._store = store
        self._journal = journal
        self._names: tuple[str, ...] = ()  # to which the stream subscribes, as the audience knows
        self._awaited: frozenset[str] = frozenset()  # those of them that have no secret yet, as the store knows
        self._task: asyncio.Task[object] | None = None  # gRPC's, which runs the handler
        self._push: asyncio.Task[None] | None = None
        self._reading = self._interrupted = False  # the handler waits for a message; it was told to wait no more
        self._at_work = False  # the handler answers a message
        self._kept = 0  # bytes of a message that it has read, and looks at once a push is written
        self._changed = False
        self._draining = False
        self._last: Finish | None = None
        self._fault: Exception | None = None
        self._instead: Replacements | None = None  # once the client has refused something

    @property
    def status(self) -> StreamStatus:
        """Who is at the other end, and the status of each name."""
        session = self._conversation.session
        found = session.status
        if self._instead is not None:
            found = self._instead.shown(session.names, found)
        if not isinstance(self._catalog, Catalog):
            found = self._catalog.marked(session.names, found)
        return self._journal.status(tuple(map(self._shown, session.names, found)))

    def _shown(self, name: str, status: NameStatus) -> NameStatus:
        waits, shown = name in self._awaited, status.name if status.name == name else self._catalog.shown(name)
        return replace(status, name=shown, waits=waits) if waits or shown != status.name else status

    def versions_in_use(self, name: str) -> tuple[str, ...]:
        """The version of the name that the client has acknowledged, and the one that was sent last, which it will use
        unless it refuses it.
        """
        session = self._conversation.session
        return session.version_in_use(name), session.sent.get(name, "")

    @property
    def connection(self) -> str:
        """gRPC's address for the connection that it is on."""
        return self._context.peer()

    def look(self, before: float) -> int:
        """Bytes that the client makes the agent keep beside that: what it said of itself, the names that it asked for,
        and requests that are not read while an answer waits. An answer that began to wait only after `before` is on its
        way.
        """
        behind = BEHIND if self.waits_since is not None and self.waits_since <= before else 0
        return self._journal.stored + self._conversation.session.stored + self._kept + behind

    def drain(self) -> None:
        """End the stream with OK: Envoy keeps what it has and opens another."""
        self._draining = True
        self._interrupt()

    def give_way(self, finish: Finish = FULL) -> None:
        """End the stream, because other clients need its place, or the memory that it takes."""
        self._last = finish
        self.drain()

    def is_concerned(self, name: str, before: "Rule | None") -> bool:
        """Whether its client may have the secret of this name now, and might not by the rule `before`, or the other way
        round.
        """
        return not isinstance(self._catalog, Catalog) and self._catalog.is_other(name, before)

    def due(self, name: str, version: str | None, now: float) -> None:
        """The secret of a name to which it subscribes has changed at that monotonic time; None where there is none to
        send. To be called for all streams and names before `push` is called for any.
        """
        if self._instead is not None:
            self._instead.drop(name)
        if not isinstance(self._catalog, Catalog) and isinstance(self._catalog[name], Absence):
            version = None  # the client may not have it
        sent = self._conversation.session.sent.get(name)
        due = None if version == sent else version
        if self.account.refusals is not None:
            self.account.refusals.changing(self, name, due)
        self._journal.due(name, due, now)
        self._changed = True

    def push(self) -> None:
        """Send what is due, as soon as the stream is not at work."""
        if self._changed and self._push is None and not (self._at_work or self._draining):
            self._push = asyncio.get_running_loop().create_task(self._send_changes())

    def take_back(self, name: str, version: str, count: int) -> str | None:
        """Send what the client acknowledged before this version of the name, which it has refused (see `refusals`)."""
        session = self._conversation.session
        former = self._catalog.former(name, session.version_in_use(name))
        if former is None or self._current(name, version) is None:
            return None
        nack = dict(zip(session.names, session.status, strict=True))[name].nacked
        if (nack is None or nack.version != version) and self._instead is not None:
            nack = self._instead.nack(name, version)  # of late the client has refused the former one too
        session.resend(name)
        self._replace(version, varied(former, count) if count else former, nack)
        return former.version

    def send_anew(self, name: str, version: str, count: int) -> bool:
        """Send this version of the name once more with other bytes (see `refusals`)."""
        found = self._current(name, version)
        if found is None:
            return False
        self._conversation.session.resend(name)
        self._replace(version, varied(found, count))
        return True

    async def run(self) -> Finish | None:
        """Talk until the end. Returns how to end the stream, or None for OK."""
        self._task = asyncio.current_task()
        try:
            finish = await self._converse()
            if self._fault is not None:
                raise self._fault
            return finish or self._last
        finally:
            if self._push is not None:
                self._push.cancel()
            self._push = self._task = None  # which know this stream: it is to be freed at once
            self._draining = True
            self._know(())
            self._store.acknowledgements.note(self, {})

    async def _converse(self) -> Finish | None:
        while not self._draining:
            message = await self._next()
            if self._push is not None:  # before the end too: gRPC must have no write under way then
                self._kept = 0 if message is None else len(message)
                await self._push
                self._kept = 0
            if message is None or self._draining:
                break
            self._at_work = True
            actions = self._received(message)
            del message  # an Envoy's first has 61 KB, and the next may be a day away
            finish = await self._perform(actions, changed=False)
            del actions  # it is empty, and would be kept for each stream, as long as that waits
            finish = finish or await self._refresh()
            self._at_work = False
            if finish is not None:
                return finish
        return None

    async def _next(self) -> bytes | None:
        """The next message; None once the peer has left or has nothing more to say, or the stream is to end."""
        self._reading = True
        try:
            # not by `next_message`, whose frame would be kept for each stream, as long as it waits
            message: object = await self._context.read()
        except asyncio.CancelledError:
            # gRPC may have cancelled the task too, because the peer has left
            if not self._interrupted or (self._task is not None and self._task.uncancel() > 0):
                raise
            return None
        except grpc.aio.BaseError as error:
            if not has_stopped(error):
                raise
            return None
        finally:
            self._reading = False
        return message if isinstance(message, bytes) else None  # else gRPC's EOF

    def _interrupt(self) -> None:
        """Let the handler not wait for another message."""
        if self._reading and not self._interrupted and self._task is not None:
            self._interrupted = True
            self._task.cancel()

    async def _send_changes(self) -> None:
        """What `push` begins. It raises nothing: the handler ends the stream."""
        try:
            finish = await self._refresh()
        except Exception as error:  # noqa: BLE001 - handed to the handler
            self._fault = error
            self.drain()
        else:
            if finish is not None:
                self._last = finish
                self.drain()
        finally:
            self._push = None

    def _received(self, message: bytes) -> list[Action]:
        try:
            request = self._conversation.decode(message)
        except MalformedMessageError as error:
            return [Finish(StatusCode.INVALID_ARGUMENT, detail=str(error))]
        session = self._conversation.session
        self._journal.met(request)
        stored = session.stored
        actions = session.receive(request, self._view)
        self.account.keep(session.stored - stored, len(message))
        self._heed(actions)
        if (names := session.names) != self._names:  # before the first wait: no change may pass between
            self._know(names)
        self._store.acknowledgements.note(self, session.acknowledged)
        return actions

    @property
    def _view(self) -> View:
        return self._catalog if self._instead is None else self._instead

    def _heed(self, actions: list[Action]) -> None:
        """Where the client refuses something, or has, do what makes it take the rest."""
        if self.account.refusals is None:
            if not any(isinstance(each, Nacked) for each in actions):
                return
            from sds_agent.sds.refusals import Refusals  # noqa: PLC0415 - Envoys seldom refuse

            self.account.refusals = Refusals()
        journal = self._journal
        for each in actions:
            if isinstance(each, Acked | Nacked):
                changed, sent_at = journal.has_change(each.nonce), journal.sent_at(each.nonce)
                self.account.refusals.replied(self, each, changed=changed, sent_at=sent_at, now=journal.monotonic())

    def _current(self, name: str, version: str) -> Resource | None:
        """What is served under the name; None if that has another version by now, or the stream does not subscribe to
        the name any more.
        """
        if name not in self._conversation.session.names:
            return None
        found = self._catalog[name]
        return found if isinstance(found, Resource) and found.version == version else None

    def _replace(self, version: str, resource: Resource, nack: Nack | None = None) -> None:
        """Send that in place of this version of its name."""
        if self._instead is None:
            from sds_agent.sds.refusals import Replacements  # noqa: PLC0415 - likewise

            self._instead = Replacements(self._catalog)
        self._instead.put(version, resource, nack)
        self._changed = True
        self.push()

    def _know(self, names: tuple[str, ...]) -> None:
        """Tell everybody who is concerned to which names the stream subscribes."""
        if self.account.refusals is not None:
            self.account.refusals.keep(self, names)
        if self._instead is not None:
            self._instead.keep(names)
        self._audience.move(self, self._names, names)
        self._names = names
        self._catalog.want(self, names)
        self._await()

    def _await(self) -> None:
        """Tell the store which of them have no secret yet."""
        awaited = frozenset(name for name in self._names if self._catalog[name] is Absence.PENDING)
        if awaited != self._awaited:
            self._awaited = awaited
            self._store.await_names(self, awaited)

    async def _refresh(self) -> Finish | None:
        """Send what has changed, and what changes meanwhile."""
        while self._changed and not self._draining:
            self._changed = False
            actions = self._conversation.session.refresh(self._view)
            self._await()  # before the answer, which the client may never read
            finish = await self._perform(actions, changed=True)
            if finish is not None:
                return finish
        return None

    async def _perform(self, actions: list[Action], *, changed: bool) -> Finish | None:
        """Do what the session says, and forget what it notes: that may have a megabyte of the client's, which may never
        read the answer. `changed`: it says so because a secret changed.
        """
        answers, finish = self._noted(actions)
        actions.clear()
        if finish is not None:
            return finish
        for answer in answers:
            if not await self._sent(answer, changed=changed):
                self.drain()
                return None
        return None

    def _noted(self, actions: list[Action]) -> tuple[list[Respond], Finish | None]:
        """Log what is no answer. Returns the answers, and how the stream is to end if it is."""
        answers = [action for action in actions if isinstance(action, Respond)]
        if len(answers) == len(actions):
            return answers, None
        notes = [action for action in actions if not isinstance(action, Respond)]
        if not isinstance(self._catalog, Catalog):
            notes = [said for each in notes for said in self._catalog.explained(each)]
        self._journal.note(notes)
        for note in notes:
            if isinstance(note, Finish):
                return [], note
        return answers, None

    async def _sent(self, answer: Respond, *, changed: bool) -> bool:
        """Send the answer. False if the peer left while the write waited for room."""
        if self._instead is not None and any(map(self._instead.has, answer.resources)):
            changed = False
        self._journal.sending(answer, changed=changed, by_peer=not self._is_of_the_store(answer))
        data = self._conversation.encode(answer)
        self.writing = len(data)
        self.waits_since = asyncio.get_running_loop().time()
        self.account.give(len(data))
        try:
            await self._context.write(data)
        except grpc.aio.InternalError:
            return False
        finally:
            self.writing = 0
            self.waits_since = None
        self._journal.sent(answer)
        if self._instead is not None:
            for each in self._instead.sent(answer.resources):
                self._journal.replaced(each)
        return True

    def _is_of_the_store(self, answer: Respond) -> bool:
        """Whether no peer can cause it: a name that is made on demand changes when a peer asks for it once more."""
        store = self._store
        return all(each.name in store for each in answer.resources) and all(name in store for name in answer.removed)
