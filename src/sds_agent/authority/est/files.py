"""The operator's files that a client of EST reads for every attempt, and what is wrong with them."""

from collections.abc import Iterator
from datetime import datetime

from msgspec import Struct

from sds_agent.authority.credentials import (
    as_problem,
    client_certificate_problems,
    read_client_certificate,
    read_password,
    read_roots,
    read_trust_roots,
)
from sds_agent.authority.est.settings import EstSettings
from sds_agent.authority.est.wire import BasicCredentials
from sds_agent.authority.protocol import AuthorityError, CurrentIdentity
from sds_agent.errors import Problem


class EstFiles(Struct, frozen=True):
    """What the files hold; None for each that the settings do not name. `roots` vouch for the server, and `anchors` are
    the trust domain's.
    """

    roots: bytes | None
    anchors: bytes | None
    basic: BasicCredentials | None
    certificate: CurrentIdentity | None


def files_of(chosen: EstSettings) -> EstFiles:
    """Read them. Blocks on the disk. Raises AuthorityError UNAUTHENTICATED."""
    basic = None
    if chosen.username is not None and chosen.password_file is not None:
        basic = BasicCredentials(chosen.username, read_password(chosen.password_file))
    return EstFiles(
        None if chosen.ca_file is None else read_roots(chosen.ca_file),
        None if chosen.roots_file is None else read_trust_roots(chosen.roots_file),
        basic,
        read_client_certificate(chosen.certificate_file, chosen.key_file),
    )


def problems(chosen: EstSettings, now: datetime) -> Iterator[Problem]:
    """What is wrong with the credentials at present. Blocks on the disk."""
    if chosen.password_file is not None:
        try:
            read_password(chosen.password_file)
        except AuthorityError as error:
            yield as_problem("password_file", error)
    yield from client_certificate_problems(chosen.certificate_file, chosen.key_file, now)
