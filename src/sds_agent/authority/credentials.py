"""The files that the client of a CA reads for every attempt: tokens, passwords, roots, certificates with their keys.

Other programs replace these files while the agent runs. So their content is never cached, and an error ends as soon as
the file is good. All functions block for a moment on the disk: a client calls them through `tasks.TimeLimit`. They
raise AuthorityError UNAUTHENTICATED, which names the file, says what to do, and quotes nothing of its content.
"""

from collections.abc import Iterator
from datetime import datetime
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
from sds_agent.values import Sensitive

LARGEST = 1 << 20
"""Bytes of a token's or a key's file."""
LONGEST_TOKEN = 16 << 10
"""Bytes: more does not fit into a request's headers."""


class Token(Sensitive, frozen=True):
    """A bearer token, a password or another text that must not be shown."""

    text: str

    def removed_from(self, words: str) -> str:
        """`words` without the token, should a CA have sent it back."""
        return words.replace(self.text, "[token]")


def read_token(file: Path, what: str = "the token") -> Token:
    """The token in `file`: printable ASCII without spaces. Space around it does not count."""
    data = _read(file, what).strip()
    if not data:
        raise _unusable(f"the file {file} with {what} is empty; the program that renews it has to write it there")
    return token(data, f"the file {file}", what)


def token(data: bytes, place: str, what: str = "the token") -> Token:
    """The token that `data` is, read from `place`, which is for messages."""
    if not 0 < len(data) <= LONGEST_TOKEN or not all(0x21 <= byte <= 0x7E for byte in data):
        raise _unusable(
            f"{place} does not hold {what} alone: up to {LONGEST_TOKEN} printable characters of ASCII without spaces; "
            f"check that it is the right file"
        )
    return Token(data.decode("ascii"))


def read_password(file: Path, what: str = "the password") -> Token:
    """The password in `file`: the text up to the line break that ends the file, if one does."""
    data = _read(file, what)
    try:
        text = data.decode().removesuffix("\n").removesuffix("\r")
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


def pair_problems(chain_file: Path | None, key_file: Path | None, what: str, now: datetime) -> Iterator[Problem]:
    """What keeps a server from accepting the certificate in `certificate_file` and `key_file`; nothing without them."""
    if chain_file is None or key_file is None:
        return
    try:
        pair = read_pair(chain_file, key_file, what)
    except AuthorityError as error:
        yield as_problem("certificate_file", error)
        return
    leaf = leaf_of(pair)
    if leaf is None or is_valid(pair, now):
        usages = frozenset[x509.ObjectIdentifier]() if leaf is None else extended_key_usages(leaf)
        if usages and ExtendedKeyUsageOID.CLIENT_AUTH not in usages:
            yield Problem(("certificate_file",), f"is no client's: {what} lacks clientAuth", "obtain one that has it")
    elif now < leaf.not_valid_before_utc:
        begin = describe_time(leaf.not_valid_before_utc)
        yield Problem(("certificate_file",), f"is valid only from {begin}", "check this machine's clock")
    else:
        end = describe_time(leaf.not_valid_after_utc)
        yield Problem(("certificate_file",), f"expired at {end}", "renew it")


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
