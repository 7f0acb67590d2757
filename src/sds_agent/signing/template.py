"""Leaves of one signer, of which all that is the same in each is encoded once.

cryptography's builder checks and encodes every field anew for each certificate, which takes as long again as a
signature on P-256 does. A template is cut from a certificate that the builder made: it keeps the encoded fields, and
puts a serial number, times, a key and a name into their places (RFC 5280 sections 4.1 and 4.2.1).
"""

from datetime import datetime
from functools import lru_cache

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, padding
from cryptography.hazmat.primitives.serialization import Encoding

from sds_agent.digest import sha1
from sds_agent.pki.certificates import load_der
from sds_agent.pki.der import elements, encoded, split
from sds_agent.pki.keys import PrivateKey, PublicKey, ecdsa, public_bytes, signature_hash

_INTEGER = 0x02
_BIT_STRING = 0x03
_OCTET_STRING = 0x04
_UTC_TIME = 0x17
_GENERALIZED_TIME = 0x18
_SEQUENCE = 0x30
_URI = 0x86
_EXTENSIONS = 0xA3
_FIELDS = 8
_MOST_EXTENSIONS = 20
_KEY_IDENTIFIER = bytes.fromhex("0603551d0e")
_BEFORE_KEY_IDENTIFIER = bytes.fromhex("301d0603551d0e04160414")
"""The extension with the subject's key identifier, up to its 20 bytes."""
_NAMES = bytes.fromhex("0603551d11")
_CRITICAL = bytes.fromhex("0101ff")
_ONLY_UTC_TIME_UNTIL = 2050
"""The year from which a time is a GeneralizedTime (RFC 5280 section 4.1.2.5)."""


class LeafTemplate:
    """A leaf without what differs between leaves for keys of one kind. Raises IndexError for a model that is no DER."""

    def __init__(self, model: x509.Certificate) -> None:
        """`model` has a critical SubjectAlternativeName with one URI, a SubjectKeyIdentifier, and an empty subject."""
        (_, content), *_ = elements(model.public_bytes(Encoding.DER))
        tbs, self._algorithm, _ = split(content, 3)
        fields = split(elements(tbs)[0][1], _FIELDS)
        self._version, _, algorithm, issuer, _, self._subject, _, extensions = fields
        self._before_times = algorithm + issuer
        listed = split(elements(elements(extensions)[0][1])[0][1], _MOST_EXTENSIONS)
        varying = (_KEY_IDENTIFIER, _NAMES)
        self._others = b"".join(each for each in listed if not elements(each)[0][1].startswith(varying))

    def sign(
        self, signer: PrivateKey, public_key: PublicKey, uri: str, serial: int, times: tuple[datetime, datetime]
    ) -> x509.Certificate:
        """A leaf for `uri` (ASCII), valid between `times`, which are whole seconds in UTC; `serial` is positive."""
        key = public_bytes(public_key)
        names = encoded(_SEQUENCE, encoded(_URI, uri.encode("ascii")))
        extensions = encoded(
            _SEQUENCE,
            _BEFORE_KEY_IDENTIFIER,
            sha1(_bits(public_key, key)),
            encoded(_SEQUENCE, _NAMES, _CRITICAL, encoded(_OCTET_STRING, names)),
            self._others,
        )
        tbs = encoded(
            _SEQUENCE,
            self._version,
            encoded(_INTEGER, serial.to_bytes(serial.bit_length() // 8 + 1, "big")),
            self._before_times,
            _validity(times),
            self._subject,
            key,
            encoded(_EXTENSIONS, extensions),
        )
        signature = encoded(_BIT_STRING, b"\0", _signature(signer, tbs))
        return load_der(encoded(_SEQUENCE, tbs, self._algorithm, signature))


def _signature(signer: PrivateKey, tbs: bytes) -> bytes:
    if isinstance(signer, ec.EllipticCurvePrivateKey):
        return signer.sign(tbs, ecdsa(signer))
    return signer.sign(tbs, padding.PKCS1v15(), signature_hash(signer))


@lru_cache(maxsize=8)
def _validity(times: tuple[datetime, datetime]) -> bytes:
    """Remembered: many are issued in one second, and most for the same time."""
    return encoded(_SEQUENCE, *map(_time, times))


def _time(moment: datetime) -> bytes:
    """A time in UTC."""
    year = moment.year
    rest = b"%02d%02d%02d%02d%02dZ" % (moment.month, moment.day, moment.hour, moment.minute, moment.second)
    if year < _ONLY_UTC_TIME_UNTIL:
        return encoded(_UTC_TIME, b"%02d%b" % (year % 100, rest))
    return encoded(_GENERALIZED_TIME, b"%04d%b" % (year, rest))


def _bits(public_key: PublicKey, key: bytes) -> bytes:
    """The key in its SubjectPublicKeyInfo, whose SHA-1 is its identifier (RFC 5280 section 4.2.1.2): a name, and no
    protection.
    """
    if isinstance(public_key, ec.EllipticCurvePublicKey):  # a point at the end, as 04 and two coordinates
        return key[-1 - 2 * ((public_key.key_size + 7) // 8) :]
    (_, content), *_ = elements(key)
    _, (_, bits) = elements(content)
    return bits[1:]
