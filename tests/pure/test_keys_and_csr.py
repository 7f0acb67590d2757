"""Keys and requests: every CA gets a request it can take, and no key is ever printed."""

from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_der_public_key, load_pem_private_key
from fakes.openssl import openssl
from hypothesis import given
from hypothesis import strategies as st

from sds_agent.pki.csr import make_csr
from sds_agent.pki.keys import KeyType, PrivateKey, generate, public_bytes, signature_hash, to_pkcs8_pem

URI = "spiffe://demo.example/ns/default/sa/web"
KEYS: dict[KeyType, PrivateKey] = {kind: generate(kind) for kind in KeyType}


def test_each_kind_makes_the_key_it_names() -> None:
    """A user who asks for a strength gets it."""
    made = {str(kind): (type(key.public_key()).__name__, key.key_size) for kind, key in KEYS.items()}
    assert made == {
        "ec-p256": ("ECPublicKey", 256),
        "ec-p384": ("ECPublicKey", 384),
        "rsa-2048": ("RSAPublicKey", 2048),
        "rsa-3072": ("RSAPublicKey", 3072),
        "rsa-4096": ("RSAPublicKey", 4096),
    }


def test_a_new_key_is_made_each_time() -> None:
    assert public_bytes(generate(KeyType.EC_P256).public_key()) != public_bytes(generate(KeyType.EC_P256).public_key())


def test_only_rsa_keys_are_too_slow_for_the_event_loop() -> None:
    """An agent that makes an RSA key goes on answering every Envoy."""
    assert {kind for kind in KeyType if kind.slow} == {KeyType.RSA_2048, KeyType.RSA_3072, KeyType.RSA_4096}


@pytest.mark.parametrize("kind", KEYS)
def test_a_key_is_written_as_plain_pkcs8(kind: KeyType) -> None:
    """The one form that Envoy reads for all of them."""
    pem = to_pkcs8_pem(KEYS[kind])
    assert pem.startswith(b"-----BEGIN PRIVATE KEY-----\n")
    assert pem.endswith(b"-----END PRIVATE KEY-----\n")
    again = load_pem_private_key(pem, password=None)
    assert isinstance(again, PrivateKey)
    assert again.private_numbers() == KEYS[kind].private_numbers()


@pytest.mark.parametrize("kind", KEYS)
def test_equal_public_bytes_mean_the_same_key(kind: KeyType) -> None:
    public = KEYS[kind].public_key()
    assert load_der_public_key(public_bytes(public)) == public
    assert len({public_bytes(key.public_key()) for key in KEYS.values()}) == len(KEYS)


def test_a_key_does_not_show_in_its_repr() -> None:
    for key in KEYS.values():
        numbers = key.private_numbers()
        secret = numbers.private_value if isinstance(numbers, ec.EllipticCurvePrivateNumbers) else numbers.d
        assert str(secret) not in repr(key)
        assert f"{secret:x}" not in repr(key).lower()


def test_the_hash_is_as_strong_as_the_key() -> None:
    """A P-384 identity is not weakened to 128 bits by its signature."""
    assert isinstance(signature_hash(KEYS[KeyType.EC_P256]), hashes.SHA256)
    assert isinstance(signature_hash(KEYS[KeyType.EC_P384]), hashes.SHA384)
    assert isinstance(signature_hash(ec.generate_private_key(ec.SECP521R1())), hashes.SHA512)
    assert isinstance(signature_hash(KEYS[KeyType.RSA_3072]), hashes.SHA256)


@pytest.mark.parametrize("kind", KEYS)
def test_a_request_asks_for_the_uri_and_for_nothing_else(kind: KeyType) -> None:
    """cert-manager's istio-csr and others refuse a request that asks for more."""
    request = x509.load_pem_x509_csr(make_csr(KEYS[kind], URI))
    assert request.is_signature_valid
    assert request.public_key() == KEYS[kind].public_key()
    assert request.subject == x509.Name([])
    (extension,) = request.extensions
    assert extension.critical
    assert extension.value == x509.SubjectAlternativeName([x509.UniformResourceIdentifier(URI)])
    # extensionRequest of PKCS#9 and no challenge password
    assert [attribute.oid.dotted_string for attribute in request.attributes] == ["1.2.840.113549.1.9.14"]


@pytest.mark.parametrize("kind", KEYS)
def test_openssl_reads_the_request_as_it_was_meant(kind: KeyType, tmp_path: Path) -> None:
    text = " ".join(openssl(tmp_path, "req", "-verify", "-noout", "-text", given=make_csr(KEYS[kind], URI)).split())
    assert "Subject: Subject Public Key Info:" in text
    assert f"Requested Extensions: X509v3 Subject Alternative Name: critical URI:{URI} Signature Algorithm:" in text


@given(path=st.text(alphabet="abzAZ09.-_/", max_size=2000))
def test_a_request_carries_any_uri_unchanged(path: str) -> None:
    uri = f"spiffe://demo.example/{path}"
    request = x509.load_pem_x509_csr(make_csr(KEYS[KeyType.EC_P256], uri))
    (name,) = request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert name.value == uri
