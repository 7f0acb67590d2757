"""How commands write what they found: a table for people, JSON or YAML for programs."""

import argparse
import os
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime, timedelta
from typing import Any

import msgspec

from sds_agent.cli import output
from sds_agent.text import ascii_json

FORMATS = ("table", "json", "yaml")

_COLOURS = {"good": "32", "warning": "33", "bad": "31", "dim": "2", "bold": "1"}


def add_format(parser: argparse.ArgumentParser, *others: str) -> None:
    """Declare `-o`, with these formats beside those that every command has."""
    parser.add_argument(
        "-o",
        "--output",
        choices=(*FORMATS, *others),
        default="table",
        dest="format",
        help="a table for people, or JSON or YAML for programs; by default a table",
    )


def document(value: object, form: str) -> str:
    """A value of the status model, or of plain types, as `json` or `yaml`, without the last line's end.

    Characters that are not printable, or that standard output does not have, are escaped, as far as a program reads the
    same value: the document may be shown.
    """
    if form == "json":
        written = msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
        return "\n".join(map(_escaped, written.split("\n")))
    import yaml  # noqa: PLC0415 - measured: 30 ms

    plain = msgspec.to_builtins(value, builtin_types=())
    written = _yaml(yaml, plain, plainly=True)
    return written if all(map(_is_plain, written.split("\n"))) else _yaml(yaml, plain, plainly=False)


def _yaml(yaml: Any, plain: Any, *, plainly: bool) -> str:
    written: str = yaml.safe_dump(plain, sort_keys=False, allow_unicode=plainly, width=120)
    return written.rstrip("\n")


def _escaped(line: str) -> str:
    """A line of JSON: outside of texts it has no such characters."""
    return line if _is_plain(line) else "".join(c if _is_plain(c) else ascii_json(c)[1:-1] for c in line)


def _is_plain(text: str) -> bool:
    return text.isprintable() and output.takes(text)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Columns as wide as their longest cell, with two spaces between them; an empty cell is a dash. Colour takes no
    room.
    """
    lines = [tuple(head), *(tuple(cell or "-" for cell in row) for row in rows)]
    widths = [max(map(_width, column)) for column in zip(*lines, strict=True)]
    return "\n".join(_line(line, widths) for line in lines)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    padded = (cell + " " * (width - _width(cell)) for cell, width in zip(cells, widths, strict=True))
    return "  ".join(padded).rstrip()


def _width(cell: str) -> int:
    """Its columns on a terminal: all text in the status model is ASCII."""
    if "\x1b" not in cell:
        return len(cell)
    return len(cell) - sum(len(f"\x1b[{code}m\x1b[0m") for code in _COLOURS.values() if f"\x1b[{code}m" in cell)


def coloured(text: str, colour: str) -> str:
    """The text in a colour of `_COLOURS`, where standard output is a terminal and NO_COLOR (no-color.org) is unset."""
    if os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb" or not _is_terminal():
        return text
    return f"\x1b[{_COLOURS[colour]}m{text}\x1b[0m"


def _is_terminal() -> bool:
    return sys.stdout is not None and sys.stdout.isatty()


def span(length: timedelta) -> str:
    """A length of time in its two largest units: `11d4h`, `3h5m`, `12s`; negative after a minus."""
    seconds = round(length.total_seconds())
    if seconds < 0:
        return f"-{span(-length)}"
    units = (("d", 86_400), ("h", 3_600), ("m", 60), ("s", 1))
    parts = []
    for unit, size in units:
        count, seconds = divmod(seconds, size)
        parts.append((count, unit))
    first = next((index for index, (count, _) in enumerate(parts) if count), len(parts) - 1)
    shown = [f"{count}{unit}" for count, unit in parts[first : first + 2] if count]
    return "".join(shown) or "0s"


def left(end: datetime, now: datetime) -> str:
    """How long until then: `in 11d4h`, or `4s ago`."""
    rest = end - now
    return f"in {span(rest)}" if rest >= timedelta(0) else f"{span(-rest)} ago"


def write(value: object, form: str) -> None:
    """Write a document to standard output. Raises OutputError."""
    output.write(document(value, form))
