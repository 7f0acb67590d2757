"""Who gives way where there is no more room: no holder is to take what the others need."""

from collections.abc import Hashable
from typing import Generic, TypeVar

from sds_agent.rpc.crowd import Crowd

M = TypeVar("M", bound=Hashable)


class Shares(Generic[M]):
    """At most `most` members, each in a holder's name."""

    def __init__(self, most: int) -> None:
        self.most = most
        self._crowd = Crowd[M]()
        self._holders: dict[M, str] = {}

    def __len__(self) -> int:
        return len(self._crowd)

    def enter(self, member: M, holder: str) -> M | None:
        """Add a member; who has to give way to it, if one has to.

        That is the oldest of the holder that has most, or the new one itself where its own holder has as many.
        """
        gives_way = self._crowd.oldest_of_the_largest() if len(self._crowd) >= self.most else None
        if gives_way is not None and self._crowd.count(holder) >= self._crowd.count(self._holders[gives_way]):
            gives_way = member
        self._crowd.enter(member, holder)
        self._holders[member] = holder
        return gives_way

    def leave(self, member: M) -> None:
        """Take a member out; one that is not here is none the less."""
        self._crowd.leave(member)
        self._holders.pop(member, None)
