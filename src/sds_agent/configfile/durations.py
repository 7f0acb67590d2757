"""Durations as operators write them: `20s`, `1h30m`, `24h`, `90d`, and Go's forms of them (`1.5h`, `1h0m0s`)."""

import re
from datetime import timedelta

_NUMBER = r"([0-9]{1,9}(?:\.[0-9]{1,6})?)"
PATTERN = rf"^(?=.)(?:{_NUMBER}d)?(?:{_NUMBER}h)?(?:{_NUMBER}m)?(?:{_NUMBER}s)?(?:{_NUMBER}ms)?$"
"""Part of the JSON Schema too, so it uses only what Python and ECMAScript read alike."""

_UNITS = {
    "d": timedelta(days=1),
    "h": timedelta(hours=1),
    "m": timedelta(minutes=1),
    "s": timedelta(seconds=1),
    "ms": timedelta(milliseconds=1),
}


def parse(text: str) -> timedelta | None:
    """The duration that `text` writes, or None: numbers with a unit, the largest first, each unit once at most.

    `timedelta.max`, which is past every bound, stands for what is longer than a timedelta can be.
    """
    found = re.fullmatch(PATTERN, text)
    if found is None:
        return None
    parts = zip(found.groups(), _UNITS.values(), strict=True)
    try:
        return sum((unit * float(number) for number, unit in parts if number is not None), timedelta())
    except OverflowError:
        return timedelta.max


def format_duration(duration: timedelta) -> str:
    """The shortest form that `parse` reads back as the same duration, rounded to whole milliseconds.

    Days are written only where nothing is left over, so a day reads `24h` and ninety of them `90d`.
    """
    left = duration // _UNITS["ms"]
    if left % 86_400_000 == 0 and left > 86_400_000:
        return f"{left // 86_400_000}d"
    written = ""
    for unit, size in (("h", 3_600_000), ("m", 60_000), ("s", 1000), ("ms", 1)):
        count, left = divmod(left, size)
        written += f"{count}{unit}" if count else ""
    return written or "0s"
