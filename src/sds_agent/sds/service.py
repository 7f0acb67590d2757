"""The gRPC methods of envoy.service.secret.v3.SecretDiscoveryService, on raw bytes."""

import asyncio
import itertools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from sds_agent import log
from sds_agent.clock import Clock, SystemClock
from sds_agent.rpc.calls import Context, next_message
from sds_agent.rpc.crowd import Crowd
from sds_agent.sds.acceptor import Connection, StoredBytes
from sds_agent.sds.audience import Audience
from sds_agent.sds.catalog import Catalog, OnDemand
from sds_agent.sds.codec import MalformedMessageError, decode, decode_delta, encode, encode_delta
from sds_agent.sds.counts import SdsCounts
from sds_agent.sds.journal import Journal, StreamJournal
from sds_agent.sds.protocol import (
    LONGEST_NAME,
    MOST_REFUSED,
    Absence,
    DeltaRequest,
    Finish,
    Note,
    Refused,
    Resource,
    Respond,
    SotwRequest,
    StatusCode,
    stored_in,
    unique,
)
from sds_agent.sds.sotw import SotwSession
from sds_agent.sds.status import NameStatus, StreamStatus
from sds_agent.sds.stream import BEHIND, FULL, Conversation, R, Stream
from sds_agent.secrets.store import SecretStore
from sds_agent.text import cut, listing, printable, quoted

if TYPE_CHECKING:
    from sds_agent.sds.departed import DepartedStream, Departures
    from sds_agent.sds.permissions import Permissions, Rules, VisibleCatalog
    from sds_agent.sds.surplus import Surplus

LOG = logging.getLogger(__name__)

SERVICE = "envoy.service.secret.v3.SecretDiscoveryService"

CROWD = 64
"""Streams that leave more behind, as they come and go, than it costs to tidy up."""

FETCH_TIMEOUT = 10.0
"""Seconds that FetchSecrets waits for a secret that is not issued yet."""

STORED = 512 << 20
"""Bytes that peers may make the agent store, by default."""

UNREAD = 5.0
"""Seconds for a stream that gives way to end, before its connection is ended: its client may not read. An answer that
waits for so long is taken as one that is not read: an agent that sends thousands, and is sent as many requests, hears
only after seconds that gRPC has taken one.
"""

LONGEST_DETAIL = 1000
"""Characters in a status message: a gRPC client closes a connection that sends it headers of more than 8 KB."""

FAULT = Finish(StatusCode.INTERNAL, detail="the agent has a fault; see its log")
"""How a call ends that meets an exception, whose own text might contain a key."""

_CODES = {
    StatusCode.INVALID_ARGUMENT: grpc.StatusCode.INVALID_ARGUMENT,
    StatusCode.NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    StatusCode.PERMISSION_DENIED: grpc.StatusCode.PERMISSION_DENIED,
    StatusCode.RESOURCE_EXHAUSTED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    StatusCode.UNAVAILABLE: grpc.StatusCode.UNAVAILABLE,
    StatusCode.INTERNAL: grpc.StatusCode.INTERNAL,
}


TOO_MUCH = Finish(
    StatusCode.RESOURCE_EXHAUSTED,
    detail="the agent stores more for its clients than sds.limits.stored_bytes allows, and most of it for yours: read "
    "the answers, end the requests that you begin, and ask for fewer names",
)
"""How a stream ends whose client makes the agent store too much."""


class _Fetch:
    """A FetchSecrets call that waits for its request, and then for its secrets, until its timeout; and then for its
    client to read the answer.
    """

    def __init__(
        self,
        context: Context,
        account: Connection,
        journal: StreamJournal,
        catalog: "Catalog | VisibleCatalog",
        seconds: float,
    ) -> None:
        self.timeout = asyncio.timeout(seconds)
        self.account = account
        self._context = context
        self._journal = journal
        self._catalog = catalog
        self._names: tuple[str, ...] = ()
        self._gave_way: Finish | None = None
        self.waits_since: float = asyncio.get_running_loop().time()
        """From when on it waits, by the event loop's clock: further requests are never read."""
        self.writing = 0
        """Bytes of its answer, once it goes out."""

    def met(self, message: bytes) -> SotwRequest:
        """Its request has come. Returns what is asked for: the rest may be large, and is kept no longer. Raises
        MalformedMessageError.
        """
        request = decode(message)
        self._journal.met(request)
        self._names = unique(request.names)
        self.account.keep(stored_in(self._names), len(message))
        return SotwRequest(names=self._names, type_url=request.type_url)

    def answers(self, count: int) -> None:
        """Its answer of so many bytes goes out, for which it has as long as its client gives it."""
        self.writing = count
        self.timeout.reschedule(None)

    @property
    def connection(self) -> str:
        """gRPC's address for the connection that it is on."""
        return self._context.peer()

    def look(self, before: float) -> int:
        """Bytes that the client makes the agent keep beside that: names, and further requests. A call that came only
        after `before` is answered in a moment.
        """
        behind = BEHIND if self.waits_since <= before else 0
        return self._journal.stored + stored_in(self._names) + behind

    @property
    def status(self) -> StreamStatus:
        """Who asks, and for what."""
        return self._journal.status(tuple(map(self._status_of, self._names)))

    def _status_of(self, name: str) -> NameStatus:
        return NameStatus(self._catalog.shown(name), waits=self._catalog[name] is Absence.PENDING)

    @property
    def ended(self) -> Finish:
        """How it ends once its time is over."""
        if self._gave_way is not None:
            return self._gave_way
        return Finish(StatusCode.UNAVAILABLE, self._names, "the secret is not issued yet; ask again")

    def drain(self) -> None:
        """End it with UNAVAILABLE, if it is not answered yet: the client may ask again."""
        if not self.writing and not self.timeout.expired():
            self.timeout.reschedule(0)

    def give_way(self, finish: Finish = FULL) -> None:
        """End it, because other clients need its place, or the memory that it takes."""
        self._gave_way = finish
        self.drain()


_Open = Stream[SotwRequest] | Stream[DeltaRequest] | _Fetch


class SecretDiscoveryService:
    """Serves a store to any number of streams."""

    def __init__(
        self,
        store: SecretStore,
        clock: Clock | None = None,
        *,
        most_streams: int = 10_000,
        most_names: int = 100,
        stored_bytes: int = STORED,
        fetch_timeout: float = FETCH_TIMEOUT,
        unread: float = UNREAD,
        files: OnDemand | None = None,
    ) -> None:
        self._store = store
        self._most_names = most_names
        self._departures: Departures | None = None
        self._fetch_timeout = fetch_timeout
        self._unread = unread
        self._catalog = Catalog(store, files)
        self._permissions: Permissions | None = None  # once there is a rule
        self.counts = SdsCounts()
        self._now = (clock or SystemClock()).now
        self._journal = Journal(
            now=self._now,
            most_streams=most_streams,
            most_names=most_names,
            counts=self.counts,
            known=lambda: store,
            changed=self._changed,
        )
        self._audience = Audience[Stream[Any]]()
        self._watch = ExitStack()  # left with the service itself
        self._watch.enter_context(store.watching(self._secrets_changed))
        self._most_streams = most_streams
        self._open = Crowd[_Open]()  # each under the process at its other end
        self._draining = False
        self._moves = 0
        self.crowd_moved = asyncio.Event()
        """Set once `CROWD` streams have come or gone. Who clears it is told of the next as many."""
        self._watchers: dict[object, Callable[[], None]] = {}
        self.connections: dict[str, Connection] = {}
        """Each connection, by gRPC's address for it. The acceptor keeps it."""
        self.stored = StoredBytes(stored_bytes, self._look)
        """What the connections' peers make the agent store."""
        self._surplus: Surplus[_Open] | None = None
        self._look_later: asyncio.TimerHandle | None = None
        self._giving_way: dict[_Open, asyncio.TimerHandle] = {}
        # Nonces are unique in the process, and by this prefix across restarts: an old stream's never match.
        self._nonce_prefix = os.urandom(4).hex()

    def handler(self) -> grpc.GenericRpcHandler:
        """The service as a handler for a grpc.aio server."""
        methods: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {
            "StreamSecrets": grpc.stream_stream_rpc_method_handler(self._stream_secrets),
            "DeltaSecrets": grpc.stream_stream_rpc_method_handler(self._delta_secrets),
            # declared to take a stream and to give one, which is the same on the wire: gRPC itself would keep calls
            # whose request has not come, and answers that their clients do not read, and neither would count against a
            # limit of ours
            "FetchSecrets": grpc.stream_stream_rpc_method_handler(self._fetch_secrets),
        }
        return grpc.method_handlers_generic_handler(SERVICE, methods)

    @property
    def streams(self) -> tuple[StreamStatus, ...]:
        """Every stream that is open and every Fetch that waits, in the order in which they came.

        Made when it is asked for, in some microseconds for each. A stream that had to give way is not among them.
        """
        return tuple(each.status for each in self._open)

    @property
    def open_streams(self) -> int:
        """How many `streams` there are."""
        return len(self._open)

    @property
    def departed(self) -> "tuple[DepartedStream, ...]":
        """The streams that ended last and whose Envoys have not come back; no Fetch. The last to end comes last."""
        if self._departures is None:
            return ()
        from sds_agent.sds.departed import gone  # noqa: PLC0415 - as in `_remember`

        return gone(self._departures.streams, self.streams)

    @contextmanager
    def watching(self, watcher: Callable[[], None]) -> Iterator[None]:
        """Call `watcher` after each change of `streams`, until the context is left: one opens, subscribes, is answered,
        replies or ends. It must not wait or raise.
        """
        key = object()
        self._watchers[key] = watcher
        try:
            yield
        finally:
            del self._watchers[key]

    def permit(self, rules: "Rules") -> None:
        """Let clients have secrets by these rules from now on. Streams that a change concerns are sent what they may
        have now. They end with OK where there were no rules before: their Envoys open others.
        """
        if self._permissions is not None:
            before = self._permissions.replace(rules)
            if before:
                self._journal.forget_refusals()
            self._push(frozenset(before), lambda stream, name: stream.is_concerned(name, before[name]))
        elif rules:
            from sds_agent.sds.permissions import Permissions  # noqa: PLC0415 - most configurations have no rules

            self._permissions = Permissions(rules)
            self.dismiss()

    def _seen_by(self, account: Connection) -> "Catalog | VisibleCatalog":
        """What a client may have that is on this connection."""
        if self._permissions is None:
            return self._catalog
        from sds_agent.sds.permissions import VisibleCatalog, process_of  # noqa: PLC0415 - as in `permit`

        return VisibleCatalog(self._catalog, self._permissions, process_of(account.peer))

    def _secrets_changed(self, names: frozenset[str]) -> None:
        self._catalog.change(names, self._audience, self._versions_in_use)
        self._push(names)

    def _push(self, names: frozenset[str], is_concerned: Callable[[Stream[Any], str], bool] | None = None) -> None:
        """Have the streams that subscribe to these names, and are concerned, send what is served under them now."""
        now, concerned = self._journal.monotonic(), dict[Stream[Any], None]()
        for name in names:
            streams = self._audience.of(name)
            if is_concerned is not None:
                streams = tuple(each for each in streams if is_concerned(each, name))
            if streams:
                found = self._catalog[name]
                version = found.version if isinstance(found, Resource) else None
                for each in streams:
                    each.due(name, version, now)
                concerned.update(dict.fromkeys(streams))
        for each in concerned:  # once the journal knows every stream that this push is for
            each.push()

    def _moved(self) -> None:
        self._moves += 1
        if self._moves % CROWD == 0:
            self.crowd_moved.set()
        self._changed()

    def _changed(self) -> None:
        if self._watchers:
            for watcher in tuple(self._watchers.values()):
                watcher()

    def drain(self) -> None:
        """End every stream with OK, and each that is opened after this. A Fetch that waits ends with UNAVAILABLE."""
        self._draining = True
        self.dismiss()
        self._journal.report_left_out(at_the_end=True)

    def report_left_out(self) -> None:
        """Log what no stream causes: how many lines were left out, and pushes that some clients did not reply to. To be
        called every few seconds.
        """
        self._journal.report_left_out()
        self._journal.report_pushes()

    def release_former(self) -> None:
        """Drop the former secrets that no client uses any more. To be called every few seconds."""
        self._catalog.release(self._versions_in_use)

    def _versions_in_use(self, name: str) -> frozenset[str]:
        streams = self._audience.of(name)
        return frozenset(version for each in streams for version in each.versions_in_use(name))

    def dismiss(self) -> None:
        """End the streams that are open with OK; their Envoys open others."""
        for each in self._open:
            each.drain()

    async def _stream_secrets(self, _requests: object, context: Context) -> None:
        def talk(nonces: Callable[[], str]) -> Conversation[SotwRequest]:
            session = SotwSession(iter(nonces, None), most_names=self._most_names)
            return Conversation(session, decode, encode)

        await _end(context, await self._run("StreamSecrets", context, talk))

    async def _delta_secrets(self, _requests: object, context: Context) -> None:
        from sds_agent.sds.delta import DeltaSession  # noqa: PLC0415 - few Envoys use this variant

        def talk(nonces: Callable[[], str]) -> Conversation[DeltaRequest]:
            session = DeltaSession(iter(nonces, None), most_names=self._most_names)
            return Conversation(session, decode_delta, encode_delta)

        await _end(context, await self._run("DeltaSecrets", context, talk))

    async def _run(
        self, method: str, context: Context, talk: Callable[[Callable[[], str]], Conversation[R]]
    ) -> tuple[grpc.StatusCode, str] | None:
        """Run a stream. Returns how to end it, or None for OK."""
        account = self._account(context)
        peer, catalog = account.holder, self._seen_by(account)
        journal = self._journal.open(method, peer)
        count = itertools.count(1)
        conversation = talk(lambda: f"{self._nonce_prefix}.{journal.number:x}.{next(count):x}")
        stream = Stream(
            context,
            conversation,
            audience=self._audience,
            catalog=catalog,
            store=self._store,
            journal=journal,
            account=account,
        )
        if account.gives_way:
            stream.give_way(TOO_MUCH)
        elif self._draining:
            stream.drain()
        finish: Finish | None = None
        try:
            with self._place(stream, peer):
                finish = await stream.run()
        except Exception as error:  # noqa: BLE001 - a bug that one stream meets must not end the others
            log.fault(LOG, f"SDS {method}", error)
            finish = FAULT
        finally:
            journal.left()
            words = "" if finish is None else _explained(finish, catalog)
            self._remember(stream, words, () if finish is None else finish.names)
        return None if finish is None else (_CODES[finish.code], words)

    def _remember(self, stream: Stream[Any], cause: str, refused: tuple[str, ...]) -> None:
        """Remember a stream that has ended, for views; not a probe, which asks for nothing."""
        status = stream.status
        if not status.names and not refused:
            return
        if self._departures is None:
            from sds_agent.sds.departed import Departures  # noqa: PLC0415 - no stream ends before the first secret

            self._departures = Departures()
        names = tuple(map(self._catalog.shown, refused))
        self._departures.note(status, self._now(), printable(cause, log.LONGEST_VALUE), names)

    def _account(self, context: Context) -> Connection:
        return self.connections.get(context.peer()) or Connection("unknown")

    @contextmanager
    def _place(self, new: _Open, peer: str) -> Iterator[None]:
        """Count it among the streams that there may be, inside this context; where there are too many, one ends."""
        if (gives_way := self._open.admit(new, peer, self._most_streams)) is not None:
            self._open.leave(gives_way)
            gives_way.give_way()
            later = asyncio.get_running_loop().call_later
            self._giving_way[gives_way] = later(self._unread, self._end_connection_of, gives_way)
        self._moved()
        try:
            yield
        finally:
            if (timer := self._giving_way.pop(new, None)) is not None:
                timer.cancel()
            self._open.leave(new)
            new.account.ended()
            self._moved()

    def _look(self) -> None:
        """Find out what peers really make the agent store; who stores too much, loses a connection."""
        if self._surplus is None:
            from sds_agent.sds.surplus import Surplus  # noqa: PLC0415 - no honest node makes the agent store so much

            self._surplus = Surplus[_Open](self.stored, self._end_for_surplus)
        loop, calls = asyncio.get_running_loop(), (*self._open, *self._giving_way)
        before = loop.time() - self._unread
        self._surplus.look(self.connections.values(), calls, before)
        # not for one that has counted: it may wait for ever, and a look takes time for each connection
        waits = any(each.waits_since is not None and each.waits_since > before for each in calls)
        if self._look_later is None and waits:
            self._look_later = loop.call_later(self._unread, self._look_once_more)

    def _look_once_more(self) -> None:
        """Perhaps what had just begun to wait at the last look waits still."""
        self._look_later = None
        self._look()

    def _end_for_surplus(self, call: _Open) -> None:
        self._open.leave(call)
        call.give_way(TOO_MUCH)

    def _end_connection_of(self, stream: _Open) -> None:
        """gRPC ends no call while an answer waits to be read, and would keep one that had to give way for ever."""
        self.hang_up(stream.connection, "it does not read the answers on streams that had to give way to others")

    def holder(self, connection: str) -> str:
        """The process at the other end of a connection, by gRPC's address for it; that address where it is over."""
        found = self.connections.get(connection)
        return connection if found is None else found.holder

    def hang_up(self, connection: str, why: str) -> None:
        """End a connection, by gRPC's address for it, and log why."""
        if (found := self.connections.get(connection)) is not None:
            found.end(why)

    async def _fetch_secrets(self, _requests: object, context: Context) -> None:
        await _end(context, await self._fetched(context))

    async def _fetched(self, context: Context) -> tuple[grpc.StatusCode, str] | None:
        account = self._account(context)
        journal = self._journal.open("FetchSecrets", account.holder)
        finish: Finish | None = FAULT
        try:
            finish = await self._fetch(context, account, journal)
        except Exception as error:  # noqa: BLE001 - likewise
            log.fault(LOG, "SDS FetchSecrets", error)
        finally:
            journal.end()
        return None if finish is None else (_CODES[finish.code], _explained(finish, self._seen_by(account)))

    async def _fetch(self, context: Context, account: Connection, journal: StreamJournal) -> Finish | None:
        """Answer the call. Returns how to end it where it gets no answer."""
        if account.gives_way:
            journal.note([TOO_MUCH])
            return TOO_MUCH
        seconds = self._time_for_fetch(context.time_remaining())
        call = _Fetch(context, account, journal, self._seen_by(account), seconds)
        try:
            async with call.timeout:
                with self._place(call, account.holder):
                    request = call.met(await _only(context))
                    self._changed()
                    answer = await self._answer(request, account)
                    if isinstance(answer, Respond):
                        data = encode(answer)
                        call.answers(len(data))
                        account.give(len(data))
                        journal.sending(answer, changed=False)
                        journal.note([*self._left_out(request, answer, account), answer])
                        with suppress(grpc.aio.InternalError):  # the client has left
                            await context.write(data)
                        return None
        except MalformedMessageError as error:
            answer = Finish(StatusCode.INVALID_ARGUMENT, detail=str(error))
        except TimeoutError:
            answer = call.ended
        journal.note([answer])
        return answer

    def _left_out(self, request: SotwRequest, answer: Respond, account: Connection) -> list[Note | Finish]:
        """What to log of names that are not in the answer, of which it says nothing."""
        answered = {each.name for each in answer.resources}
        left_out = tuple(name for name in request.names if name not in answered)
        if not left_out:
            return []
        catalog, refused = self._seen_by(account), Refused(left_out)
        return [refused] if isinstance(catalog, Catalog) else catalog.explained(refused)

    def _time_for_fetch(self, remaining: float | None) -> float:
        """Seconds until the answer: before the client's own deadline, so that it gets our status, not its time-out."""
        return self._fetch_timeout if remaining is None else min(self._fetch_timeout, remaining * 0.9)

    async def _answer(self, request: SotwRequest, account: Connection) -> Respond | Finish:
        from sds_agent.sds.fetch import fetch  # noqa: PLC0415 - Envoys open streams

        changed, caller = asyncio.Event(), object()
        names = frozenset(request.names[: self._most_names])  # more are refused

        def look(others: frozenset[str]) -> None:
            if not names.isdisjoint(others):
                changed.set()

        catalog = self._seen_by(account)
        catalog.want(caller, names)
        try:
            with self._store.watching(look):
                while (answer := fetch(request, catalog, most_names=self._most_names)) is None:
                    allowed = names if isinstance(catalog, Catalog) else catalog.allowed(names)
                    self._store.await_names(caller, allowed)
                    await changed.wait()
                    changed.clear()
                    catalog = self._seen_by(account)  # it may have been told of the change before the first rule came
        finally:
            catalog.want(caller, ())
            self._store.await_names(caller, frozenset())
        if isinstance(catalog, Catalog) or not isinstance(answer, Finish):
            return answer
        return catalog.denied(answer)


def _explained(finish: Finish, catalog: "Catalog | VisibleCatalog") -> str:
    return explain(finish, catalog.names, catalog.directories)


async def _end(context: Context, end: tuple[grpc.StatusCode, str] | None) -> None:
    """End the call so, of which nothing else may be left by then: its client may not read the end."""
    if end is not None:
        await context.abort(*end)


async def _only(context: Context) -> bytes:
    """The only message of a call. Raises MalformedMessageError where there is none."""
    if (message := await next_message(context)) is None:
        raise MalformedMessageError("the call ended without a DiscoveryRequest")
    return message


def explain(finish: Finish, offered: tuple[str, ...], directories: tuple[Path, ...] = ()) -> str:
    """The status message: which names are not served, and which are; in ASCII, and bounded whatever the peer sent."""
    if finish.detail:
        return finish.detail
    asked = listing(finish.names, MOST_REFUSED, LONGEST_NAME)
    served = ", ".join(quoted(name, LONGEST_NAME) for name in offered[: LONGEST_DETAIL // 4])
    files = ", ".join(quoted(str(each), LONGEST_NAME) for each in directories)
    of_files = [f"file-cert: and file-root: names of files below {files}"] if files else []
    known = ", and ".join([*([served] if served else []), *of_files])  # of thousands the first may be for others
    return cut(f"no secret named {asked}{f'; this agent serves {known}' if known else ''}", LONGEST_DETAIL)
