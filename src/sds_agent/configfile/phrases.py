"""What an error says about a place in a configuration: its key, what was found there, and the nearest known word."""

import re
from typing import TypeAlias

from sds_agent.text import LONGEST_QUOTE, ascii_json, concealed, cut

KeyPath: TypeAlias = tuple[str | int, ...]
"""Where a value stands in a configuration: `("workloads", 0, "key")`."""

_PLAIN_KEY = "[A-Za-z0-9_-]{1,80}"


def render(path: KeyPath) -> str:
    """A key path as text: `workloads[0].key`."""
    written = ""
    for part in path:
        if isinstance(part, int):
            written += f"[{part}]"
        else:
            plain = part if re.fullmatch(_PLAIN_KEY, part) else quoted(part)
            written += f".{plain}" if written else plain
    return written


def describe(value: object, written: str | None = None) -> str:
    """What was found for a single value, to follow its key: `is "x"`, `is 0660, which YAML reads as the number 432`.

    `written` is the value's text in the file.
    """
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
    return f"is {cut(written, LONGEST_QUOTE)}, which YAML reads as {read}"


def describe_kind(value: object) -> str:
    """What was found, without quoting it: text in the place of a section may be a secret one level too high."""
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


def must_be(allowed: str, reason: str = "") -> str:
    """How to fix a value, with the reason why the one found is not allowed."""
    return f"it must be {allowed}" + (f"; {reason}" if reason else "")


def did_you_mean(word: str, known: list[str]) -> str:
    """A question that names the nearest known word, or nothing where none is near."""
    import difflib  # noqa: PLC0415 - measured: 3 ms, for what is wrong

    near = difflib.get_close_matches(word[:LONGEST_QUOTE].lower(), known, n=1)
    return f"did you mean {near[0]}?" if near else ""


def quoted(text: str) -> str:
    """The text in double quotes, as YAML has them, in ASCII, without control characters and of a bounded length, and
    without the user and the password of a URL.
    """
    return ascii_json(cut(concealed(text), LONGEST_QUOTE))
