"""Tokens, passwords and pairs in files, as programs, editors and other systems write them."""

from collections.abc import Callable
from pathlib import Path

import pytest
from fakes.hierarchy import make_ca, make_leaf, new_key

from sds_agent.authority.credentials import LONGEST_TOKEN, Token, read_pair, read_password, read_token
from sds_agent.authority.protocol import AuthorityError, ErrorKind
from sds_agent.pki.certificates import write_pem
from sds_agent.pki.keys import to_pkcs8_pem


@pytest.mark.parametrize("around", ["{}", "{}\n", "{}\r\n", "{}\n\n", " {}\t", "\ufeff{}\r\n"])
def test_what_an_editor_puts_around_a_token_does_not_count(tmp_path: Path, around: str) -> None:
    file = tmp_path / "token"
    file.write_bytes(around.format("a.to-ken_~!").encode())
    assert read_token(file) == Token("a.to-ken_~!")


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("secret", "secret"),
        ("secret\n", "secret"),
        ("secret\r\n", "secret"),
        (" two words \n", " two words "),
        ("schlüssel\n", "schlüssel"),
    ],
)
def test_a_password_is_all_of_its_line(tmp_path: Path, written: str, read: str) -> None:
    file = tmp_path / "password"
    file.write_bytes(written.encode())
    assert read_password(file) == Token(read)


@pytest.mark.parametrize(
    ("reader", "written"),
    [
        *((read_token, each) for each in (b"two words", b"two\nlines", b"nul\0", "schlüssel".encode(), b"\xff\xfet\0")),
        (read_token, b"x" * (LONGEST_TOKEN + 1)),
        *((read_password, each) for each in (b"", b"\n", b"\r\n", b"two\nlines", b"nul\0", b"\xff")),
        (read_password, b"x" * (LONGEST_TOKEN + 1)),
    ],
)
def test_what_is_no_such_credential_is_named_and_not_quoted(
    tmp_path: Path, reader: Callable[[Path], Token], written: bytes
) -> None:
    file = tmp_path / "credential"
    file.write_bytes(written)
    with pytest.raises(AuthorityError, match="check that it is the right file") as caught:
        reader(file)
    assert caught.value.kind is ErrorKind.UNAUTHENTICATED
    assert str(file) in str(caught.value)
    assert "xxxx" not in str(caught.value)
    assert "lines" not in str(caught.value)


def test_an_empty_file_of_a_token_says_who_has_to_write_it(tmp_path: Path) -> None:
    (tmp_path / "token").write_bytes(b"\n")
    with pytest.raises(AuthorityError, match="is empty; the program that renews it has to write it there"):
        read_token(tmp_path / "token")


def test_a_key_of_another_certificate_is_not_shown_with_this_one(tmp_path: Path) -> None:
    """As while a program replaces one file after the other: a server would end the connection, and say little."""
    chain, key, other = tmp_path / "client.pem", new_key(), new_key()
    chain.write_bytes(write_pem([make_leaf(make_ca("clients"), key=key)]))
    for name, each in (("right.key", key), ("wrong.key", other)):
        (tmp_path / name).write_bytes(to_pkcs8_pem(each))
    assert read_pair(chain, tmp_path / "right.key", "the client certificate").private_key_pem == to_pkcs8_pem(key)
    with pytest.raises(AuthorityError, match=r"client\.pem and .*wrong\.key do not belong together") as caught:
        read_pair(chain, tmp_path / "wrong.key", "the client certificate")
    assert caught.value.kind is ErrorKind.UNAUTHENTICATED
