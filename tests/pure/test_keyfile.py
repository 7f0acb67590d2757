"""A key is taken in whatever form the operator's tool wrote it; the rest is refused in words without the key."""

import base64
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from fakes.openssl import openssl

from sds_agent.pki.keyfile import KeyFileError, PassphraseError, is_encrypted, read_private_key

PASSPHRASE = b"correct horse"
PASSOUT = ("-passout", f"pass:{PASSPHRASE.decode()}")
EC = ("ecparam", "-name", "prime256v1", "-genkey")

PLAIN = {
    "PKCS#8, EC": ("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-384"),
    "PKCS#8, RSA": ("genpkey", "-algorithm", "RSA"),
    "PKCS#1": ("genrsa", "-traditional", "2048"),
    "SEC1": (*EC, "-noout"),
    "SEC1 behind EC PARAMETERS": EC,
    "P-521": ("ecparam", "-name", "secp521r1", "-genkey", "-noout"),
}
ENCRYPTED = {
    "PKCS#8 with PBES2": ("genpkey", "-algorithm", "RSA", "-aes256", "-pass", f"pass:{PASSPHRASE.decode()}"),
    "PKCS#1 with its own header": ("genrsa", "-traditional", "-aes256", *PASSOUT, "2048"),
}
REFUSED = {
    "RSA-PSS": (("genpkey", "-algorithm", "RSA-PSS"), "is an RSA-PSS key"),
    "explicit parameters": ((*EC, "-param_enc", "explicit"), "explicit parameters"),
    "short RSA": (("genrsa", "1024"), "RSA key of 1024 bits"),
    "short PKCS#1": (("genrsa", "-traditional", "1024"), "RSA key of 1024 bits"),
    "another curve": (("ecparam", "-name", "secp256k1", "-genkey", "-noout"), "on the curve secp256k1"),
    "Ed25519": (("genpkey", "-algorithm", "ed25519"), "neither an EC nor an RSA key"),
    "DSA parameters alone": (("ecparam", "-name", "prime256v1"), "holds no private key"),
}
DISGUISES: dict[str, Callable[[bytes], bytes]] = {
    "as it is": lambda pem: pem,
    "a text before it": lambda pem: b"Bag Attributes\n    friendlyName: ca\n" + pem,
    "CRLF": lambda pem: pem.replace(b"\n", b"\r\n"),
    "a byte order mark": lambda pem: b"\xef\xbb\xbf" + pem,
    "no line break at its end": lambda pem: pem.rstrip(),
}


def made(directory: Path, arguments: tuple[str, ...]) -> bytes:
    return openssl(directory, *arguments).encode()


@pytest.fixture(scope="module")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[tuple[str, ...]], bytes]:
    """One key for each of these arguments: to make one takes longer than to read it in every disguise."""
    directory = tmp_path_factory.mktemp("keys")
    return cache(lambda arguments: made(directory, arguments))


@pytest.mark.parametrize("disguise", DISGUISES.values(), ids=DISGUISES)
@pytest.mark.parametrize("arguments", PLAIN.values(), ids=PLAIN)
def test_every_plain_form_is_taken(
    arguments: tuple[str, ...], disguise: Callable[[bytes], bytes], once: Callable[[tuple[str, ...]], bytes]
) -> None:
    pem = once(arguments)
    key = read_private_key(disguise(pem))
    assert isinstance(key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey)
    assert not is_encrypted(pem)
    assert read_private_key(disguise(pem), PASSPHRASE).private_numbers() == key.private_numbers()


@pytest.mark.parametrize("disguise", DISGUISES.values(), ids=DISGUISES)
@pytest.mark.parametrize("arguments", ENCRYPTED.values(), ids=ENCRYPTED)
def test_an_encrypted_key_is_taken_with_its_passphrase_alone(
    arguments: tuple[str, ...], disguise: Callable[[bytes], bytes], once: Callable[[tuple[str, ...]], bytes]
) -> None:
    pem = disguise(once(arguments))
    assert is_encrypted(pem)
    assert read_private_key(pem, PASSPHRASE).key_size == 2048
    with pytest.raises(PassphraseError, match="there is no passphrase"):
        read_private_key(pem)
    with pytest.raises(PassphraseError, match="the passphrase is wrong"):
        read_private_key(pem, b"wrong")


@pytest.mark.parametrize(("arguments", "words"), REFUSED.values(), ids=REFUSED)
def test_a_key_that_cannot_serve_is_refused_in_words(arguments: tuple[str, ...], words: str, tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match=words):
        read_private_key(made(tmp_path, arguments))


def test_an_explicit_curve_is_seen_in_pkcs8_too(tmp_path: Path) -> None:
    pem = openssl(tmp_path, "pkcs8", "-topk8", "-nocrypt", given=made(tmp_path, (*EC, "-param_enc", "explicit")))
    with pytest.raises(KeyFileError, match="explicit parameters"):
        read_private_key(pem.encode())


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b"hello", "holds no private key"),
        (b"\x30\x82\x01\x00", "is in DER"),
        (b"\x30\x82\x04\x8f\x02\x01\x03\x30", "is in PKCS#12, .* `openssl pkcs12 -nodes -in"),
        (b"\x30\x80\x02\x01\x03\x30\x80", "is in PKCS#12"),
        (b"-----BEGIN CERTIFICATE-----\nAA==\n-----END CERTIFICATE-----\n", "is a certificate"),
        (b"-----BEGIN TRUSTED CERTIFICATE-----\nAA==\n-----END TRUSTED CERTIFICATE-----\n", "OpenSSL's own kind"),
        (b"-----BEGIN PUBLIC KEY-----\nAA==\n-----END PUBLIC KEY-----\n", "is a public key"),
        (b"-----BEGIN OPENSSH PRIVATE KEY-----\nAA==\n-----END OPENSSH PRIVATE KEY-----\n", "OpenSSH"),
        (b"-----BEGIN PRIVATE KEY-----\nAA==\n", "has no END line"),
        (b"-----BEGIN PRIVATE KEY-----\n****\n-----END PRIVATE KEY-----\n", "not base64"),
        (b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n", "not a well-formed"),
    ],
)
def test_the_error_says_what_a_file_without_a_key_contains(data: bytes, words: str) -> None:
    with pytest.raises(KeyFileError, match=words):
        read_private_key(data)


def test_two_keys_in_a_file_are_refused_rather_than_guessed_at(tmp_path: Path) -> None:
    with pytest.raises(KeyFileError, match="holds 2 private keys"):
        read_private_key(made(tmp_path, EC) + made(tmp_path, EC))


def test_a_truncated_key_is_refused_without_a_word_of_it(tmp_path: Path) -> None:
    """Every cut of a file that is being written: refused, and the message holds none of the key's base64."""
    pem = made(tmp_path, PLAIN["PKCS#8, EC"])
    lines = [line for line in pem.decode().splitlines() if not line.startswith("-----")]
    for length in range(len(pem) - len("-----END PRIVATE KEY-----\n")):
        with pytest.raises(KeyFileError) as caught:
            read_private_key(pem[:length])
        assert not any(line in str(caught.value) for line in lines)
    damaged = re.sub(rb"\n(.{20})", rb"\n" + base64.b64encode(b"\x00" * 15), pem, count=1)
    with pytest.raises(KeyFileError) as caught:
        read_private_key(damaged)
    assert not any(line in str(caught.value) for line in lines)
