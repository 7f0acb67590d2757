"""How plain data becomes a settings object, through what the object's class declares, with every problem at once.

msgspec's own conversion ends at the first error and knows no lines, so the walk here takes its place. It also takes
less than that one does: a number for a flag, or text such as "5.0" for a whole number, is a mistake in a file. Numbers
and flags may come as text, because environment variables are text.

What cannot be read is UNREAD in the object that comes back, so that checks which compare keys can be made on the rest.
"""

from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, TypeVar

import msgspec
from msgspec import Struct
from msgspec.inspect import DictType, StructType, Type, VarTupleType

from sds_agent.configfile.declarations import Declaration, Variant, declaration, declared_keys, fields_of, keys_of
from sds_agent.configfile.document import Document, Origin
from sds_agent.configfile.environment import variable
from sds_agent.configfile.phrases import KeyPath, describe, describe_kind, did_you_mean, must_be
from sds_agent.configfile.types import NotTextError, UnacceptableError
from sds_agent.errors import Problem, ProblemsError

T = TypeVar("T", bound=Struct)
V = TypeVar("V")


class _Unread(Enum):
    UNREAD = "unread"

    def __bool__(self) -> bool:
        return False


UNREAD: Final[Any] = _Unread.UNREAD
"""Stands in a settings object for a value that could not be read; it is false. No such object leaves the loader."""


class _Reading(Struct):
    """One pass over a document, and the problems seen so far, whose places are key paths."""

    base: Path
    origins: Mapping[KeyPath, Origin]
    problems: list[Problem] = msgspec.field(default_factory=list)

    def refuse(self, path: KeyPath, found: str, fix: str) -> Any:
        """Note a problem; the value is unread."""
        self.problems.append(Problem(path, found, fix))
        return UNREAD

    def written(self, path: KeyPath) -> str | None:
        """The text of a scalar in the file."""
        origin = self.origins.get(path)
        return None if origin is None else origin.written

    def read(self, here: Declaration, value: object, path: KeyPath) -> Any:
        """The setting that `value` gives, or UNREAD."""
        if here.variant:
            return self._selected(here, here.variant, value, path)
        if "convert" not in here.extra:
            match here.type:
                case StructType() as section:
                    return self._section_or_value(here, section, value, path)
                case VarTupleType(item_type=item):
                    return self._list(here, item, value, path)
                case DictType(key_type=name, value_type=item):
                    return self._mapping(here, name, item, value, path)
        return self._single(here, value, path, here.allowed)

    def _single(self, here: Declaration, value: object, path: KeyPath, allowed: str) -> Any:
        """The setting that a single value gives, or UNREAD; `allowed` says what may stand there."""
        try:
            return here.convert(value, self.base)
        except UnacceptableError as error:
            reason = self._reason(here, path, error)
            return self.refuse(path, describe(value, self.written(path)), must_be(allowed, reason))

    def _reason(self, here: Declaration, path: KeyPath, error: UnacceptableError) -> str:
        """Quotes are no way out for a number, or a flag, whose text is not acceptable either."""
        written = self.written(path)
        if isinstance(error, NotTextError) and written is not None:
            try:
                here.convert(written, self.base)
            except UnacceptableError as also:
                return str(also)
        return str(error)

    def _section_or_value(self, here: Declaration, section: StructType, value: object, path: KeyPath) -> Any:
        if here.shorthand is None:
            return self.section(section, value, path)
        if isinstance(value, dict | list):
            return self.section(section, value, path) if value else self.refuse(path, "is empty", must_be(here.allowed))
        single = self._single(here.shorthand, value, path, here.allowed)
        return section.cls(**{here.extra["shorthand"]: single}) if was_read(single) else UNREAD

    def section(self, of: StructType, value: object, path: KeyPath) -> Any:
        """An instance of a settings class, in which single values may be UNREAD."""
        if not isinstance(value, dict):
            return self.refuse(path, describe_kind(value), must_be(Declaration(of, {}, {}).allowed))
        known = keys_of(of.cls)
        for name in value:
            if name not in known:
                here = f"the keys here are {', '.join(known)}"
                near = self._of_variable(name, known, path) or did_you_mean(name, list(known))
                self.refuse((*path, name), "is not a known key", f"{near} ({here})" if near else here)
        given: dict[str, Any] = {}
        for name, declared, required in declared_keys(of.cls):
            at = (*path, name)
            if name in value:
                given[name] = self.read(declared, value[name], at)
            elif required:
                given[name] = self.refuse(at, "is missing", must_be(declared.allowed))
        return of.cls(**given)

    def _of_variable(self, name: str, known: Iterable[str], path: KeyPath) -> str:
        """The variable that was perhaps meant by one with a single underscore between the parts of a key."""
        origin = self.origins.get((*path, name))
        if origin is None or not origin.is_variable:
            return ""
        parts = ((each, name.removeprefix(f"{each}_")) for each in known if name.startswith(f"{each}_"))
        return next((f"did you mean ${variable((*path, *each))}?" for each in parts), "")

    def _list(self, here: Declaration, item: Type, value: object, path: KeyPath) -> Any:
        if not isinstance(value, list) or not value:
            return self.refuse(path, describe_kind(value), must_be(here.allowed))
        declared = declaration(item)
        return tuple(self.read(declared, each, (*path, index)) for index, each in enumerate(value))

    def _mapping(self, here: Declaration, name: Type, item: Type, value: object, path: KeyPath) -> Any:
        if not isinstance(value, dict) or not value:
            return self.refuse(path, describe_kind(value), must_be(here.allowed))
        names, declared = declaration(name), declaration(item)
        for each in value:
            try:
                names.convert(each, self.base)
            except UnacceptableError as error:
                fix = must_be(names.allowed, str(error))
                self.refuse((*path, each), "has a name that is not allowed", fix)
        return MappingProxyType({each: self.read(declared, inner, (*path, each)) for each, inner in value.items()})

    def _selected(self, here: Declaration, variant: Variant, value: object, path: KeyPath) -> Any:
        if not isinstance(value, dict):
            return self.refuse(path, describe_kind(value), must_be(here.allowed))
        at, written = (*path, "type"), value.get("type")
        try:
            of = variant.find(written) if isinstance(written, str) else None
        except ProblemsError as error:
            self.problems += [problem.within(*path) for problem in error.problems]
            return UNREAD
        if of is not None:
            return self.section(fields_of(of), value, path)
        allowed = f"one of {', '.join(variant.types)}"
        if "type" not in value:
            return self.refuse(at, "is missing", must_be(allowed))
        near = did_you_mean(written, variant.types) if isinstance(written, str) else ""
        return self.refuse(at, describe(written, self.written(at)), must_be(allowed, near))


def read(of: type[T], document: Document) -> tuple[T, list[Problem]]:
    """The settings that a document gives, and all that is wrong with it, by key path.

    The settings can be used if nothing is wrong. Else single values in them, whole sections too, may be UNREAD.
    """
    reading = _Reading(document.base, document.origins)
    return reading.section(fields_of(of), document.tree, ()), reading.problems


def was_read(value: object) -> bool:
    """Whether a place in a settings object holds more than UNREAD."""
    return value is not UNREAD


def readable(items: Iterable[V]) -> Iterator[tuple[int, V]]:
    """The items of a list that could be read, with their indexes; none if the list itself could not be."""
    return ((index, item) for index, item in enumerate(items or ()) if was_read(item))
