"""The files that the client of an Istio CA reads for every attempt: the token, the roots, a provisioned certificate.

Other programs replace these files while the agent runs. So their content is never cached, and an error ends as soon as
the file is good.
"""

from datetime import datetime
from pathlib import Path

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from sds_agent.authority.istio.wire import names_a_workload
from sds_agent.authority.protocol import AuthorityError, CurrentIdentity, ErrorKind
from sds_agent.named_files import NamedFileError, read_certificate_file, read_named_file
from sds_agent.pki.certificates import (
    CertificateError,
    ParsedBundle,
    has_key,
    read_pem,
    subject_alternative_uris,
    write_pem,
)
from sds_agent.pki.keys import PrivateKey, to_pkcs8_pem
from sds_agent.values import Sensitive

LARGEST = 1 << 20
"""Bytes of a token's or a key's file."""
LONGEST_TOKEN = 16 << 10
"""Bytes: more does not fit into a request's headers."""


class Token(Sensitive, frozen=True):
    """A bearer token."""

    text: str

    def removed_from(self, words: str) -> str:
        """`words` without the token, should a CA have sent it back."""
        return words.replace(self.text, "[token]")


def read_token(file: Path) -> Token:
    """The token in `file`. Raises AuthorityError UNAUTHENTICATED, which does not quote what is there."""
    data = _read(file, "the token").strip()
    if not data:
        raise _unusable(f"the token file {file} is empty; the program that renews the token has to write it there")
    if len(data) > LONGEST_TOKEN or not all(0x21 <= byte <= 0x7E for byte in data):
        raise _unusable(
            f"the token file {file} does not hold a token alone: up to {LONGEST_TOKEN} printable characters of ASCII "
            f"without spaces; check that it is the right file"
        )
    return Token(data.decode("ascii"))


def read_certificates(file: Path, what: str) -> ParsedBundle:
    """The certificates in `file`, at least one. Raises AuthorityError UNAUTHENTICATED.

    gRPC must get them as `write_pem` writes them. It reads less than we do: no byte order mark, and no two blocks
    without a line break between them. An empty text means to it that no roots were given, and then it trusts those of
    the system. And it takes none where there is one that it does not load.
    """
    try:
        return read_certificate_file(file, what)
    except NamedFileError as error:
        raise _unusable(str(error)) from error


def read_provisioned(directory: Path) -> CurrentIdentity:
    """The pair `cert-chain.pem` and `key.pem`, as Istio's PROV_CERT has it. Raises AuthorityError UNAUTHENTICATED."""
    chain = read_certificates(directory / "cert-chain.pem", "the provisioned certificate")
    key_pem = _read(directory / "key.pem", "the provisioned key")
    try:
        key = load_pem_private_key(key_pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise _unusable(f"{directory / 'key.pem'} is no unencrypted private key in PEM; put the right one there") from (
            error
        )
    if not isinstance(key, PrivateKey) or not has_key(chain.certificates[0], key.public_key()):
        left_out = "".join(f" ({each})" for each in chain.left_out)
        raise _unusable(
            f"cert-chain.pem and key.pem in {directory} do not belong together{left_out}; provision them again"
        )
    return CurrentIdentity(write_pem(chain.certificates), to_pkcs8_pem(key))


def can_speak(identity: CurrentIdentity, now: datetime) -> bool:
    """Whether a CA can accept this certificate: it names a workload and is valid at `now`.

    With any other the whole connection fails, and the failure looks as if no server listened.
    """
    try:
        leaf = read_pem(identity.chain_pem)[0]
    except (CertificateError, IndexError):
        return False
    valid = leaf.not_valid_before_utc <= now < leaf.not_valid_after_utc
    return valid and names_a_workload(subject_alternative_uris(leaf))


def _read(file: Path, what: str) -> bytes:
    try:
        return read_named_file(file, what, LARGEST)
    except NamedFileError as error:
        raise _unusable(str(error)) from error


def _unusable(message: str) -> AuthorityError:
    return AuthorityError(ErrorKind.UNAUTHENTICATED, message)
