"""What a configuration may look like, as values, and how a tree of plain data is read through them.

Five shapes are enough: a `Scalar`, a `Section` of known keys, a `Listing`, `Named` entries and a `Variant` that its
`type` selects. The settings are frozen structs whose fields carry their shapes (`setting`), so one declaration
gives the Python type, the check, the message and the JSON Schema. Reading never stops at the first error: each one
becomes a `Finding`, and what could be read is kept for the checks that compare keys.

A validation library would do most of this. None is used because the settings are on the way to the first secret: to
import the usual one and to build these models with it takes more than half as long as to import gRPC, cryptography and
anyio together.
"""

from collections.abc import Callable, Mapping
from enum import Enum
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Final, Generic, Literal, Protocol, TypeAlias, TypeVar, cast, dataclass_transform

import msgspec
from msgspec import NODEFAULT, Struct

from sds_agent.errors import ConfigurationError

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

KeyPath: TypeAlias = tuple[str | int, ...]
"""Where a value stands: `("workloads", 0, "key")`."""

LONGEST_QUOTE = 80


class _Invalid(Enum):
    INVALID = "invalid"


INVALID: Final = _Invalid.INVALID
Invalid: TypeAlias = Literal[_Invalid.INVALID]


class UnacceptableError(ConfigurationError):
    """A single value is not of its scalar's kind. The message, if any, adds to what is allowed."""


class Finding(Struct, frozen=True):
    """One thing wrong with a tree: at `path`, what was `found` ("is …") and how to `fix` it."""

    path: KeyPath
    found: str
    fix: str


class Reading(Struct):
    """One pass over a tree, and what it has seen so far.

    `base` is the directory that relative paths start from, `written` the text of scalars as the file has it.
    """

    base: Path
    written: Mapping[KeyPath, str]
    findings: list[Finding] = msgspec.field(default_factory=list)
    values: dict[KeyPath, object] = msgspec.field(default_factory=dict)

    def refuse(self, path: KeyPath, found: str, fix: str) -> Invalid:
        """Note a finding."""
        self.findings.append(Finding(path, found, fix))
        return INVALID


class Shape(Protocol[T_co]):
    """What one place of the tree may hold."""

    @property
    def allowed(self) -> str:
        """What may stand here, to follow "it must be"."""
        ...

    def read(self, value: object, path: KeyPath, reading: Reading) -> T_co | Invalid:
        """The setting that `value` gives; INVALID, and a finding in `reading`, if it gives none."""
        ...


class Scalar(Struct, Generic[T], frozen=True):
    """A single value. `parse` gets it, with the directory that relative paths start from, and raises UnacceptableError.

    `write` gives the form that the file has. A `secret` one is never quoted back.
    """

    allowed: str
    parse: Callable[[object, Path], T]
    schema: Mapping[str, object]
    write: Callable[[T], object] = str
    secret: bool = False

    def read(self, value: object, path: KeyPath, reading: Reading) -> T | Invalid:
        """The parsed value."""
        try:
            parsed = self.parse(value, reading.base)
        except UnacceptableError as error:
            if self.secret:
                return reading.refuse(path, "has a value that is not shown", _must_be(self.allowed))
            found = describe(value, reading.written.get(path))
            return reading.refuse(path, found, _must_be(self.allowed, str(error)))
        reading.values[path] = parsed
        return parsed


class Section(Struct, Generic[T], frozen=True):
    """A mapping with the keys that a settings class declares."""

    of: type[T]

    @property
    def allowed(self) -> str:
        """The keys."""
        return f"a mapping with the keys {', '.join(sorted(keys(self.of)))}"

    def read(self, value: object, path: KeyPath, reading: Reading, also: frozenset[str] = frozenset()) -> T | Invalid:
        """An instance; `also` names keys that are somebody else's to read."""
        if not isinstance(value, dict):
            return reading.refuse(path, describe_kind(value), _must_be(self.allowed))
        known = keys(self.of)
        unknown = [name for name in value if name not in known and name not in also]
        for name in unknown:
            _refuse_unknown(name, sorted({*known, *also}), path, reading)
        given: dict[str, object] = {}
        for name, key in known.items():
            if name in value:
                given[name] = key.shape.read(value[name], (*path, name), reading)
            elif key.required or key.filled:
                given[name] = reading.refuse((*path, name), "is missing", _must_be(key.shape.allowed))
        return INVALID if unknown or INVALID in given.values() else self.of(**given)


class Listing(Struct, Generic[T], frozen=True):
    """A list with at least one item. `what` names the items, in the plural."""

    item: Shape[T]
    what: str

    @property
    def allowed(self) -> str:
        """What the items are."""
        return f"a list of one or more {self.what}"

    def read(self, value: object, path: KeyPath, reading: Reading) -> tuple[T, ...] | Invalid:
        """The items, in order."""
        if not isinstance(value, list) or not value:
            return reading.refuse(path, describe_kind(value), _must_be(self.allowed))
        items = [self.item.read(item, (*path, index), reading) for index, item in enumerate(value)]
        read = tuple(item for item in items if item is not INVALID)
        return read if len(read) == len(items) else INVALID


class Named(Struct, Generic[T], frozen=True):
    """A mapping with at least one entry, from names that the user chooses. `what` names the entries, in the plural."""

    name: Scalar[str]
    item: Shape[T]
    what: str

    @property
    def allowed(self) -> str:
        """What the entries are."""
        return f"a mapping from names to one or more {self.what}"

    def read(self, value: object, path: KeyPath, reading: Reading) -> Mapping[str, T] | Invalid:
        """The entries by name, read-only."""
        if not isinstance(value, dict) or not value:
            return reading.refuse(path, describe_kind(value), _must_be(self.allowed))
        entries: dict[str, T] = {}
        for name, item in value.items():
            good = self._read_name(name, path, reading)
            read = self.item.read(item, (*path, name), reading)
            if good and read is not INVALID:
                entries[name] = read
        return MappingProxyType(entries) if len(entries) == len(value) else INVALID

    def _read_name(self, name: str, path: KeyPath, reading: Reading) -> bool:
        try:
            self.name.parse(name, reading.base)
        except UnacceptableError as error:
            reading.refuse((*path, name), "has a name that is not allowed", _must_be(self.name.allowed, str(error)))
            return False
        return True


class HasType(Protocol):
    """A settings class that a `type` key selects."""

    type: ClassVar[Any]


HasTypeT = TypeVar("HasTypeT", bound=HasType)


class Variant(Struct, Generic[HasTypeT], frozen=True):
    """One of several sections; the key `type` says which, and each class names its own in a class variable `type`."""

    kinds: tuple[type[HasTypeT], ...]

    @property
    def allowed(self) -> str:
        """The types."""
        return f"a mapping with a type ({', '.join(self._by_type())}) and that type's keys"

    def read(self, value: object, path: KeyPath, reading: Reading) -> HasTypeT | Invalid:
        """An instance of the class that `type` names."""
        if not isinstance(value, dict):
            return reading.refuse(path, describe_kind(value), _must_be(self.allowed))
        by_type, at = self._by_type(), (*path, "type")
        allowed = f"one of {', '.join(by_type)}"
        if "type" not in value:
            return reading.refuse(at, "is missing", _must_be(allowed))
        kind = value["type"]
        if not isinstance(kind, str) or kind not in by_type:
            near = did_you_mean(kind, list(by_type)) if isinstance(kind, str) else ""
            return reading.refuse(at, describe(kind, reading.written.get(at)), _must_be(allowed, near))
        return Section(by_type[kind]).read(value, path, reading, also=frozenset({"type"}))

    def _by_type(self) -> dict[str, type[HasTypeT]]:
        return {kind.type: kind for kind in self.kinds}


class Key(Struct, frozen=True):
    """One key of a section. A `filled` one may be left out of the file because the loader then fills it in."""

    shape: Shape[Any]
    doc: str
    filled: bool
    default: Callable[[], object] | None = None

    @property
    def required(self) -> bool:
        """Whether the file must have it."""
        return self.default is None and not self.filled


_ABSENT: Any = object()
_OF_EVERY_CLASS = frozenset({"__dict__", "__weakref__", "__annotations__", "__module__"})


def setting(
    shape: Shape[T],
    doc: str,
    *,
    default: T = _ABSENT,
    default_factory: Callable[[], T] = _ABSENT,
    filled: bool = False,
) -> T:
    """A field of a settings class. `doc` is what an editor shows: one or two sentences."""
    if default_factory is _ABSENT and default is not _ABSENT:
        default_factory = lambda: default  # noqa: E731 - the two ways to give a default become one
    return cast("T", Key(shape, doc, filled, None if default_factory is _ABSENT else default_factory))


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(setting,))
def settings(cls: type[T]) -> type[T]:
    """Make a settings class: a frozen struct with keyword arguments only, whose `KEYS` are what `setting` declared."""
    declared = {name: value for name, value in vars(cls).items() if isinstance(value, Key)}
    others = {name: value for name, value in vars(cls).items() if name not in {*declared, *_OF_EVERY_CLASS}}
    fields = [
        (name, Any, NODEFAULT if key.default is None else msgspec.field(default_factory=key.default))
        for name, key in declared.items()
    ]
    made = msgspec.defstruct(
        cls.__name__, fields, namespace={**others, "KEYS": declared}, module=cls.__module__, frozen=True, kw_only=True
    )
    return cast("type[T]", made)


def keys(of: type[Any]) -> Mapping[str, Key]:
    """The keys of a settings class, in the order of their declaration."""
    found: Mapping[str, Key] = of.KEYS
    return found


def describe(value: object, written: str | None = None) -> str:
    """What a scalar's place holds, to follow its key: `is "x"`, `is 0660, which YAML reads as the number 432`."""
    match value:
        case bool():
            read = str(value).lower()
        case int() if abs(value) > 10**18:  # Python refuses to write out the largest ones
            read = "a very large number"
        case int() | float():
            read = f"the number {value}"
        case str():
            return f"is {quoted(value)}"
        case _:
            return describe_kind(value)
    if written is None or read.endswith(f" {written}") or read == written:
        return f"is {read}"
    return f"is {_cut(written)}, which YAML reads as {read}"


def describe_kind(value: object) -> str:
    """What a place holds without quoting it: text in the place of a section may be a secret one level too high."""
    match value:
        case None:
            return "is empty"
        case dict():
            return "is a mapping" if value else "is an empty mapping"
        case list():
            return "is a list" if value else "is an empty list"
        case str():
            return "is text"
        case bool():
            return "is true or false"
        case _:
            return "is a number"


def quoted(text: str) -> str:
    """`text` in double quotes, in ASCII, without control characters and of a bounded length."""
    import json  # noqa: PLC0415 - only needed once something is wrong

    return json.dumps(_cut(text))


def did_you_mean(word: str, known: list[str]) -> str:
    """A question that names the nearest known word, or nothing where none is near."""
    import difflib  # noqa: PLC0415 - only needed once something is wrong

    near = difflib.get_close_matches(word[:LONGEST_QUOTE].lower(), known, n=1)
    return f"did you mean {near[0]}?" if near else ""


def _refuse_unknown(name: str, known: list[str], path: KeyPath, reading: Reading) -> None:
    here = f"the keys here are {', '.join(known)}"
    near = did_you_mean(name, known)
    reading.refuse((*path, name), "is not a known key", f"{near} ({here})" if near else here)


def _must_be(allowed: str, why: str = "") -> str:
    return f"it must be {allowed}" + (f"; {why}" if why else "")


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST_QUOTE else f"{text[:LONGEST_QUOTE]}..."
