"""The authorities while they are open: each in a task of its own, so that one can be closed without the others.

A kind opens its authority as a context manager, in which task groups may live: it has to be left in the task that has
entered it, and tasks of one authority must not end in the middle of another's.
"""

import asyncio
from collections.abc import Iterable, Iterator, Mapping

from sds_agent.authority import registry
from sds_agent.authority.kind import AuthoritySettings, Context
from sds_agent.authority.protocol import Authority, Supplier
from sds_agent.tasks import BackgroundTask, Start, uninterrupted


class OpenAuthority:
    """One authority, from its opening until it is closed."""

    def __init__(self) -> None:
        self._closing = asyncio.Event()
        self._opened: asyncio.Future[Authority | Supplier] = asyncio.get_running_loop().create_future()
        self._task: BackgroundTask | None = None

    async def open(self, start: Start, chosen: AuthoritySettings, context: Context) -> None:
        """Open it. Raises what its kind raises; then, and if the caller is cancelled, it is not open."""
        self._task = start(self._hold(chosen, context))
        try:
            await asyncio.shield(self._opened)
        except BaseException:
            await self.close()
            raise

    @property
    def authority(self) -> Authority | Supplier:
        """The authority, once it is open."""
        return self._opened.result()

    def begin_to_close(self) -> None:
        """Close it in its own time: nothing waits for that but the end of all."""
        self._closing.set()

    async def close(self) -> None:
        """Close it, and return once that is done, also where the caller is cancelled."""
        self._closing.set()
        if self._task is None:
            return
        if not self._opened.done():
            self._task.task.cancel()
        await uninterrupted(self._closed(self._task))

    @staticmethod
    async def _closed(task: BackgroundTask) -> None:
        await asyncio.wait([task.task])

    async def _hold(self, chosen: AuthoritySettings, context: Context) -> None:
        """An error while it opens is the opener's; a later one is a fault, and ends the agent."""
        try:
            async with registry.kind_of(chosen).open(chosen, context) as authority:
                self._opened.set_result(authority)
                await self._closing.wait()
        except Exception as error:
            if self._opened.done():
                raise
            self._opened.set_exception(error)
        finally:
            self._opened.cancel()  # no effect where it is done


class OpenAuthorities(Mapping[str, Authority | Supplier]):
    """Those of the configuration that is in force, by their names."""

    def __init__(self, start: Start) -> None:
        self._start = start
        self._open: dict[str, OpenAuthority] = {}

    def __getitem__(self, name: str) -> Authority | Supplier:
        """The authority of this name. Raises KeyError."""
        return self._open[name].authority

    def __iter__(self) -> Iterator[str]:
        """The names, in the order in which they were opened."""
        return iter(self._open)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._open)

    async def opened(self, chosen: AuthoritySettings, context: Context) -> OpenAuthority:
        """Open another one, which is not among these yet. Raises what its kind raises."""
        authority = OpenAuthority()
        await authority.open(self._start, chosen, context)
        return authority

    def replace(self, fresh: Mapping[str, OpenAuthority], gone: Iterable[str]) -> list[OpenAuthority]:
        """Have these from now on, and those that are `gone` no longer; returns the latter, which are still open."""
        closing = [self._open.pop(name) for name in gone]
        self._open |= fresh
        return closing

    async def close(self) -> None:
        """Close them all, the last first."""
        while self._open:
            _, last = self._open.popitem()
            await last.close()
