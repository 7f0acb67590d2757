"""DER (ITU-T X.690) without a schema: fields that cryptography has parsed and does not show, and encoded values."""

from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from typing import NamedTuple, TypeAlias

Element: TypeAlias = tuple[int, bytes]
"""A value: its tag, or the first byte of a longer one, and its content."""

_LONG_TAG = 0x1F
_FIELDS_OF_TBS = 6
_LONGEST_REMEMBERED = 8192


def elements(data: bytes) -> list[Element]:
    """The values that stand one after another in `data`. Raises IndexError for what is no DER."""
    found, at, size = list[Element](), 0, len(data)
    while at < size:
        tag, length = data[at], data[at + 1]
        if tag & _LONG_TAG == _LONG_TAG or length & 0x80:
            break  # of such there are few
        if (end := at + 2 + length) > size:
            raise IndexError
        found.append((tag, data[at + 2 : end]))
        at = end
    found += [(data[begin], data[content:end]) for begin, content, end in _places(data, at)]
    return found


def split(data: bytes, most: int) -> list[bytes]:
    """The values that stand one after another in `data`, each whole. Raises IndexError for what is no DER, and for more
    than `most` values.
    """
    found = [data[begin:end] for begin, _, end in islice(_places(data), most + 1)]
    if len(found) > most:
        raise IndexError
    return found


def _places(data: bytes, at: int = 0) -> Iterator[tuple[int, int, int]]:
    """Where each value from `at` on begins, where its content does, and where it ends."""
    while at < len(data):
        begin, tag, at = at, data[at], at + 1
        if tag & _LONG_TAG == _LONG_TAG:
            while data[at] & 0x80:
                at += 1
            at += 1
        length, at = data[at], at + 1
        if length & 0x80:
            size = length & 0x7F
            length, at = int.from_bytes(data[at : at + size], "big"), at + size
        if at + length > len(data):
            raise IndexError
        yield begin, at, at + length
        at += length


def encoded(tag: int, *contents: bytes) -> bytes:
    """One value: its tag, which is one byte, the length of its content, and that: all of `contents`."""
    content = b"".join(contents)
    if len(content) < 0x80:
        return bytes((tag, len(content))) + content
    length = len(content).to_bytes((len(content).bit_length() + 7) // 8, "big")
    return bytes((tag, 0x80 | len(length))) + length + content


class CertificateFields(NamedTuple):
    """The fields of a TBSCertificate (RFC 5280 section 4.1) from its serial number on, the outer algorithm, and what is
    signed: the whole TBSCertificate.
    """

    of_tbs: list[Element]
    outer_algorithm: bytes
    signed: bytes

    @property
    def issuer(self) -> bytes:
        """The content of the issuer's name."""
        return self.of_tbs[2][1]

    @property
    def subject(self) -> bytes:
        """The content of the subject's name."""
        return self.of_tbs[4][1]


def fields_of_certificate(der: bytes) -> CertificateFields:
    """The fields of a certificate. Raises IndexError or ValueError for what is none.

    The last answers are remembered: each certificate is asked about twice.
    """
    return _remembered_fields(der) if len(der) <= _LONGEST_REMEMBERED else _fields_of(der)


def _fields_of(der: bytes) -> CertificateFields:
    (_, content, _), *_ = _places(der)
    (begin, at, end), (_, outer, outer_end), *_ = _places(der, content)
    fields = elements(der[at:end])
    if fields[0][0] == 0xA0:
        del fields[0]
    if len(fields) < _FIELDS_OF_TBS:
        raise IndexError
    return CertificateFields(fields, der[outer:outer_end], der[begin:end])


_remembered_fields = lru_cache(maxsize=8)(_fields_of)


def texts_of_subject(der: bytes) -> list[str]:
    """The values in a certificate's subject, whatever their types: for a person, where no library reads the name."""
    try:
        subject = fields_of_certificate(der).subject
        attributes = [attribute for _, part in elements(subject) for attribute in elements(part)]
        return [elements(attribute)[-1][1].decode("latin-1") for _, attribute in attributes]
    except (IndexError, ValueError):
        return []
