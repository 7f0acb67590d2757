"""What a CA's answers give: values, and its words in a message."""

from collections.abc import Callable

import pytest
from msgspec import Struct

from sds_agent.authority.answers import LONGEST_TEXT, LONGEST_WORDS, all_failed, decoded, status_and, words
from sds_agent.authority.credentials import Token
from sds_agent.authority.protocol import AuthorityError, ErrorKind


class Named(Struct):
    name: str


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b'{"name": 1}', b'"\xff"', b"[" * 100_000, b'{"new": ' + b"[" * 100_000]
)
def test_what_is_no_such_json_is_no_error(body: bytes) -> None:
    assert decoded(body, Named) is None


def test_unknown_fields_are_ignored() -> None:
    assert decoded(b'{"name": "root", "new": {}}', Named) == Named("root")


def test_a_token_that_a_ca_sends_back_is_removed_before_its_words_are_cut() -> None:
    token = Token("s" * 40)
    said = words("x" * (LONGEST_WORDS - 10) + token.text, token)
    assert "ssss" not in said
    assert words(b"no\n\tentry \xff", token) == "no entry ?"


@pytest.mark.parametrize("of", [str, str.encode])
def test_of_a_huge_text_only_the_beginning_is_read(of: Callable[[str], str | bytes]) -> None:
    """To look for a token in all that an answer may hold would stop the agent for seconds."""
    assert words(of(" " * LONGEST_TEXT + "the end"), Token("t" * 20)) == ""
    assert words(of(" " * LONGEST_TEXT + "the end")[7:], Token("t" * 20)) == "the end"


def test_a_status_stands_before_the_words_and_alone_without_any() -> None:
    assert [status_and("denied", 403), status_and("", 403)] == ["403: denied", "403"]


def test_servers_that_all_failed_are_named_with_the_shortest_delay() -> None:
    first = AuthorityError(ErrorKind.TRANSIENT, "one", retry_after=9)
    second = AuthorityError(ErrorKind.THROTTLED, "two", retry_after=4)
    assert all_failed([first], ErrorKind.TRANSIENT) is first
    both = all_failed([first, second], ErrorKind.TRANSIENT)
    assert (str(both), both.kind, both.retry_after) == ("one; two", ErrorKind.TRANSIENT, 4)
    assert all_failed([first, AuthorityError(ErrorKind.TRANSIENT, "three")], ErrorKind.TRANSIENT).retry_after is None
