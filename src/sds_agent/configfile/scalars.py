"""The kinds of single values: what an operator may write for each, and the typed value it becomes.

Numbers may come as text too, because environment variables are text.
"""

import os
import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

from sds_agent.configfile.durations import PATTERN as DURATION_PATTERN
from sds_agent.configfile.durations import format_duration
from sds_agent.configfile.durations import parse as parse_duration
from sds_agent.configfile.shapes import Scalar, UnacceptableError, did_you_mean
from sds_agent.identity.spiffe import SpiffeId, SpiffeIdError, TrustDomain

N = TypeVar("N", int, float)
S = TypeVar("S", bound=str)

LONGEST_NAME = 255
"""Characters of a workload's name."""
LONGEST_SOCKET_PATH = 107
"""Bytes that fit a Unix socket's address (sockaddr_un) without its final zero."""
TEMPORARY_NAME = 8
"""Bytes of a slash and the name that the socket has before it appears."""
LARGEST_ID = 2**32 - 2
"""The kernel takes the id above it for "unchanged"."""

_MODE_PATTERN = "^(0|0o)?[67][0-7]0$"
_ACCOUNT_PATTERN = "^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}[$]?$"
_AUTHORITY_PATTERN = "^[a-z0-9][a-z0-9_-]{0,62}$"
_FILE_NAMES = ("file-cert:", "file-root:")


class FileMode(int):
    """The permission bits of a file; `str` gives them as chmod takes them, such as `0660`."""

    def __str__(self) -> str:
        return f"{int(self):04o}"


def text(value: object) -> str:
    """The text that `value` is. Raises UnacceptableError."""
    if isinstance(value, str):
        return value
    raise UnacceptableError("write it in quotes" if isinstance(value, bool | int | float) else "")


def choice(*among: S) -> Scalar[S]:
    """One of these words."""
    known = {str(each): each for each in among}

    def parse(value: object, _base: Path) -> S:
        written = text(value)
        if written not in known:
            raise UnacceptableError(did_you_mean(written, list(known)))
        return known[written]

    return Scalar(f"one of {', '.join(known)}", parse, {"type": "string", "enum": list(known)})


def duration(least: timedelta, most: timedelta, why: str = "") -> Scalar[timedelta]:
    """A length of time within bounds. `why` explains them."""
    bounds = f"between {format_duration(least)} and {format_duration(most)}"

    def parse(value: object, _base: Path) -> timedelta:
        if isinstance(value, int | float):
            raise UnacceptableError("a number alone has no unit: write 20s, 90m, 24h or 30d")
        read = parse_duration(text(value))
        if read is None:
            raise UnacceptableError("the units are d, h, m, s and ms, the largest first")
        if not least <= read <= most:
            raise UnacceptableError(why)
        return read

    schema = {"type": "string", "pattern": DURATION_PATTERN}
    return Scalar(f"a duration such as 20s, 1h30m or 30d, {bounds}", parse, schema, format_duration)


def whole(least: int, most: int) -> Scalar[int]:
    """A whole number within bounds."""
    schema = {"type": "integer", "minimum": least, "maximum": most}
    return Scalar(f"a whole number from {least} to {most}", _number(int, least, most), schema, int)


def share(least: float, most: float) -> Scalar[float]:
    """A number within bounds."""
    schema = {"type": "number", "minimum": least, "maximum": most}
    return Scalar(f"a number from {least} to {most}", _number(float, least, most), schema, float)


def _number(kind: Callable[[int | float | str], N], least: N, most: N) -> Callable[[object, Path], N]:
    def parse(value: object, _base: Path) -> N:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise UnacceptableError
        try:
            read = kind(value)
        except (ValueError, OverflowError) as error:
            raise UnacceptableError from error
        if not least <= read <= most or (isinstance(value, float) and read != value):
            raise UnacceptableError
        return read

    return parse


def _flag(value: object, _base: Path) -> bool:
    if isinstance(value, bool):
        return value
    if text(value) not in {"true", "false"}:
        raise UnacceptableError
    return value == "true"


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


def _absolute(value: object, base: Path) -> Path:
    written = text(value)
    if not written or not written.isprintable():
        raise UnacceptableError("it holds unprintable characters" if written else "it is empty")
    if written.startswith("~"):
        raise UnacceptableError("~ is not expanded here: write the home directory out")
    return base / written


def _socket(value: object, base: Path) -> Path:
    if isinstance(value, str) and value.startswith(("unix:", "@")):
        raise UnacceptableError("write the path alone: no unix: before it, and no abstract name")
    path = _absolute(value, base)
    if (size := len(os.fsencode(path))) > LONGEST_SOCKET_PATH:
        raise UnacceptableError(f"with its directory it has {size} bytes: choose a shorter one")
    if (size := len(os.fsencode(path.parent)) + TEMPORARY_NAME) > LONGEST_SOCKET_PATH:
        raise UnacceptableError(f"its directory and the temporary name in it have {size} bytes: choose a shorter one")
    return path


def _workload_name(value: object, _base: Path) -> str:
    written = text(value)
    if not 0 < len(written) <= LONGEST_NAME or not written.isprintable():
        raise UnacceptableError(f"it has {len(written)} characters" if len(written) > LONGEST_NAME else "")
    if written.startswith(_FILE_NAMES):
        raise UnacceptableError("names with file-cert: and file-root: stand for files")
    return written


def _authority_name(value: object, _base: Path) -> str:
    written = text(value)
    if not re.fullmatch(_AUTHORITY_PATTERN, written):
        raise UnacceptableError
    return written


def _trust_domain(value: object, _base: Path) -> str:
    try:
        return str(TrustDomain.parse(text(value)))
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


FLAG = Scalar("true or false", _flag, {"type": "boolean"}, bool)
MODE = Scalar(
    'octal digits in quotes such as "0660" or "0600": read and write for the owner, nothing for others',
    _mode,
    {"type": "string", "pattern": _MODE_PATTERN},
)
ACCOUNT = Scalar(
    "a name or a numeric id", _account, {"type": ["string", "integer"], "minimum": 0, "pattern": _ACCOUNT_PATTERN}
)
PATH = Scalar("a path", _absolute, {"type": "string", "minLength": 1})
SOCKET_PATH = Scalar(f"a path of at most {LONGEST_SOCKET_PATH} bytes", _socket, {"type": "string", "minLength": 1})
WORKLOAD_NAME = Scalar(
    f"1 to {LONGEST_NAME} printable characters that do not begin with file-cert: or file-root:",
    _workload_name,
    {"type": "string", "minLength": 1, "maxLength": LONGEST_NAME, "pattern": "^(?!file-(cert|root):)"},
)
AUTHORITY_NAME = Scalar(
    "1 to 63 of a-z, 0-9, - and _, beginning with a letter or a digit",
    _authority_name,
    {"type": "string", "pattern": _AUTHORITY_PATTERN},
)
TRUST_DOMAIN = Scalar(
    "the name of a trust domain such as demo.example",
    _trust_domain,
    {"type": "string", "maxLength": 255, "pattern": "^[a-z0-9._-]+$"},
)
WORKLOAD_ID = Scalar(
    "a SPIFFE ID with a path such as spiffe://demo.example/web",
    _workload_id,
    {"type": "string", "maxLength": 2048, "pattern": "^spiffe://[a-z0-9._-]+(/[A-Za-z0-9._-]+)+$"},
)
