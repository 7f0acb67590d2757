"""The streams that have ended, so that an Envoy that left can be told from one that never came: pure.

Of an Envoy's streams for the same names the last counts. Memory is bounded, whatever peers send: so many streams, each
with some names, cut.
"""

from collections import OrderedDict
from datetime import datetime

from msgspec import Struct

from sds_agent.sds.status import StreamStatus
from sds_agent.text import cut

MOST = 1000
"""Streams that are remembered; those that ended first are forgotten."""
MOST_NAMES = 4
LONGEST = 120
"""Names of a stream that are remembered, and characters of a name, a node id or a cause."""


class DepartedStream(Struct, frozen=True):
    """A stream that has ended, as `StreamStatus` has one that is open.

    `cause` says in words why the agent ended it; it is empty where the client did, or the agent stopped.
    """

    number: int
    method: str
    node: str
    peer: str
    names: tuple[str, ...]
    connected_at: datetime
    left_at: datetime
    cause: str = ""


class Departures:
    """Remembers them."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._found: OrderedDict[tuple[str, tuple[str, ...]], DepartedStream] = OrderedDict()

    def note(self, stream: StreamStatus, left_at: datetime, cause: str, refused: tuple[str, ...] = ()) -> None:
        """A stream has ended. `refused` are names that it asked for and was refused; both are printable."""
        asked = tuple(dict.fromkeys((*(each.name for each in stream.names), *refused)))
        if not asked:  # no Envoy, but a probe
            return
        names = tuple(cut(name, LONGEST) for name in asked[:MOST_NAMES])
        node, peer = cut(stream.node, LONGEST), stream.peer
        key = (node or peer, names)
        self._found.pop(key, None)
        self._found[key] = DepartedStream(
            stream.number, stream.method, node, peer, names, stream.connected_at, left_at, cut(cause, 2 * LONGEST)
        )
        if len(self._found) > self._most:
            self._found.popitem(last=False)

    @property
    def streams(self) -> tuple[DepartedStream, ...]:
        """Those that are remembered; the last to end comes last."""
        return tuple(self._found.values())


def gone(departed: tuple[DepartedStream, ...], open_now: tuple[StreamStatus, ...]) -> tuple[DepartedStream, ...]:
    """Those whose Envoy has no stream now for a name that it had then."""
    served = {
        (cut(each.node, LONGEST) or each.peer, cut(name.name, LONGEST)) for each in open_now for name in each.names
    }
    return tuple(each for each in departed if not any((each.node or each.peer, name) in served for name in each.names))
