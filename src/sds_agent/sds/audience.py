"""Which streams subscribe to which names, so that a change reaches those that it concerns and costs the others nothing.

A node may have thousands of names and thousands of streams, and a name changes every few seconds then.
"""

from collections.abc import Hashable, Iterable
from typing import Generic, TypeVar

M = TypeVar("M", bound=Hashable)


class Audience(Generic[M]):
    """Members under the names to which they subscribe."""

    def __init__(self) -> None:
        self._by_name: dict[str, dict[M, None]] = {}

    def move(self, member: M, before: Iterable[str], after: Iterable[str]) -> None:
        """A member subscribed to the names `before`, and subscribes to those `after` from now on."""
        kept = set(after)
        for name in before:
            if name not in kept:
                members = self._by_name[name]
                del members[member]
                if not members:
                    del self._by_name[name]
        for name in after:
            self._by_name.setdefault(name, {})[member] = None

    def __contains__(self, name: object) -> bool:
        """Whether any subscribes to the name."""
        return name in self._by_name

    def of(self, name: str) -> tuple[M, ...]:
        """Those that subscribe to the name, in the order in which they began to."""
        return tuple(self._by_name.get(name, ()))
