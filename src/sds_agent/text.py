"""Text that others wrote, such as a peer, a CA or an operator, as a part of our messages and logs.

Such text is cut to a length that the caller gives. What is put in quotes or escaped is ASCII without control
characters: other characters could reorder or hide what a terminal shows, or begin a line of their own.
"""

import signal
from collections.abc import Sequence

import msgspec

LONGEST_QUOTE = 80
"""Characters of a text in a message that says what is wrong with it."""
MARK = "..."
"""What follows a text that was cut."""


def cut(text: str, most: int, *, count: bool = False) -> str:
    """The text, or its first `most` characters and `MARK`; with `count` the mark says how long the text was."""
    if len(text) <= most:
        return text
    return f"{text[:most]}… ({len(text)} characters)" if count else text[:most] + MARK


def first(texts: Sequence[str], most: int) -> tuple[str, ...]:
    """All of the texts, or the first `most` of them and, in a last one, how many more there are."""
    more = len(texts) - most
    return tuple(texts) if more <= 0 else (*texts[:most], f"and {more} more")


def quoted(text: str, most: int = LONGEST_QUOTE) -> str:
    """The text in Python's quotes, escaped; the mark of one that was cut follows them."""
    return ascii(text) if len(text) <= most else ascii(text[:most]) + MARK


def listing(names: Sequence[str], most: int, longest: int) -> str:
    """The first `most` names in quotes, each with so many characters at most, and a mark if there are more."""
    return ", ".join(quoted(name, longest) for name in names[:most]) + (", ..." if len(names) > most else "")


def concealed(text: str) -> str:
    """The text without what may be a user's name and a password in a URL: what is between its `//` and its last `@`."""
    begin, slashes, rest = text.partition("//")
    _, at, host = rest.rpartition("@")
    return f"{begin}//***@{host}" if slashes and at else text


def escaped(text: str, most: int) -> str:
    """The text without quotes, in ASCII with Python's escapes."""
    return cut(ascii(text)[1:-1], most)


def printable(text: str, most: int) -> str:
    """The text, cut with its length in the mark, in ASCII; what is not printable ASCII is escaped as in JSON."""
    shown = cut(text, most, count=True)
    return shown if shown.isascii() and shown.isprintable() else ascii_json(shown)[1:-1]


def visible(text: str) -> str:
    """The text, whole; each character that is not printable, such as one that controls a terminal or reorders what it
    shows, is escaped as in Python.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def one_line(text: str, most: int) -> str:
    """The text on one line of printable ASCII, for words of another program: `?` for what is not ASCII."""
    return cut("".join(c if c.isascii() and c.isprintable() else " " if c.isspace() else "?" for c in text), most)


def is_token(data: bytes) -> bool:
    """Whether it is a text as a header carries a token or a password: printable ASCII without spaces."""
    return all(0x21 <= byte <= 0x7E for byte in data)


def ascii_json(value: object) -> str:
    """The value in JSON, in which what is not ASCII is escaped, and so is DEL; a text is in double quotes then.

    msgspec is imported anyway, and faster, but does not escape and knows no lone surrogates.
    """
    try:
        encoded = msgspec.json.encode(value)
    except UnicodeEncodeError:
        encoded = b"\xff"
    if encoded.isascii():
        return encoded.decode().replace("\x7f", "\\u007f")
    import json  # noqa: PLC0415 - measured: 1.3 ms of the way to the first secret

    return json.dumps(value, ensure_ascii=True, separators=(",", ":")).replace("\x7f", "\\u007f")


def name_of_signal(number: int) -> str | None:
    """A signal's name, such as SIGTERM; most of the real-time signals have none."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return None
