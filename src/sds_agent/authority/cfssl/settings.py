"""The settings of the kind `cfssl`, and which of them do not go together."""

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

CfsslName: TypeAlias = Annotated[str, matching("^[ -~]{1,253}$", "1 to 253 printable characters of ASCII")]


class CfsslSettings(Struct, frozen=True, kw_only=True, tag="cfssl", tag_field="type"):
    """Cloudflare's CFSSL (`cfssl serve`, `multirootca`): a signing profile decides on usages and lifetime."""

    url: Annotated[ServerUrl, Meta(description="Where CFSSL listens, such as https://ca.example:8888.")]
    ca_file: CaFile = None
    server_name: ServerNameKey = None
    profile: Annotated[
        CfsslName | None,
        Meta(description="The signing profile. Left out: the default one, which is also taken for an unknown name."),
    ] = None
    label: Annotated[
        CfsslName | None, Meta(description="The signer of a multirootca (label). Left out: its default one.")
    ] = None
    auth_key_file: Annotated[
        FilePath | None,
        Meta(
            description="The key in hexadecimal digits that the profile's auth_key names, read anew for every request; "
            "the agent then asks by authsign. Left out: by sign, which the server has for profiles without an auth_key."
        ),
    ] = None
    certificate_file: Annotated[
        FilePath | None,
        Meta(
            description="A client certificate with its intermediates (PEM) for a server with -mutual-tls-ca, read anew "
            "for every request."
        ),
    ] = None
    key_file: ClientKeyFile = None
    bundle: Annotated[
        bool,
        Meta(
            description="Ask for the chain with each certificate. Needed where more than one intermediate is between "
            "the certificate and its root, or where the root comes from there; the server then runs with -ca-bundle "
            "and -int-bundle."
        ),
    ] = False
    roots_file: Annotated[
        FilePath | None,
        Meta(
            description="The trust domain's roots (PEM), read anew every time. Left out: CFSSL's own certificate where "
            "that is self-signed, and otherwise the root of its bundle."
        ),
    ] = None
    refresh_every: RefreshEvery = REFRESH_EVERY


def conflicts(chosen: CfsslSettings) -> Iterator[Problem]:
    """The keys of one authority that contradict each other. A value that could not be read is false: nothing is said
    of it.
    """
    if chosen.url:
        yield from roots_conflicts(chosen.url, chosen.ca_file)
        yield from pair_conflicts(chosen.url, chosen.certificate_file, chosen.key_file)
