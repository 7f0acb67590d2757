"""Where PEM blocks begin and end: as OpenSSL and Envoy read it, and in the forms that files get by accident."""

from collections.abc import Callable
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from fakes.hierarchy import make_ca, make_crl, new_key
from fakes.openssl import openssl

from sds_agent.pki.certificates import read_pem, write_pem
from sds_agent.pki.forms import first_label
from sds_agent.pki.keyfile import read_private_key
from sds_agent.pki.keys import to_pkcs8_pem
from sds_agent.pki.pem import blocks, labels
from sds_agent.pki.validation.revocation import read_crls

CA = make_ca("root")
KEY = new_key()
CERTIFICATE = write_pem([CA.certificate])
KEY_PEM = to_pkcs8_pem(KEY)
LIST = make_crl(CA, 7).public_bytes(Encoding.PEM)

COMMENT = {
    "in the middle of a line": b"# the old -----BEGIN %s----- was taken out here\n",
    "with its END": b"# between -----BEGIN %s----- and -----END %s----- it says:\n",
    "quoted": b"> -----BEGIN %s-----\n",
    "in small letters": b"-----begin %s-----\n",
}
Read = Callable[[bytes], object]
KINDS: dict[str, tuple[bytes, bytes, Read]] = {
    "certificate": (b"CERTIFICATE", CERTIFICATE, read_pem),
    "key": (b"PRIVATE KEY", KEY_PEM, lambda data: read_private_key(data).private_numbers()),
    "revocation list": (b"X509 CRL", LIST, read_crls),
}


@pytest.mark.parametrize("comment", COMMENT.values(), ids=COMMENT)
@pytest.mark.parametrize(("label", "pem", "read"), KINDS.values(), ids=KINDS)
def test_a_text_that_names_a_begin_is_a_comment(comment: bytes, label: bytes, pem: bytes, read: Read) -> None:
    text = comment.replace(b"%s", label)
    for data in (text + pem, pem + text, pem + b"\n" + text):
        assert read(data) == read(pem)


def test_openssl_reads_such_a_file_too(tmp_path: Path) -> None:
    (tmp_path / "c.pem").write_bytes(COMMENT["in the middle of a line"].replace(b"%s", b"CERTIFICATE") + CERTIFICATE)
    assert openssl(tmp_path, "x509", "-in", "c.pem").encode() == CERTIFICATE


BOM = b"\xef\xbb\xbf"
JOINED = {
    "as written": CERTIFICATE * 2,
    "without a line break between": CERTIFICATE.strip() * 2,
    "with a blank between": b" ".join([CERTIFICATE.strip()] * 2),
    "each with a byte order mark": (BOM + CERTIFICATE) * 2,
    "joined with a byte order mark between": BOM + CERTIFICATE.strip() + BOM + CERTIFICATE,
    "indented": b"\n".join(b"\t  " + line for line in (CERTIFICATE * 2).splitlines()),
    "each in one line": CERTIFICATE.replace(b"\n", b" ").strip() + b"\n" + CERTIFICATE.replace(b"\n", b""),
    "all in one line": CERTIFICATE.replace(b"\n", b" ") * 2,
    "with the line ends of an old Mac": CERTIFICATE.replace(b"\n", b"\r") * 2,
    "behind a key": (KEY_PEM.strip() + CERTIFICATE.strip()) * 2,
}


@pytest.mark.parametrize("data", JOINED.values(), ids=JOINED)
def test_blocks_that_were_run_together_are_read(data: bytes) -> None:
    assert write_pem(read_pem(data)) == CERTIFICATE * 2


def test_a_block_ends_where_the_next_one_begins() -> None:
    """So a text of BEGINs alone is searched once, and not once for each of them."""
    begins = b"-----BEGIN A-----\n" * 3
    found = list(blocks(begins + b"-----END A-----\n", frozenset({b"A"})))
    assert [(block.has_end, block.is_last) for block in found] == [(False, False), (False, False), (True, True)]
    assert list(labels(begins)) == [b"A"] * 3
    assert first_label(b"text " + begins) == "A"
    assert found[0].text == b"-----BEGIN A-----\n"


def test_a_block_does_not_show_what_is_in_it() -> None:
    (block,) = blocks(KEY_PEM, frozenset({b"PRIVATE KEY"}))
    assert repr(block) == "Block(...)"
    assert block.text == KEY_PEM.strip()
