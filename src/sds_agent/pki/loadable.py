"""What Envoy's TLS library (BoringSSL) does not load of what cryptography reads.

One such certificate makes Envoy refuse the whole bundle, or the whole chain, that it is in. Tried on Envoy 1.36.4 and
1.40.0, and as strict as the stricter of the two: in the string types of names, in BIT STRINGs, in the parameters of
unknown algorithms and in versions. What Envoy does not judge while it loads, such as extensions, is not judged here.
"""

import re
from functools import lru_cache

from cryptography import x509

from sds_agent.pki.der import elements, fields_of_certificate

LARGEST_NAME = 1_000_000
"""Bytes. Envoys refuse a name from some bytes below 1 MiB on."""

_SEQUENCE, _SET = 0x30, 0x31
_CONSTRUCTED, _CLASS = 0x20, 0xC0
_BYTE_ORDER_MARK = "\ufeff"


def fault_of_loading(certificate: x509.Certificate, der: bytes) -> str | None:
    """Why Envoy does not load the certificate, as a clause, or None. It was parsed to its end, from `der`."""
    fields, outer, _ = fields_of_certificate(der)
    _, (_, inner), (_, issuer), _, (_, subject), _, *optional = fields
    if certificate.version is x509.Version.v1 and optional:
        return "it is of version 1 and has extensions or unique identifiers, which only later versions have"
    return _fault_of_name("issuer", issuer) or _fault_of_name("subject", subject) or _fault_of_algorithm(inner, outer)


def _fault_of_name(whose: str, name: bytes) -> str | None:
    if len(name) > LARGEST_NAME:
        return f"its {whose}'s name has more than {LARGEST_NAME} bytes"
    fault = _fault_of_short(name) if len(name) <= _LONGEST_REMEMBERED else _fault_of_attributes(name)
    return f"its {whose}'s name holds {fault}" if fault else None


def _fault_of_attributes(name: bytes) -> str | None:
    for _, attributes in elements(name):
        for _, attribute in elements(attributes):
            _, (tag, value) = elements(attribute)
            if fault := _fault_of_value(tag, value):
                return fault
    return None


_LONGEST_REMEMBERED = 1024
_fault_of_short = lru_cache(maxsize=32)(_fault_of_attributes)
"""Leaves have their issuer's name in common."""


def _fault_of_algorithms(*identifiers: bytes) -> str | None:
    """Judged for all algorithms; only of those that it does not know does cryptography accept any parameters."""
    for identifier in identifiers:
        _, *parameters = elements(identifier)
        for tag, value in parameters:
            if fault := _fault_of_value(tag, value):
                return f"the parameters of its signature's algorithm are {fault}"
    return None


_remembered_algorithms = lru_cache(maxsize=8)(_fault_of_algorithms)


def _fault_of_algorithm(inner: bytes, outer: bytes) -> str | None:
    """Leaves have these in common too."""
    short = len(inner) + len(outer) <= _LONGEST_REMEMBERED
    return _remembered_algorithms(inner, outer) if short else _fault_of_algorithms(inner, outer)


def _fault_of_value(tag: int, value: bytes) -> str | None:
    """What is wrong with a value of any type; most types are not parsed further."""
    if tag & _CLASS or tag in {_SEQUENCE, _SET}:
        return None
    if tag in _ENCODINGS:
        return _fault_of_text(tag, value)
    good = _is_bits(value) if tag == _BITS else re.fullmatch(_FORMS.get(tag, _ANY), value) and not tag & _CONSTRUCTED
    return None if good else f"a value of the type {tag:#04x} in a form that is not taken"


def _fault_of_text(tag: int, value: bytes) -> str | None:
    try:
        text = value.decode(_ENCODINGS[tag])
    except UnicodeDecodeError:
        return "a text that is damaged"
    for code in () if text.isascii() else map(ord, text):
        if code & 0xFFFE == 0xFFFE or 0xFDD0 <= code <= 0xFDEF:  # the Unicode Standard, section 23.7
            return f"U+{code:04X}, which is no character"
        if code > 0xFFFF and tag == _BMP_STRING:  # X.690 section 8.23.7 knows characters of two bytes alone
            return f"U+{code:04X} as a surrogate pair in a BMPString"
    if text.startswith(_BYTE_ORDER_MARK) and tag != _UTF8_STRING:
        return "a text that begins with a byte order mark"
    return None


def _is_bits(value: bytes) -> bool:
    """Whether the number of unused bits is one, and they are zero (X.690 section 11.2.1)."""
    unused = value[0] if value else 8
    return unused == 0 or (unused < 8 and len(value) > 1 and value[-1] & ((1 << unused) - 1) == 0)


# Tags (X.680 section 8.6)
_BITS, _UTF8_STRING, _UNIVERSAL_STRING, _BMP_STRING = 0x03, 0x0C, 0x1C, 0x1E
_ENCODINGS = {_UTF8_STRING: "utf-8", _UNIVERSAL_STRING: "utf-32-be", _BMP_STRING: "utf-16-be"}
_ANY, _NEVER = rb"(?s:.*)", rb"(?!)"
_NUMBER = rb"(?s:(?!\x00[\x00-\x7f]|\xff[\x80-\xff]).+)"  # in the fewest bytes
_FORMS = {
    0x01: rb"[\x00\xff]",
    0x02: _NUMBER,
    0x05: rb"",
    0x06: rb"(?:(?!\x80)[\x80-\xff]*[\x00-\x7f])+",
    0x08: _NEVER,
    0x0A: _NUMBER,
    0x17: _NEVER,  # a time, whose forms Envoys refuse but for one; no name needs it
    0x18: _NEVER,
}
