"""Issuing certificates as values: a self-signed root, an intermediate below it, and leaves below a signer.

A certificate's times are whole seconds. They are rounded down, so that a leaf never lives longer than was asked for,
and never past its signer.
"""

import os
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from functools import cached_property

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from sds_agent.digest import sha1, sha256
from sds_agent.errors import SdsAgentError
from sds_agent.pki.certificates import describe, describe_name, describe_time, extension, has_key
from sds_agent.pki.keys import PrivateKey, PublicKey, signature_hash
from sds_agent.pki.validation.rules import fault_of_ca_flag
from sds_agent.signing.template import LeafTemplate
from sds_agent.values import Sensitive

ROOT_BACKDATE = timedelta(days=2)
"""How far back a root's NotBefore lies: it stays valid when the clock is corrected after the first start."""
LEAF_BACKDATE = timedelta(minutes=2)
"""How far back a leaf's NotBefore lies: the difference that the clocks of two machines may have."""
SHORTEST_LIFE = timedelta(seconds=1)
"""A shorter one could be rounded down to a certificate that has expired when it is issued."""
LONGEST_ORGANIZATION = 64
"""Characters in a subject's O (ub-organization-name in RFC 5280, appendix A.1)."""
LONGEST_COMMON_NAME = 64
"""Bytes of a subject's CN: ub-common-name counts characters there, and cryptography counts these."""


class SignerError(SdsAgentError):
    """The signer cannot issue what was asked of it."""


class Signer(Sensitive, frozen=True, dict=True):
    """A CA's certificate and its private key. Raises SignerError when they do not match, or it is not a CA's."""

    certificate: x509.Certificate
    key: PrivateKey

    @cached_property
    def begins(self) -> datetime:
        """When its certificate begins."""
        return self.certificate.not_valid_before_utc

    @cached_property
    def ends(self) -> datetime:
        """When its certificate ends."""
        return self.certificate.not_valid_after_utc

    @cached_property
    def _templates(self) -> dict[bool, LeafTemplate]:
        """Of its leaves, by whether their keys are RSA keys."""
        return {}

    def __post_init__(self) -> None:
        if not has_key(self.certificate, self.key.public_key()):
            raise SignerError(
                f"the private key is not that of the CA certificate {describe(self.certificate)}: give the key it was "
                "made for"
            )
        if fault := fault_of_ca_flag(self.certificate):
            raise SignerError(fault)

    def sign_leaf(self, public_key: PublicKey, uri: str, now: datetime, ttl: timedelta) -> x509.Certificate:
        """Issue a leaf for `uri` (ASCII), as X509-SVID asks in sections 3.1 and 4.

        Its times, and what is raised, are those of `sign`.
        """
        of_rsa = isinstance(public_key, rsa.RSAPublicKey)
        template = self._templates.get(of_rsa)
        if template is not None:
            return template.sign(self.key, public_key, uri, _serial_number(), self.validity(now, ttl))
        usages = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)
        leaf = self.sign(public_key, [x509.UniformResourceIdentifier(uri)], usages, now, ttl)
        self._templates[of_rsa] = LeafTemplate(leaf)
        return leaf

    def sign(
        self,
        public_key: PublicKey,
        names: Iterable[x509.GeneralName],
        usages: Iterable[x509.ObjectIdentifier],
        now: datetime,
        ttl: timedelta,
    ) -> x509.Certificate:
        """Issue a certificate that is no CA's, with these names and extended key usages, and an empty subject.

        It is valid from LEAF_BACKDATE before `now` until `now + ttl`, both within the signer's validity. Raises
        SignerError when the signer is not valid at `now`, or `ttl` is under SHORTEST_LIFE.
        """
        not_before, not_after = self.validity(now, ttl)
        # TLS 1.2 may encrypt to an RSA key; no other kind can be used so
        usage = _key_usage(digital_signature=True, key_encipherment=isinstance(public_key, rsa.RSAPublicKey))
        builder = (
            _builder(x509.Name([]), self.certificate.subject, public_key, not_before, not_after)
            .add_extension(x509.SubjectAlternativeName(names), critical=True)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(_authority_key_identifier(self.certificate), critical=False)
        )
        return builder.sign(self.key, signature_hash(self.key))

    def validity(self, now: datetime, ttl: timedelta) -> tuple[datetime, datetime]:
        """The times, in UTC, of a certificate that is issued at `now` for `ttl`, within the signer's own.

        Raises SignerError.
        """
        first, last = self.begins, self.ends
        if ttl < SHORTEST_LIFE:
            raise SignerError(f"a certificate cannot be issued for {ttl.total_seconds():g} s: ask for 1 s or more")
        if now >= last:
            raise SignerError(f"the CA {describe(self.certificate)} expired on {describe_time(last)}: renew it")
        if now < first:
            raise SignerError(
                f"the CA {describe(self.certificate)} is valid only from {describe_time(first)}, and it is "
                f"{describe_time(now)}: set this machine's clock"
            )
        end = _whole_seconds(now + ttl) if ttl < last - now else last
        return max(_whole_seconds(now - LEAF_BACKDATE), first), end


def make_root(key: PrivateKey, organization: str, now: datetime, lifetime: timedelta) -> Signer:
    """A new self-signed root for `key`, with O = `organization` as its subject, valid until `now + lifetime`.

    A longer organization than LONGEST_ORGANIZATION (a trust domain may have 255 characters) is cut and followed by a
    hash of the whole, so that no two get one subject. Key identifiers distinguish roots of the same name. Raises
    SignerError when `organization` is empty, or `lifetime` under SHORTEST_LIFE.
    """
    if not organization:
        raise SignerError("a root needs a name: give the trust domain")
    if lifetime < SHORTEST_LIFE:
        raise SignerError(f"a root cannot be made for {lifetime.total_seconds():g} s: give it 1 s or more")
    name = root_name(organization)
    own_identifier = key_identifier(key.public_key())
    issuer_identifier = x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(own_identifier)
    not_before, not_after = _whole_seconds(now - ROOT_BACKDATE), _whole_seconds(now + lifetime)
    builder = (
        _builder(name, name, key.public_key(), not_before, not_after)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .add_extension(_key_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(issuer_identifier, critical=False)
    )
    return Signer(builder.sign(key, signature_hash(key)), key)


def root_name(organization: str) -> x509.Name:
    """The subject that `make_root` gives a root of that organization."""
    return x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, _organization(organization))])


def make_intermediate(
    root: Signer, key: PrivateKey, name: str, now: datetime, lifetime: timedelta, *, permitted_host: str | None = None
) -> Signer:
    """A CA for `key` below `root`, valid until `now + lifetime`, that can have no further CA below it.

    Its subject is the root's O and CN = `name`. With `permitted_host` (a trust domain) all URIs below it must have that
    host: the constraint is the bare host, without scheme or leading dot (RFC 5280 section 4.2.1.10). Raises SignerError
    when `name` cannot be a CN or `permitted_host` is no DNS name, when the root is not valid at `now`, or when
    `lifetime` is under SHORTEST_LIFE or ends after the root.
    """
    if not name.isprintable() or not 0 < len(name.encode()) <= LONGEST_COMMON_NAME:
        raise SignerError(
            f"an intermediate needs a name of printable characters, 1 to {LONGEST_COMMON_NAME} bytes long in UTF-8"
        )
    from sds_agent.pki.validation.constraints import is_host_name  # noqa: PLC0415 - for an intermediate alone

    if permitted_host is not None and not is_host_name(permitted_host):
        raise SignerError(
            f"a name constraint holds URIs to a DNS name, such as demo.example, and {describe_name(permitted_host)} is "
            "none (an IP address is not, nor what has an empty label, an underscore, a hyphen at the end of a label, "
            "or a number as its last label), so that no Envoy would take what is issued: leave the constraint out, or "
            "name another trust domain"
        )
    not_before, not_after = root.validity(now, lifetime)
    if not_after < _whole_seconds(now + lifetime):
        raise SignerError(
            f"the root {describe(root.certificate)} ends on {describe_time(not_after)}, before the intermediate would: "
            "give the intermediate a shorter lifetime, or make a new root"
        )
    organization = root.certificate.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)
    subject = x509.Name([*organization, x509.NameAttribute(NameOID.COMMON_NAME, name)])
    builder = (
        _builder(subject, root.certificate.subject, key.public_key(), not_before, not_after)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(key_cert_sign=True, crl_sign=True), critical=True)
        .add_extension(_authority_key_identifier(root.certificate), critical=False)
    )
    if permitted_host is not None:
        hosts = [x509.UniformResourceIdentifier(permitted_host)]
        builder = builder.add_extension(x509.NameConstraints(hosts, None), critical=True)
    return Signer(builder.sign(root.key, signature_hash(root.key)), key)


def _builder(
    subject: x509.Name, issuer: x509.Name, public_key: PublicKey, not_before: datetime, not_after: datetime
) -> x509.CertificateBuilder:
    """What all certificates have in common, the random serial number included."""
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(_serial_number())
        .not_valid_before(not_before)
        .not_valid_after(not_after)
        .add_extension(key_identifier(public_key), critical=False)
    )


def _serial_number() -> int:
    return int.from_bytes(os.urandom(16)) or 1


def _key_usage(
    *,
    digital_signature: bool = False,
    key_encipherment: bool = False,
    key_cert_sign: bool = False,
    crl_sign: bool = False,
) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=digital_signature,
        content_commitment=False,
        key_encipherment=key_encipherment,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=key_cert_sign,
        crl_sign=crl_sign,
        encipher_only=False,
        decipher_only=False,
    )


def key_identifier(public_key: PublicKey) -> x509.SubjectKeyIdentifier:
    """The key identifier of RFC 5280, section 4.2.1.2, method 1: SHA-1 of the key's bits.

    `SubjectKeyIdentifier.from_public_key` gives the same and loads `hashlib`: see `digest`.
    """
    if isinstance(public_key, rsa.RSAPublicKey):
        bits = public_key.public_bytes(Encoding.DER, PublicFormat.PKCS1)
    else:
        bits = public_key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    return x509.SubjectKeyIdentifier(sha1(bits))


def _authority_key_identifier(issuer: x509.Certificate) -> x509.AuthorityKeyIdentifier:
    """The issuer's own key identifier where it has one, since CAs derive it differently (RFC 5280 section 4.2.1.1)."""
    identifier = extension(issuer, x509.SubjectKeyIdentifier)
    if identifier is None:
        identifier = x509.SubjectKeyIdentifier.from_public_key(issuer.public_key())
    return x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(identifier)


def _organization(text: str) -> str:
    if len(text) <= LONGEST_ORGANIZATION:
        return text
    mark = f"~{sha256(text.encode()).hex()[:16]}"
    return text[: LONGEST_ORGANIZATION - len(mark)] + mark


def _whole_seconds(moment: datetime) -> datetime:
    utc = moment.astimezone(UTC)
    return utc - timedelta(0, 0, utc.microsecond)
