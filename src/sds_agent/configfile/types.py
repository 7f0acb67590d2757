"""The types of single values that msgspec does not know: what an operator may write for each, and what it becomes.

A field is annotated with them as with msgspec's own, and with a description: `ca_file: Annotated[FilePath | None,
Meta(description="The roots.")] = None`. Each has one function that converts the value in the file, or raises
UnacceptableError with the reason. `custom` makes the annotation of another such type.
"""

import os.path
import re
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Annotated, Any, TypeAlias

from msgspec import Meta

from sds_agent.configfile.durations import PATTERN as DURATION_PATTERN
from sds_agent.configfile.durations import format_duration
from sds_agent.configfile.durations import parse as parse_duration
from sds_agent.configfile.phrases import describe
from sds_agent.errors import ConfigurationError
from sds_agent.files import LONGEST_SOCKET_PATH, socket_path_size
from sds_agent.identity.spiffe import SpiffeId, SpiffeIdError
from sds_agent.identity.spiffe import TrustDomain as ParsedTrustDomain
from sds_agent.text import quoted

LONGEST_NAME = 255
"""Characters of a workload's name."""
LARGEST_ID = 2**32 - 2
"""The kernel takes the id above it for "unchanged"."""

MOST_ITEMS = 8
"""Items of a list for which a single value may stand."""

_AUTHORITY_PATTERN = "^[a-z0-9][a-z0-9_-]{0,62}$"
_AUTHORITY_ALLOWED = "1 to 63 of a-z, 0-9, - and _, beginning with a letter or a digit"
_MODE_PATTERN = "^(0|0o)?[67][0-7]0$"
_ACCOUNT_PATTERN = "^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}[$]?$"
_FILE_NAMES = ("file-cert:", "file-root:")

Convert: TypeAlias = Callable[[object, Path], Any]
"""Converts a value in the file to the setting. The second argument is the directory that relative paths start from.
Raises UnacceptableError.
"""


class UnacceptableError(ConfigurationError):
    """A value is not of its type. The message, if any, is the reason, to follow what is allowed."""


class NotTextError(UnacceptableError):
    """YAML reads as a number or a flag what has to be text; quotes mend it where the text is acceptable."""


class FileMode(int):
    """The permission bits of a file; `str` gives them as chmod takes them, such as `0660`."""

    def __str__(self) -> str:
        return f"{int(self):04o}"


def custom(convert: Convert, allowed: str, schema: dict[str, object], write: Callable[[Any], object] = str) -> Meta:
    """The annotation of a type that `convert` makes. `allowed` says what may stand there, to follow "it must be".

    `schema` is the JSON Schema of the value in the file, and `write` converts a setting back to that value.
    """
    return Meta(extra={"convert": convert, "allowed": allowed, "write": write}, extra_json_schema=schema)


def one_or_several(convert: Convert, allowed: str, pattern: str, *, unique: bool = False) -> Meta:
    """The annotation of a tuple of values, for which the file has one of them or a list of 1 to MOST_ITEMS.

    `convert` makes each, `allowed` says what one is, and `pattern` matches it. `unique` is for the schema alone.
    """

    def convert_all(value: object, base: Path) -> tuple[Any, ...]:
        if not isinstance(value, list):
            return (convert(value, base),)
        if not 0 < len(value) <= MOST_ITEMS:
            raise UnacceptableError(f"it has {len(value)} of them")
        return tuple(convert(each, base) for each in _texts(value))

    schema: dict[str, object] = {
        "type": ["string", "array"],
        "pattern": pattern,
        "minItems": 1,
        "maxItems": MOST_ITEMS,
        **({"uniqueItems": True} if unique else {}),
        "items": {"type": "string", "pattern": pattern},
    }
    return custom(convert_all, f"{allowed}, or a list of 1 to {MOST_ITEMS} of them", schema, list)


def matching(pattern: str, allowed: str) -> Meta:
    """The annotation of text that a pattern matches as a whole. Python and ECMAScript must read the pattern alike."""
    return Meta(pattern=pattern, extra={"allowed": allowed})


def shorthand(key: str) -> Meta:
    """The annotation of a section for which a single value may stand: that of its key `key` alone."""
    return Meta(extra={"shorthand": key})


def listing(items: str) -> Meta:
    """The annotation of a list with at least one item. `items` names them, in the plural."""
    return Meta(min_length=1, extra={"allowed": f"a list of one or more {items}"})


def naming(entries: str) -> Meta:
    """The annotation of a mapping from names of the user's choice to at least one entry. `entries` is a plural."""
    return Meta(min_length=1, extra={"allowed": f"a mapping from names to one or more {entries}"})


def filled_in(default: str) -> Meta:
    """The annotation of a key that may be left out of the file although it has no default: the loader adds it.

    `default` stands in the column of defaults on the page of all keys.
    """
    return Meta(extra={"filled_in": default})


def duration(least: timedelta, most: timedelta, reason: str = "") -> Meta:
    """The annotation of a length of time within bounds. `reason` explains them."""

    def convert(value: object, _base: Path) -> timedelta:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if is_number or (isinstance(value, str) and value.isdecimal()):
            raise UnacceptableError("a number alone has no unit: write 20s, 90m, 24h or 30d")
        read = parse_duration(text(value))
        if read is None:
            raise UnacceptableError("the units are d, h, m, s and ms, the largest first")
        if not least <= read <= most:
            raise UnacceptableError(reason)
        return read

    bounds = f"between {format_duration(least)} and {format_duration(most)}"
    schema: dict[str, object] = {"type": "string", "pattern": DURATION_PATTERN}
    return custom(convert, f"a duration such as 20s, 1h30m or 30d, {bounds}", schema, format_duration)


def text(value: object) -> str:
    """The text that `value` is. Raises UnacceptableError."""
    if isinstance(value, str):
        return value
    raise NotTextError("write it in quotes") if isinstance(value, bool | int | float) else UnacceptableError()


def _texts(items: list[object]) -> Iterator[str]:
    """The texts of a list. Raises UnacceptableError, which names the item that is none: only the list has a line."""
    for index, each in enumerate(items):
        if not isinstance(each, str):
            fix = ": write it in quotes" if isinstance(each, bool | int | float) else ""
            raise UnacceptableError(f"its item [{index}] {describe(each)}{fix}")
        yield each


def _mode(value: object, _base: Path) -> FileMode:
    written = text(value)
    if re.fullmatch(_MODE_PATTERN, written):
        return FileMode(int(written.removeprefix("0o"), 8))
    if re.fullmatch("(0|0o)?[0-7]{3}", written) and written[-1] != "0":
        raise UnacceptableError(
            "every process that may connect can read private keys; let others in through sds.group instead"
        )
    raise UnacceptableError


def _account(value: object, _base: Path) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return _account_id(value)
    written = text(value)
    if not re.fullmatch(_ACCOUNT_PATTERN, written):
        raise UnacceptableError
    return _account_id(int(written)) if written.isdecimal() else written


def _account_id(number: int) -> str:
    if not 0 <= number <= LARGEST_ID:
        raise UnacceptableError(f"ids lie between 0 and {LARGEST_ID}")
    return str(number)


def file_path(value: object, base: Path) -> Path:
    """The path that `value` writes; a relative one starts from `base`. Raises UnacceptableError."""
    written = text(value)
    if not written or not written.isprintable():
        raise UnacceptableError("it holds unprintable characters" if written else "it is empty")
    if written.startswith("~"):
        raise UnacceptableError("~ is not expanded here: write the home directory out")
    return base / written


def _command(value: object, _base: Path) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise UnacceptableError("no shell reads it: write each argument as an item of its own")
    words = tuple(_texts(value))
    if not words[0] or any("\0" in word for word in words):
        raise UnacceptableError("the first item names the program, and no item holds a null byte")
    return words


def _directory_of_secrets(value: object, base: Path) -> Path:
    path = file_path(value, base)
    if not os.path.normpath(path).strip("/"):
        raise UnacceptableError("that is every file of this machine: name the directories with certificates alone")
    return path


def socket_path(value: object, base: Path) -> Path:
    """The same for the path of a Unix socket. Raises UnacceptableError."""
    if isinstance(value, str) and value.startswith(("unix:", "@")):
        raise UnacceptableError("write the path alone: no unix: before it, and no abstract name")
    path = file_path(value, base)
    if path.name in {"", ".."}:
        raise UnacceptableError("it is a directory: name the socket in it")
    if (size := socket_path_size(path)) > LONGEST_SOCKET_PATH:
        raise UnacceptableError(f"it, or a temporary name beside it, has {size} bytes: choose a shorter directory")
    return path


def _workload_name(value: object, _base: Path) -> str:
    written = text(value)
    if not 0 < len(written) <= LONGEST_NAME or not written.isprintable():
        raise UnacceptableError(f"it has {len(written)} characters" if len(written) > LONGEST_NAME else "")
    if written.startswith(_FILE_NAMES):
        raise UnacceptableError("names with file-cert: and file-root: stand for files")
    return written


def _trust_domain(value: object, _base: Path) -> str:
    try:
        return str(ParsedTrustDomain.parse(text(value)))
    except SpiffeIdError as error:
        raise UnacceptableError(str(error)) from error


def _workload_id(value: object, _base: Path) -> str:
    try:
        read = SpiffeId.parse(text(value))
    except SpiffeIdError as error:
        raise UnacceptableError(str(error)) from error
    if not read.is_workload:
        raise UnacceptableError("it has no path: the trust domain's own ID is not a workload's")
    return str(read)


def _authority_name(value: object, _base: Path) -> str:
    written = text(value)
    if not re.fullmatch(_AUTHORITY_PATTERN, written):
        raise UnacceptableError(f"{quoted(written, LONGEST_NAME)} is no such name: {_AUTHORITY_ALLOWED}")
    return written


_PATH_SCHEMA: dict[str, object] = {"type": "string", "minLength": 1}

FilePath: TypeAlias = Annotated[Path, custom(file_path, "a path", _PATH_SCHEMA)]
Command: TypeAlias = Annotated[
    tuple[str, ...],
    custom(
        _command,
        "a list of a program and its arguments",
        {"type": "array", "minItems": 1, "items": {"type": "string"}},
        list,
    ),
]
SecretDirectory: TypeAlias = Annotated[
    Path, custom(_directory_of_secrets, "a directory other than /", {**_PATH_SCHEMA, "pattern": "[^/]"})
]
SocketPath: TypeAlias = Annotated[
    Path, custom(socket_path, f"a path of at most {LONGEST_SOCKET_PATH} bytes", {**_PATH_SCHEMA, "pattern": "[^/]"})
]
Mode: TypeAlias = Annotated[
    FileMode,
    custom(
        _mode,
        'octal digits in quotes such as "0660" or "0600": read and write for the owner, nothing for others',
        {"type": "string", "pattern": _MODE_PATTERN},
    ),
]
Account: TypeAlias = Annotated[
    str,
    custom(
        _account,
        "a name or a numeric id",
        {"type": ["string", "integer"], "minimum": 0, "pattern": _ACCOUNT_PATTERN},
    ),
]
WorkloadName: TypeAlias = Annotated[
    str,
    custom(
        _workload_name,
        f"1 to {LONGEST_NAME} printable characters that do not begin with file-cert: or file-root:",
        {"type": "string", "minLength": 1, "maxLength": LONGEST_NAME, "pattern": "^(?!file-(cert|root):)"},
    ),
]
AuthorityName: TypeAlias = Annotated[str, matching(_AUTHORITY_PATTERN, _AUTHORITY_ALLOWED)]
AuthorityNames: TypeAlias = Annotated[
    tuple[str, ...], one_or_several(_authority_name, "the name of an authority", _AUTHORITY_PATTERN, unique=True)
]
CredentialName: TypeAlias = Annotated[
    str,
    matching("^[A-Za-z0-9_-][A-Za-z0-9_.-]{0,254}$", "the name of a credential: A-Z, a-z, 0-9, _, - and ."),
]
TrustDomain: TypeAlias = Annotated[
    str,
    custom(
        _trust_domain,
        "the name of a trust domain such as demo.example",
        {"type": "string", "maxLength": 255, "pattern": "^[a-z0-9._-]+$"},
    ),
]
WorkloadId: TypeAlias = Annotated[
    str,
    custom(
        _workload_id,
        "a SPIFFE ID with a path such as spiffe://demo.example/web",
        {"type": "string", "maxLength": 2048, "pattern": "^spiffe://[a-z0-9._-]+(/[A-Za-z0-9._-]+)+$"},
    ),
]
