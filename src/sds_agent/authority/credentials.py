"""The files that the client of a CA reads for every attempt: tokens, passwords, roots, certificates with their keys.

Other programs replace these files while the agent runs. So their content is never cached, and an error ends as soon as
the file is good. All functions block for a moment on the disk: a client calls them through `tasks.TimeLimit`. They
raise AuthorityError UNAUTHENTICATED, which names the file, says what to do, and quotes nothing of its content.
"""

from codecs import BOM_UTF8
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from cryptography.x509.oid import ExtendedKeyUsageOID

from sds_agent.authority.protocol import AuthorityError, CurrentIdentity, ErrorKind
from sds_agent.errors import Problem
from sds_agent.named_files import NamedFileError, read_certificate_file, read_named_file
from sds_agent.pki.certificates import (
    CertificateError,
    ParsedBundle,
    describe_time,
    extended_key_usages,
    has_key,
    read_pem,
    write_pem,
)
from sds_agent.pki.keys import PrivateKey, to_pkcs8_pem
from sds_agent.text import is_token
from sds_agent.values import Sensitive

LARGEST = 1 << 20
"""Bytes of a token's or a key's file."""
LONGEST_TOKEN = 16 << 10
"""Bytes: more does not fit into a request's headers."""
SERVER_ROOTS = "the roots that vouch for the CA's server"
TRUST_ROOTS = "the trust domain's roots"
CLIENT_CERTIFICATE = "the client certificate"
"""What ca_file, roots_file, and certificate_file with key_file hold, for messages."""
SHORTEST_PIECE = 16
"""Characters in a row that a text must share with a token to be a piece of it. Fewer may be chance, and are no use."""


class Token(Sensitive, frozen=True):
    """A bearer token, a password or another text that must not be shown."""

    text: str

    def removed_from(self, words: str) -> str:
        """`words` without the token, should a CA have sent it back."""
        return words.replace(self.text, _REMOVED)

    def pieces_removed_from(self, words: str) -> str:
        """`words` without the token and without longer pieces of it: servers and proxies cut what they quote."""
        words = self.removed_from(words)
        text, step = self.text, SHORTEST_PIECE // 2
        kept, at, end = list[str](), 0, 0
        while at + step <= len(words):  # each piece has one of these samples in it as a whole
            found = text.find(words[at : at + step])
            begin, after = (at, at) if found < 0 else _extended(words, at, text, found, end)
            if after - begin >= SHORTEST_PIECE:
                kept += (words[end:begin], _REMOVED)
                at = end = after
            else:
                at += step
        return "".join((*kept, words[end:]))


_REMOVED = "[token]"


def _extended(words: str, at: int, text: str, found: int, least: int) -> tuple[int, int]:
    """From where (`least` or later) to where `words` is like `text`: around `at`, as around `found` there."""
    begin, after = at, at
    while begin > least and begin - at + found > 0 and words[begin - 1] == text[begin - 1 - at + found]:
        begin -= 1
    while after < len(words) and after - at + found < len(text) and words[after] == text[after - at + found]:
        after += 1
    return begin, after


def read_token(file: Path, what: str = "the token") -> Token:
    """The token in `file`: printable ASCII without spaces. Space around it and a byte order mark do not count."""
    data = _read(file, what).removeprefix(BOM_UTF8).strip()
    if not data:
        raise _unusable(f"the file {file} with {what} is empty; the program that renews it has to write it there")
    return token(data, f"the file {file}", what)


def token(data: bytes, place: str, what: str = "the token") -> Token:
    """The token that `data` is, read from `place`, which is for messages."""
    if not 0 < len(data) <= LONGEST_TOKEN or not is_token(data):
        raise _unusable(
            f"{place} does not hold {what} alone: up to {LONGEST_TOKEN} printable characters of ASCII without spaces; "
            f"check that it is the right file"
        )
    return Token(data.decode("ascii"))


def token_end(shown: Token) -> datetime | None:
    """When a token ends, as far as it tells: it is a JWT with that claim, or else opaque. Nothing is verified."""
    import jwt  # noqa: PLC0415 - measured: 7 ms, and no request needs it

    try:
        claims = jwt.decode(shown.text, options={"verify_signature": False})
        return datetime.fromtimestamp(claims["exp"], UTC)
    except (jwt.InvalidTokenError, KeyError, TypeError, ValueError, OverflowError, OSError):
        return None


def token_fault(shown: Token, now: datetime) -> Problem | None:
    """The problem, with no place yet, of what names a token that has ended at `now`."""
    if (end := token_end(shown)) is None or now < end:
        return None
    fix = "the program that renews it has to write a new one"
    return Problem((), f"names a token that expired at {describe_time(end)}", fix)


def read_password(file: Path, what: str = "the password", *, trimmed: bool = False) -> Token:
    """The password in `file`: the text up to the line break that ends the file, if one does.

    A `trimmed` one ends before all space at the end of the file.
    """
    data = _read(file, what)
    try:
        text = data.decode()
        text = text.rstrip() if trimmed else text.removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise _unusable(f"the file {file} with {what} is no text; check that it is the right file") from error
    if not text or len(text) > LONGEST_TOKEN or "\n" in text or "\0" in text:
        raise _unusable(
            f"the file {file} does not hold {what}, one line of text, alone; check that it is the right file"
        )
    return Token(text)


def read_certificates(file: Path, what: str) -> ParsedBundle:
    """The certificates in `file`, at least one.

    gRPC must get them as `write_pem` writes them. It reads less than we do: no byte order mark, and no two blocks
    without a line break between them. An empty text means to it that no roots were given, and then it trusts those of
    the system. And it takes none where there is one that it does not load.
    """
    try:
        return read_certificate_file(file, what)
    except NamedFileError as error:
        raise _unusable(str(error)) from error


def read_roots(file: Path, what: str = SERVER_ROOTS) -> bytes:
    """The certificates in `file` that can be used, in PEM."""
    return write_pem(read_certificates(file, what).certificates)


def read_trust_roots(file: Path) -> bytes:
    """The trust domain's roots in `file`, in PEM, of which at least one can be used.

    Those that cannot be are among the others: who takes them names what is left out of the bundle.
    """
    return read_certificates(file, TRUST_ROOTS).rewritten


def read_client_certificate(certificate_file: Path | None, key_file: Path | None) -> CurrentIdentity | None:
    """The pair in these files; None where the settings name none."""
    if certificate_file is None or key_file is None:
        return None
    return read_pair(certificate_file, key_file, CLIENT_CERTIFICATE)


def read_pair(chain_file: Path, key_file: Path, what: str) -> CurrentIdentity:
    """A certificate, its intermediates, and its unencrypted key. `what` is such as "the client certificate"."""
    return pair(
        read_certificates(chain_file, what), _read(key_file, f"the key of {what}"), str(chain_file), str(key_file)
    )


def pair(chain: ParsedBundle, key_pem: bytes, chain_place: str, key_place: str) -> CurrentIdentity:
    """The same of what was read from these places, which are for messages; `chain` holds at least one certificate."""
    try:
        key = load_pem_private_key(key_pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _unusable(f"{key_place} is no unencrypted private key in PEM; put the right one there") from error
    if not isinstance(key, PrivateKey) or not has_key(chain.certificates[0], key.public_key()):
        left_out = "".join(f" ({each})" for each in chain.left_out)
        raise _unusable(f"{chain_place} and {key_place} do not belong together{left_out}; provision them again")
    return CurrentIdentity(write_pem(chain.certificates), to_pkcs8_pem(key))


def client_certificate_problems(
    certificate_file: Path | None, key_file: Path | None, now: datetime
) -> Iterator[Problem]:
    """What keeps a server from accepting the certificate in these files; nothing where the settings name none."""
    try:
        shown = read_client_certificate(certificate_file, key_file)
    except AuthorityError as error:
        yield as_problem("certificate_file", error)
        return
    leaf = None if shown is None else leaf_of(shown)
    if leaf is None:
        return
    if (fault := time_fault(leaf, now)) is not None:
        yield fault.within("certificate_file")
    usages = extended_key_usages(leaf)
    if usages and ExtendedKeyUsageOID.CLIENT_AUTH not in usages:
        found = "has a certificate that is no client's: its extended key usage lacks clientAuth"
        yield Problem(("certificate_file",), found, "obtain one that has it")


def time_fault(leaf: x509.Certificate, now: datetime) -> Problem | None:
    """The problem, with no place yet, of what holds a certificate that is not valid at `now`."""
    if now >= leaf.not_valid_after_utc:
        return Problem((), f"has a certificate that expired at {describe_time(leaf.not_valid_after_utc)}", "renew it")
    if now < leaf.not_valid_before_utc:
        begin = describe_time(leaf.not_valid_before_utc)
        return Problem((), f"has a certificate that is valid only from {begin}", "check this machine's clock")
    return None


def as_problem(key: str, error: AuthorityError) -> Problem:
    """An error of this module as a problem of the key that names the file, such as `auth.token_file`."""
    found, _, fix = str(error).rpartition("; ")
    return Problem(tuple(key.split(".")), f"cannot be used: {found}", fix)


def leaf_of(identity: CurrentIdentity) -> x509.Certificate | None:
    """The certificate of an identity; None where it cannot be read."""
    try:
        return read_pem(identity.chain_pem)[0]
    except (CertificateError, IndexError):
        return None


def is_valid(identity: CurrentIdentity, now: datetime) -> bool:
    """Whether a server can accept the identity's certificate at `now`, as far as its own times are concerned."""
    leaf = leaf_of(identity)
    return leaf is not None and leaf.not_valid_before_utc <= now < leaf.not_valid_after_utc


def _read(file: Path, what: str) -> bytes:
    try:
        return read_named_file(file, what, LARGEST)
    except NamedFileError as error:
        raise _unusable(str(error)) from error


def _unusable(message: str) -> AuthorityError:
    return AuthorityError(ErrorKind.UNAUTHENTICATED, message)
