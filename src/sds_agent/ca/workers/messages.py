"""What the parent and its workers tell each other, as values, in msgpack.

`call` numbers the questions of one worker; a `Reply` has the number of its question. `connection` is a connection's
own name (`acceptor.Arrival`).
"""

from datetime import datetime
from typing import TypeAlias

import msgspec
from msgspec import Struct

from sds_agent.ca.audit import Entry
from sds_agent.ca.callers import ClaimRule
from sds_agent.ca.denied import Denied
from sds_agent.ca.policy import NodeAgent
from sds_agent.values import Sensitive


class _Message(Struct, frozen=True, array_like=True, tag=True):
    """A message on the socket: an array whose first item is the name of its class."""


class SignerMaterial(_Message, Sensitive, frozen=True):
    """What signs now: certificates and lists in DER, the signer's key as PKCS#8 in PEM."""

    signer: bytes
    key: bytes
    intermediates: tuple[bytes, ...]
    roots: tuple[bytes, ...]
    crls: tuple[bytes, ...]


class Denials(_Message, frozen=True):
    """The identities that get nothing from now on."""

    denied: Denied


class Keys(_Message, frozen=True):
    """The key set of the issuer with this index, as it was read; empty while none could be."""

    issuer: int
    data: bytes


class Setup(_Message, Sensitive, frozen=True):
    """A worker's first message: what of the configuration it needs, and all that may change later.

    `rules` and `keys` have one item for each issuer; `connection_age` is in seconds; `most` connections are the most
    that it gets.
    """

    log_level: str
    trust_domain: str
    server_names: tuple[str, ...]
    mtls: bool
    join_tokens: str | None
    node_agents: tuple[NodeAgent, ...]
    rules: tuple[ClaimRule, ...]
    per_caller: int
    connection_age: float
    most: int
    material: SignerMaterial
    denied: Denied
    keys: tuple[bytes, ...]


class HandOver(_Message, frozen=True):
    """A connection is the worker's; its descriptor comes with this message. The rest is as in `Arrival`."""

    connection: str
    address: str
    origin: str


class GiveWay(_Message, frozen=True):
    """End a connection: another one has its place."""

    connection: str


class Reply(_Message, frozen=True):
    """Whether it may be so, or is done; `error` is the number of the operating system's error that kept it from it."""

    call: int
    granted: bool = True
    error: int = 0


class AreYouThere(_Message, frozen=True):
    """To be answered with `Here`, at once."""


class Drain(_Message, frozen=True):
    """Take no connection any more, answer the calls in work, and end."""


class Ready(_Message, frozen=True):
    """The worker answers calls."""


class Here(_Message, frozen=True):
    """The worker's event loop runs."""


class Unfit(_Message, frozen=True):
    """The worker cannot start, for this reason, about which the operator has to do something."""

    reason: str


class Admit(_Message, frozen=True):
    """Is this caller within its quota?"""

    call: int
    caller: str


class Begin(_Message, frozen=True):
    """Is there a place for one more request in work?"""

    call: int


class GiveBack(_Message, frozen=True):
    """Takes back the place that this call got, if it got one."""

    call: int


class Issue(_Message, frozen=True):
    """Write down a certificate, which took so many seconds."""

    call: int
    entry: Entry
    now: datetime
    seconds: float


class Refuse(_Message, frozen=True):
    """Write down a refusal."""

    entry: Entry
    now: datetime


class Refresh(_Message, frozen=True):
    """Read that issuer's key set again, unless that was done a moment ago; `Keys` comes before the answer."""

    call: int
    issuer: int


class Prove(_Message, frozen=True):
    """A call proved this caller on a connection."""

    connection: str
    caller: str


class Leave(_Message, frozen=True):
    """A connection has ended."""

    connection: str


class Say(_Message, frozen=True):
    """A line for the server's log."""

    at: datetime
    level: str
    name: str
    fields: dict[str, str | int | float | bool | list[str]]


ToWorker: TypeAlias = Reply | HandOver | GiveWay | SignerMaterial | Denials | Keys | Setup | AreYouThere | Drain
ToParent: TypeAlias = Admit | Begin | GiveBack | Issue | Refuse | Prove | Leave | Refresh | Say | Ready | Here | Unfit

_ENCODER = msgspec.msgpack.Encoder()
_TO_WORKER: msgspec.msgpack.Decoder[ToWorker] = msgspec.msgpack.Decoder(ToWorker)
_TO_PARENT: msgspec.msgpack.Decoder[ToParent] = msgspec.msgpack.Decoder(ToParent)


def encode(message: ToWorker | ToParent) -> bytes:
    """The message as bytes."""
    return _ENCODER.encode(message)


def to_worker(data: memoryview) -> ToWorker:
    """A message of the parent's. Raises msgspec.MsgspecError, and what the values in it raise."""
    return _TO_WORKER.decode(data)


def to_parent(data: memoryview) -> ToParent:
    """A message of a worker's. Raises msgspec.MsgspecError, and what the values in it raise."""
    return _TO_PARENT.decode(data)
