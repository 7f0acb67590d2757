"""Environment variables that override single keys: `SDS_AGENT__SDS__SOCKET=/run/x.sock`.

The parts of a name are the parts of a key path, joined by two underscores and without regard to case. The two
underscores after the prefix keep clear of what Kubernetes sets for a service named sds-agent (SDS_AGENT_SERVICE_HOST).
"""

from collections.abc import Mapping
from typing import Any, TypeAlias

from msgspec import Struct

from sds_agent.configfile.document import Document, Origin
from sds_agent.configfile.phrases import KeyPath, render
from sds_agent.errors import ConfigurationError, Problem

PREFIX = "SDS_AGENT__"

_Container: TypeAlias = dict[str, Any] | list[Any]


class _MisfitError(ConfigurationError):
    """A variable's name does not lead to a key; the arguments are what is found and how to fix it."""


class _Variable(Struct, frozen=True):
    name: str
    value: str

    @property
    def parts(self) -> list[str]:
        return self.name[len(PREFIX) :].lower().split("__")

    @property
    def origin(self) -> Origin:
        return Origin(f"${self.name}", is_variable=True)

    def order(self) -> list[tuple[int, str]]:
        """Items of a list in their order, and a section before its keys."""
        return [(_index(part), part) for part in self.parts]


def apply(document: Document, environ: Mapping[str, str]) -> list[Problem]:
    """Put the values of all variables with our prefix into the document, as text."""
    ours = [_Variable(name, value) for name, value in environ.items() if name.upper().startswith(PREFIX)]
    problems = []
    for variable in sorted(ours, key=_Variable.order):
        document.variables.append(variable.name)
        try:
            _set(document, variable)
        except _MisfitError as error:
            found, fix = error.args
            problems.append(Problem((variable.origin.source,), found, fix))
    return problems


def _set(document: Document, variable: _Variable) -> None:
    *parents, last = variable.parts
    if not all(variable.parts):
        raise _MisfitError("names no key", f"write {PREFIX} and the parts of a key path, joined by two underscores")
    container: _Container = document.tree
    path: KeyPath = ()
    for part, following in zip(parents, variable.parts[1:], strict=True):
        key = _key(container, part, path)
        path = (*path, key)
        container = _enter(document, container, path, [] if _index(following) >= 0 else {}, variable.origin)
    key = _key(container, last, path)
    path = (*path, key)
    before = document.origins.get(path)
    if before is not None and before.is_variable and _value(container, key) is not None:
        raise _MisfitError(f"sets {render(path)}, which {before.source} sets too", "keep one of them")
    _put(container, key, variable.value)
    document.origins[path] = variable.origin


def _key(container: _Container, part: str, path: KeyPath) -> str | int:
    """The key or the index that a part of a variable's name means in this section or list."""
    if isinstance(container, dict):
        return _named(container, part, path)
    index = _index(part)
    if not 0 <= index <= len(container):
        end = f"{render(path)} has {len(container)} items"
        raise _MisfitError(f"has {part} where the index of an item must be", f"{end}: use 0 to {len(container)}")
    return index


def _named(container: dict[str, Any], part: str, path: KeyPath) -> str:
    """Of the keys that are there the one that differs in case only.

    A shell's variable cannot hold `-`, so `_` stands for it too, where that leaves no doubt.
    """
    same = [name for name in container if _loose(name) == _loose(part)]
    exact = [name for name in same if name.lower() == part]
    if len(exact) == 1 or len(same) == 1:
        return (exact if len(exact) == 1 else same)[0]
    if same:
        names = " and ".join(render((*path, name)) for name in same)
        raise _MisfitError(f"could mean {names}", "rename one of them in the file")
    return part


def _loose(name: str) -> str:
    return name.lower().replace("-", "_")


def _enter(document: Document, container: _Container, path: KeyPath, empty: _Container, origin: Origin) -> _Container:
    """The section or list at `path`, the last part of which is in `container`; made if nothing is there."""
    key = path[-1]
    inner = _value(container, key)
    if inner is None:
        inner = empty
        _put(container, key, inner)
        document.origins[path] = origin
    if not isinstance(inner, dict | list):
        raise _MisfitError(f"leads into {render(path)}, which is a single value", "set that key, or correct the name")
    return inner


def _value(container: _Container, key: str | int) -> Any:
    match container, key:
        case dict(), str():
            return container.get(key)
        case list(), int() if key < len(container):
            return container[key]
    return None


def _put(container: _Container, key: str | int, value: object) -> None:
    match container, key:
        case dict(), str():
            container[key] = value
        case list(), int():
            container[key : key + 1] = [value]


def _index(part: str) -> int:
    """The number that a part is, or -1."""
    return int(part) if part.isascii() and part.isdecimal() and len(part) <= 6 else -1
