"""Whether one certificate signed another (RFC 5280 section 6.1.3, steps a.1 and a.4), by algorithms that Envoy takes.

cryptography's own check wants the issuer's name in the same encoding on both sides, which neither RFC 5280 nor Envoy
asks for; so the name and the key are compared here.
"""

from contextlib import suppress

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa
from cryptography.x509.oid import SignatureAlgorithmOID

from sds_agent.pki.certificates import der_of, describe, describe_name, remembered_of_two
from sds_agent.pki.der import fields_of_certificate
from sds_agent.pki.names import issuer_of, subject_of

# What Envoy's TLS library takes beside ECDSA, without the weak.
_KNOWN = frozenset(
    {
        SignatureAlgorithmOID.RSA_WITH_SHA224,
        SignatureAlgorithmOID.RSA_WITH_SHA256,
        SignatureAlgorithmOID.RSA_WITH_SHA384,
        SignatureAlgorithmOID.RSA_WITH_SHA512,
        SignatureAlgorithmOID.RSASSA_PSS,
        SignatureAlgorithmOID.ED25519,
    }
)
# made once: cryptography makes one anew for each certificate
_ECDSA = {
    SignatureAlgorithmOID.ECDSA_WITH_SHA224: ec.ECDSA(hashes.SHA224()),
    SignatureAlgorithmOID.ECDSA_WITH_SHA256: ec.ECDSA(hashes.SHA256()),
    SignatureAlgorithmOID.ECDSA_WITH_SHA384: ec.ECDSA(hashes.SHA384()),
    SignatureAlgorithmOID.ECDSA_WITH_SHA512: ec.ECDSA(hashes.SHA512()),
}
_HASHES = frozenset({"sha224", "sha256", "sha384", "sha512"})
_PSS_HASHES = _HASHES - {"sha224"}
_SIGN_LIKE_THIS = "its CA must sign by RSA or ECDSA, with SHA-256 or its like"


@remembered_of_two
def fault_of_signature(certificate: x509.Certificate, issuer: x509.Certificate) -> str | None:
    """Why `issuer` did not issue the certificate, by name and signature.

    The answers to the last questions are remembered: one certificate on its way to Envoys leads to the same question
    five times, and each takes a signature.
    """
    if fault := _fault_of_algorithm(certificate):
        return fault
    if issuer_of(certificate) != subject_of(issuer):
        return f"{describe(certificate)} was issued by {describe_name(certificate.issuer)}, not by {describe(issuer)}"
    try:
        _verify(certificate, issuer)
    except InvalidSignature:
        return f"{describe(certificate)} was not signed with the key of {describe(issuer)}, its issuer by name"
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        return f"the signature of {describe(issuer)} on {describe(certificate)} cannot be checked ({error})"
    return None


def fault_of_pss(certificate: x509.Certificate, issuer: x509.Certificate) -> str | None:
    """Envoy and Go take RSA-PSS only as TLS 1.3 has it (RFC 8446 section 4.2.3); openssl's default is another."""
    if certificate.signature_algorithm_oid != SignatureAlgorithmOID.RSASSA_PSS:
        return None  # as nearly all: what is below would say the same
    if not in_other_pss(certificate, certificate.tbs_certificate_bytes, issuer):
        return None
    return (
        f"{describe(certificate)} is signed by RSA-PSS in a form that Envoy does not take: its CA must sign with "
        "SHA-256, SHA-384 or SHA-512, the same hash for the mask, and a salt as long as the hash (openssl: -sigopt "
        "rsa_pss_saltlen:digest)"
    )


def in_other_pss(
    signed: x509.Certificate | x509.CertificateRevocationList, content: bytes, issuer: x509.Certificate
) -> bool:
    """Whether what the issuer signed, with this `content`, has a signature by RSA-PSS in another form than that."""
    if signed.signature_algorithm_oid != SignatureAlgorithmOID.RSASSA_PSS:
        return False
    digest, key = signed.signature_hash_algorithm, issuer.public_key()
    if digest is not None and digest.name in _PSS_HASHES and isinstance(key, rsa.RSAPublicKey):
        form = padding.PSS(padding.MGF1(digest), padding.PSS.DIGEST_LENGTH)
        with suppress(InvalidSignature):
            key.verify(signed.signature, content, form, digest)
            return False
    return True


def _verify(certificate: x509.Certificate, issuer: x509.Certificate) -> None:
    """Raises InvalidSignature where the issuer's key did not make it, and ValueError where that cannot be checked."""
    content, signature = _signed_content(certificate), certificate.signature
    form = _ECDSA.get(certificate.signature_algorithm_oid) or certificate.signature_algorithm_parameters
    match issuer.public_key(), form:
        case ec.EllipticCurvePublicKey() as key, ec.ECDSA() as form:
            key.verify(signature, content, form)
        case rsa.RSAPublicKey() as key, padding.PKCS1v15() | padding.PSS() as form if (
            digest := certificate.signature_hash_algorithm
        ):
            key.verify(signature, content, form, digest)
        case ed25519.Ed25519PublicKey() as key, None:
            key.verify(signature, content)
        case _:
            raise InvalidSignature


def _signed_content(certificate: x509.Certificate) -> bytes:
    """What is signed. The algorithm stands in a certificate twice, the signed one first; they are the same (section
    4.1.1.2), or else this raises ValueError.
    """
    (_, (_, inner), *_), outer, signed = fields_of_certificate(der_of(certificate))
    if inner != outer:
        raise ValueError("it names two algorithms")
    return signed


def _fault_of_algorithm(certificate: x509.Certificate) -> str | None:
    """Certificates have been forged with MD5 and SHA-1; other algorithms that are not listed no Envoy would verify."""
    algorithm = certificate.signature_algorithm_oid
    if algorithm in _ECDSA:
        return None
    how = f"by the algorithm {algorithm.dotted_string}"
    try:
        digest = certificate.signature_hash_algorithm
    except UnsupportedAlgorithm:
        return f"{describe(certificate)} is signed {how}: {_SIGN_LIKE_THIS}"
    if digest is not None and digest.name not in _HASHES:
        how = f"with {digest.name.upper()}"
    elif algorithm in _KNOWN:
        return None
    return f"{describe(certificate)} is signed {how}: {_SIGN_LIKE_THIS}"
