"""The settings of the kind `est`, and which of them do not go together."""

from collections.abc import Iterator
from typing import Annotated, TypeAlias

from msgspec import Meta, Struct

from sds_agent.authority.http_settings import (
    REFRESH_EVERY,
    CaFile,
    ClientKeyFile,
    RefreshEvery,
    ServerNameKey,
    ServerUrl,
    pair_conflicts,
    roots_conflicts,
)
from sds_agent.configfile.types import FilePath, matching
from sds_agent.errors import Problem

EstLabel: TypeAlias = Annotated[str, matching("^[A-Za-z0-9._~-]{1,253}$", "one segment of a path such as mesh")]
EstUser: TypeAlias = Annotated[
    str, matching("^[!-9;-~]{1,253}$", "1 to 253 printable characters of ASCII without spaces and colons")
]


class EstSettings(Struct, frozen=True, kw_only=True, tag="est", tag_field="type"):
    """A CA that speaks EST (RFC 7030): certificates by a password or a client certificate, renewed over mTLS."""

    url: Annotated[
        ServerUrl,
        Meta(description="Where the EST server is, such as https://ca.example:8443, without /.well-known/est."),
    ]
    ca_file: CaFile = None
    server_name: ServerNameKey = None
    label: Annotated[
        EstLabel | None,
        Meta(description="Which of the server's CAs to ask, the label in its paths. Left out: its default one."),
    ] = None
    username: Annotated[
        EstUser | None,
        Meta(description="The user's name for HTTP Basic authentication."),
    ] = None
    password_file: Annotated[
        FilePath | None, Meta(description="The file with that user's password, read anew for every request.")
    ] = None
    certificate_file: Annotated[
        FilePath | None,
        Meta(
            description="A client certificate with its intermediates (PEM) to enroll with, beside the password or in "
            "its place. Read anew for every request."
        ),
    ] = None
    key_file: ClientKeyFile = None
    reenroll: Annotated[
        bool,
        Meta(
            description="Renew over mTLS with the current certificate (simplereenroll); where the server refuses it, "
            "enroll anew. Turned off: always enroll anew."
        ),
    ] = True
    roots_file: Annotated[
        FilePath | None,
        Meta(
            description="The trust domain's roots (PEM), read anew every time. Left out: the self-signed certificates "
            "among the server's cacerts."
        ),
    ] = None
    refresh_every: RefreshEvery = REFRESH_EVERY


def conflicts(chosen: EstSettings) -> Iterator[Problem]:
    """The keys of one authority that contradict each other. A value that could not be read is false: nothing is said
    of it.
    """
    if chosen.url:
        if chosen.url.startswith("http:"):
            yield Problem(("url",), "begins with http", "EST works over TLS alone: write https")
        elif "/.well-known/" in chosen.url:
            yield Problem(("url",), "holds /.well-known/est", "the agent adds that itself: write what is before it")
        else:
            yield from roots_conflicts(chosen.url, chosen.ca_file)
            yield from pair_conflicts(chosen.url, chosen.certificate_file, chosen.key_file)
    yield from _caller(chosen)


def _caller(chosen: EstSettings) -> Iterator[Problem]:
    given = [chosen.username, chosen.password_file, chosen.certificate_file, chosen.key_file]
    if given == [None, None, None, None]:
        fix = "the first certificate takes username and password_file, or certificate_file and key_file"
        yield Problem(("username",), "is missing", fix)
    elif chosen.username is None and chosen.password_file:
        yield Problem(("username",), "is missing", "name the user whose password is in password_file")
    elif chosen.username and chosen.password_file is None:
        yield Problem(("password_file",), "is missing", "name the file with the password of username")
