"""The agent's settings, typed: what every other part gets. The annotations say what the file may hold."""

from collections.abc import Iterable, Mapping
from datetime import timedelta
from types import MappingProxyType
from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta, Struct

from sds_agent.config.istio import IstioSettings
from sds_agent.configfile.reading import selected
from sds_agent.configfile.types import (
    Account,
    AuthorityName,
    FileMode,
    FilePath,
    Mode,
    SocketPath,
    TrustDomain,
    WorkloadId,
    WorkloadName,
    duration,
    filled_in,
    listing,
    naming,
)
from sds_agent.log import LogSettings
from sds_agent.pki.keys import KeyType

BUNDLE_NAME = "ROOTCA"
"""A resource name of the trust bundle, as pilot-agent has it."""
ONLY_AUTHORITY = "local"
"""The name of the one authority there is where the file names none."""

_TTL = duration(
    timedelta(seconds=5),
    timedelta(days=90),
    "certificates count whole seconds and a renewal needs time for a second attempt, so less than 5s cannot be kept "
    "up; more than 90d is refused by common CAs and leaves a stolen key good for long",
)
_ROOT_LIFETIME = duration(timedelta(minutes=1), timedelta(days=30 * 365))


class PeerLimitSettings(Struct, frozen=True, kw_only=True):
    """What the peers on the socket can make the agent hold."""

    streams: Annotated[
        int,
        Meta(
            ge=1,
            le=1_000_000,
            description="Streams and calls at one time, of all peers together. Where there are more, one of the "
            "process that has most gives way.",
        ),
    ] = 10_000
    names: Annotated[int, Meta(ge=1, le=10_000, description="Resource names on one stream.")] = 100
    request_bytes: Annotated[
        int,
        Meta(
            ge=128 << 10,
            le=64 << 20,
            description="Bytes of one request. An Envoy's first request has about 61 KB, because it tells all of "
            "Envoy's extensions.",
        ),
    ] = 1 << 20


class SdsSettings(Struct, frozen=True, kw_only=True):
    """The socket that Envoys connect to."""

    socket: Annotated[
        SocketPath,
        filled_in("see [Places](configuration.md#places)"),
        Meta(
            description="The path of the Unix socket. Left out: sds.sock in $RUNTIME_DIRECTORY, or else "
            "sds-agent/sds.sock in the user's runtime directory; for root /run/sds-agent/sds.sock.",
        ),
    ]
    mode: Annotated[Mode, Meta(description="The socket's mode. A process that may connect can read private keys.")] = (
        msgspec.field(default_factory=lambda: FileMode(0o660))
    )  # msgspec puts plain defaults into its JSON Schema
    owner: Annotated[
        Account | None,
        Meta(description="The user, by name or id, that the socket is given to. Left out: the agent's own."),
    ] = None
    group: Annotated[
        Account | None,
        Meta(
            description="The group, by name or id, that the socket is given to; put the Envoys' user into it. Left "
            "out: the agent's own.",
        ),
    ] = None
    limits: PeerLimitSettings = PeerLimitSettings()


class RenewalSettings(Struct, frozen=True, kw_only=True):
    """When a certificate is renewed."""

    fraction: Annotated[
        float,
        Meta(
            ge=0.2,
            le=0.8,
            description="The part of its lifetime, from issue to expiry, after which a certificate is renewed.",
        ),
    ] = 0.5
    jitter: Annotated[
        float,
        Meta(
            ge=0,
            le=0.1,
            description="How much of the lifetime that moment may lie earlier or later; the certificate's serial "
            "decides, so that many agents do not ask at once.",
        ),
    ] = 0.05


class EmbeddedSettings(Struct, frozen=True, kw_only=True, tag="embedded", tag_field="type"):
    """A CA inside the agent, whose root is kept in the state directory."""

    key: Annotated[KeyType, Meta(description="The kind of the root's key.")] = KeyType.EC_P256
    root_lifetime: Annotated[
        timedelta,
        _ROOT_LIFETIME,
        Meta(description="How long a root is valid. A new one is made in the last fifth of it."),
    ] = timedelta(days=3650)


class CacertsSettings(Struct, frozen=True, kw_only=True, tag="cacerts", tag_field="type"):
    """A CA that is plugged in from a directory, in Istio's layout; the agent signs with it."""

    directory: Annotated[
        FilePath,
        Meta(
            description="The directory with ca-cert.pem, ca-key.pem, root-cert.pem and cert-chain.pem, or tls.crt, "
            "tls.key and ca.crt. It is read anew when its content changes.",
        ),
    ]
    passphrase_file: Annotated[
        FilePath | None, Meta(description="The file with the key's passphrase. Left out: the key is not encrypted.")
    ] = None


AuthoritySettings: TypeAlias = EmbeddedSettings | IstioSettings | CacertsSettings
"""The settings of an upstream CA."""

_AUTHORITIES: Mapping[str, type[AuthoritySettings]] = {
    "embedded": EmbeddedSettings,
    "istio": IstioSettings,
    "cacerts": CacertsSettings,
}


def _types() -> Iterable[str]:
    return _AUTHORITIES


class WorkloadSettings(Struct, frozen=True, kw_only=True):
    """An identity that the agent keeps a certificate for."""

    name: Annotated[
        WorkloadName,
        Meta(
            description="The resource name that Envoy asks for: its sds_config's secret name. The SPIFFE ID is a "
            "second one.",
        ),
    ]
    spiffe_id: Annotated[WorkloadId, Meta(description="The SPIFFE ID in the certificate, its only name.")]
    key: Annotated[KeyType, Meta(description="The kind of key; a new one is made for every certificate.")] = (
        KeyType.EC_P256
    )
    ttl: Annotated[
        timedelta, _TTL, Meta(description="How long a certificate is asked to be valid, from its issue.")
    ] = timedelta(hours=24)
    authority: Annotated[
        AuthorityName | None,
        Meta(description="The name of the authority that issues it. May be left out where there is only one."),
    ] = None
    output: Annotated[
        FilePath | None,
        Meta(
            description="A directory to keep the certificate in as files too, for programs that do not speak SDS: "
            "cert-chain.pem, key.pem (unencrypted) and root-cert.pem.",
        ),
    ] = None

    @property
    def names(self) -> tuple[str, ...]:
        """The resource names of its certificate: Istio's users know the first, SPIRE's the second."""
        return (self.name,) if self.name == self.spiffe_id else (self.name, self.spiffe_id)


def _only_embedded() -> Mapping[str, AuthoritySettings]:
    return MappingProxyType({ONLY_AUTHORITY: EmbeddedSettings()})


class Settings(Struct, frozen=True, kw_only=True):
    """The whole configuration."""

    trust_domain: Annotated[TrustDomain, Meta(description="The trust domain of every workload here.")]
    state_dir: Annotated[
        FilePath,
        filled_in("see [Places](configuration.md#places)"),
        Meta(
            description="The directory for what has to outlive the agent, such as the embedded CA's key. Left out: "
            "$STATE_DIRECTORY, or else sds-agent in the user's state directory; for root "
            "/var/lib/sds-agent.",
        ),
    ]
    sds: Annotated[SdsSettings, filled_in("")]
    authorities: Annotated[
        Mapping[AuthorityName, Annotated[AuthoritySettings, selected(_AUTHORITIES.get, _types)]],
        naming("authorities"),
        Meta(description="The CAs, by names of your own. Left out: one embedded CA with the name local."),
    ] = msgspec.field(default_factory=_only_embedded)
    workloads: Annotated[
        tuple[WorkloadSettings, ...],
        listing("workloads"),
        Meta(description="The identities that the agent keeps certificates for."),
    ]
    keep_certificates: Annotated[
        bool,
        Meta(
            description="Whether certificates and their private keys are kept in the state directory, readable by the "
            "agent's user alone, so that a restarted agent serves at once what is still valid. With false "
            "those that were kept are removed at the start.",
        ),
    ] = True
    renewal: RenewalSettings = RenewalSettings()
    log: LogSettings = LogSettings()

    def authority_of(self, workload: WorkloadSettings) -> str:
        """The name of the authority that issues for `workload`."""
        return workload.authority or next(iter(self.authorities))

    @property
    def bundle_names(self) -> tuple[str, ...]:
        """The resource names of the trust bundle: Istio's users know the first, SPIRE's the second."""
        return (BUNDLE_NAME, f"spiffe://{self.trust_domain}")
