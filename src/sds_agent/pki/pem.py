"""PEM (RFC 7468) as tools, editors and people leave it: where its blocks begin and end.

A BEGIN counts where it begins a line, as for OpenSSL and Envoy; in the middle of a line it is a comment. It may be
indented, or come after a byte order mark. It may also come right after the END of another block: `cat` joins two files
like that when the first has no line break at its end.
"""

import base64
import re
from collections.abc import Iterator

from sds_agent.values import Sensitive

_BEGIN = re.compile(
    rb"(?:\A|[\r\n]|-----END [A-Z0-9 ]{1,40}-----)(?:[ \t]|\xef\xbb\xbf)*(?P<begin>-----BEGIN ([A-Z0-9 ]{1,40})-----)"
)


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
        return base64.b64decode(b"".join(self.body.split()), validate=True)


def labels(data: bytes) -> Iterator[bytes]:
    """The label of every block, in order."""
    return (begin[2] for begin in _BEGIN.finditer(data))


def blocks(data: bytes, wanted: frozenset[bytes]) -> Iterator[Block]:
    """The blocks whose label is `wanted`, in order. All others are skipped, and so is the text around them."""
    begins = list(_BEGIN.finditer(data))
    for number, begin in enumerate(begins, start=1):
        label, first = begin[2], begin.start("begin")
        if label not in wanted:
            continue
        is_last = number == len(begins)
        limit = len(data) if is_last else begins[number].start("begin")
        end = b"-----END " + label + b"-----"
        at = data.find(end, begin.end(), limit)
        has_end = at >= 0
        text, body = (data[first : at + len(end)], at) if has_end else (data[first:limit], limit)
        yield Block(label, text, data[begin.end() : body], has_end, is_last)
