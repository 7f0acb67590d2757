"""The operator's files that a client of CFSSL reads for every attempt, and what is wrong with them."""

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from msgspec import Struct

from sds_agent.authority.cfssl.settings import CfsslSettings
from sds_agent.authority.cfssl.wire import AuthKey, read_auth_key
from sds_agent.authority.credentials import as_problem, pair_problems, read_pair, read_token
from sds_agent.authority.http_client import roots_in
from sds_agent.authority.protocol import AuthorityError, CurrentIdentity, ErrorKind
from sds_agent.errors import Problem

_CLIENT = "the client certificate"


class CfsslFiles(Struct, frozen=True):
    """What the files hold; None for each that the settings do not name. `roots` vouch for the server, and `anchors` are
    the trust domain's.
    """

    roots: bytes | None
    anchors: bytes | None
    auth_key: AuthKey | None
    certificate: CurrentIdentity | None


def files_of(chosen: CfsslSettings) -> CfsslFiles:
    """Read them. Blocks on the disk. Raises AuthorityError UNAUTHENTICATED."""
    pair = None
    if chosen.certificate_file is not None and chosen.key_file is not None:
        pair = read_pair(chosen.certificate_file, chosen.key_file, _CLIENT)
    return CfsslFiles(
        None if chosen.ca_file is None else roots_in(chosen.ca_file),
        None if chosen.roots_file is None else roots_in(chosen.roots_file, "the trust domain's roots"),
        None if chosen.auth_key_file is None else _auth_key_in(chosen.auth_key_file),
        pair,
    )


def problems(chosen: CfsslSettings, now: datetime) -> Iterator[Problem]:
    """What is wrong with the credentials at present. Blocks on the disk."""
    if chosen.auth_key_file is not None:
        try:
            _auth_key_in(chosen.auth_key_file)
        except AuthorityError as error:
            yield as_problem("auth_key_file", error)
    yield from pair_problems(chosen.certificate_file, chosen.key_file, _CLIENT, now)


def _auth_key_in(file: Path) -> AuthKey:
    what = "the key of the profile's auth_key"
    key = read_auth_key(read_token(file, what).text)
    if key is None:
        raise AuthorityError(
            ErrorKind.UNAUTHENTICATED,
            f"the file {file} does not hold {what} as hexadecimal digits; write it as the server's auth_keys has it",
        )
    return key
