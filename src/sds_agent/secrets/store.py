"""The newest secret under every name, and the watchers to call when one changes.

The store is where issuance and SDS meet, and the only place. It has values, not a queue: a watcher is called with the
names that changed and reads the snapshot when it gets to it, so a slow reader neither grows memory nor misses the
newest secret. All of it runs on the event loop's thread; nothing here waits.

There may be tens of thousands of names, so nothing that is done for one of them looks at the others: a snapshot is
copied only when the secrets change after somebody has taken one. Who needs one secret asks for it by its name.
"""

from collections import Counter
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
        self._names = tuple(dict.fromkeys((*names, *self._optional)))
        self._secrets: dict[str, Secret | None] = dict.fromkeys(self._names)
        self._snapshot: Snapshot | None = None  # of these secrets, if one was taken
        self._without = set(self._names) - self._optional
        self._watchers: dict[object, Watcher] = {}
        self._awaited: dict[object, frozenset[str]] = {}
        self._awaiting = Counter[str]()
        self._hurried: dict[str, Callable[[], None]] = {}
        self.handed_over: frozenset[str] = frozenset()
        """The names that have gone to another owner by the change that is being announced. What was served under them
        before is that of the former one.
        """
        self.acknowledgements = Acknowledgements()

    def __contains__(self, name: object) -> bool:
        """Whether there is such a name, with or without a secret."""
        return name in self._secrets

    def secret(self, name: str) -> Secret | None:
        """What is served under this name now; None while there is none to give, and where there is no such name."""
        return self._secrets.get(name)

    @property
    def names(self) -> tuple[str, ...]:
        """Every name, in the order of the configuration: the same object until `replace_names`."""
        return self._names

    @property
    def snapshot(self) -> Snapshot:
        """What is served now. Never changes under a reader: the next change copies it."""
        if self._snapshot is None:
            self._snapshot = MappingProxyType(self._secrets)
        return self._snapshot

    @property
    def complete(self) -> bool:
        """Whether the agent is ready: each name has a secret."""
        return not self._without

    @property
    def missing(self) -> tuple[str, ...]:
        """The names without a secret, for which the agent is not ready."""
        return tuple(name for name in self._names if name in self._without) if self._without else ()

    def publish(self, secrets: Mapping[str, Secret]) -> frozenset[str]:
        """Serve these secrets from now on, all at once; returns the names whose content changed.

        Watchers are called with those alone: an unchanged secret is never published twice.
        """
        before = self._secrets
        return self._change(
            {
                name: secret
                for name, secret in secrets.items()
                if (known := before.get(name)) is None or known.version != secret.version
            }
        )

    def withhold(self, names: Iterable[str]) -> frozenset[str]:
        """Stop serving these names' secrets, which have ended; returns the names that had one. The names stay."""
        return self._change({name: None for name in names if self._secrets.get(name) is not None})

    def replace_names(
        self, names: Iterable[str], optional: Iterable[str], secrets: Mapping[str, Secret | None]
    ) -> frozenset[str]:
        """Have these names from now on, and no others; returns those that came, went or have other content.

        `secrets` has what is served under a name from now on, or None; a name that is not in it goes on as it was. It
        happens all at once: a name may go to another owner, and no watcher sees the names of both.
        """
        before, self._optional = self._secrets, frozenset(optional)
        self._names = tuple(dict.fromkeys((*names, *self._optional)))
        self._secrets = {name: secrets.get(name, before.get(name)) for name in self._names}
        self._snapshot = None
        self._without = {name for name, each in self._secrets.items() if each is None} - self._optional
        moved = before.keys() ^ self._secrets.keys()
        common = before.keys() & self._secrets.keys()
        other = {name for name in common if _version(before[name]) != _version(self._secrets[name])}
        changed = frozenset(moved | other)
        if changed:
            self.handed_over = changed & secrets.keys()
            self.announce(changed)
            self.handed_over = frozenset()
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
        before = self._awaited.pop(client, frozenset())
        if names:
            self._awaited[client] = names
        for name in before - names:
            self._awaiting[name] -= 1
            if not self._awaiting[name]:
                del self._awaiting[name]
        for name in names - before:
            self._awaiting[name] += 1
            if (watcher := self._hurried.get(name)) is not None:
                watcher()

    def awaited(self, names: Iterable[str]) -> bool:
        """Whether a client waits for any of these names: they are to be issued first."""
        return bool(self._awaiting) and any(name in self._awaiting for name in names)

    def watch_awaited(self, names: Iterable[str], watcher: Callable[[], None]) -> None:
        """Call `watcher` when another client begins to wait for one of these names, until `unwatch_awaited`.

        A name has one watcher, the last. It must not wait or raise.
        """
        for name in names:
            self._hurried[name] = watcher

    def unwatch_awaited(self, names: Iterable[str], watcher: Callable[[], None]) -> None:
        """Do not call `watcher` any more. Where another one watches a name by now, that stays."""
        for name in names:
            if self._hurried.get(name) == watcher:
                del self._hurried[name]

    @contextmanager
    def hurrying(self, names: Iterable[str], watcher: Callable[[], None]) -> Iterator[None]:
        """Watch these names inside this context."""
        watched = tuple(names)
        self.watch_awaited(watched, watcher)
        try:
            yield
        finally:
            self.unwatch_awaited(watched, watcher)

    def _change(self, changed: Mapping[str, Secret | None]) -> frozenset[str]:
        names = frozenset(changed)
        if not names:
            return names
        if self._snapshot is not None:
            self._secrets, self._snapshot = dict(self._secrets), None
        if not names <= self._secrets.keys():
            self._names = tuple(dict.fromkeys((*self._names, *changed)))
        self._secrets.update(changed)
        for name, secret in changed.items():
            if secret is not None or name in self._optional:
                self._without.discard(name)
            else:
                self._without.add(name)
        self.announce(names)
        return names


def _version(secret: Secret | None) -> str | None:
    return None if secret is None else secret.version
