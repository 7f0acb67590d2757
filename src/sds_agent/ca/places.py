"""Which connection ends when the CA has more than it has places for.

Every client that reaches the port can connect. So a connection on which no caller is proven has its place only until
another one needs it: the oldest of them gives way to the newest, and once an origin has a `SHARE` of all places, the
oldest of that origin. A connection on which a caller is proven gives way to none that proves nothing. A part of the
places is not for proven callers, so that there is always room to prove an identity; beyond the rest, the caller with
most connections loses its oldest.
"""

from collections.abc import Hashable
from functools import lru_cache
from ipaddress import IPv6Address, ip_address
from typing import Generic, TypeVar

from sds_agent.rpc.crowd import Crowd

SHARE = 4
LEAST_SHARE = 32
"""One origin has at most a fourth of all places for connections without a proven caller, so that others have room; but
at least LEAST_SHARE, for machines behind one address that all start at the same time.
"""
RESERVE = 8
"""An eighth of all places is for connections on which no caller is proven yet."""

K = TypeVar("K", bound=Hashable)


class Places(Generic[K]):
    """The places, `most` in all, and the connections that have them. One that has to end loses its place at once."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._most_of_origin = max(LEAST_SHARE, most // SHARE)
        self._most_proven = most - most // RESERVE
        self._unproven = Crowd[K]()
        self._proven = Crowd[K]()

    def __len__(self) -> int:
        return len(self._unproven) + len(self._proven)

    def arrive(self, connection: K, origin: str) -> K | None:
        """Give a new connection a place. Returns the one that has to end for it.

        That is the new one itself where every other one has a proven caller, and None where there was room.
        """
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
        """Give the connection a proven caller's place. Returns the one that has to end for it, if one has to.

        A connection that has ended or given way changes nothing.
        """
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
        """Free the place of a connection that has ended. One that gave way changes nothing."""
        self._unproven.leave(connection)
        self._proven.leave(connection)


@lru_cache(1024)
def origin_of(host: str) -> str:
    """What an address counts for: an IPv6 address for its network of 64 bits, which one machine usually has alone."""
    try:
        address = ip_address(host.partition("%")[0])
    except ValueError:
        return host
    if not isinstance(address, IPv6Address):
        return str(address)
    if address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(IPv6Address(int(address) >> 64 << 64))
