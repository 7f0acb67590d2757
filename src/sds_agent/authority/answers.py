"""What the answers of all CAs have in common: JSON as values, and a CA's own words in a message."""

from collections.abc import Sequence
from contextlib import suppress
from typing import TypeVar

import msgspec

from sds_agent.authority.credentials import Token
from sds_agent.authority.protocol import AuthorityError, ErrorKind
from sds_agent.text import one_line

T = TypeVar("T")

LONGEST_WORDS = 300
"""Characters of a CA's own words in a message."""
LONGEST_TEXT = 256 << 10
"""Bytes or characters of a text that are read for them."""


_OF_NO_REQUEST = {ErrorKind.DENIED: ErrorKind.UNAUTHENTICATED, ErrorKind.INVALID: ErrorKind.TRANSIENT}


def keeping_request(error: AuthorityError) -> AuthorityError:
    """The same error in a kind that ends no request: for a refusal that says nothing of the one that waits for an
    approval.
    """
    return AuthorityError(_OF_NO_REQUEST.get(error.kind, error.kind), str(error), retry_after=error.retry_after)


class Questions:
    """Questions that are asked again and again, the answers to which may overtake each other: one that is older than
    what is known does not count.
    """

    def __init__(self) -> None:
        self._asked = self._told = 0

    def ask(self) -> int:
        """Its number."""
        self._asked += 1
        return self._asked

    def counts(self, number: int) -> bool:
        """Whether no later one was answered before. Its answer is what is known from now on."""
        if number <= self._told:
            return False
        self._told = number
        return True

    def is_known(self, number: int) -> bool:
        """Whether its answer is still what is known."""
        return number == self._told


def decoded(body: bytes, of: type[T]) -> T | None:
    """What an answer in JSON holds, as this type; None for what is none. Unknown fields are ignored.

    msgspec's error is not passed on: it may quote what the answer holds, such as a token.
    """
    with suppress(msgspec.MsgspecError, ValueError, RecursionError):
        return msgspec.json.decode(body, type=of)
    return None


def words(text: str | bytes, *secrets: Token) -> str:
    """A CA's own words as one short line without these secrets, which are removed before the text is cut."""
    said = text[:LONGEST_TEXT] if isinstance(text, str) else text[:LONGEST_TEXT].decode(errors="replace")
    for each in secrets:
        said = each.pieces_removed_from(said)
    return one_line(" ".join(said.split()), LONGEST_WORDS)


def status_and(words: str, status: int | str) -> str:
    """The status of an answer with the CA's words, where it has any: `403: permission denied`."""
    return f"{status}: {words}" if words else str(status)


def all_failed(failures: Sequence[AuthorityError], kind: ErrorKind) -> AuthorityError:
    """The error where each of several servers failed: of one its own, and else of this kind with the cause of each."""
    if len(failures) == 1:
        return failures[0]
    # the one that asks for the shortest delay may be asked then; one that asks for none, at once
    delay = min(failure.retry_after or 0 for failure in failures) or None
    return AuthorityError(kind, "; ".join(map(str, failures)), retry_after=delay)
