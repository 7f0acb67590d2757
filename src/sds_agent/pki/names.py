"""When two distinguished names are the same: not as they are encoded, but as Envoy's TLS library compares them.

RFC 5280 section 7.1 asks for it: a CA may be `Demo CA` in a PrintableString as the subject, and in a UTF8String, with
other capitals or more spaces, as the issuer. BoringSSL folds the case of ASCII letters and normalizes nothing else
(crypto/x509/x_name.cc), and so does this: by what section 7.1 says of all Unicode, names would be the same that are
different for Envoy.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import TypeAlias

from cryptography import x509
from cryptography.x509.oid import NameOID

from sds_agent.pki.certificates import der_of, remembered
from sds_agent.pki.der import elements, fields_of_certificate

CanonicalName: TypeAlias = tuple[tuple[bytes, ...], ...]
"""RDN by RDN, each as its sorted attributes. It can be hashed, and begins like another if that name does."""

_LONGEST_CACHED = 1024
_IA5 = 0x16
# Tags of strings, and their encodings. T61 has one of its own, which no CA means that writes Latin-1 into it.
_ENCODINGS = {
    0x0C: "utf-8",
    0x13: "latin-1",
    0x14: "latin-1",
    _IA5: "latin-1",
    0x1A: "latin-1",
    0x1C: "utf-32-be",
    0x1E: "utf-16-be",
}


def canonical(name: x509.Name) -> CanonicalName:
    """The name in a form that is equal for names that are the same."""
    ((_, rdns),) = elements(name.public_bytes())
    return _canonical_of(rdns)


def same_name(one: x509.Name, other: x509.Name) -> bool:
    """Whether two names are the same."""
    return canonical(one) == canonical(other)


def same_encoding(one: x509.Name, other: x509.Name) -> bool:
    """Whether two names are the same byte by byte, as Go demands of an issuer and what it issued."""
    return one.public_bytes() == other.public_bytes()


@remembered
def subject_of(certificate: x509.Certificate) -> CanonicalName:
    """The certificate's subject, canonical. From its bytes, for cryptography would encode the name again."""
    return _canonical_of(fields_of_certificate(der_of(certificate)).subject)


@remembered
def issuer_of(certificate: x509.Certificate) -> CanonicalName:
    """The certificate's issuer, likewise."""
    return _canonical_of(fields_of_certificate(der_of(certificate)).issuer)


def is_self_issued(certificate: x509.Certificate) -> bool:
    """Issuer and subject are one name, as where a CA's old key certifies its new one."""
    return issuer_of(certificate) == subject_of(certificate)


def email_addresses(name: x509.Name) -> Iterator[str | None]:
    """The values of its emailAddress attributes: None for one that is no IA5String, as PKCS #9 wants it."""
    texts = (attribute.value for attribute in name.get_attributes_for_oid(NameOID.EMAIL_ADDRESS))
    ((_, rdns),) = elements(name.public_bytes())
    tags = (tag for rdn in _attributes_of(rdns) for kind, tag, _ in rdn if kind == _EMAIL_ADDRESS)
    for text, tag in zip(texts, tags, strict=True):
        yield text if tag == _IA5 and isinstance(text, str) else None


def _canonical_of(rdns: bytes) -> CanonicalName:
    # cached by its bytes: for cryptography a name is the same in every type of string, though it reads some otherwise
    return _cached(rdns) if len(rdns) <= _LONGEST_CACHED else _canonical(rdns)


def _canonical(rdns: bytes) -> CanonicalName:
    return tuple(
        tuple(sorted(b"%b=%b" % (kind, _folded(tag, text)) for kind, tag, text in rdn)) for rdn in _attributes_of(rdns)
    )


_cached = lru_cache(maxsize=512)(_canonical)
"""One search needs the same few names many times."""


def _attributes_of(rdns: bytes) -> Iterator[Iterator[tuple[bytes, int, bytes]]]:
    """RDN by RDN the attributes: the kind's OID as DER content, the value's tag and its content."""
    for _, rdn in elements(rdns):
        yield _attributes(rdn)


def _attributes(rdn: bytes) -> Iterator[tuple[bytes, int, bytes]]:
    for _, attribute in elements(rdn):
        (_, kind), (tag, value) = elements(attribute)
        yield kind, tag, value


def _folded(tag: int, content: bytes) -> bytes:
    """The value in UTF-8 without what makes no difference, or for what is no string its tag and content."""
    encoding = _ENCODINGS.get(tag)
    if encoding is None:
        return b"%d:%b" % (tag, content)
    # of bytes, `split` and `lower` know the space and the letters of ASCII only
    return b"=" + b" ".join(content.decode(encoding).encode().split()).lower()


((_, _EMAIL_ADDRESS),) = elements(bytes.fromhex("06092a864886f70d010901"))
