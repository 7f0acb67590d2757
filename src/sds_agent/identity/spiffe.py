"""SPIFFE IDs, to the letter of the SPIFFE-ID standard (section 2 of standards/SPIFFE-ID.md in spiffe/spiffe).

A value of these types is well formed by construction; any other text raises SpiffeIdError. The messages are clauses, to
stand alone or after a colon.

The standard wants the trust domain in lower case (section 2.1), and says that scheme and trust domain are
case-insensitive (section 2.4). An ID in capitals is refused here, not rewritten: CAs sign an ID, and Envoy matches it,
byte by byte, so a silently changed one would be an identity that was not asked for. go-spiffe refuses it as well.
"""

import string
from collections.abc import Iterable
from typing import Self

from msgspec import Struct

from sds_agent.errors import SdsAgentError
from sds_agent.text import quoted

LONGEST_ID = 2048
"""Bytes of a whole ID (section 2.3)."""
LONGEST_TRUST_DOMAIN = 255
"""Bytes of a trust domain's name (section 2.3)."""

_SCHEME = "spiffe://"
_BELOW = "/*"
_TRUST_DOMAIN_CHARACTERS = frozenset(string.ascii_lowercase + string.digits + ".-_")
_SEGMENT_CHARACTERS = frozenset(string.ascii_letters + string.digits + ".-_")
_NOT_IN_AN_ID = {
    "@": "a SPIFFE ID has no user part",
    ":": "a SPIFFE ID has no port",
    "%": "a SPIFFE ID has no percent-encoding",
    "?": "a SPIFFE ID has no query",
    "#": "a SPIFFE ID has no fragment",
}


class SpiffeIdError(SdsAgentError):
    """A text is not a SPIFFE ID, or not the name of a trust domain."""


class TrustDomain(Struct, frozen=True, order=True):
    """The name of a trust domain, such as `demo.example`. Raises SpiffeIdError."""

    name: str

    def __post_init__(self) -> None:
        _check_trust_domain(self.name)

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a trust domain's bare name, without `spiffe://`. Raises SpiffeIdError."""
        return cls(text)

    @property
    def uri(self) -> str:
        """The trust domain's own SPIFFE ID, such as `spiffe://demo.example`."""
        return f"{_SCHEME}{self.name}"

    def __str__(self) -> str:
        return self.name


class SpiffeId(Struct, frozen=True, order=True):
    """A SPIFFE ID. `path` begins with `/`, or is empty in a trust domain's own ID. Raises SpiffeIdError."""

    trust_domain: TrustDomain
    path: str

    def __post_init__(self) -> None:
        _check_length(str(self))
        _check_path(self.path)

    @classmethod
    def parse(cls, uri: str) -> Self:
        """Read a SPIFFE ID such as `spiffe://demo.example/ns/default/sa/web`. Raises SpiffeIdError."""
        _check_length(uri)  # before its characters: a peer may send a text of any length
        if not uri.startswith(_SCHEME):
            raise SpiffeIdError(_about_scheme(uri))
        name, slash, path = uri.removeprefix(_SCHEME).partition("/")
        return cls(TrustDomain(name), slash + path)

    @property
    def is_workload(self) -> bool:
        """Whether the ID has a path. One without is the trust domain's own, and no leaf may have it (X509-SVID 3.1)."""
        return self.path != ""

    def __str__(self) -> str:
        return f"{_SCHEME}{self.trust_domain.name}{self.path}"


def is_segment(text: str) -> bool:
    """Whether the text may stand between two `/` of a SPIFFE ID's path."""
    try:
        _check_segment(text)
    except SpiffeIdError:
        return False
    return True


def covers(patterns: Iterable[str], uri: str) -> bool:
    """Whether one of the patterns stands for that SPIFFE ID.

    A pattern is a SPIFFE ID, or ends in `/*`, which stands for every SPIFFE ID below it.
    """
    return any(uri.startswith(each[:-1]) if each.endswith(_BELOW) else uri == each for each in patterns)


def fault_of_pattern(written: str, trust_domain: str | None = None) -> str | None:
    """What is wrong with a pattern, None if nothing is. If a trust domain is given, the pattern has to lie in it."""
    try:
        identity = SpiffeId.parse(written.removesuffix(_BELOW))
    except SpiffeIdError as error:
        return str(error)
    if not identity.is_workload and not written.endswith(_BELOW):
        return "it has no path"
    if trust_domain is not None and str(identity.trust_domain) != trust_domain:
        return f"it is not in the trust domain: begin it with spiffe://{trust_domain}/"
    return None


def _check_length(uri: str) -> None:
    # characters stand for bytes: whatever is not ASCII is refused anyway
    if len(uri) > LONGEST_ID:
        raise SpiffeIdError(
            f"the SPIFFE ID {quoted(uri)} is {len(uri)} bytes long, and the most that is allowed is {LONGEST_ID}"
        )


def _about_scheme(uri: str) -> str:
    if uri.lower().startswith(_SCHEME):
        return f"the scheme of the SPIFFE ID {quoted(uri)} must be in lower case: write {_SCHEME}"
    return f"{quoted(uri)} is not a SPIFFE ID: it must begin with {_SCHEME}, as in spiffe://demo.example/web"


def _check_trust_domain(name: str) -> None:
    if not name:
        raise SpiffeIdError("the trust domain is empty: name one, such as demo.example")
    if name.startswith(_SCHEME):
        raise SpiffeIdError(f"the trust domain {quoted(name)} must be the bare name, without {_SCHEME}")
    if len(name) > LONGEST_TRUST_DOMAIN:
        raise SpiffeIdError(
            f"the trust domain {quoted(name)} is {len(name)} bytes long, and the most that is allowed is "
            f"{LONGEST_TRUST_DOMAIN}"
        )
    if wrong := _first_outside(_TRUST_DOMAIN_CHARACTERS, name):
        raise SpiffeIdError(f"the trust domain {quoted(name)} holds {wrong}; allowed are a-z, 0-9, '.', '-' and '_'")


def _check_path(path: str) -> None:
    if not path:
        return
    if not path.startswith("/"):
        raise SpiffeIdError(f"the path {quoted(path)} of a SPIFFE ID must begin with '/'")
    if path.endswith("/"):
        raise SpiffeIdError(f"the path {quoted(path)} of a SPIFFE ID ends with '/': leave that out")
    for segment in path[1:].split("/"):
        _check_segment(segment, path)


def _check_segment(segment: str, path: str | None = None) -> None:
    if not segment:
        raise SpiffeIdError(f"{_named(path)} has an empty segment: write a single '/' between two segments")
    if segment in {".", ".."}:
        raise SpiffeIdError(f"{_named(path)} has the segment '{segment}': write the path out in full")
    if wrong := _first_outside(_SEGMENT_CHARACTERS, segment):
        allowed = "allowed between two '/' are a-z, A-Z, 0-9, '.', '-' and '_'"
        raise SpiffeIdError(f"{_named(path)} holds {wrong}; {allowed}")


def _named(path: str | None) -> str:
    return "the path" if path is None else f"the path {quoted(path)} of a SPIFFE ID"


def _first_outside(allowed: frozenset[str], text: str) -> str | None:
    """The first character that is not allowed, quoted, with what is known of why."""
    if allowed.issuperset(text):
        return None
    wrong = next(character for character in text if character not in allowed)
    reason = "write it in lower case" if wrong in string.ascii_uppercase else _NOT_IN_AN_ID.get(wrong)
    return f"{wrong!a} ({reason})" if reason else f"{wrong!a}"
