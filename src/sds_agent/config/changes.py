"""What one configuration has that another one has not, and which of it a running agent takes: a value, made of values.

A key is either applied while the agent runs (LIVE) or needs a restart: those are about what the process owns from its
start to its end, such as the socket, the state directory and the names that peers know it by. A configuration that
changes one of the latter is refused as a whole, in the words of `SettingsChange.refusals`: an agent that took the
rest of it would run with a configuration that no file holds.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from msgspec import Struct

from sds_agent.config.settings import Settings

LIVE = ("authorities", "workloads", "renewal", "failover", "requests", "log")
"""The keys that are applied while the agent runs."""
RESTART = ("trust_domain", "state_dir", "sds", "keep_certificates", "state_encryption", "admin", "telemetry")
"""The keys that only a restart applies, each with all keys in its section."""


class NameChange(Struct, frozen=True):
    """The names of what came, went and is another now, each in the order of its configuration."""

    added: tuple[str, ...] = ()
    removed: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()


class SettingsChange(Struct, frozen=True):
    """What a configuration changes: workloads and authorities by their names.

    `keys` are the keys of LIVE that differ, `restart` those that only a restart applies. It is false where the two
    configurations are equal.
    """

    workloads: NameChange = NameChange()
    authorities: NameChange = NameChange()
    keys: tuple[str, ...] = ()
    restart: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.keys or self.restart)

    @property
    def refusals(self) -> tuple[str, ...]:
        """Why a running agent cannot take it, in words, one for each key; empty where it can."""
        return tuple(f"{key} has changed, which only a restart of the agent applies" for key in self.restart)

    @property
    def to_open(self) -> tuple[str, ...]:
        """The authorities that have to be opened."""
        return (*self.authorities.added, *self.authorities.changed)

    @property
    def to_close(self) -> tuple[str, ...]:
        """The authorities that have to be closed, as they were before."""
        return (*self.authorities.removed, *self.authorities.changed)


def difference(before: Settings, after: Settings) -> SettingsChange:
    """What `after` changes of `before`. Two workloads are the same one if their names are equal."""
    return SettingsChange(
        _named({each.name: each for each in before.workloads}, {each.name: each for each in after.workloads}),
        _named(before.authorities, after.authorities),
        tuple(key for key in LIVE if getattr(before, key) != getattr(after, key)),
        tuple(key for name in RESTART for key in _differing(getattr(before, name), getattr(after, name), name)),
    )


def _named(before: Mapping[str, object], after: Mapping[str, object]) -> NameChange:
    return NameChange(
        tuple(name for name in after if name not in before),
        tuple(name for name in before if name not in after),
        tuple(name for name in after if name in before and after[name] != before[name]),
    )


def _differing(before: Any, after: Any, key: str) -> Iterator[str]:
    """The keys of single values that differ, below `key` where that is a section of both."""
    if before == after:
        return
    if not isinstance(before, Struct) or type(before) is not type(after):
        yield key
        return
    for name in before.__struct_fields__:
        yield from _differing(getattr(before, name), getattr(after, name), f"{key}.{name}")
