"""The settings, typed: what every other part gets. The shapes in their fields say what the file may hold."""

from collections.abc import Mapping
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar, Literal, TypeAlias

from sds_agent.config.conflicts import BUNDLE_NAME
from sds_agent.config.istio import IstioSettings
from sds_agent.configfile.scalars import (
    ACCOUNT,
    AUTHORITY_NAME,
    FLAG,
    MODE,
    PATH,
    SOCKET_PATH,
    TRUST_DOMAIN,
    WORKLOAD_ID,
    WORKLOAD_NAME,
    FileMode,
    choice,
    duration,
    share,
    whole,
)
from sds_agent.configfile.shapes import Listing, Named, Section, Variant, setting, settings
from sds_agent.log import Format
from sds_agent.pki.keys import KeyType

Level: TypeAlias = Literal["debug", "info", "warning", "error"]

ONLY_AUTHORITY = "local"
"""The name of the one authority there is where the file names none."""

_FORMATS: tuple[Format, ...] = ("auto", "text", "json")
_LEVELS: tuple[Level, ...] = ("debug", "info", "warning", "error")
_KEY = choice(*KeyType)
_TTL = duration(
    timedelta(seconds=5),
    timedelta(days=90),
    "certificates count whole seconds and a renewal needs time for a second attempt, so less than 5s cannot be kept "
    "up; more than 90d is refused by common CAs and leaves a stolen key good for long",
)
_ROOT_LIFETIME = duration(timedelta(minutes=1), timedelta(days=30 * 365))


@settings
class LogSettings:
    """What is logged, and how."""

    format: Format = setting(
        choice(*_FORMATS),
        "How an event is written: text is key=value, json one object a line; auto is text on a terminal, else json.",
        default="auto",
    )
    level: Level = setting(choice(*_LEVELS), "The least level that is written.", default="info")


@settings
class LimitSettings:
    """What the peers on the socket can make the agent hold."""

    streams: int = setting(whole(1, 1_000_000), "Streams and calls at one time, of all peers together.", default=10_000)
    names: int = setting(whole(1, 10_000), "Resource names on one stream.", default=100)
    request_bytes: int = setting(
        whole(128 << 10, 64 << 20),
        "Bytes of one request. An Envoy's first request has about 61 KB, because it tells all of Envoy's extensions.",
        default=1 << 20,
    )


@settings
class SdsSettings:
    """The socket that Envoys connect to."""

    socket: Path = setting(
        SOCKET_PATH,
        "The path of the Unix socket. Left out: sds.sock in $RUNTIME_DIRECTORY, or else sds-agent/sds.sock in the "
        "user's runtime directory; for root /run/sds-agent/sds.sock.",
        filled=True,
    )
    mode: FileMode = setting(
        MODE, "The socket's mode, as octal digits in quotes. Others must have no rights.", default=FileMode(0o660)
    )
    owner: str | None = setting(
        ACCOUNT,
        "The user, by name or id, that the socket is given to. Left out: the agent's own.",
        default=None,
    )
    group: str | None = setting(
        ACCOUNT,
        "The group, by name or id, that the socket is given to. Left out: the agent's own.",
        default=None,
    )
    limits: LimitSettings = setting(
        Section(LimitSettings),
        "What the peers on the socket can make the agent hold.",
        default_factory=LimitSettings,
    )


@settings
class RenewalSettings:
    """When a certificate is renewed."""

    fraction: float = setting(
        share(0.2, 0.8),
        "The part of its lifetime, from issue to expiry, after which a certificate is renewed.",
        default=0.5,
    )
    jitter: float = setting(
        share(0, 0.1),
        "How much of the lifetime that moment may lie earlier or later; the certificate's serial decides, so "
        "that many agents do not ask at once.",
        default=0.05,
    )


@settings
class EmbeddedSettings:
    """A CA inside the agent, whose root is kept in the state directory."""

    type: ClassVar[Literal["embedded"]] = "embedded"

    key: KeyType = setting(_KEY, "The kind of the root's key.", default=KeyType.EC_P256)
    root_lifetime: timedelta = setting(
        _ROOT_LIFETIME,
        "How long a root is valid. A new one is made in the last fifth of it.",
        default=timedelta(days=3650),
    )


@settings
class CacertsSettings:
    """A CA that is plugged in from a directory, in Istio's layout; the agent signs with it."""

    type: ClassVar[Literal["cacerts"]] = "cacerts"

    directory: Path = setting(
        PATH,
        "The directory with ca-cert.pem, ca-key.pem, root-cert.pem and cert-chain.pem, or tls.crt, tls.key and ca.crt. "
        "It is read anew when its content changes.",
    )
    passphrase_file: Path | None = setting(
        PATH, "The file with the key's passphrase. Left out: the key is not encrypted.", default=None
    )


AuthoritySettings: TypeAlias = EmbeddedSettings | IstioSettings | CacertsSettings
"""The settings of an upstream CA: the union of the classes in `_AUTHORITY`."""

_AUTHORITY: Variant[AuthoritySettings] = Variant((EmbeddedSettings, IstioSettings, CacertsSettings))


@settings
class WorkloadSettings:
    """An identity that the agent keeps a certificate for."""

    name: str = setting(
        WORKLOAD_NAME,
        "The resource name that Envoy asks for: its sds_config's secret name. The SPIFFE ID is a second one.",
    )
    spiffe_id: str = setting(WORKLOAD_ID, "The SPIFFE ID in the certificate, its only name.")
    key: KeyType = setting(_KEY, "The kind of key; a new one is made for every certificate.", default=KeyType.EC_P256)
    ttl: timedelta = setting(
        _TTL, "How long a certificate is asked to be valid, from its issue.", default=timedelta(hours=24)
    )
    authority: str | None = setting(
        AUTHORITY_NAME,
        "The name of the authority that issues it. May be left out where there is only one.",
        default=None,
    )
    output: Path | None = setting(
        PATH,
        "A directory to keep the certificate in as files too, for programs that do not speak SDS: cert-chain.pem, "
        "key.pem (unencrypted) and root-cert.pem.",
        default=None,
    )

    @property
    def names(self) -> tuple[str, ...]:
        """The resource names of its certificate: Istio's users know the first, SPIRE's the second."""
        return (self.name,) if self.name == self.spiffe_id else (self.name, self.spiffe_id)


def _only_embedded() -> Mapping[str, AuthoritySettings]:
    return MappingProxyType({ONLY_AUTHORITY: EmbeddedSettings()})


@settings
class Settings:
    """The whole configuration."""

    trust_domain: str = setting(TRUST_DOMAIN, "The trust domain of every workload here.")
    state_dir: Path = setting(
        PATH,
        "The directory for what has to outlive the agent, such as the embedded CA's key. Left out: $STATE_DIRECTORY, "
        "or else sds-agent in the user's state directory; for root /var/lib/sds-agent.",
        filled=True,
    )
    sds: SdsSettings = setting(Section(SdsSettings), "The socket that Envoys connect to.", filled=True)
    authorities: Mapping[str, AuthoritySettings] = setting(
        Named(AUTHORITY_NAME, _AUTHORITY, "authorities"),
        "The CAs, by names of your own. Left out: one embedded CA with the name local.",
        default_factory=_only_embedded,
    )
    workloads: tuple[WorkloadSettings, ...] = setting(
        Listing(Section(WorkloadSettings), "workloads"), "The identities that the agent keeps certificates for."
    )
    keep_certificates: bool = setting(
        FLAG,
        "Whether certificates and their private keys are kept in the state directory, readable by the agent's user "
        "alone, so that a restarted agent serves at once what is still valid. With false those that were kept are "
        "removed at the start.",
        default=True,
    )
    renewal: RenewalSettings = setting(
        Section(RenewalSettings), "When a certificate is renewed.", default_factory=RenewalSettings
    )
    log: LogSettings = setting(Section(LogSettings), "What is logged, and how.", default_factory=LogSettings)

    def authority_of(self, workload: WorkloadSettings) -> str:
        """The name of the authority that issues for `workload`."""
        return workload.authority or next(iter(self.authorities))

    @property
    def bundle_names(self) -> tuple[str, ...]:
        """The resource names of the trust bundle: Istio's users know the first, SPIRE's the second."""
        return (BUNDLE_NAME, f"spiffe://{self.trust_domain}")


SHAPE = Section(Settings)
