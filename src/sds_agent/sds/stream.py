"""One gRPC stream: it carries bytes between the wire and a session, and the session's notes to the log.

gRPC's rules that shape this file: one read and one write at a time on a stream; a cancelled read loses the next
message, so one task reads and never times out; gRPC cancels the task of a stream whose peer has left; a status is
only sent by returning or aborting outside any task group.
"""

import asyncio
from collections.abc import Callable, Iterable, Mapping
from typing import Generic, Protocol, TypeVar

import grpc.aio
from msgspec import Struct

from sds_agent.sds.catalog import Catalog
from sds_agent.sds.codec import MalformedMessageError
from sds_agent.sds.journal import StreamJournal
from sds_agent.sds.protocol import (
    Absence,
    Action,
    DeltaRequest,
    Finish,
    Resource,
    Respond,
    SotwRequest,
    StatusCode,
    View,
)
from sds_agent.sds.status import NameStatus, StreamStatus
from sds_agent.secrets.store import SecretStore

FULL = Finish(StatusCode.RESOURCE_EXHAUSTED, detail="there are more streams than sds.limits.streams allows")
"""How a stream ends that gives way to another."""

Context = grpc.aio.ServicerContext[bytes, bytes]
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

    @property
    def status(self) -> tuple[NameStatus, ...]:
        """The status of each name."""
        ...

    def receive(self, request: R_contra, view: View) -> list[Action]:
        """Take a message of the client."""
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

    def __init__(
        self,
        context: Context,
        conversation: Conversation[R],
        *,
        catalog: Catalog,
        store: SecretStore,
        journal: StreamJournal,
    ) -> None:
        self._context = context
        self._conversation: Conversation[R] = conversation
        self._catalog = catalog
        self._store = store
        self._journal = journal
        self._wake = asyncio.Event()
        self._taken = asyncio.Event()
        self._message: bytes | None = None
        self._ended = False
        self._changed = False
        self._draining = False
        self._last: Finish | None = None

    @property
    def status(self) -> StreamStatus:
        """Who is at the other end, and the status of each name."""
        return self._journal.status(self._conversation.session.status)

    def drain(self) -> None:
        """End the stream with OK: Envoy keeps what it has and opens another."""
        self._draining = True
        self._wake.set()

    def give_way(self) -> None:
        """End the stream, because another client needs its place."""
        self._last = FULL
        self.drain()

    async def run(self) -> Finish | None:
        """Talk until the end. Returns how to end the stream, or None for OK."""
        async with asyncio.TaskGroup() as tasks:
            reader = tasks.create_task(self._read())
            try:
                with self._store.watching(self._on_change):
                    return await self._converse()
            finally:
                self._catalog.want(self, ())
                self._store.await_names(self, frozenset())
                self._store.acknowledgements.note(self, {})
                reader.cancel()

    async def _read(self) -> None:
        while True:
            message = await self._context.read()
            if not isinstance(message, bytes):  # gRPC's EOF: the peer has left or has nothing more to say
                self._ended = True
                self._wake.set()
                return
            self._message = message
            self._wake.set()
            await self._taken.wait()
            self._taken = asyncio.Event()

    def _on_change(self, changed: frozenset[str]) -> None:
        session = self._conversation.session
        if not changed.isdisjoint(session.names):
            self._journal.due(self._due(changed.intersection(session.names), session.sent))
            self._changed = True
            self._wake.set()

    def _due(self, names: Iterable[str], sent: Mapping[str, str]) -> dict[str, str | None]:
        """The versions that the session will send of these names, by name; None where it sends nothing."""
        found = {name: self._catalog[name] for name in names}
        versions = {name: each.version if isinstance(each, Resource) else None for name, each in found.items()}
        return {name: None if sent.get(name) == version else version for name, version in versions.items()}

    async def _converse(self) -> Finish | None:
        while not (self._draining or self._ended):
            await self._wake.wait()
            self._wake = asyncio.Event()
            finish = await self._perform(self._received(), changed=False)
            finish = finish or await self._perform(self._refreshed(), changed=True)
            if finish is not None:
                return finish
            self._catalog.want(self, self._conversation.session.names)
            self._store.await_names(self, self._pending())
            self._store.acknowledgements.note(self, self._conversation.session.acknowledged)
        return self._last

    def _received(self) -> list[Action]:
        message, self._message = self._message, None
        if message is None:
            return []
        self._taken.set()
        try:
            request = self._conversation.decode(message)
        except MalformedMessageError as error:
            return [Finish(StatusCode.INVALID_ARGUMENT, detail=str(error))]
        self._journal.met(request)
        return self._conversation.session.receive(request, self._catalog)

    def _refreshed(self) -> list[Action]:
        if self._ended or not self._changed:
            return []
        self._changed = False
        return self._conversation.session.refresh(self._catalog)

    async def _perform(self, actions: list[Action], *, changed: bool) -> Finish | None:
        """Do what the session says. `changed`: it says so because a secret changed."""
        self._journal.note(action for action in actions if not isinstance(action, Respond))
        for action in actions:
            if isinstance(action, Finish):
                return action
            if isinstance(action, Respond) and not await self._sent(action, changed=changed):
                self._ended = True
                return None
        return None

    async def _sent(self, answer: Respond, *, changed: bool) -> bool:
        """Send the answer. False if the peer left while the write waited for room."""
        self._journal.sending(answer, changed=changed and self._is_of_the_store(answer))
        try:
            await self._context.write(self._conversation.encode(answer))
        except grpc.aio.InternalError:
            return False
        self._journal.note([answer])
        return True

    def _is_of_the_store(self, answer: Respond) -> bool:
        """Whether no peer can cause it: a name that is made on demand changes when a peer asks for it once more."""
        names = (*(resource.name for resource in answer.resources), *answer.removed)
        return all(name in self._store.snapshot for name in names)

    def _pending(self) -> frozenset[str]:
        return frozenset(name for name in self._conversation.session.names if self._catalog[name] is Absence.PENDING)
