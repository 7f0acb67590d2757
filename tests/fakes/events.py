"""The package's log events as values that a test can wait for."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import anyio

Event = dict[str, Any]


class Events(logging.Handler):
    """Records every event, and wakes the tests that wait for one."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.seen: list[Event] = []
        self._more = anyio.Event()

    def emit(self, record: logging.LogRecord) -> None:
        """Record the event."""
        fields = getattr(record, "sds_agent_fields", {})
        self.seen.append({"event": record.getMessage(), "level": record.levelname.lower(), **fields})
        self._more.set()
        self._more = anyio.Event()

    def named(self, name: str, **fields: object) -> list[Event]:
        """The events so far of that name with these fields."""
        return [e for e in self.seen if e["event"] == name and all(e.get(k) == v for k, v in fields.items())]

    async def next(self) -> None:
        """Wait for the next event of any name, or for a moment."""
        with anyio.move_on_after(0.02):
            await self._more.wait()

    async def wait(self, name: str, *, count: int = 1, within: float = 10, **fields: object) -> Event:
        """Wait for the count-th event of that name with these fields, for so many seconds, and return it."""
        with anyio.move_on_after(within):
            while len(self.named(name, **fields)) < count:
                await self._more.wait()
        found = self.named(name, **fields)
        last = "\n".join(map(str, self.seen[-20:]))
        assert len(found) >= count, (
            f"{len(found)} of {count} {name} {fields} within {within} s; the last events:\n{last}"
        )
        return found[count - 1]


@contextmanager
def recorded() -> Iterator[Events]:
    """Record the package's events inside this context."""
    logger = logging.getLogger("sds_agent")
    events, level = Events(), logger.level
    logger.addHandler(events)
    logger.setLevel(logging.DEBUG)
    try:
        yield events
    finally:
        logger.removeHandler(events)
        logger.setLevel(level)
