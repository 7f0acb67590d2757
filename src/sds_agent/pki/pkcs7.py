"""The certificates of a PKCS#7 message that holds nothing else (RFC 5652 sections 3 and 5.1, RFC 8951 section 3.2).

Its certificates are a SET, whose order DER fixes and many programs do not keep, OpenSSL among them. cryptography warns
of such a message and says that it may refuse it some day; so only the certificates themselves are given to it.
"""

import base64

from sds_agent.errors import SdsAgentError
from sds_agent.pki.der import elements

_SEQUENCE = 0x30
_EXPLICIT_0 = 0xA0
_SIGNED_DATA = bytes.fromhex("2a864886f70d010702")


class Pkcs7Error(SdsAgentError):
    """What should be a PKCS#7 message of certificates is none."""


def certificates_pem(der: bytes) -> bytes:
    """The certificates in a message, unread, as PEM blocks in its order; empty where it has none. Raises Pkcs7Error."""
    try:
        ((tag, info),) = elements(der)
        (_, kind), (_, content) = elements(info)
        ((inner, signed_data),) = elements(content)
        found = [each for field, each in elements(signed_data) if field == _EXPLICIT_0]
        certificates = [each for field in found[:1] for each in elements(field)]
    except (IndexError, ValueError) as error:
        raise Pkcs7Error("it is no PKCS#7 message in DER") from error
    if (tag, kind, inner) != (_SEQUENCE, _SIGNED_DATA, _SEQUENCE):
        raise Pkcs7Error("it is no PKCS#7 message of certificates (SignedData)")
    return b"".join(_pem(content) for tag, content in certificates if tag == _SEQUENCE)


def _pem(content: bytes) -> bytes:
    size = len(content).to_bytes((len(content).bit_length() + 7) // 8 or 1, "big")
    length = size if len(content) < 0x80 else bytes([0x80 | len(size)]) + size
    text = base64.encodebytes(bytes([_SEQUENCE]) + length + content)
    return b"-----BEGIN CERTIFICATE-----\n" + text + b"-----END CERTIFICATE-----\n"
