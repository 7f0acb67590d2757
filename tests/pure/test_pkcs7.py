"""The certificates of PKCS#7 messages, in whatever order a CA puts them."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, pkcs7
from fakes.est_server import certs_only, tlv
from fakes.hierarchy import make_ca
from hypothesis import given
from hypothesis import strategies as st

from sds_agent.pki.certificates import read_pem, write_pem
from sds_agent.pki.pkcs7 import Pkcs7Error, certificates_pem

CERTIFICATES = tuple(make_ca(name).certificate for name in ("a", "b", "c" * 64))


def by_openssl(certificates: Sequence[x509.Certificate], folder: Path) -> bytes:
    (folder / "in.pem").write_bytes(write_pem(certificates))
    command = ["openssl", "crl2pkcs7", "-nocrl", "-certfile", str(folder / "in.pem"), "-outform", "DER"]
    return subprocess.run(command, capture_output=True, check=True).stdout


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1,), ()])
def test_what_openssl_writes_is_read_in_its_order(order: Sequence[int], tmp_path: Path) -> None:
    chosen = tuple(CERTIFICATES[index] for index in order)
    assert read_pem(certificates_pem(by_openssl(chosen, tmp_path))) == chosen
    assert read_pem(certificates_pem(certs_only(chosen))) == chosen


def test_what_cryptography_writes_is_read() -> None:
    der = pkcs7.serialize_certificates(list(CERTIFICATES), Encoding.DER)
    assert set(read_pem(certificates_pem(der))) == set(CERTIFICATES)


def test_what_is_no_certificate_is_passed_over() -> None:
    """Attribute certificates and old forms are other choices of the same SET (RFC 5652 section 10.2.2)."""
    der = CERTIFICATES[0].public_bytes(Encoding.DER)
    other = tlv(0xA1, b"\x05\x00")
    inner = [tlv(0x02, b"\x01"), tlv(0x31), tlv(0x30), tlv(0xA0, other, der)]
    message = tlv(0x30, bytes.fromhex("06092a864886f70d010702"), tlv(0xA0, tlv(0x30, *inner)))
    assert read_pem(certificates_pem(message)) == CERTIFICATES[:1]


@pytest.mark.parametrize("damage", ["other kind", "cut", "more behind", "empty", "no sequence"])
def test_another_message_is_refused(damage: str) -> None:
    good = certs_only(CERTIFICATES)
    wrong = {
        "other kind": good.replace(bytes.fromhex("2a864886f70d010702"), bytes.fromhex("2a864886f70d010703")),
        "cut": good[:-1],
        "more behind": good + good,
        "empty": b"",
        "no sequence": b"\x31" + good[1:],
    }
    with pytest.raises(Pkcs7Error):
        certificates_pem(wrong[damage])


@given(st.binary(max_size=300) | st.binary(max_size=40).map(lambda noise: certs_only(CERTIFICATES[:1])[:60] + noise))
def test_noise_raises_nothing_else(noise: bytes) -> None:
    try:
        certificates_pem(noise)
    except Pkcs7Error as error:
        assert str(error)  # noqa: PT017 - either is good
