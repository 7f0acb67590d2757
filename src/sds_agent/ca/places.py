"""Which connections the CA keeps when there are more than it has places for.

Anyone can connect, so a connection on which no caller has proven an identity has its place only until another needs
it: the oldest such gives way to the newest, first among those from the same origin once that has a `SHARE` of all
places. A connection on which a caller was proven keeps its place against all that prove nothing. A part of the places
is never theirs, so that there is room to prove something; beyond it, the caller with most connections loses its oldest.
"""

from collections.abc import Hashable
from ipaddress import IPv6Address, ip_address
from typing import Generic, TypeVar

from sds_agent.rpc.crowd import Crowd

SHARE = 4
LEAST_SHARE = 32
"""One origin has at most a fourth of all places for connections that proved nothing, or so many: others have room, and
the machines behind one address that all start at the same time too.
"""
RESERVE = 8
"""An eighth of all places is for those that are to prove something yet."""

K = TypeVar("K", bound=Hashable)


class Places(Generic[K]):
    """The places, `most` in all, and what holds them."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._most_of_origin = max(LEAST_SHARE, most // SHARE)
        self._most_proven = most - most // RESERVE
        self._unproven = Crowd[K]()
        self._proven = Crowd[K]()

    def __len__(self) -> int:
        return len(self._unproven) + len(self._proven)

    def arrive(self, connection: K, origin: str) -> K | None:
        """A new connection; returns the one that has to end for it, which is itself where all others were proven."""
        gives_way = None
        if self._unproven.count(origin) >= self._most_of_origin:
            gives_way = self._unproven.oldest_of(origin)
        elif len(self) >= self._most:
            gives_way = self._unproven.oldest()
            if gives_way is None:
                return connection
        if gives_way is not None:
            self._unproven.leave(gives_way)
        self._unproven.enter(connection, origin)
        return gives_way

    def prove(self, connection: K, caller: str) -> K | None:
        """A caller was proven on that connection; returns the one that has to end so that it may stay."""
        if connection not in self._unproven:
            return None
        self._unproven.leave(connection)
        self._proven.enter(connection, caller)
        if len(self._proven) <= self._most_proven:
            return None
        gives_way = self._proven.oldest_of_the_largest()
        if gives_way is not None:
            self._proven.leave(gives_way)
        return gives_way

    def leave(self, connection: K) -> None:
        """That connection has ended; nothing changes where it gave way already."""
        self._unproven.leave(connection)
        self._proven.leave(connection)


def origin_of(host: str) -> str:
    """Whose an address is: an IPv6 address its network's of 64 bits, which one machine commonly has to itself."""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if not isinstance(address, IPv6Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(IPv6Address(int(address) >> 64 << 64))
