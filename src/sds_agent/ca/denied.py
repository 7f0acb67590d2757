"""The deny list: identities that get nothing, however they are proven.

To revoke a certificate closes one way in. A spent join token can still be used with its first key, a certificate that
the machine got by renewal has another serial number, and an issuer of tokens knows of neither. So an operator shuts a
machine out by its identity: in a file with a SPIFFE ID in each line, which the CA reads again while it runs.

No accident may let a denied machine in again. The list that was read before stays in force where the file cannot be
read, has a line that is no SPIFFE ID, or may be cut off: where it is empty, or its last line has no end. A file that a
program writes line by line is whole only at its end: what a new reading leaves out stays denied until a second one,
later, finds the same.
"""

from collections.abc import Iterable

from msgspec import Struct

from sds_agent.errors import SdsAgentError
from sds_agent.identity.spiffe import covers, fault_of_pattern


class DenyListError(SdsAgentError):
    """The file cannot be used. The message says why, and how to fix it."""


class Denied(Struct, frozen=True):
    """The identities that get nothing: these SPIFFE IDs, and all that the patterns, which end in `/*`, cover."""

    ids: frozenset[str] = frozenset()
    patterns: tuple[str, ...] = ()

    def covers(self, uri: str) -> bool:
        """Whether this identity gets nothing."""
        return uri in self.ids or covers(self.patterns, uri)

    def and_also(self, others: "Denied") -> "Denied":
        """What this list denies, and what the other one does."""
        return Denied(self.ids | others.ids, tuple(dict.fromkeys((*self.patterns, *others.patterns))))


NO_IDENTITY = Denied()


def parse(data: bytes, trust_domain: str) -> Denied:
    """What the file's content means: a SPIFFE ID or a pattern in each line; `#` begins a comment.

    Raises DenyListError.
    """
    if not data.strip():
        raise DenyListError(
            "it is empty, as a file that was cut off is: write a comment into it where no identity is denied"
        )
    if not data.endswith(b"\n"):
        raise DenyListError("its last line has no end, as where a file was cut off: end it by a line break")
    try:
        lines = data.decode().splitlines()
    except ValueError as error:
        raise DenyListError("it is no text in UTF-8: write a SPIFFE ID into each line") from error
    written = [(number, text) for number, line in enumerate(lines, 1) if (text := line.partition("#")[0].strip())]
    for number, text in written:
        if fault := fault_of_pattern(text, trust_domain):
            raise DenyListError(f"line {number}: {fault}")
    return _of(text for _, text in written)


def _of(written: Iterable[str]) -> Denied:
    ids, patterns = set[str](), list[str]()
    for each in written:
        if each.endswith("/*"):
            patterns.append(each)
        else:
            ids.add(each)
    return Denied(frozenset(ids), tuple(patterns))
