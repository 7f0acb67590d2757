"""The state of an open stream as frozen values, for views and tests.

A session remembers what its client said of each name (`Replies`), and a stream's journal who the client is and when it
was answered (`StreamRecord`). Both are pure: the time is an argument. `SecretDiscoveryService.streams` makes a
`StreamStatus` of the two when it is read, so that a push does no work for it.

What a peer wrote is shown as the log shows it: cut to a bounded length, and in printable ASCII (`text.printable`), so
that a view can print it as it is; a name that the configuration has too is shown as it is there. No field holds key
material: a version is a hash of what is public.
"""

from collections.abc import Container, Iterable, Mapping
from datetime import datetime
from sys import getsizeof

from msgspec import Struct

from sds_agent import log
from sds_agent.sds.protocol import Acked, Nacked
from sds_agent.text import printable

MOST_TIMED = 32
"""Answers of a stream whose time is remembered until the client replies. One that never does costs no more memory."""


class Nack(Struct, frozen=True):
    """A version that the client refused (a NACK), and the reason that it gave."""

    version: str
    reason: str


class NameStatus(Struct, frozen=True):
    """The versions of one subscribed name on a stream.

    `sent` is the newest that was sent; None while the name waits for its secret, and for a name that is not served
    (SotW). `acked` is the version in use, as far as this stream knows. `nacked` is the newest NACK, until an ACK
    follows it. Over Delta the empty version stands for the answer that the name is not served. `waits`: it is served,
    and has no secret yet, or has none any more. `denied` is whether the client's process may not have it.
    """

    name: str
    sent: str | None = None
    acked: str | None = None
    nacked: Nack | None = None
    waits: bool = False
    denied: bool = False


class StreamStatus(Struct, frozen=True):
    """One open stream, or one Fetch that waits for its secret.

    `number` is the stream's in the log, `method` the name of the gRPC method. `node`, `cluster` and `version` are what
    the client says it is, empty where it does not say: the version of Envoy, or name and version of another program.
    `peer` is the process at the other end of the connection, as the kernel says: "pid 7 (uid 101)", or the connection's
    address for a process in a PID namespace that the agent does not see. `ack_ms` are the milliseconds from the last
    response with an ACK to that ACK.
    """

    number: int
    method: str
    node: str
    cluster: str
    peer: str
    names: tuple[NameStatus, ...]
    connected_at: datetime
    responded_at: datetime | None
    ack_ms: float | None
    version: str = ""


class Replies:
    """What the client said of the names that it subscribes to. Other names take no memory."""

    __slots__ = ("_acked", "_nacked")

    def __init__(self) -> None:
        self._acked: dict[str, str] = {}
        self._nacked: dict[str, Nack] = {}

    def take(self, reply: Acked | Nacked, subscribed: Container[str]) -> None:
        """Remember an ACK or NACK, as far as it is about names that are still subscribed."""
        reason = printable(reply.reason, log.LONGEST_VALUE) if isinstance(reply, Nacked) else None
        for name, version in reply.versions.items():
            if name not in subscribed:
                continue
            if reason is not None:
                self._nacked[name] = Nack(version, reason)
            else:
                self._acked[name] = version
                self._nacked.pop(name, None)

    def forget(self, names: Iterable[str]) -> None:
        """These names were taken out of the subscription, or the client has lost what it had of them."""
        for name in names:
            self._acked.pop(name, None)
            self._nacked.pop(name, None)

    def version_in_use(self, name: str) -> str:
        """The version of the name that the client has acknowledged, the empty one where there is none."""
        return self._acked.get(name, "")

    def acknowledged(self, names: Iterable[str]) -> Mapping[str, str]:
        """The version of each of these names that the client has acknowledged, the empty one where there is none."""
        return {name: self._acked.get(name, "") for name in names}

    def status(self, names: Iterable[str], sent: Mapping[str, str]) -> tuple[NameStatus, ...]:
        """The status of these names; `sent` has the versions last sent."""
        acked, nacked = self._acked, self._nacked
        return tuple(
            NameStatus(printable(n, log.LONGEST_VALUE), sent.get(n), acked.get(n), nacked.get(n)) for n in names
        )


class _Timed(Struct, frozen=True):
    """When an answer was sent, on the monotonic clock, whether because a secret changed and no peer can cause that, and
    whether it had any secret that had changed.
    """

    at: float
    changed: bool
    has_change: bool


class StreamRecord:
    """Who a stream's client is, and when it was answered."""

    __slots__ = (
        "_ack_ms",
        "_cluster",
        "_connected_at",
        "_responded_at",
        "_timed",
        "method",
        "node",
        "number",
        "peer",
        "version",
    )

    def __init__(self, number: int, method: str, peer: str, now: datetime) -> None:
        self.number = number
        self.method = method
        self.peer = peer
        self.node = ""
        self.version = ""
        self._cluster = ""
        self._connected_at = now
        self._responded_at: datetime | None = None
        self._ack_ms: float | None = None
        self._timed: dict[str, _Timed] = {}  # by nonce: the answers without a reply

    def met(self, node: str, cluster: str, version: str = "") -> None:
        """Note who the client says it is. Only the first message of a stream is sure to say so."""
        if node:
            self.node, self._cluster, self.version = node, cluster, version

    @property
    def stored(self) -> int:
        """Bytes of what the client said of itself."""
        return getsizeof(self.node) + getsizeof(self._cluster) + getsizeof(self.version)

    def sending(self, nonce: str, *, changed: bool, has_change: bool = False, now: datetime, monotonic: float) -> None:
        """The answer of that nonce goes out at this moment (see `_Timed`)."""
        self._responded_at = now
        self._timed[nonce] = _Timed(monotonic, changed, has_change)
        if len(self._timed) > MOST_TIMED:
            del self._timed[next(iter(self._timed))]

    def is_change(self, nonce: str) -> bool:
        """Whether the answer of that nonce, which has no reply yet, went out because a secret changed."""
        timed = self._timed.get(nonce)
        return timed is not None and timed.changed

    def has_change(self, nonce: str) -> bool:
        """Whether the answer of that nonce, which has no reply yet, had a secret that had changed."""
        timed = self._timed.get(nonce)
        return timed is not None and timed.has_change

    def sent_at(self, nonce: str) -> float | None:
        """The monotonic time of the answer of that nonce, which has no reply yet; None where it is forgotten."""
        timed = self._timed.get(nonce)
        return None if timed is None else timed.at

    def replied(self, reply: Acked | Nacked, *, monotonic: float) -> float | None:
        """The client has replied to an answer: the milliseconds since it was sent, or None if they are forgotten."""
        timed = self._timed.pop(reply.nonce, None)
        if timed is None:
            return None
        milliseconds = round((monotonic - timed.at) * 1000, 1)
        if isinstance(reply, Acked):
            self._ack_ms = milliseconds
        return milliseconds

    def status(self, names: tuple[NameStatus, ...]) -> StreamStatus:
        """The stream's status; the session gives that of its names."""
        return StreamStatus(
            number=self.number,
            method=self.method,
            node=printable(self.node, log.LONGEST_VALUE),
            cluster=printable(self._cluster, log.LONGEST_VALUE),
            peer=self.peer,
            names=names,
            connected_at=self._connected_at,
            responded_at=self._responded_at,
            ack_ms=self._ack_ms,
            version=printable(self.version, log.LONGEST_VALUE),
        )
