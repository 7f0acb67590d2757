"""Just enough of DER (ITU-T X.690) for what cryptography has parsed and does not tell."""

from collections.abc import Iterator


def values(data: bytes) -> Iterator[tuple[int, bytes]]:
    """The tag and the content of each value in `data`, one after the other.

    Raises ValueError where they do not fill it, or a tag takes more than a byte, as none does in a certificate.
    """
    position = 0
    while position < len(data):
        tag, begin, end = _header(data, position)
        if end > len(data):
            raise ValueError("a value goes on past the end")
        yield tag, data[begin:end]
        position = end


def _header(data: bytes, position: int) -> tuple[int, int, int]:
    """A value's tag, and where its content begins and ends."""
    if len(data) < position + 2 or data[position] & 0x1F == 0x1F:
        raise ValueError("there is no tag of one byte and a length")
    tag, length, begin = data[position], data[position + 1], position + 2
    if length < 0x80:
        return tag, begin, begin + length
    digits = data[begin : begin + length - 0x80]
    if not digits or len(digits) < length - 0x80:
        raise ValueError("the length is cut off")
    begin += len(digits)
    return tag, begin, begin + int.from_bytes(digits)


def dotted(content: bytes) -> str:
    """The text of an OBJECT IDENTIFIER, such as "2.5.29.32.0". Raises ValueError for one that is cut off or empty."""
    numbers, number = list[int](), 0
    for byte in content:
        number = number << 7 | byte & 0x7F
        if byte < 0x80:
            numbers.append(number)
            number = 0
    if not content or content[-1] >= 0x80:
        raise ValueError("the object identifier is cut off")
    first = min(numbers[0] // 40, 2)
    return ".".join(map(str, [first, numbers[0] - 40 * first, *numbers[1:]]))
