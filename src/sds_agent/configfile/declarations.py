"""What a settings class declares, place by place.

A settings class is a frozen msgspec struct. A field is a bool, int, float, str, Literal or Enum, with the bounds,
pattern and greatest length that `Meta` gives, a type of `types`, a settings class, a tuple of such, a mapping to them
from names, or a settings class that the key `type` selects. With `| None` it may be left out. `msgspec.inspect`, which
`import msgspec` imports anyway, describes it; what is here adds our annotations, and reads single values.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

from msgspec import Meta, Struct
from msgspec.inspect import (
    BoolType,
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
    type_info,
)

from sds_agent.configfile.phrases import did_you_mean
from sds_agent.configfile.types import Convert, UnacceptableError, text


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
    """The annotation of a place whose key `type` selects one of several settings classes, as Variant describes."""
    return Meta(extra={"variant": Variant(find, names)})


class Declaration(Struct, frozen=True, dict=True):
    """What a settings class declares for one place: msgspec's type, and what the annotations `types` makes add to it.

    `schema` is the part of the JSON Schema that the annotations give.
    """

    type: Type
    extra: Mapping[str, Any]
    schema: Mapping[str, object]

    @property
    def variant(self) -> Variant | None:
        """The settings classes among which the key `type` selects, where it does."""
        return self.extra.get("variant")

    @property
    def section(self) -> StructType | None:
        """What msgspec says of the settings class of a section; None for any other place."""
        return self.type if isinstance(self.type, StructType) and "convert" not in self.extra else None

    @property
    def shorthand(self) -> "Declaration | None":
        """What a single value may be that stands for a section; None where a section is a mapping alone."""
        key = self.extra.get("shorthand")
        if key is None or self.section is None:
            return None
        return next(declaration(field.type) for field in self.section.fields if field.name == key)

    @property
    def allowed(self) -> str:
        """What may stand here, to follow "it must be"."""
        if self.section:
            mapping = f"a mapping with the keys {', '.join(keys_of(self.section.cls))}"
            return mapping if self.shorthand is None else f"{self.shorthand.allowed}, or {mapping}"
        if self.variant:
            return f"a mapping with a type ({', '.join(self.variant.types)}) and that type's keys"
        return str(self.extra["allowed"]) if "allowed" in self.extra else self._plain[0]

    def convert(self, value: object, base: Path) -> Any:
        """The setting that a single value gives. Raises UnacceptableError."""
        convert = self.extra["convert"] if "convert" in self.extra else self._plain[1]
        return convert(value, base)

    @cached_property
    def _plain(self) -> tuple[str, Convert]:
        """What msgspec's type alone says."""
        return _single(self.type)


def declaration(type_: Type) -> Declaration:
    """A type apart from its annotations, and from None: an optional key is left out, never empty."""
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
                return Declaration(type_, extra, schema)


@cache
def fields_of(of: type[Struct]) -> StructType:
    """What msgspec says of a settings class."""
    return cast("StructType", type_info(of))


class DeclaredKey(NamedTuple):
    """A key of a section: its name, what is declared for it, and whether it must be there."""

    name: str
    declared: Declaration
    required: bool


@cache
def declared_keys(of: type[Struct]) -> tuple[DeclaredKey, ...]:
    """The keys of a settings class in their order, but for its `type`. A file may hold thousands of such sections."""
    return tuple(DeclaredKey(each.name, declaration(each.type), each.required) for each in fields_of(of).fields)


@cache
def keys_of(of: type[Struct]) -> tuple[str, ...]:
    """The keys of a settings class, sorted, its `type` among them where that selects it."""
    section = fields_of(of)
    tag = [section.tag_field] if section.tag_field else []
    return tuple(sorted([*tag, *(field.name for field in section.fields)]))


def _single(type_: Type) -> tuple[str, Convert]:
    """What a single value of one of msgspec's types may be, and how it becomes a setting."""
    match type_:
        case BoolType():
            found: tuple[str, Convert] = "true or false", _flag
        case IntType(ge=least, le=most):
            found = f"a whole number{_bounds(least, most)}", _number(int, least, most)
        case FloatType(ge=least, le=most):
            found = f"a number{_bounds(least, most)}", _number(float, least, most)
        case LiteralType(values=words):
            found = _words({str(word): word for word in words})
        case EnumType(cls=kinds):
            found = _words({kind.value: kind for kind in kinds})
        case StrType(pattern=pattern, max_length=most):
            allowed = "printable text" if most is None else f"1 to {most} printable characters"
            found = allowed, _text(pattern or ".+", most)
        case _:
            raise TypeError(f"no configuration file can have {type_}")
    return found


def _flag(value: object, _base: Path) -> bool:
    if isinstance(value, bool):
        return value
    if text(value) not in {"true", "false"}:
        raise UnacceptableError
    return value == "true"


def _bounds(least: float | None, most: float | None) -> str:
    if least is None or most is None:
        return f" of at least {least}" if least is not None else f" of at most {most}" if most is not None else ""
    return f" from {least} to {most}"


def _number(kind: Callable[[int | float | str], Any], least: Any, most: Any) -> Convert:
    def convert(value: object, _base: Path) -> Any:
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

    return convert


def _text(pattern: str, most: int | None) -> Convert:
    def convert(value: object, _base: Path) -> str:
        written = text(value)
        if most is not None and len(written) > most:
            raise UnacceptableError(f"it has {len(written)} characters")
        if not re.fullmatch(pattern, written) or not written.isprintable():
            raise UnacceptableError
        return written

    return convert


def _words(known: Mapping[str, Any]) -> tuple[str, Convert]:
    def convert(value: object, _base: Path) -> Any:
        written = text(value)
        if written not in known:
            raise UnacceptableError(did_you_mean(written, list(known)))
        return known[written]

    return f"one of {', '.join(known)}", convert
