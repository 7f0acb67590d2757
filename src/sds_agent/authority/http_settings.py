"""What the settings of CAs with a server have in common: the keys that name it and what vouches for it, and their
conflicts.
"""

import re
from collections.abc import Iterator
from datetime import timedelta
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import Annotated, TypeAlias
from urllib.parse import urlsplit

from msgspec import Meta

from sds_agent.configfile.phrases import quoted
from sds_agent.configfile.types import FilePath, UnacceptableError, custom, duration, matching, text
from sds_agent.errors import Problem

URL_PATTERN = r"^https?://(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?(/[A-Za-z0-9._~/-]*)?$"


def server_url(value: object, _base: Path) -> str:
    """The URL that `value` writes, as ServerUrl has it. Raises UnacceptableError."""
    written = text(value)
    if not re.fullmatch(URL_PATTERN, written):
        raise UnacceptableError(
            f"{quoted(written)} is no such URL: begin it with https://, and leave out user, query and fragment"
        )
    check_brackets(written)
    parts = urlsplit(written)
    try:
        port = parts.port
    except ValueError as error:
        raise UnacceptableError("ports go from 1 to 65535") from error
    if port == 0:
        raise UnacceptableError("ports go from 1 to 65535")
    if parts.scheme == "http" and not is_loopback(parts.hostname or ""):
        raise UnacceptableError("without TLS, with http, it has to be on this machine: write https, or 127.0.0.1")
    return written.rstrip("/")


ServerUrl: TypeAlias = Annotated[
    str,
    custom(
        server_url,
        "the URL of a server such as https://ca.example:9000",
        {"type": "string", "pattern": URL_PATTERN},
    ),
]
"""A URL without a slash at its end. It is https, or http to this machine."""
ServerName: TypeAlias = Annotated[str, matching("^[A-Za-z0-9._-]{1,253}$", "a host's name such as ca.example")]

CaFile: TypeAlias = Annotated[
    FilePath | None,
    Meta(description="The roots (PEM) that vouch for the server, read anew for every request. Required with https."),
]
ServerNameKey: TypeAlias = Annotated[
    ServerName | None,
    Meta(description="The name in the server's certificate. Left out: the host that the agent connects to."),
]
ClientKeyFile: TypeAlias = Annotated[
    FilePath | None, Meta(description="The key of the certificate in certificate_file: unencrypted PEM.")
]
RefreshEvery: TypeAlias = Annotated[
    timedelta,
    duration(timedelta(seconds=1), timedelta(days=1)),
    Meta(description="How often the agent reads the trust domain's roots when it requests no certificate."),
]
REFRESH_EVERY = timedelta(minutes=5)
"""The default of RefreshEvery."""


def roots_conflicts(url: str, ca_file: Path | None) -> Iterator[Problem]:
    """Whether `ca_file` goes with the URL. A value that could not be read is false; nothing is said of it."""
    if url.startswith("https:") and ca_file is None:
        fix = (
            "without roots nothing vouches for the CA's server: name their file; for a public CA that is the system's, "
            "such as /etc/ssl/certs/ca-certificates.crt"
        )
        yield Problem(("ca_file",), "is missing", fix)
    elif url.startswith("http:") and ca_file is not None:
        yield Problem(
            ("ca_file",), "is given", "the URL begins with http, which has no use for it: keep one of the two"
        )


def pair_conflicts(url: str, certificate_file: Path | None, key_file: Path | None) -> Iterator[Problem]:
    """Whether a client certificate and its key go with each other and with the URL. A value that could not be read is
    false; nothing is said of it.
    """
    named = {"certificate_file": certificate_file, "key_file": key_file}
    given = [key for key, value in named.items() if value]
    missing = [key for key, value in named.items() if value is None]
    if url.startswith("http:"):
        for key in given:
            yield Problem(
                (key,), "is given", "a client certificate takes TLS, and the URL begins with http: write https"
            )
    elif given and missing:
        yield Problem((missing[0],), "is missing", "a client certificate takes both certificate_file and key_file")


def check_brackets(written: str) -> None:
    """See that what stands in brackets, if anything does, is an address of IPv6. Raises UnacceptableError."""
    if found := re.search(r"\[(.*)\]", written):
        try:
            IPv6Address(found[1])
        except ValueError as error:
            raise UnacceptableError(f"{quoted(found[1])} in its brackets is no IPv6 address") from error


def is_loopback(host: str) -> bool:
    """Whether a host is this machine by its form."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"  # RFC 6761 section 6.3: no other machine may have the name
