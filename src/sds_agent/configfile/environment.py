"""Environment variables that override single keys: `SDS_AGENT__SDS__SOCKET=/run/x.sock`.

The parts of a name are the parts of a key path, joined by two underscores and without regard to case. The two
underscores after the prefix avoid the variables of a Kubernetes service named sds-agent (SDS_AGENT_SERVICE_HOST).
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from msgspec import Struct

from sds_agent.configfile.document import Document, Origin
from sds_agent.configfile.phrases import KeyPath, render
from sds_agent.errors import Problem, ProblemsError

PREFIX = "SDS_AGENT__"

_Container: TypeAlias = dict[str, Any] | list[Any]


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
    """Put the values of all variables with our prefix into the document, as text.

    Returns what is wrong with their names. What is wrong with a value shows when the document is read.
    """
    ours = [_Variable(name, value) for name, value in environ.items() if name.upper().startswith(PREFIX)]
    problems: list[Problem] = []
    for variable in sorted(ours, key=_Variable.order):
        document.variables.append(variable.name)
        try:
            _set(document, variable)
        except ProblemsError as error:
            problems += [problem.within(variable.origin.source) for problem in error.problems]
    return problems


def overlooked(environ: Mapping[str, str], keys: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Variables with one underscore too few behind the prefix, which set nothing, with the names that were meant.

    `keys` are those at the top of the file. What Kubernetes sets for a service is none of these: it has no section.
    """
    short = PREFIX.removesuffix("_")
    for name in sorted(environ):
        rest = name[len(short) :].lower()
        if not name.upper().startswith(short) or name.upper().startswith(PREFIX):
            continue
        first, parts, _ = rest.partition("__")
        if first in keys and (parts or "_" in first):
            yield name, f"{PREFIX}{name[len(short) :]}"


def variable(key: KeyPath) -> str:
    """The name of the variable that sets the key, if there is one (`leads_to`)."""
    return PREFIX + "__".join(str(part).upper().replace("-", "_") for part in key)


def leads_to(name: str, key: KeyPath, among: Iterable[str]) -> bool:
    """Whether the variable of that name sets this key, where the section above it has the names in `among` too."""
    first, *rest = key
    tree: dict[str, Any] = {str(first): {each: {} for each in among}} if len(rest) > 1 else {}
    if apply(Document(tree=tree, origins={(): Origin("")}, base=Path()), {name: ""}):
        return False
    inner: Any = tree
    for part in key:
        inner = inner.get(part) if isinstance(inner, dict) else None
    return bool(inner == "")


def _misfit(found: str, fix: str) -> ProblemsError:
    """A variable whose name does not lead to a key."""
    return ProblemsError([Problem((), found, fix)])


def _set(document: Document, variable: _Variable) -> None:
    """Put one variable's value into the document. Raises ProblemsError."""
    *parents, last = variable.parts
    if not all(variable.parts):
        raise _misfit("names no key", f"write {PREFIX} and the parts of a key path, joined by two underscores")
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
        raise _misfit(f"sets {render(path)}, which {before.source} sets too", "keep one of them")
    _put(container, key, variable.value)
    document.origins[path] = variable.origin


def _key(container: _Container, part: str, path: KeyPath) -> str | int:
    """The key or the index that a part of a variable's name means in this section or list. Raises ProblemsError."""
    if isinstance(container, dict):
        return _named(container, part, path)
    index = _index(part)
    if not 0 <= index <= len(container):
        end = f"{render(path)} has {len(container)} items"
        raise _misfit(f"has {part} where the index of an item must be", f"{end}: use 0 to {len(container)}")
    return index


def _named(container: dict[str, Any], part: str, path: KeyPath) -> str:
    """The key in the container that differs from `part` in case only, or else `part`. Raises ProblemsError.

    The name of a shell's variable cannot have a `-`, so `_` stands for it too where only one key fits.
    """
    same = [name for name in container if _loose(name) == _loose(part)]
    exact = [name for name in same if name.lower() == part]
    if len(exact) == 1 or len(same) == 1:
        return (exact if len(exact) == 1 else same)[0]
    if same:
        names = " and ".join(render((*path, name)) for name in same)
        raise _misfit(f"could mean {names}", "rename one of them in the file")
    return part


def _loose(name: str) -> str:
    return name.lower().replace("-", "_")


def _enter(document: Document, container: _Container, path: KeyPath, empty: _Container, origin: Origin) -> _Container:
    """The section or list at `path`, the last part of which is in `container`; `empty` is put there if nothing is.

    Raises ProblemsError where a single value is.
    """
    key = path[-1]
    inner = _value(container, key)
    if inner is None:
        inner = empty
        _put(container, key, inner)
        document.origins[path] = origin
    if not isinstance(inner, dict | list):
        raise _misfit(f"leads into {render(path)}, which is a single value", "set that key, or correct the name")
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
    """The number that a part writes, or -1."""
    return int(part) if part.isascii() and part.isdecimal() and len(part) <= 6 else -1
