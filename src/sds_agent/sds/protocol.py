"""The words of an SDS session: what a client may say, and what the server is to do about it.

A session (`sotw.SotwSession`, `delta.DeltaSession`) is a pure object. It takes a request, or the signal that secrets
changed, together with a view of what is served, and returns actions: one that goes to the client (`Respond`,
`Finish`) and notes for the log. It does no I/O and knows no clock, so a test can try every order of events without a
socket.
"""

from collections.abc import Collection, Iterable, Mapping
from enum import Enum
from sys import getsizeof
from typing import Protocol

from msgspec import Struct

from sds_agent.values import Sensitive

SECRET_TYPE = "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret"  # noqa: S105 - the name of a type
"""The one type that is served. In a request an empty type URL means this one. An answer always carries it, or Envoy
ignores it.
"""


MOST_REFUSED = 4
"""Names of those that a client does not get, in the status message."""
LONGEST_NAME = 60
"""Characters of a name in it."""


class Resource(Sensitive, frozen=True):
    """A secret under the name it was asked for, with its encoded forms: an entry of a SotW answer, and of a Delta
    answer; `version_info` is the version of a SotW answer that has no other resource.
    """

    name: str
    version: str
    sotw: bytes = b""
    delta: bytes = b""
    version_info: bytes = b""


class Absence(Enum):
    """Why there is no resource under a name."""

    PENDING = "pending"
    """The name exists, but its secret does not yet, or was withheld. The answer waits for it."""
    UNKNOWN = "unknown"
    """This server does not serve the name."""


class View(Protocol):
    """What is served at one moment."""

    def __getitem__(self, name: str) -> Resource | Absence:
        """The resource of this exact name, or why there is none. Never raises."""
        ...


class SotwRequest(Struct, frozen=True):
    """A DiscoveryRequest, the fields that matter. `version` is the client's own, as `1.40.0` of an Envoy, or
    `gateway 2.1` of another program.

    `error` is the text of `error_detail`, or None where it is absent: its presence alone makes a NACK.
    """

    names: tuple[str, ...] = ()
    nonce: str = ""
    error: str | None = None
    type_url: str = SECRET_TYPE
    node_id: str = ""
    cluster: str = ""
    version: str = ""


class DeltaRequest(Struct, frozen=True):
    """A DeltaDiscoveryRequest, the fields that matter. `version` is the client's own."""

    subscribe: tuple[str, ...] = ()
    unsubscribe: tuple[str, ...] = ()
    nonce: str = ""
    error: str | None = None
    type_url: str = SECRET_TYPE
    node_id: str = ""
    cluster: str = ""
    version: str = ""


class StatusCode(Enum):
    """How a stream ends when the server ends it, by the names of gRPC's status codes."""

    INVALID_ARGUMENT = "invalid argument"
    NOT_FOUND = "not found"
    PERMISSION_DENIED = "permission denied"
    RESOURCE_EXHAUSTED = "resource exhausted"
    UNAVAILABLE = "unavailable"
    INTERNAL = "internal"


class Respond(Struct, frozen=True):
    """Send an answer. `removed` is Delta's `removed_resources`; SotW cannot express it."""

    nonce: str
    resources: tuple[Resource, ...]
    removed: tuple[str, ...] = ()


class Finish(Struct, frozen=True):
    """End the stream. `names` are those that the client did not get; `detail` says why, but for NOT_FOUND, where the
    names do.
    """

    code: StatusCode
    names: tuple[str, ...] = ()
    detail: str = ""


class Subscribed(Struct, frozen=True):
    """Names were added to the subscription; `pending` are those of them that wait for their secret."""

    names: tuple[str, ...]
    pending: tuple[str, ...] = ()


class Unsubscribed(Struct, frozen=True):
    """Names were taken out of the subscription."""

    names: tuple[str, ...]


class Acked(Struct, frozen=True):
    """The client took an answer; `versions` are those in it, by name."""

    nonce: str
    versions: Mapping[str, str]


class Nacked(Struct, frozen=True):
    """The client refused an answer with these `versions` by name, for `reason`, and goes on with what it had."""

    nonce: str
    versions: Mapping[str, str]
    reason: str


class Stale(Struct, frozen=True):
    """A reply to an answer that is not outstanding: it is not the first one, or is about an earlier stream.

    It settles nothing. `reason` is that of a NACK, for the log.
    """

    nonce: str
    reason: str | None = None


class Refused(Struct, frozen=True):
    """Names that are not served, which the client asked for among others that are, or over Delta, and why."""

    names: tuple[str, ...]
    cause: str = "unknown name"


Note = Subscribed | Unsubscribed | Acked | Nacked | Stale | Refused
Action = Respond | Finish | Note


class Outstanding(Struct, frozen=True):
    """An answer that the client has neither taken nor refused yet; `versions` are those in it, by name."""

    nonce: str
    versions: Mapping[str, str]

    def settled(self, error: str | None) -> Acked | Nacked:
        """What the client's reply to it says: a NACK if it carries an error, else an ACK."""
        if error is None:
            return Acked(self.nonce, self.versions)
        return Nacked(self.nonce, self.versions, error)


def unacceptable(type_url: str, names: int, most_names: int) -> Finish | None:
    """Why a message of either variant ends its stream whatever the session's state; None where it does not."""
    if type_url not in {"", SECRET_TYPE}:
        return Finish(StatusCode.INVALID_ARGUMENT, detail=f"type_url must be {SECRET_TYPE} or empty")
    if names > most_names:
        return Finish(StatusCode.RESOURCE_EXHAUSTED, detail=f"a stream may ask for at most {most_names} names")
    return None


ENTRY = 48
"""Bytes that a dict needs for each of its keys."""


def stored_in(*groups: Collection[str]) -> int:
    """Bytes of these texts in memory, and of the groups; a text that is in several groups is there once."""
    texts = {id(text): text for group in groups for text in group}
    return sum(map(getsizeof, texts.values())) + ENTRY * sum(map(len, groups))


def unique(names: Iterable[str]) -> tuple[str, ...]:
    """The names without repetitions, in the order of their first occurrence."""
    return tuple(dict.fromkeys(names))
