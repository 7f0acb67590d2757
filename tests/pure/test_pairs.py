"""A certificate and its key from texts that others wrote."""

import pytest
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)
from fakes.hierarchy import make_ca, make_leaf, new_key

from sds_agent.pki.certificates import write_pem
from sds_agent.pki.keys import to_pkcs8_pem
from sds_agent.pki.pairs import CERTIFICATE, KEY, PairError, read_pair_of

ROOT = make_ca("root")
SIGNER = make_ca("signer", ROOT)
SECRET = new_key()
LEAF = make_leaf(SIGNER, key=SECRET)
KEY_PEM = to_pkcs8_pem(SECRET)


def test_the_leaf_comes_first_and_roots_are_left_out() -> None:
    pair = read_pair_of(write_pem([ROOT.certificate, SIGNER.certificate, LEAF, LEAF]), KEY_PEM)
    assert pair.chain == (LEAF, SIGNER.certificate)
    assert pair.leaf == LEAF


def test_one_text_may_hold_both() -> None:
    text = KEY_PEM + write_pem([LEAF, SIGNER.certificate])
    assert read_pair_of(text, text).chain == (LEAF, SIGNER.certificate)


def test_a_self_signed_leaf_stays() -> None:
    own = make_ca("own")
    assert read_pair_of(write_pem([own.certificate]), to_pkcs8_pem(own.key)).chain == (own.certificate,)  # type: ignore[arg-type]  # an EC key


@pytest.mark.parametrize("form", [PrivateFormat.TraditionalOpenSSL, PrivateFormat.PKCS8])
def test_an_encrypted_key_takes_its_password(form: PrivateFormat) -> None:
    locked = SECRET.private_bytes(Encoding.PEM, form, BestAvailableEncryption(b"word"))
    assert read_pair_of(write_pem([LEAF]), locked, b"word").chain == (LEAF,)
    for password in (None, b"wrong"):
        with pytest.raises(PairError) as refused:
            read_pair_of(write_pem([LEAF]), locked, password)
        assert refused.value.problem.where == (KEY,)


def test_a_sec1_key_is_read() -> None:
    sec1 = SECRET.private_bytes(Encoding.PEM, PrivateFormat.TraditionalOpenSSL, NoEncryption())
    assert read_pair_of(write_pem([LEAF]), sec1).leaf == LEAF


WRONG = {
    "no certificate": (b"", KEY_PEM, CERTIFICATE, "holds no certificate"),
    "another key": (write_pem([LEAF]), to_pkcs8_pem(new_key()), CERTIFICATE, "no certificate in it has the key"),
    "a cut certificate": (write_pem([LEAF])[:-30], KEY_PEM, CERTIFICATE, "the certificate is cut off"),
    "a cut key": (write_pem([LEAF]), KEY_PEM[:-30], KEY, "has no END line"),
    "no key": (write_pem([LEAF]), b"", KEY, "is empty"),
}


@pytest.mark.parametrize(("chain", "key", "place", "said"), WRONG.values(), ids=WRONG)
def test_what_does_not_go_together_is_refused_by_its_place(chain: bytes, key: bytes, place: str, said: str) -> None:
    with pytest.raises(PairError, match=said) as refused:
        read_pair_of(chain, key)
    assert refused.value.problem.where == (place,)


def test_neither_the_pair_nor_its_error_shows_the_key() -> None:
    secret = KEY_PEM.split(b"\n")[1].decode()
    with pytest.raises(PairError) as refused:
        read_pair_of(write_pem([make_leaf(ROOT)]), KEY_PEM)
    assert secret not in f"{refused.value} {refused.value!r} {read_pair_of(write_pem([LEAF]), KEY_PEM)!r}"
