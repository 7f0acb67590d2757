"""X.509 certificates as values: read, write, and ask what they say.

Their times are cryptography's own `not_valid_before_utc` and `not_valid_after_utc`, which makes them anew each time;
`times_of` remembers them for the checks.
"""

import binascii
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import wraps
from typing import Any, TypeVar

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.types import CertificatePublicKeyTypes
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.utils import CryptographyDeprecationWarning
from msgspec import Struct

from sds_agent.errors import SdsAgentError
from sds_agent.pki.der import fields_of_certificate, texts_of_subject
from sds_agent.pki.keys import PublicKey
from sds_agent.pki.loadable import fault_of_loading
from sds_agent.pki.pem import Block, blocks
from sds_agent.text import cut, quoted

ExtensionT = TypeVar("ExtensionT", bound=x509.ExtensionType)
K = TypeVar("K")
T = TypeVar("T")

# "X509 CERTIFICATE" is an old label for the same content; RFC 7468 section 5.1 lets it pass for the sake of old tools
_TRUSTED = b"TRUSTED CERTIFICATE"
_LABELS = frozenset({b"CERTIFICATE", b"X509 CERTIFICATE", _TRUSTED})
_MALFORMED = (ValueError, TypeError, IndexError, x509.DuplicateExtension)
_UNSUPPORTED = (x509.InvalidVersion, x509.UnsupportedGeneralNameType, UnsupportedAlgorithm)
_UNKNOWN_FEATURE = KeyError
"""What cryptography raises for a TLS feature (RFC 7633) that it has no name for."""
_LONGEST_QUOTE = 120
_BEGIN, _END = b"-----BEGIN CERTIFICATE-----\n", b"\n-----END CERTIFICATE-----\n"
_COLUMNS = 64
_LONGEST_ISSUER = 1024
_SUBJECT_PUBLIC_KEY = 5
"""Its place among the fields of a certificate from the serial number on."""
_USUAL_KEYS = (
    bytes.fromhex("300d06092a864886f70d010101050003"),  # RSA
    *(
        bytes.fromhex(f"{algorithm}03{length}00{form}")
        for algorithm, uncompressed, compressed in (
            ("301006072a8648ce3d020106052b81040021", "3a", "1e"),  # P-224
            ("301306072a8648ce3d020106082a8648ce3d030107", "42", "22"),  # P-256
            ("301006072a8648ce3d020106052b81040022", "62", "32"),  # P-384
            ("301006072a8648ce3d020106052b81040023", "8186", "44"),  # P-521
        )
        for length, form in ((uncompressed, "04"), (compressed, "02"), (compressed, "03"))
    ),
)
"""How the content of a SubjectPublicKeyInfo begins: the algorithm with its parameters, then the tag of a BIT STRING, of
a point also its length and form (SEC 1 section 2.3.3). The rest cryptography reads as strictly as BoringSSL.
"""
MOST_FAULTS = 20
"""Reasons listed for one text; beyond that the blocks that cannot be used are counted."""

# Many old roots have the serial number 0, or a long name. cryptography reads them, but warns each time.
# Set once for the process: to set and reset a filter around each reading would not be safe between threads.
warnings.filterwarnings("ignore", "Parsed a serial number which wasn't positive", CryptographyDeprecationWarning)
warnings.filterwarnings("ignore", "Attribute's length must be", UserWarning)


MOST_SHARED, LONGEST_SHARED = 128, 8192
"""CA certificates of which the objects are kept, and bytes of such a one."""
MOST_REMEMBERED = 8
"""Certificates for which an answer is remembered at least: in most hierarchies, all of one walk to an anchor."""
MOST_LOADED = 32
"""Certificates, and texts of one chain, that are remembered as they were read and written: more than there are requests
at a time on their way from a CA in this process.
"""
MOST_PAIRS_REMEMBERED = 32
"""Pairs of certificates for which an answer is remembered at most, as of a leaf and each CA of its issuer's name."""


class CertificateError(SdsAgentError):
    """A PEM text holds a certificate that cannot be read, or is cut off."""


class ParsedBundle(Struct, frozen=True):
    """The certificates of a PEM text, in its order, and what is wrong with those that were left out, a clause each.

    `unread` has the blocks of the latter, by their numbers, for the next reader to say the same: as they are, but of
    one that is cut off its BEGIN alone. A private key that was joined to it may come next.
    """

    certificates: tuple[x509.Certificate, ...]
    left_out: tuple[str, ...] = ()
    unread: Mapping[int, bytes] = {}

    @property
    def rewritten(self) -> bytes:
        """All of them in PEM and nothing else, so that whoever reads it finds the same at the same numbers."""
        if not self.unread:
            return write_pem(self.certificates)
        written = [write_pem([each]) for each in self.certificates]
        for number, text in sorted(self.unread.items()):
            # a block without an END has to be followed by another, or all of the text would count as cut off
            last = len(written) if _ends(text) else len(written) - 1
            written.insert(min(number - 1, last), text)
        return b"".join(written)


def read_bundle(data: bytes) -> ParsedBundle:
    """Every certificate in `data` that can be used; none when there is no CERTIFICATE block.

    Text before, between and after the blocks is skipped (RFC 7468 section 2), and so are blocks of other kinds; `pem`
    says what counts as one. A certificate that cannot be read, or that Envoy does not load, is left out: in a bundle it
    would cost all others. What is returned has been parsed to its end, so that no attribute of it raises.

    Raises CertificateError where every certificate would be left out, and for a text that is cut off within one: others
    may be missing behind it.
    """
    if (written := _contents.get(data)) is not None:
        with suppress(CertificateError):  # below it is said of which block
            return ParsedBundle(tuple(map(_read_der, written)))
    found, faults, unread = list[x509.Certificate](), list[str](), dict[int, bytes]()
    for number, block in enumerate(blocks(data, _LABELS), start=1):
        if block.is_last and not block.has_end:
            raise CertificateError(f"PEM block {number} has no END line: the certificate is cut off")
        try:
            found.append(_read_block(block))
        except CertificateError as error:
            faults.append(f"PEM block {number} {error}")
            unread[number] = (block.text if block.has_end else b"-----BEGIN %s-----" % block.label) + b"\n"
    if len(faults) > MOST_FAULTS:
        faults[MOST_FAULTS:] = [f"{len(faults) - MOST_FAULTS} more cannot be used"]
    if faults and not found:
        raise CertificateError("; ".join(faults))
    return ParsedBundle(tuple(found), tuple(faults), unread)


def read_pem(data: bytes) -> tuple[x509.Certificate, ...]:
    """Every certificate in `data`, each of which is needed. Raises CertificateError where one would be left out."""
    reading = read_bundle(data)
    if reading.left_out:
        raise CertificateError("; ".join(reading.left_out))
    return reading.certificates


def read_again(written: bytes) -> tuple[x509.Certificate, ...]:
    """What `write_pem` wrote of certificates that were read before: nothing about them is judged anew."""
    return tuple(x509.load_pem_x509_certificates(written))


def read_issuers_again(written: bytes) -> tuple[x509.Certificate, ...]:
    """As `read_again`, of a chain without its leaf: where that is all there is, nothing is read."""
    rest = written.partition(_END)[2]
    return read_again(rest) if rest else ()


def write_pem(certificates: Iterable[x509.Certificate]) -> bytes:
    """The certificates as PEM blocks in their order, each ending in a newline. The last texts are remembered, for what
    a CA in this process has written is read, and written again, as soon as it was checked.
    """
    ders = tuple(map(der_of, certificates))
    return _written(ders) if sum(map(len, ders)) <= LONGEST_SHARED else _pem(ders)


def write_beside(certificates: Iterable[x509.Certificate], unread: Iterable[bytes]) -> bytes:
    """The certificates in PEM, at least one, with blocks that could not be read (`ParsedBundle.unread`) for the next
    reader to name: each once and in an order of their own, as CAs tell theirs in any, and the reader numbers them. They
    come first, for one that is cut off would cost all others at the end.
    """
    return b"".join(sorted(set(unread))) + write_pem(certificates)


def _ends(text: bytes) -> bool:
    return all(block.has_end for block in blocks(text, _LABELS))


def _pem(ders: tuple[bytes, ...]) -> bytes:
    return b"".join(map(_block, ders))


def _written(ders: tuple[bytes, ...]) -> bytes:
    """As `_pem`, remembered from both sides."""
    if (text := _texts.get(ders)) is None:
        text = _pem(ders)
        _remember(_texts, ders, text)
        _remember(_contents, text, ders)
    return text


def der_of(certificate: x509.Certificate) -> bytes:
    """The certificate in DER: of the last that were loaded, what they were loaded from."""
    known = _by_object.get(id(certificate))
    return certificate.public_bytes(Encoding.DER) if known is None else known.der


def load_der(der: bytes) -> x509.Certificate:
    """The certificate in `der`, of which nothing is judged. Raises what cryptography raises.

    The last ones are remembered: cryptography would encode all fields again, and what a CA in this process has just
    signed comes back from it.
    """
    if (known := _by_content.get(der)) is not None:
        return known.certificate
    loaded = _KnownCertificate(x509.load_der_x509_certificate(der), der)
    if len(der) <= LONGEST_SHARED:
        _remember(_by_content, der, loaded)
        _remember(_by_object, id(loaded.certificate), loaded)
    return loaded.certificate


class _KnownCertificate(Struct, frozen=True):
    certificate: x509.Certificate
    der: bytes


def _remember(memory: OrderedDict[K, T], key: K, value: T) -> None:
    """In place of the oldest, so that none is lost that is still on its way. Other threads may do the same."""
    if len(memory) >= MOST_LOADED:
        memory.popitem(last=False)
    memory[key] = value


_by_content, _by_object = OrderedDict[bytes, _KnownCertificate](), OrderedDict[int, _KnownCertificate]()
_texts, _contents = OrderedDict[tuple[bytes, ...], bytes](), OrderedDict[bytes, tuple[bytes, ...]]()


def unique(certificates: Iterable[x509.Certificate]) -> tuple[x509.Certificate, ...]:
    """The certificates without repetitions (of the same DER), in the order of their first appearance."""
    given = tuple(certificates)
    return given if len(given) <= 1 else tuple({c.public_bytes(Encoding.DER): c for c in given}.values())


def longest_valid_first(certificates: Iterable[x509.Certificate]) -> tuple[x509.Certificate, ...]:
    """The same certificates without repetitions, in an order that depends on nothing else.

    Of several roots of one name and key, as where one was renewed, Envoy takes the first, and refuses all that is below
    when that one has expired.
    """
    return unique(
        sorted(certificates, key=lambda c: (-c.not_valid_after_utc.timestamp(), c.public_bytes(Encoding.DER)))
    )


def remembered(question: Callable[[x509.Certificate], T]) -> Callable[[x509.Certificate], T]:
    """Remember the last answers, each by its certificate's object. An `lru_cache` hashes all fields of the certificate
    at each question, which takes longer than most answers do.
    """
    # with the certificate, so that no other has its id
    last, before = dict[int, tuple[x509.Certificate, T]](), dict[int, tuple[x509.Certificate, T]]()

    @wraps(question)
    def answer(certificate: x509.Certificate) -> T:
        nonlocal last, before
        if (found := last.get(id(certificate))) is not None:
            return found[1]
        # a CA is asked about again and again, between leaves that are asked about once
        found = before.get(id(certificate)) or (certificate, question(certificate))
        if len(last) >= MOST_REMEMBERED:
            last, before = {}, last
        last[id(certificate)] = found
        return found[1]

    return answer


def remembered_of_two(
    question: Callable[[x509.Certificate, x509.Certificate], T],
) -> Callable[[x509.Certificate, x509.Certificate], T]:
    """Remember the last MOST_PAIRS_REMEMBERED answers, each by the objects of two certificates."""
    answers = dict[tuple[int, int], tuple[x509.Certificate, x509.Certificate, T]]()

    @wraps(question)
    def answer(one: x509.Certificate, other: x509.Certificate) -> T:
        key = id(one), id(other)
        if (known := answers.get(key)) is not None:
            return known[2]
        if len(answers) >= MOST_PAIRS_REMEMBERED:
            answers.clear()
        answers[key] = found = one, other, question(one, other)
        return found[2]

    return answer


def write_ca_pem(certificates: Iterable[x509.Certificate]) -> bytes:
    """As `write_pem`, of CAs: the text of the last ones is remembered, as it goes out beside many leaves."""
    return b"".join(map(_pem_of, certificates))


@remembered
def _pem_of(certificate: x509.Certificate) -> bytes:
    return write_pem([certificate])


@remembered
def is_self_signed(certificate: x509.Certificate) -> bool:
    """Whether issuer and subject are one name and the certificate's own key signed it."""
    try:
        certificate.verify_directly_issued_by(certificate)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm):
        return False
    return True


@remembered
def times_of(certificate: x509.Certificate) -> tuple[datetime, datetime]:
    """From when until when it is valid, in UTC."""
    return certificate.not_valid_before_utc, certificate.not_valid_after_utc


def serial_hex(certificate: x509.Certificate) -> str:
    """The serial number in lower-case hexadecimal, without leading zeros."""
    return f"{certificate.serial_number:x}"


def has_key(certificate: x509.Certificate, public_key: CertificatePublicKeyTypes) -> bool:
    """Whether the certificate is for that public key."""
    return certificate.public_key() == public_key


def has_key_in_usual_form(certificate: x509.Certificate) -> bool:
    """Whether its RSA or EC key is in a form that Envoy reads: that of RFC 3279 section 2.3.1 or RFC 5480 section 2, in
    which a point may be compressed. Of other kinds of key it is true.

    cryptography gives the same key for an RSA key without parameters, for one under the name of RSA-PSS, and for a
    point in the hybrid form. With such a key BoringSSL neither loads a certificate of its own nor checks a signature.
    """
    _, found = fields_of_certificate(der_of(certificate)).of_tbs[_SUBJECT_PUBLIC_KEY]
    return found.startswith(_USUAL_KEYS) or not isinstance(certificate.public_key(), PublicKey)


def extension(certificate: x509.Certificate, kind: type[ExtensionT]) -> ExtensionT | None:
    """The certificate's extension of that kind, or None. The kind is none of which a certificate may have several."""
    found: ExtensionT | None = _extensions(certificate).get(kind)  # by its type: to ask for it would take longer
    return found


@remembered
def _extensions(certificate: x509.Certificate) -> dict[type[x509.ExtensionType], Any]:
    """Its extensions by their kinds. Remembered, for cryptography looks through all of them at each question, of which
    a walk to an anchor has dozens.
    """
    values = [each.value for each in certificate.extensions]
    return {type(each): each for each in values}


def san_values(certificate: x509.Certificate) -> tuple[x509.GeneralName, ...]:
    """Every subject alternative name, whatever its form, in order; empty without the extension."""
    found = extension(certificate, x509.SubjectAlternativeName)
    return () if found is None else tuple(found)


def subject_alternative_uris(certificate: x509.Certificate) -> tuple[str, ...]:
    """The subject alternative names that are URIs, in order."""
    return tuple(n.value for n in san_values(certificate) if isinstance(n, x509.UniformResourceIdentifier))


def is_ca(certificate: x509.Certificate) -> bool:
    """Whether BasicConstraints says CA:TRUE, critical or not."""
    constraints = extension(certificate, x509.BasicConstraints)
    return constraints is not None and constraints.ca


def extended_key_usages(certificate: x509.Certificate) -> frozenset[x509.ObjectIdentifier]:
    """What ExtendedKeyUsage lists; empty without the extension."""
    found = extension(certificate, x509.ExtendedKeyUsage)
    return frozenset() if found is None else frozenset(found)


def describe(certificate: x509.Certificate) -> str:
    """The certificate for a message: its subject, or else its first URI, or else its serial number."""
    if certificate.subject.rdns:
        return describe_name(certificate.subject)
    uris = subject_alternative_uris(certificate)
    return describe_name(uris[0]) if uris else f"the certificate with serial number {serial_hex(certificate)}"


def describe_name(name: object) -> str:
    """A name (an x509.Name, or a SAN's value) for a message: quoted, in ASCII without controls, and cut."""
    text = name.rfc4514_string() if isinstance(name, x509.Name) else str(name)
    return quoted(text, _LONGEST_QUOTE)


def describe_time(moment: datetime) -> str:
    """A time for a message: in UTC, to the second, as certificates have it."""
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def _block(der: bytes) -> bytes:
    text = binascii.b2a_base64(der, newline=False)
    lines = [text[at : at + _COLUMNS] for at in range(0, len(text), _COLUMNS)]
    return b"".join([_BEGIN, b"\n".join(lines), _END])


def _read_block(block: Block) -> x509.Certificate:
    if block.label == _TRUSTED:
        raise CertificateError(
            "is a TRUSTED CERTIFICATE, which is OpenSSL's own form: `openssl x509 -in FILE` writes it as a plain one"
        )
    if not block.has_end:
        raise CertificateError("has no END line before the next BEGIN: the certificate is cut off")
    try:
        der = block.der()
    except binascii.Error as error:
        raise CertificateError(f"is not a certificate: its base64 is damaged ({error})") from error
    return _read_der(der)


def _read_der(der: bytes) -> x509.Certificate:
    """The certificate. Of a CA it is the same object for the same bytes: CAs send theirs with each leaf, and an object
    takes 20 KB with what was parsed of it.
    """
    if (known := _shared.get(der)) is not None:
        return known
    certificate = _parsed(der)
    if len(der) <= LONGEST_SHARED and is_ca(certificate):
        if len(_shared) >= MOST_SHARED:
            _shared.clear()
        _shared[der] = certificate
    return certificate


def _parsed(der: bytes) -> x509.Certificate:
    certificate = None
    try:
        certificate = load_der(der)
        _parse_all(certificate, der)
    except _MALFORMED as error:
        found = f"is not a well-formed X.509 certificate ({cut(str(error), _LONGEST_QUOTE)})"
        raise CertificateError(f"{found}{_subject(der, certificate)}") from error
    except _UNSUPPORTED as error:
        found = f"is a certificate of a kind that is not supported ({cut(str(error), _LONGEST_QUOTE)})"
        raise CertificateError(f"{found}{_subject(der, certificate)}") from error
    except _UNKNOWN_FEATURE as error:
        found = f"is a certificate of a kind that is not supported (it has the TLS feature {error})"
        raise CertificateError(f"{found}{_subject(der, certificate)}") from error
    if fault := fault_of_loading(certificate, der):
        raise CertificateError(f"is a certificate that Envoy does not load: {fault}{_subject(der, certificate)}")
    return certificate


_shared = dict[bytes, x509.Certificate]()


def _parse_all(certificate: x509.Certificate, der: bytes) -> None:
    """Read what cryptography parses only on demand, so that a malformed part is found here and not later."""
    _ = certificate.version, certificate.subject, certificate.extensions
    times_of(certificate)
    certificate.public_key()
    issuer = fields_of_certificate(der).issuer
    if issuer in _issuers:
        return  # leaves have it in common, and to parse it takes long
    _ = certificate.issuer
    if len(issuer) <= _LONGEST_ISSUER:
        if len(_issuers) >= MOST_SHARED:
            _issuers.clear()
        _issuers.add(issuer)


_issuers = set[bytes]()
"""Names that cryptography has read."""


def _subject(der: bytes, certificate: x509.Certificate | None) -> str:
    """Which certificate it is, as far as that can be read."""
    if certificate is not None:
        with suppress(*_MALFORMED):
            return f"; its subject is {describe_name(certificate.subject)}"
    texts = ", ".join(texts_of_subject(der))
    return f"; its subject is {describe_name(texts)}" if texts else ""
