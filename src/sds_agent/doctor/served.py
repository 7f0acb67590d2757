"""The names that an agent serves, for those who ask for another one: pure."""

from collections.abc import Sequence

from sds_agent.configfile.phrases import did_you_mean

MOST_COMPARED = 20
"""Names for which the nearest is looked for: among twenty thousand names that takes most of a second."""
MOST_NAMES = 10


class Served:
    """The names that are served."""

    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(names)
        self._known = frozenset(names)
        self._hints: dict[str, str] = {}

    def __contains__(self, name: object) -> bool:
        return name in self._known

    def __bool__(self) -> bool:
        return bool(self._names)

    def instead_of(self, name: str) -> str:
        """What is meant perhaps by a name that is not served, in words."""
        if name not in self._hints and len(self._hints) < MOST_COMPARED:
            self._hints[name] = did_you_mean(name, self._names)
        return self._hints.get(name) or f"there are {', '.join(self._names[:MOST_NAMES])}"
