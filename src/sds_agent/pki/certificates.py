"""X.509 certificates as values: read, write, and ask what they say.

Their times are cryptography's own `not_valid_before_utc` and `not_valid_after_utc`.
"""

import base64
import binascii
import re
import warnings
from collections.abc import Iterable
from datetime import UTC, datetime
from typing import TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.utils import CryptographyDeprecationWarning

from sds_agent.errors import SdsAgentError

ExtensionT = TypeVar("ExtensionT", bound=x509.ExtensionType)

# "X509 CERTIFICATE" is an old label for the same content; RFC 7468 section 5.1 lets it pass for the sake of old tools
_BEGIN = re.compile(rb"-----BEGIN ((?:X509 |TRUSTED )?CERTIFICATE)-----")
_LONGEST_QUOTE = 120

# Many an old root has the serial number 0. cryptography takes it, but warns at every look that it will not for ever.
# Once for the process: a filter that is set and taken back around each look would not be safe between threads.
warnings.filterwarnings("ignore", "Parsed a serial number which wasn't positive", CryptographyDeprecationWarning)


class CertificateError(SdsAgentError):
    """A PEM text holds a certificate that cannot be read."""


def read_pem(data: bytes) -> tuple[x509.Certificate, ...]:
    """Every certificate in `data`, in its order; none when there is no CERTIFICATE block.

    Text before, between and after the blocks is skipped (RFC 7468 section 2), CRLF and a byte order mark with it, and
    so are blocks of other kinds; the line break between two blocks may be missing. Raises CertificateError, which
    counts the blocks from 1, for one that is not a well-formed certificate. What is returned has been parsed to its
    end: no question to it raises.
    """
    return tuple(_read_block(data, begin, n) for n, begin in enumerate(_BEGIN.finditer(data), start=1))


def write_pem(certificates: Iterable[x509.Certificate]) -> bytes:
    """The certificates as PEM blocks in their order, each ending in a newline."""
    return b"".join(certificate.public_bytes(Encoding.PEM) for certificate in certificates)


def unique(certificates: Iterable[x509.Certificate]) -> tuple[x509.Certificate, ...]:
    """The certificates without repetitions (of the same DER), in the order of their first appearance."""
    return tuple({c.public_bytes(Encoding.DER): c for c in certificates}.values())


def longest_valid_first(certificates: Iterable[x509.Certificate]) -> tuple[x509.Certificate, ...]:
    """The same certificates without repetitions, in an order that depends on nothing else.

    Of several roots of one name and key, as where one was renewed, Envoy takes the first, and refuses all that is below
    when that one has expired.
    """
    return unique(
        sorted(certificates, key=lambda c: (-c.not_valid_after_utc.timestamp(), c.public_bytes(Encoding.DER)))
    )


def is_self_signed(certificate: x509.Certificate) -> bool:
    """Whether issuer and subject are one name and the certificate's own key signed it."""
    try:
        certificate.verify_directly_issued_by(certificate)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


def serial_hex(certificate: x509.Certificate) -> str:
    """The serial number in lower-case hexadecimal, without leading zeros."""
    return f"{certificate.serial_number:x}"


def has_key(certificate: x509.Certificate, public_key: CertificatePublicKeyTypes) -> bool:
    """Whether the certificate is for that public key."""
    return _key_bytes(certificate.public_key()) == _key_bytes(public_key)


def extension(certificate: x509.Certificate, kind: type[ExtensionT]) -> ExtensionT | None:
    """The certificate's extension of that kind, or None."""
    try:
        return certificate.extensions.get_extension_for_class(kind).value
    except x509.ExtensionNotFound:
        return None


def san_values(certificate: x509.Certificate) -> tuple[x509.GeneralName, ...]:
    """Every subject alternative name, whatever its form, in order; empty without the extension."""
    return tuple(extension(certificate, x509.SubjectAlternativeName) or ())


def subject_alternative_uris(certificate: x509.Certificate) -> tuple[str, ...]:
    """The subject alternative names that are URIs, in order."""
    return tuple(n.value for n in san_values(certificate) if isinstance(n, x509.UniformResourceIdentifier))


def is_ca(certificate: x509.Certificate) -> bool:
    """Whether BasicConstraints says CA:TRUE, critical or not."""
    constraints = extension(certificate, x509.BasicConstraints)
    return constraints is not None and constraints.ca


def extended_key_usages(certificate: x509.Certificate) -> frozenset[x509.ObjectIdentifier]:
    """What ExtendedKeyUsage lists; empty without the extension."""
    return frozenset(extension(certificate, x509.ExtendedKeyUsage) or ())


def describe(certificate: x509.Certificate) -> str:
    """The certificate for a message: its subject, or else its first URI, or else its serial number."""
    if certificate.subject.rdns:
        return describe_name(certificate.subject)
    uris = subject_alternative_uris(certificate)
    return describe_name(uris[0]) if uris else f"the certificate with serial number {serial_hex(certificate)}"


def describe_name(name: object) -> str:
    """A name (an x509.Name, or a SAN's value) for a message: quoted, in ASCII without controls, and cut."""
    text = name.rfc4514_string() if isinstance(name, x509.Name) else str(name)
    return ascii(text if len(text) <= _LONGEST_QUOTE else f"{text[:_LONGEST_QUOTE]}...")


def describe_time(moment: datetime) -> str:
    """A time for a message: in UTC, to the second, as certificates have it."""
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def _key_bytes(key: CertificatePublicKeyTypes) -> bytes:
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _read_block(data: bytes, begin: re.Match[bytes], number: int) -> x509.Certificate:
    label = begin[1]
    if label.startswith(b"TRUSTED"):
        raise CertificateError(
            f"PEM block {number} is a TRUSTED CERTIFICATE, which only OpenSSL reads: `openssl x509 -in FILE` writes it "
            "as a plain one"
        )
    end = data.find(b"-----END " + label + b"-----", begin.end())
    if end < 0:
        raise CertificateError(f"PEM block {number} has no END line: the certificate is cut off")
    try:
        der = base64.b64decode(b"".join(data[begin.end() : end].split()), validate=True)
    except binascii.Error as error:
        raise CertificateError(f"PEM block {number} is not a certificate: its base64 is damaged ({error})") from error
    return _read_der(der, number)


def _read_der(der: bytes, number: int) -> x509.Certificate:
    try:
        certificate = x509.load_der_x509_certificate(der)
        _parse_all(certificate)
    except (ValueError, TypeError, x509.DuplicateExtension) as error:
        raise CertificateError(f"PEM block {number} is not a well-formed X.509 certificate ({error})") from error
    except (x509.InvalidVersion, x509.UnsupportedGeneralNameType, UnsupportedAlgorithm) as error:
        raise CertificateError(
            f"PEM block {number} is a certificate of a kind that is not supported ({error})"
        ) from error
    return certificate


def _parse_all(certificate: x509.Certificate) -> None:
    """Ask for what cryptography parses only on demand, so that a malformed part is found here and not later on."""
    questions = ("version", "subject", "issuer", "not_valid_before_utc", "not_valid_after_utc", "extensions")
    for question in questions:
        getattr(certificate, question)
    certificate.public_key()
