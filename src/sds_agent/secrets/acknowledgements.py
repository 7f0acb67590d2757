"""Which version of each name every client has acknowledged: SDS notes it, and issuance reads it.

A leaf below a new root goes out after the bundle with that root, and Envoy loads each secret by a stream of its own: no
order of pushes puts one before the other, only waiting for the acknowledgements does. A client may refuse a version or
never reply, so issuance limits the time that it waits.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager


class Acknowledgements:
    """The version of each name that each client subscribes to. All of it runs on the event loop's thread."""

    def __init__(self) -> None:
        self._versions: dict[object, Mapping[str, str]] = {}
        self._watchers: dict[object, Callable[[], None]] = {}
        self._found: dict[frozenset[tuple[str, str]], int] = {}  # since the last change: thousands may ask the same

    def note(self, client: object, versions: Mapping[str, str]) -> None:
        """`client` (any hashable) subscribes to these names and has acknowledged these versions, the empty one where it
        has acknowledged none. Without any name it is forgotten.
        """
        if versions == self._versions.get(client, {}):
            return
        if versions:
            self._versions[client] = versions
        else:
            self._versions.pop(client, None)
        self._found.clear()
        for watcher in tuple(self._watchers.values()):
            watcher()

    def outstanding(self, current: Mapping[str, str]) -> int:
        """How many clients subscribe to one of these names and have not acknowledged its current version."""
        key = frozenset(current.items())
        if key not in self._found:
            self._found[key] = sum(
                any(versions.get(name, version) != version for name, version in current.items())
                for versions in self._versions.values()
            )
        return self._found[key]

    @contextmanager
    def watching(self, watcher: Callable[[], None]) -> Iterator[None]:
        """Call `watcher` after each change, until the context is left. It must not wait or raise."""
        key = object()
        self._watchers[key] = watcher
        try:
            yield
        finally:
            del self._watchers[key]
