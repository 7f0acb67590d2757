"""Files with the right content in another form than PEM: which form it is, and what converts it."""

from sds_agent.errors import Problem
from sds_agent.pki.pem import labels

_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_BASE64_OF_BEGIN = b"LS0tLS1CRUdJTi"
_DER_SEQUENCE = b"\x30"
_PKCS12_VERSION = b"\x02\x01\x03"
"""What a PKCS#12 file begins with behind the head of its SEQUENCE, and no key does (RFC 7292, section 4)."""
_LONGEST_HEAD = 6
"""Bytes of a SEQUENCE's tag and length."""


def first_label(data: bytes) -> str | None:
    """The label of the first PEM block, or None without one."""
    return next((label.decode() for label in labels(data)), None)


def other_form(data: bytes, openssl: str) -> Problem | None:
    """What a file without PEM is instead, such as "is in DER", or None where nothing is known.

    `openssl` is the command that reads such content, such as `x509`.
    """
    if data.startswith(_DER_SEQUENCE):
        if _PKCS12_VERSION in data[: _LONGEST_HEAD + len(_PKCS12_VERSION)]:
            found = "is in PKCS#12, with key and certificates in one"
            return _converted(found, "openssl pkcs12 -nodes -in FILE -out FILE.pem")
        return _converted(
            "is in DER", f"openssl {openssl} -inform DER -in FILE -out FILE.pem", "convert it to PEM with"
        )
    if data.startswith(_UTF16):
        return _converted("is in UTF-16, as Windows writes it", "iconv -f UTF-16 -t UTF-8 FILE > FILE.pem")
    if data.startswith(_BASE64_OF_BEGIN):
        found = "is in base64 once more, as Kubernetes shows a Secret"
        return _converted(found, "base64 -d FILE > FILE.pem", "decode it with")
    return None


def without_certificate(data: bytes, wanted: str) -> Problem:
    """What is wrong with a file in which no certificate was found; `wanted` is what should be there."""
    if form := other_form(data, "x509"):
        return form
    label = first_label(data)
    if label == "PKCS7":
        return _converted("is in PKCS#7", "openssl pkcs7 -print_certs -in FILE -out FILE.pem")
    what = f"it begins with {label}" if label else "there is no PEM block in it"
    return Problem((), f"holds no certificate: {what}", f"put there {wanted}, in PEM")


def _converted(found: str, command: str, how: str = "convert it with") -> Problem:
    return Problem((), found, f"{how} `{command}`")
