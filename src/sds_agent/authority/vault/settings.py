"""The settings of the kind `vault`, and which of them do not go together."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, ClassVar, Protocol, TypeAlias

import msgspec
from msgspec import Meta, Struct
from msgspec.structs import StructConfig

from sds_agent.authority.http_settings import (
    REFRESH_EVERY,
    URL_PATTERN,
    CaFile,
    ClientKeyFile,
    RefreshEvery,
    ServerNameKey,
    pair_conflicts,
    roots_conflicts,
    server_url,
)
from sds_agent.configfile.declarations import selected
from sds_agent.configfile.types import FilePath, matching, one_or_several
from sds_agent.errors import Problem

VaultUrls: TypeAlias = Annotated[
    tuple[str, ...],
    one_or_several(server_url, "the URL of a server such as https://vault.example:8200", URL_PATTERN),
]
_SEGMENTS = "^(?!v1/)[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*$"
MountPath: TypeAlias = Annotated[
    str, matching(_SEGMENTS, "a path such as pki or team/pki, without v1/ before it and without a slash at its ends")
]
RoleName: TypeAlias = Annotated[str, matching("^[A-Za-z0-9_.@-]{1,253}$", "a role's name such as sds-agent")]
RoleId: TypeAlias = Annotated[str, matching("^[!-~]{1,4096}$", "printable characters of ASCII without spaces")]


class VaultTokenAuth(Struct, frozen=True, kw_only=True, tag="token", tag_field="type"):
    """A token that something else puts into a file, such as Vault Agent."""

    token_file: Annotated[
        FilePath,
        Meta(
            description="The token, read anew for every request. The agent renews it at two thirds of its time, where "
            "it can be renewed."
        ),
    ]


class VaultKubernetesAuth(Struct, frozen=True, kw_only=True, tag="kubernetes", tag_field="type"):
    """Log in with the token of a Kubernetes service account."""

    role: Annotated[RoleName, Meta(description="The role of the auth method.")]
    jwt_file: Annotated[FilePath, Meta(description="The service account's token, read anew for every login.")] = (
        msgspec.field(default_factory=lambda: Path("/var/run/secrets/kubernetes.io/serviceaccount/token"))
    )
    mount: Annotated[MountPath, Meta(description="Where the auth method is enabled, below auth/.")] = "kubernetes"


class VaultJwtAuth(Struct, frozen=True, kw_only=True, tag="jwt", tag_field="type"):
    """Log in with a JWT that another issuer gives, such as a CI system, a cloud or SPIRE."""

    jwt_file: Annotated[FilePath, Meta(description="The JWT, read anew for every login.")]
    role: Annotated[RoleName | None, Meta(description="The role of the auth method. Left out: its default_role.")] = (
        None
    )
    mount: Annotated[MountPath, Meta(description="Where the auth method is enabled, below auth/.")] = "jwt"


class VaultAppRoleAuth(Struct, frozen=True, kw_only=True, tag="approle", tag_field="type"):
    """Log in with a role ID and a secret ID."""

    role_id: Annotated[RoleId, Meta(description="The role ID, which is no secret.")]
    secret_id_file: Annotated[
        FilePath | None,
        Meta(description="The secret ID, read anew for every login. Left out: the role takes none."),
    ] = None
    mount: Annotated[MountPath, Meta(description="Where the auth method is enabled, below auth/.")] = "approle"


class VaultCertAuth(Struct, frozen=True, kw_only=True, tag="cert", tag_field="type"):
    """Log in with the client certificate in certificate_file and key_file."""

    role: Annotated[
        RoleName | None,
        Meta(description="The role of the auth method. Left out: every role is tried that the certificate fits."),
    ] = None
    mount: Annotated[MountPath, Meta(description="Where the auth method is enabled, below auth/.")] = "cert"


class VaultAuth(Protocol):
    """How the agent authenticates: one of AUTHS."""

    __struct_config__: ClassVar[StructConfig]
    __struct_fields__: ClassVar[tuple[str, ...]]


AUTHS: Mapping[str, type[Struct]] = {
    str(each.__struct_config__.tag): each
    for each in (VaultTokenAuth, VaultKubernetesAuth, VaultJwtAuth, VaultAppRoleAuth, VaultCertAuth)
}
"""The ways to authenticate, by the name that the file gives as `auth.type`."""


def auth_names() -> Iterable[str]:
    """The names of AUTHS."""
    return AUTHS


class VaultSettings(Struct, frozen=True, kw_only=True, tag="vault", tag_field="type"):
    """The PKI secrets engine of HashiCorp Vault or OpenBao; a role of it signs."""

    url: Annotated[
        VaultUrls,
        Meta(
            description="The server, or the nodes of its cluster: where one does not answer, the next is asked. A "
            "redirect to the leader is followed to these alone."
        ),
    ]
    ca_file: CaFile = None
    server_name: ServerNameKey = None
    namespace: Annotated[
        MountPath | None, Meta(description="The namespace of the mounts. Left out: the root namespace.")
    ] = None
    mount: Annotated[MountPath, Meta(description="Where the PKI engine is enabled.")] = "pki"
    role: Annotated[RoleName, Meta(description="The role of the PKI engine that signs.")]
    auth: Annotated[
        VaultAuth, selected(AUTHS.get, auth_names), Meta(description="How the agent authenticates; see below.")
    ]
    revocation_lists: Annotated[
        bool,
        Meta(
            description="Serve the revocation lists of the engine's issuers with the trust bundle, so that Envoys "
            "refuse revoked peers. Left out where that would make them refuse others."
        ),
    ] = False
    certificate_file: Annotated[
        FilePath | None,
        Meta(
            description="A client certificate with its intermediates (PEM), for the auth method cert, or for a server "
            "that asks every client for one. Read anew for every connection."
        ),
    ] = None
    key_file: ClientKeyFile = None
    roots_file: Annotated[
        FilePath | None,
        Meta(
            description="The trust domain's roots (PEM), read anew every time. Left out: the self-signed issuers of "
            "the PKI engine; required where it has intermediates alone."
        ),
    ] = None
    refresh_every: RefreshEvery = REFRESH_EVERY


def conflicts(chosen: VaultSettings) -> Iterator[Problem]:
    """The keys of one authority that contradict each other. A value that could not be read is false: it is passed
    over.
    """
    urls = chosen.url or ()
    if len({each.partition(":")[0] for each in urls}) > 1:
        yield Problem(("url",), "has both http and https", "write https for each of them")
    elif urls:
        yield from roots_conflicts(urls[0], chosen.ca_file)
    yield from _certificate(chosen)


def _certificate(chosen: VaultSettings) -> Iterator[Problem]:
    url, by_certificate = (chosen.url or ("",))[0], isinstance(chosen.auth, VaultCertAuth)
    if by_certificate and url.startswith("http:"):
        yield Problem(("auth", "type"), "is cert", "a certificate takes TLS, and the URL begins with http: write https")
    elif by_certificate and chosen.certificate_file is None and chosen.key_file is None:
        for key in ("certificate_file", "key_file"):
            yield Problem((key,), "is missing", "auth.type is cert: name the client certificate and its key")
    yield from pair_conflicts(url, chosen.certificate_file, chosen.key_file)
