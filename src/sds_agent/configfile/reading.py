"""How plain data becomes a settings object, through what the object's class declares, with every problem at once.

Settings classes are frozen msgspec structs. The walk here follows what `msgspec.inspect` says of their fields, since
msgspec's own conversion ends at the first error and knows no lines. It also takes less than that one does: a number
for a flag, or text such as "5.0" for a whole number, is a mistake in a file.

A field is a bool, int, float, str, Literal or Enum, with the bounds, pattern and greatest length that `Meta` gives, a
type of `types`, a settings class, a tuple of such, or a mapping to them from names. With `| None` it may be left out.

Numbers and flags may come as text, because environment variables are text. What cannot be read is UNREAD in the object
that comes back, so that checks which compare keys can still be made on the rest.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, TypeVar, cast

import msgspec
from msgspec import Meta, Struct
from msgspec.inspect import (
    BoolType,
    DictType,
    EnumType,
    FloatType,
    IntType,
    LiteralType,
    Metadata,
    NoneType,
    StrType,
    StructType,
    Type,
    UnionType,
    VarTupleType,
    type_info,
)

from sds_agent.configfile.document import Document
from sds_agent.configfile.phrases import KeyPath, describe, describe_kind, did_you_mean, must_be
from sds_agent.configfile.types import UnacceptableError, text
from sds_agent.errors import Problem, ProblemsError

T = TypeVar("T", bound=Struct)
V = TypeVar("V")


class _Unread(Enum):
    UNREAD = "unread"

    def __bool__(self) -> bool:
        return False


UNREAD: Final[Any] = _Unread.UNREAD
"""Stands in a settings object for a value that could not be read; it is false. No such object leaves the loader."""


class Variant(Struct, frozen=True):
    """A section whose key `type` selects the settings class.

    `find` gives the class of a type, which it may import for that, or None; the class is tagged with the type
    (`tag="istio", tag_field="type"`). It raises ProblemsError for one that cannot be used, with places in the section.
    `names` gives the types there are.
    """

    find: Callable[[str], type[Struct] | None]
    names: Callable[[], Iterable[str]]

    @property
    def types(self) -> list[str]:
        """The types there are."""
        return list(self.names())


def selected(find: Callable[[str], type[Struct] | None], names: Callable[[], Iterable[str]]) -> Meta:
    """The annotation of a base class of which the key `type` selects one that is made, as Variant has it."""
    return Meta(extra={"variant": Variant(find, names)})


class Place(Struct, frozen=True):
    """What a place may hold: msgspec's type, what our annotations say of it, and its own part of the JSON Schema."""

    type: Type
    extra: Mapping[str, Any]
    schema: Mapping[str, object]

    @property
    def section(self) -> StructType | None:
        """What msgspec says of the settings class of a section; None for any other place."""
        return self.type if isinstance(self.type, StructType) and "convert" not in self.extra else None

    @property
    def allowed(self) -> str:
        """What may stand here, to follow "it must be"."""
        match self.type:
            case _ if "allowed" in self.extra:
                words = str(self.extra["allowed"])
            case _ if variant := self.extra.get("variant"):
                words = f"a mapping with a type ({', '.join(variant.types)}) and that type's keys"
            case StructType() as section:
                words = f"a mapping with the keys {', '.join(_keys(section))}"
            case BoolType():
                words = "true or false"
            case IntType(ge=least, le=most):
                words = f"a whole number{_bounds(least, most)}"
            case FloatType(ge=least, le=most):
                words = f"a number{_bounds(least, most)}"
            case LiteralType(values=known):
                words = f"one of {', '.join(map(str, known))}"
            case EnumType(cls=kinds):
                words = f"one of {', '.join(kind.value for kind in kinds)}"
            case StrType(max_length=most):
                words = "printable text" if most is None else f"1 to {most} printable characters"
            case _:
                raise TypeError(f"no configuration file can hold {self.type}")
        return words


def _bounds(least: float | None, most: float | None) -> str:
    if least is None or most is None:
        return f" of at least {least:g}" if least is not None else f" of at most {most:g}" if most is not None else ""
    return f" from {least} to {most}"


def place(type_: Type) -> Place:
    """A type without its annotations and without None: an optional key is left out, never empty."""
    extra: dict[str, Any] = {}
    schema: dict[str, object] = {}
    while True:
        match type_:
            case Metadata():
                extra = {**(type_.extra or {}), **extra}
                schema = {**(type_.extra_json_schema or {}), **schema}
                type_ = type_.type
            case UnionType(types=(value, NoneType())) | UnionType(types=(NoneType(), value)):
                type_ = value
            case _:
                return Place(type_, extra, schema)


@cache
def fields_of(of: type[Struct]) -> StructType:
    """What msgspec says of a settings class."""
    return cast("StructType", type_info(of))


class _Reading(Struct):
    """One pass over a document, and the problems seen so far, whose places are key paths."""

    base: Path
    written: Mapping[KeyPath, str]
    problems: list[Problem] = msgspec.field(default_factory=list)

    def refuse(self, path: KeyPath, found: str, fix: str) -> Any:
        """Note a problem; the value is unread."""
        self.problems.append(Problem(path, found, fix))
        return UNREAD

    def read(self, type_: Type, value: object, path: KeyPath) -> Any:
        """The setting that `value` gives, or UNREAD."""
        here = place(type_)
        if variant := here.extra.get("variant"):
            return self._selected(here, variant, value, path)
        if "convert" not in here.extra:
            match here.type:
                case StructType() as section:
                    return self.section(section, value, path)
                case VarTupleType(item_type=item):
                    return self._list(here, item, value, path)
                case DictType(key_type=name, value_type=item):
                    return self._mapping(here, name, item, value, path)
        try:
            return _convert(here, value, self.base)
        except UnacceptableError as error:
            return self.refuse(path, describe(value, self.written.get(path)), must_be(here.allowed, str(error)))

    def section(self, of: StructType, value: object, path: KeyPath) -> Any:
        """An instance of a settings class, in which single values may be UNREAD."""
        if not isinstance(value, dict):
            return self.refuse(path, describe_kind(value), must_be(Place(of, {}, {}).allowed))
        known = _keys(of)
        for name in value:
            if name not in known:
                here = f"the keys here are {', '.join(known)}"
                near = did_you_mean(name, known)
                self.refuse((*path, name), "is not a known key", f"{near} ({here})" if near else here)
        given: dict[str, Any] = {}
        for field in of.fields:
            at = (*path, field.name)
            if field.name in value:
                given[field.name] = self.read(field.type, value[field.name], at)
            elif field.required:
                given[field.name] = self.refuse(at, "is missing", must_be(place(field.type).allowed))
        return of.cls(**given)

    def _list(self, here: Place, item: Type, value: object, path: KeyPath) -> Any:
        if not isinstance(value, list) or not value:
            return self.refuse(path, describe_kind(value), must_be(here.allowed))
        return tuple(self.read(item, each, (*path, index)) for index, each in enumerate(value))

    def _mapping(self, here: Place, name: Type, item: Type, value: object, path: KeyPath) -> Any:
        if not isinstance(value, dict) or not value:
            return self.refuse(path, describe_kind(value), must_be(here.allowed))
        names = place(name)
        for each in value:
            try:
                _convert(names, each, self.base)
            except UnacceptableError as error:
                fix = must_be(names.allowed, str(error))
                self.refuse((*path, each), "has a name that is not allowed", fix)
        return MappingProxyType({each: self.read(item, inner, (*path, each)) for each, inner in value.items()})

    def _selected(self, here: Place, variant: Variant, value: object, path: KeyPath) -> Any:
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
        return self.refuse(at, describe(written, self.written.get(at)), must_be(allowed, near))


def read(of: type[T], document: Document) -> tuple[T, list[Problem]]:
    """The settings that a document gives, and all that is wrong with it, by key path.

    The settings can be used if nothing is wrong. Else single values in them, whole sections too, may be UNREAD.
    """
    reading = _Reading(document.base, document.written)
    return reading.section(fields_of(of), document.tree, ()), reading.problems


def was_read(value: object) -> bool:
    """Whether a place in a settings object holds more than UNREAD."""
    return value is not UNREAD


def readable(items: Iterable[V]) -> Iterator[tuple[int, V]]:
    """The items of a list that could be read, with their indexes; none if the list itself could not be."""
    return ((index, item) for index, item in enumerate(items or ()) if was_read(item))


def _keys(section: StructType) -> list[str]:
    tag = [section.tag_field] if section.tag_field else []
    return sorted([*tag, *(field.name for field in section.fields)])


def _convert(here: Place, value: object, base: Path) -> Any:
    """A single value. Raises UnacceptableError."""
    match here.type:
        case _ if convert := here.extra.get("convert"):
            read = convert(value, base)
        case BoolType():
            read = _flag(value)
        case IntType(ge=least, le=most):
            read = _number(int, value, least, most)
        case FloatType(ge=least, le=most):
            read = _number(float, value, least, most)
        case LiteralType(values=words):
            read = _word(value, {str(word): word for word in words})
        case EnumType(cls=kinds):
            read = _word(value, {kind.value: kind for kind in kinds})
        case StrType(pattern=pattern, max_length=most):
            read = _text(value, pattern or ".+", most)
        case _:
            raise TypeError(f"no configuration file can hold {here.type}")
    return read


def _text(value: object, pattern: str, most: int | None) -> str:
    written = text(value)
    if most is not None and len(written) > most:
        raise UnacceptableError(f"it has {len(written)} characters")
    if not re.fullmatch(pattern, written) or not written.isprintable():
        raise UnacceptableError
    return written


def _flag(value: object) -> bool:
    if isinstance(value, bool):
        return value
    if text(value) not in {"true", "false"}:
        raise UnacceptableError
    return value == "true"


def _number(kind: Callable[[int | float | str], Any], value: object, least: Any, most: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise UnacceptableError
    try:
        read = kind(value)
    except (ValueError, OverflowError) as error:
        raise UnacceptableError from error
    fits = (least is None or least <= read) and (most is None or read <= most)
    nan = isinstance(read, float) and math.isnan(read)
    if not fits or nan or (isinstance(value, float) and read != value):
        raise UnacceptableError
    return read


def _word(value: object, known: Mapping[str, Any]) -> Any:
    written = text(value)
    if written not in known:
        raise UnacceptableError(did_you_mean(written, list(known)))
    return known[written]
