"""The newest secret under every name, and the watchers to call when one changes.

The store is where issuance and SDS meet, and the only place. It has values, not a queue: a watcher is called with the
names that changed and reads the snapshot when it gets to it, so a slow reader neither grows memory nor misses the
newest secret. All of it runs on the event loop's thread; nothing here waits.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

from sds_agent.secrets.acknowledgements import Acknowledgements
from sds_agent.secrets.model import Secret

Snapshot = Mapping[str, Secret | None]
"""Every name that exists, with its secret, or None while there is none to give (not issued yet, or expired)."""

Watcher = Callable[[frozenset[str]], None]


class SecretStore:
    """The current snapshot, its watchers, what clients are waiting for, and what they have acknowledged."""

    def __init__(self, names: Iterable[str] = (), optional: Iterable[str] = ()) -> None:
        """Without any secret. The agent is ready without the `optional` names, which need not ever have one."""
        self._optional = frozenset(optional)
        self._snapshot: Snapshot = MappingProxyType(dict.fromkeys((*names, *self._optional)))
        self._watchers: dict[object, Watcher] = {}
        self._awaited: dict[object, frozenset[str]] = {}
        self.acknowledgements = Acknowledgements()

    @property
    def snapshot(self) -> Snapshot:
        """What is served now. Never changes under a reader: a change makes a new one."""
        return self._snapshot

    @property
    def missing(self) -> tuple[str, ...]:
        """The names without a secret, for which the agent is not ready."""
        return tuple(name for name, secret in self._snapshot.items() if secret is None and name not in self._optional)

    def publish(self, secrets: Mapping[str, Secret]) -> frozenset[str]:
        """Serve these secrets from now on, all at once; returns the names whose content changed.

        Watchers are called with those alone: an unchanged secret is never published twice.
        """
        return self._change(
            {name: secret for name, secret in secrets.items() if _version(self._snapshot.get(name)) != secret.version}
        )

    def withhold(self, names: Iterable[str]) -> frozenset[str]:
        """Stop serving these names' secrets, which have ended; returns the names that had one. The names stay."""
        return self._change({name: None for name in names if self._snapshot.get(name) is not None})

    def replace_names(
        self, names: Iterable[str], optional: Iterable[str], secrets: Mapping[str, Secret | None]
    ) -> frozenset[str]:
        """Have these names from now on, and no others; returns those that came, went or have other content.

        `secrets` has what is served under a name from now on, or None; a name that is not in it goes on as it was. It
        happens all at once: a name may go to another owner, and no watcher sees the names of both.
        """
        before, self._optional = self._snapshot, frozenset(optional)
        wanted = (*names, *self._optional)
        self._snapshot = MappingProxyType({name: secrets.get(name, before.get(name)) for name in wanted})
        moved = before.keys() ^ self._snapshot.keys()
        common = before.keys() & self._snapshot.keys()
        other = {name for name in common if _version(before[name]) != _version(self._snapshot[name])}
        changed = frozenset(moved | other)
        if changed:
            self.announce(changed)
        return changed

    @contextmanager
    def watching(self, watcher: Watcher) -> Iterator[None]:
        """Call `watcher` with the changed names after each change, until the context is left. It must not wait or
        raise.
        """
        key = object()
        self._watchers[key] = watcher
        try:
            yield
        finally:
            del self._watchers[key]

    def announce(self, names: frozenset[str]) -> None:
        """Call the watchers for names that are served from elsewhere than this store and have changed there."""
        for watcher in tuple(self._watchers.values()):
            watcher(names)

    def await_names(self, client: object, names: frozenset[str]) -> None:
        """Note that `client` (any hashable) waits for these names' first secret; an empty set ends the note."""
        if names:
            self._awaited[client] = names
        else:
            self._awaited.pop(client, None)

    def awaited(self, names: Iterable[str]) -> bool:
        """Whether a client waits for any of these names: they are to be issued first."""
        wanted = frozenset(names)
        return any(not wanted.isdisjoint(waiting) for waiting in self._awaited.values())

    def _change(self, changed: Mapping[str, Secret | None]) -> frozenset[str]:
        names = frozenset(changed)
        if names:
            self._snapshot = MappingProxyType({**self._snapshot, **changed})
            self.announce(names)
        return names


def _version(secret: Secret | None) -> str | None:
    return None if secret is None else secret.version
