"""The operator's files that a client of CFSSL reads for every attempt, and what is wrong with them."""

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from msgspec import Struct

from sds_agent.authority.cfssl.settings import CfsslSettings
from sds_agent.authority.cfssl.wire import AuthKey, read_auth_key
from sds_agent.authority.credentials import (
    as_problem,
    client_certificate_problems,
    read_client_certificate,
    read_roots,
    read_token,
    read_trust_roots,
)
from sds_agent.authority.protocol import AuthorityError, CurrentIdentity, ErrorKind
from sds_agent.errors import Problem


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
    return CfsslFiles(
        None if chosen.ca_file is None else read_roots(chosen.ca_file),
        None if chosen.roots_file is None else read_trust_roots(chosen.roots_file),
        None if chosen.auth_key_file is None else _auth_key_in(chosen.auth_key_file),
        read_client_certificate(chosen.certificate_file, chosen.key_file),
    )


def problems(chosen: CfsslSettings, now: datetime) -> Iterator[Problem]:
    """What is wrong with the credentials at present. Blocks on the disk."""
    if chosen.auth_key_file is not None:
        try:
            _auth_key_in(chosen.auth_key_file)
        except AuthorityError as error:
            yield as_problem("auth_key_file", error)
    yield from client_certificate_problems(chosen.certificate_file, chosen.key_file, now)


def _auth_key_in(file: Path) -> AuthKey:
    what = "the key of the profile's auth_key"
    key = read_auth_key(read_token(file, what).text)
    if key is None:
        raise AuthorityError(
            ErrorKind.UNAUTHENTICATED,
            f"the file {file} does not hold {what} as hexadecimal digits; write it as the server's auth_keys has it",
        )
    return key
