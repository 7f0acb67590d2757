"""Accepts the peers on the agent's socket, and relays each to gRPC's own (see `relay`).

gRPC would accept them itself, without a log line when no descriptor is left and without a limit on their number. So it
listens at a socket without a name, which only this process can reach. Its end of each relay has an abstract address
that the kernel chooses. gRPC gives that address as the call's peer, and it leads to the process at the other end.
"""

import asyncio
import logging
import os
import socket
import struct
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from sds_agent import log
from sds_agent.budget import Buckets, Budget, Rate
from sds_agent.rpc.crowd import Crowd
from sds_agent.rpc.frames import ENHANCE_YOUR_CALM, Bounds, Inspection, Messages
from sds_agent.sds.relay import Relay

if TYPE_CHECKING:
    from sds_agent.sds.refusals import Refusals

LOG = logging.getLogger(__name__)

BACKLOG = 4096
RETRY_AFTER = 0.05
"""Seconds from an accept that failed to the next one."""
CALLS = Rate(1000, 200)
"""Calls that the connections of one process may begin before the relays read from it less often. Each call costs the
event loop half a millisecond, so a process that makes calls without end takes no more than a tenth of it.
"""
MOST_PROCESSES = 10_000
A_MINUTE = Rate(1, 1 / 60)
"""How often the log says that there are too many connections, or that one of a process was ended."""
BOUNDS = Bounds(block=16 << 10, frames=1 << 62)
"""gRPC refuses a header block that is larger uncompressed. Frames have no limit, because a connection may stay open for
months; gRPC itself stops reading from a peer that makes it answer and does not read.
"""
STUCK = 3 << 18
"""Bytes that a connection can cost whose peer does not read, beside answers: in the sockets between it and gRPC, and
in gRPC, which replies to its pings.
"""
STUCK_IN_GRPC = 3 << 16
"""What of that is in gRPC: measured with grpcio 1.85, it has buffers of 180 KB for a peer that only pings."""
ENDED = 3 << 14
"""Bytes that a call costs which the agent has ended, and whose end gRPC cannot send because the peer does not read.
Measured with grpcio 1.85: 20 to 27 KB, and its headers.
"""
_CREDENTIALS = struct.Struct("iII")
"""A process, its user and its group (struct ucred, unix(7))."""


def _nothing(_why: str | None) -> None:
    pass


class StoredBytes:
    """The bytes that all peers together make the agent store, rather too many: those of requests that have begun and
    not ended, and, in place of what is kept of the others, all that came in and went out since the last `look`.
    """

    def __init__(self, most: int, look: Callable[[], None]) -> None:
        self.most = most
        self.unfinished = 0
        self._look = look
        self._others = 0
        self._look_at = most

    def add(self, count: int) -> None:
        """So many bytes have come in, or go out as an answer."""
        self._others += count
        self._check()

    def move(self, count: int) -> None:
        """Requests that have begun and not ended have so many bytes more. Those of one that ends may be kept."""
        self.unfinished += count
        if count > 0:
            self._check()
        else:
            self._others -= count

    def found(self, others: int) -> None:
        """So much is really kept of the others. The next look comes once a quarter of `most` has been added."""
        self._others = others
        self._look_at = max(self.most, others + self.unfinished + self.most // 4)

    def _check(self) -> None:
        if self._others + self.unfinished > self._look_at:
            self._look()


class Connection:
    """A connection: the process at its other end, what ends it at once (with a cause for the log, or without a word),
    and what its peer makes the agent store.

    `unfinished` are the bytes of requests that have begun and not ended. Where it `gives_way`, gRPC gets nothing more
    of what it sends, and none of that counts any more.
    """

    __slots__ = (
        "_given",
        "_messages",
        "_passed",
        "_relay",
        "_stored",
        "_was_stuck",
        "end",
        "gives_way",
        "holder",
        "refusals",
        "unfinished",
    )

    def __init__(
        self, holder: str, end: Callable[[str | None], None] = _nothing, *, stored: StoredBytes | None = None
    ) -> None:
        self.holder = holder
        self.end = end
        self.unfinished = 0
        self.gives_way = False
        self.refusals: Refusals | None = None
        """What its Envoy refuses, once that has refused something."""
        self._stored = stored
        self._relay: Relay | None = None
        self._messages: Messages | None = None
        self._given = 0  # bytes of answers, since the last look
        self._was_stuck = False  # at the last look
        self._passed = 0  # bytes of answers that the peer had been sent at the last look

    def relayed(self, relay: Relay, messages: Messages) -> None:
        """This is what relays it, and what sees the messages pass."""
        self.end, self._relay, self._messages = relay.close, relay, messages
        relay.on_stuck(self._stuck)

    @property
    def peer(self) -> socket.socket | None:
        """The socket to the peer, while it is open."""
        return None if self._relay is None else self._relay.peer

    def over(self) -> None:
        """It is over. What relayed it is to be freed at once, and not when Python next looks for cycles."""
        self._move(-self.unfinished)
        self.end, self._relay, self._messages = _nothing, None, None

    def came(self, count: int) -> None:
        """The peer has sent so many bytes."""
        if self._stored is not None and not self.gives_way:
            self._stored.add(count)

    def keep(self, count: int, came: int) -> None:
        """Of a request of `came` bytes the agent keeps `count`: more than came, where it has many short names."""
        if count > came:
            self.came(count - came)

    def called(self) -> None:
        """The peer has begun a call."""
        if self.is_stuck:
            self.came(ENDED)

    def ended(self) -> None:
        """The agent has ended a call. Where the peer does not read, gRPC keeps it."""
        if self.is_stuck:
            self.came(ENDED)

    def give(self, count: int) -> None:
        """gRPC is given an answer of so many bytes."""
        self._given += count
        if self._stored is not None:
            self._stored.add(count)

    def moved(self, count: int) -> None:
        """Requests that have begun and not ended have so many bytes more."""
        if not self.gives_way:
            self._move(count)

    def _stuck(self) -> None:
        self.came(STUCK)

    def _move(self, count: int) -> None:
        self.unfinished += count
        if self._stored is not None:
            self._stored.move(count)

    @property
    def is_stuck(self) -> bool:
        """Whether the peer does not take what it is sent."""
        return self._relay is not None and self._relay.is_stuck

    def unread(self, writing: int, calls: int) -> int:
        """How many bytes of answers wait for the peer, `writing` of which gRPC has not taken yet; and what it costs to
        keep calls that the agent has ended already, because `calls` are all that it knows. To be called at each look.

        What gRPC has taken it sends in a moment, unless the peer does not read. Then all counts that it was given since
        the last look and has not sent. What it has sent may wait in the peer's socket.
        """
        if self._relay is None or self._messages is None:
            return writing
        passed = self._messages.answers
        was_stuck, self._was_stuck = self._was_stuck, self.is_stuck
        if not self._was_stuck:
            self._given, self._passed = writing, passed
            return writing + self._relay.waiting
        # one that is stuck for a moment takes a large answer
        in_grpc = STUCK_IN_GRPC + ENDED * max(0, self._messages.calls - calls) if was_stuck else 0
        return max(writing, self._given - (passed - self._passed)) + self._relay.waiting + in_grpc

    def give_way(self) -> None:
        """Discard what the peer sends, and count nothing that it makes the agent store."""
        self._move(-self.unfinished)
        self.gives_way = True
        if self._relay is not None:
            self._relay.discard()

    def refuse(self) -> None:
        """End it. gRPC could not say to calls how they end while their answers wait to be read: they are reset."""
        if self._relay is not None and self._messages is not None:
            self._relay.say(self._messages.resets(ENHANCE_YOUR_CALM))
        self.end(None)


class UnixAcceptor:
    """Accepts from `begin` on. At most `most` connections are open: of the process that has most, the oldest gives way.

    `backend` is a descriptor of gRPC's socket; the acceptor owns it from now on. `connections` gets each
    connection, by gRPC's address for it, for as long as it is open; what their peers send counts in `stored`.
    """

    def __init__(
        self,
        listener: socket.socket,
        backend: int,
        most: int,
        connections: dict[str, Connection],
        stored: StoredBytes | None = None,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        self._backend = backend
        self._connections = connections
        self._stored = stored
        self._most = most
        self._placed = Crowd[Relay]()  # each under its process; one that had to give way is out
        self._relays: set[Relay] = set()
        self._emptied = asyncio.Event()
        self._emptied.set()
        self._failed = log.LogOnChange(LOG, "not_accepted")
        self._calls = Buckets(CALLS, MOST_PROCESSES)
        self._full = Budget(A_MINUTE, A_MINUTE, most_keys=1)
        self._ended = Budget(A_MINUTE, Rate(20, 20 / 60), most_keys=100)
        self._again: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Accept from now on."""
        self._listener.setblocking(False)
        self._loop.add_reader(self._listener.fileno(), self._accept)

    def close(self) -> None:
        """Accept no more. Connections that are open stay open."""
        if self._again is not None:
            self._again.cancel()
        if self._listener.fileno() >= 0:
            self._loop.remove_reader(self._listener.fileno())
            self._listener.close()
            os.close(self._backend)

    async def emptied(self) -> None:
        """Wait until no connection is open."""
        await self._emptied.wait()

    def abort(self) -> None:
        """Close every connection at once."""
        for relay in tuple(self._relays):
            relay.close()

    def _accept(self) -> None:
        """Accept one connection; the event loop calls again for the next. The way to gRPC is opened first: a peer that
        cannot be relayed yet waits in the kernel's queue.
        """
        try:
            back = self._connect_back()
        except OSError as error:
            self._pause(error)
            return
        try:
            peer, _ = self._listener.accept()
        except OSError as error:
            back.close()
            if not isinstance(error, BlockingIOError | ConnectionAbortedError):
                self._pause(error)
            return
        self._failed.resolved()
        self._relay(peer, back)

    def _connect_back(self) -> socket.socket:
        back = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            back.setblocking(False)
            back.bind("")  # to an address that the kernel chooses (unix(7), autobind)
            back.connect(f"/proc/self/fd/{self._backend}")
        except BaseException:
            back.close()
            raise
        return back

    def _pause(self, error: OSError) -> None:
        if not isinstance(error, BlockingIOError):  # which says that gRPC has not accepted the last ones yet
            self._failed.report(error.strerror or str(error))
        self._loop.remove_reader(self._listener.fileno())
        self._again = self._loop.call_later(RETRY_AFTER, self.begin)

    def _relay(self, peer: socket.socket, back: socket.socket) -> None:
        peer.setblocking(False)
        address = f"unix-abstract:{back.getsockname()[1:].decode()}"
        holder = _process(peer) or address

        def closed(relay: Relay, why: str | None) -> None:
            self._connections.pop(address, None)
            connection.over()
            self._placed.leave(relay)
            self._relays.discard(relay)
            if not self._relays:
                self._emptied.set()
            if why is not None:
                self._report_ended(holder, why)

        def pace(calls: int) -> float:
            now = time.monotonic()
            return self._calls.of(holder, now).overdraw(now, calls)

        connection = Connection(holder, stored=self._stored)
        messages = Messages(connection)
        relay = Relay(peer, back, Inspection(BOUNDS, messages), pace, closed)
        connection.relayed(relay, messages)
        self._connections[address] = connection
        self._relays.add(relay)
        self._emptied.clear()
        gives_way = self._placed.admit(relay, holder, self._most)
        relay.begin()
        if gives_way is not None:
            self._report_full(holder)
            gives_way.close()

    def _report_full(self, holder: str) -> None:
        if self._full.take("", time.monotonic()):
            log.event(LOG, "too_many_connections", level=logging.WARNING, most=self._most, newest=holder)

    def _report_ended(self, holder: str, why: str) -> None:
        if self._ended.take(holder, time.monotonic()):
            log.event(LOG, "connection_ended", level=logging.WARNING, holder=holder, cause=why)


def credentials(peer: socket.socket) -> tuple[int, int, int]:
    """The process that connected, its user and its group, as ids at that moment; 0 for a process that lies in a PID
    namespace which this one does not see. Raises OSError.
    """
    process, user, group = _CREDENTIALS.unpack(
        peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    )
    return process, user, group


def _process(peer: socket.socket) -> str | None:
    """The process that connected, if it is in a PID namespace that this one sees."""
    process, user, _ = credentials(peer)
    return f"pid {process} (uid {user})" if process else None
