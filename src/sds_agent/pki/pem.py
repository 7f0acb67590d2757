"""PEM (RFC 7468) as tools, editors and people leave it: where its blocks begin and end.

A BEGIN counts where it begins a line, as for OpenSSL and Envoy; in the middle of a line it is a comment. It may be
indented, or come after a byte order mark. It may also come right after the END of another block: `cat` joins two files
like that when the first has no line break at its end.
"""

import binascii
import re
from collections.abc import Iterator

from sds_agent.values import Sensitive

_BEGIN = re.compile(rb"-----BEGIN ([A-Z0-9 ]{1,40})-----")
_END = re.compile(rb"-----END [A-Z0-9 ]{1,40}-----\Z")
_LONGEST_END = 54
_SPACES, _BYTE_ORDER_MARK = (0x20, 0x09), b"\xef\xbb\xbf"
_LINE_BREAKS = (0x0A, 0x0D)


class Block(Sensitive, frozen=True):
    """A PEM block: its label, its text from BEGIN to END, and its body, which is what is between the two.

    Without an END of that label both reach to the next BEGIN, or to the end of the data where the block `is_last`.
    """

    label: bytes
    text: bytes
    body: bytes
    has_end: bool
    is_last: bool

    def der(self) -> bytes:
        """The content. Raises binascii.Error for what is not base64."""
        return binascii.a2b_base64(b"".join(self.body.split()), strict_mode=True)


def labels(data: bytes) -> Iterator[bytes]:
    """The label of every block, in order."""
    return (begin[1] for begin in _begins(data))


def blocks(data: bytes, wanted: frozenset[bytes]) -> Iterator[Block]:
    """The blocks whose label is `wanted`, in order. All others are skipped, and so is the text around them."""
    begins = list(_begins(data))
    for number, begin in enumerate(begins, start=1):
        label, first = begin[1], begin.start()
        if label not in wanted:
            continue
        is_last = number == len(begins)
        limit = len(data) if is_last else begins[number].start()
        end = b"-----END " + label + b"-----"
        at = data.find(end, begin.end(), limit)
        has_end = at >= 0
        text, body = (data[first : at + len(end)], at) if has_end else (data[first:limit], limit)
        yield Block(label, text, data[begin.end() : body], has_end, is_last)


def _begins(data: bytes) -> Iterator[re.Match[bytes]]:
    """Every BEGIN that counts, with its label. What comes before it is looked at only where one is."""
    after = 0
    for begin in _BEGIN.finditer(data):
        if _counts(data, begin.start(), after):
            yield begin
            after = begin.end()


def _counts(data: bytes, at: int, after: int) -> bool:
    """Whether a BEGIN there begins a line, or comes after an END; `after` is where the one before it ended."""
    if at > after and data[at - 1] in _LINE_BREAKS:
        return True
    while at > after:
        if data[at - 1] in _SPACES:
            at -= 1
        elif at - after >= len(_BYTE_ORDER_MARK) and data.endswith(_BYTE_ORDER_MARK, after, at):
            at -= len(_BYTE_ORDER_MARK)
        else:
            break
    if at == after:
        return at == 0
    return data[at - 1] in _LINE_BREAKS or _END.search(data, max(after, at - _LONGEST_END), at) is not None
