"""What is open at a server, such as connections or calls, by age and group: one gives way when there are too many."""

from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

M = TypeVar("M", bound=Hashable)


class Crowd(Generic[M]):
    """Members, each of one group, in the order in which they came."""

    def __init__(self) -> None:
        self._members: dict[M, str] = {}
        self._groups: dict[str, dict[M, None]] = {}

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, member: object) -> bool:
        return member in self._members

    def __iter__(self) -> Iterator[M]:
        return iter(self._members)

    def enter(self, member: M, group: str) -> None:
        """Add a new member, as the newest."""
        self._members[member] = group
        self._groups.setdefault(group, {})[member] = None

    def admit(self, member: M, group: str, most: int) -> M | None:
        """Add a new member, as the newest. Returns the one that has to give way where there are more than `most`.

        That is the oldest of the largest group, or the new one itself where its own group has as many: no group takes
        what the others need. It is still a member; the caller ends it and removes it.
        """
        gives_way = self.oldest_of_the_largest() if len(self) >= most else None
        if gives_way is not None and self.count(group) >= self.count(self._members[gives_way]):
            gives_way = member
        self.enter(member, group)
        return gives_way

    def leave(self, member: M) -> None:
        """Remove a member. One that is not here changes nothing."""
        group = self._members.pop(member, None)
        if group is None:
            return
        others = self._groups[group]
        del others[member]
        if not others:
            del self._groups[group]

    def count(self, group: str) -> int:
        """How many members a group has."""
        return len(self._groups.get(group, ()))

    def oldest(self) -> M | None:
        """The oldest of all members."""
        return next(iter(self._members), None)

    def oldest_of(self, group: str) -> M | None:
        """The oldest member of a group."""
        return next(iter(self._groups.get(group, ())), None)

    def oldest_of_the_largest(self) -> M | None:
        """The oldest member of the group that has most."""
        largest = max(self._groups.values(), key=len, default={})
        return next(iter(largest), None)
