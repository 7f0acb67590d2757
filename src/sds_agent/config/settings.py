"""The agent's settings, typed: what every other part gets. The annotations say what the file may hold."""

from collections.abc import Mapping
from datetime import timedelta
from enum import StrEnum
from types import MappingProxyType
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from sds_agent.admin.settings import AdminSettings, TelemetrySettings
from sds_agent.authority import registry
from sds_agent.authority.kind import AuthoritySettings, Use
from sds_agent.configfile.declarations import selected
from sds_agent.configfile.reading import readable, was_read
from sds_agent.configfile.types import (
    Account,
    AuthorityName,
    AuthorityNames,
    Command,
    CredentialName,
    FileMode,
    FilePath,
    Mode,
    SecretDirectory,
    SocketPath,
    TrustDomain,
    WorkloadId,
    WorkloadName,
    duration,
    filled_in,
    listing,
    naming,
    shorthand,
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


class PeerLimitSettings(Struct, frozen=True, kw_only=True):
    """The limits for the clients of the socket."""

    streams: Annotated[
        int,
        Meta(
            ge=1,
            le=1_000_000,
            description="Streams and calls at one time, of all clients together. When there are more, the agent ends "
            "one of the process that has most.",
        ),
    ] = 10_000
    names: Annotated[int, Meta(ge=1, le=10_000, description="Resource names on one stream.")] = 100
    request_bytes: Annotated[
        int,
        Meta(
            ge=128 << 10,
            le=64 << 20,
            description="Bytes of one request. An Envoy's first request has about 61 KB, because it names all of "
            "Envoy's extensions.",
        ),
    ] = 1 << 20
    stored_bytes: Annotated[
        int,
        Meta(
            ge=64 << 20,
            le=1 << 40,
            description="Bytes that all clients together can make the agent store: requests that have begun and not "
            "ended, answers that are not read, and names. When there are more, the process that has most loses a "
            "connection.",
        ),
    ] = 512 << 20


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
    files: Annotated[
        tuple[SecretDirectory, ...],
        listing("directories"),
        Meta(
            description="The directories of which Envoys may ask for files, by Istio's names file-cert:CERTIFICATE~KEY "
            "and file-root:ROOTS. A process that may connect can read the keys below them. Left out: none."
        ),
    ] = ()
    limits: PeerLimitSettings = PeerLimitSettings()


class RenewalSettings(Struct, frozen=True, kw_only=True):
    """When a certificate is renewed."""

    fraction: Annotated[
        float,
        Meta(
            ge=0.2,
            le=0.8,
            description="The part of its lifetime, from issue to expiry, after which the agent renews a certificate; "
            "the first one at any moment before, unless it lives less than 10m or jitter is 0 (see Renewal).",
        ),
    ] = 0.5
    jitter: Annotated[
        float,
        Meta(
            ge=0,
            le=0.1,
            description="The part of the lifetime by which a renewal may come earlier or later; the certificate's "
            "serial number decides, so that many agents do not ask at once. With 0 every moment is exact.",
        ),
    ] = 0.05


class OutputLayout(StrEnum):
    """The names of an output's files."""

    ISTIO = "istio"
    KUBERNETES = "kubernetes"
    SPIFFE = "spiffe"
    SPIFFE_HELPER = "spiffe-helper"


class OutputSettings(Struct, frozen=True, kw_only=True):
    """Certificates as files, for programs that do not speak SDS."""

    directory: Annotated[
        FilePath,
        Meta(description="The directory, whose files change all at once. `output: DIRECTORY` sets this key alone."),
    ]
    layout: Annotated[
        OutputLayout,
        Meta(
            description="The names of the files. istio: cert-chain.pem, key.pem, root-cert.pem; kubernetes: tls.crt, "
            "tls.key, ca.crt; spiffe-helper: svid.pem, svid_key.pem, svid_bundle.pem; spiffe: "
            "credential-bundle.private-key.pem (key, then chain) and a TRUST_DOMAIN.spiffe-trust-bundle.pem for each "
            "trust domain.",
        ),
    ] = OutputLayout.ISTIO
    owner: Annotated[Account | None, Meta(description="The user, by name or id, that the files are given to.")] = None
    group: Annotated[Account | None, Meta(description="The group, by name or id, that the files are given to.")] = None
    key_mode: Annotated[
        Literal["0400", "0440", "0600", "0640"],
        Meta(description="The mode of the file with the private key. The others have 0644."),
    ] = "0600"
    on_renewed: Annotated[
        Command | None,
        Meta(
            description="A program to run once new files are in place, with its arguments. No shell reads it.",
        ),
    ] = None
    on_failed: Annotated[
        Command | None,
        Meta(description="A program to run when an attempt to get a certificate has failed, with its arguments."),
    ] = None
    hook_timeout: Annotated[
        timedelta,
        duration(timedelta(seconds=1), timedelta(hours=1)),
        Meta(description="How long such a program may run before the agent ends it."),
    ] = timedelta(seconds=30)


class FailoverSettings(Struct, frozen=True, kw_only=True):
    """When the agent asks the next of a workload's authorities, where it has several."""

    failures: Annotated[
        int,
        Meta(
            ge=1,
            le=100,
            description="Failed attempts in a row after which the next authority is asked, while a valid certificate "
            "is served. Where none is, or what is served nears its end, the first failure is enough.",
        ),
    ] = 3
    after: Annotated[
        timedelta,
        duration(timedelta(seconds=1), timedelta(days=1)),
        Meta(
            description="How long after the beginning of the first of these attempts the next authority is asked even "
            "if fewer have failed, as where the authority hangs or asks for a delay.",
        ),
    ] = timedelta(seconds=30)
    back_after: Annotated[
        timedelta,
        duration(timedelta(seconds=10), timedelta(days=30)),
        Meta(
            description="How long after the switch an earlier authority is asked for a certificate again, if no "
            "renewal is due before. The time doubles with each attempt that fails, up to an hour.",
        ),
    ] = timedelta(minutes=5)


class RequestSettings(Struct, frozen=True, kw_only=True):
    """How the agent asks each authority."""

    timeout: Annotated[
        timedelta,
        duration(
            timedelta(seconds=1), timedelta(minutes=5), "a renewal in short lives leaves no more time for one attempt"
        ),
        Meta(
            description="How long an authority may take to answer one request. With several authorities the agent "
            "gives up earlier, so that the others have time.",
        ),
    ] = timedelta(seconds=10)
    concurrency: Annotated[
        int,
        Meta(
            ge=1,
            le=256,
            description="Requests that one authority is asked to answer at one time. The others wait: identities that "
            "an Envoy waits for go first, and then those that end first.",
        ),
    ] = 8


class ClientSettings(Struct, frozen=True, kw_only=True):
    """Who may ask for a certificate: processes of one of the users, and those that have one of the groups."""

    users: Annotated[
        tuple[Account, ...],
        listing("users"),
        Meta(description="The users, by name or id, whose processes may ask for it."),
    ] = ()
    groups: Annotated[
        tuple[Account, ...],
        listing("groups"),
        Meta(
            description="The groups, by name or id, whose processes may ask for it: those that have it as their own or "
            "as a supplementary group when they connect.",
        ),
    ] = ()


class WorkloadSettings(Struct, frozen=True, kw_only=True):
    """An identity that the agent obtains certificates for."""

    name: Annotated[
        WorkloadName,
        Meta(
            description="The resource name that Envoy asks for: its sds_config's secret name. The SPIFFE ID is a "
            "second one.",
        ),
    ]
    spiffe_id: Annotated[WorkloadId, Meta(description="The SPIFFE ID in the certificate, its only name.")]
    key: Annotated[KeyType, Meta(description="The kind of key; the agent makes a new one for every certificate.")] = (
        KeyType.EC_P256
    )
    ttl: Annotated[
        timedelta, _TTL, Meta(description="The lifetime that the agent asks for, from the issue of the certificate.")
    ] = timedelta(hours=24)
    authority: Annotated[
        AuthorityNames | None,
        Meta(
            description="The name of the authority that issues it, or a list of them in order: where one fails, the "
            "next one is asked (see failover). May be left out where there is only one.",
        ),
    ] = None
    clients: Annotated[
        ClientSettings | None,
        Meta(
            description="Who may ask for its certificate and key, by what the kernel says of the process that has "
            "connected. Left out: every process that may connect to the socket.",
        ),
    ] = None
    output: Annotated[
        OutputSettings | None,
        shorthand("directory"),
        Meta(
            description="Where the agent also stores the certificate as files, for programs that do not speak SDS: a "
            "directory, or a mapping.",
        ),
    ] = None

    @property
    def names(self) -> tuple[str, ...]:
        """The resource names of its certificate: Istio's users know the first, SPIRE's the second."""
        return (self.name,) if self.name == self.spiffe_id else (self.name, self.spiffe_id)


class StateEncryptionSettings(Struct, frozen=True, kw_only=True):
    """The key that encrypts what the agent stores in the state directory. One of the two names it."""

    key_file: Annotated[
        FilePath | None,
        Meta(
            description="The file with the key: 32 to 4096 bytes, all random, such as `openssl rand -out FILE 32` "
            "writes. Every byte counts.",
        ),
    ] = None
    credential: Annotated[
        CredentialName | None,
        Meta(
            description="The name of the systemd credential with the key: the file of this name in "
            "$CREDENTIALS_DIRECTORY, as LoadCredential= and LoadCredentialEncrypted= put it there.",
        ),
    ] = None


def _only_embedded() -> Mapping[str, AuthoritySettings]:
    return MappingProxyType({ONLY_AUTHORITY: registry.kind("embedded").settings()})


class Settings(Struct, frozen=True, kw_only=True):
    """The whole configuration."""

    trust_domain: Annotated[TrustDomain, Meta(description="The trust domain of every workload here.")]
    state_dir: Annotated[
        FilePath,
        filled_in("see [Places](configuration.md#places)"),
        Meta(
            description="The directory for state that outlives the agent's process, such as the embedded CA's key. "
            "Left out: $STATE_DIRECTORY, or else sds-agent in the user's state directory; for root "
            "/var/lib/sds-agent.",
        ),
    ]
    sds: Annotated[SdsSettings, filled_in("")]
    authorities: Annotated[
        Mapping[AuthorityName, Annotated[AuthoritySettings, selected(registry.settings_of, registry.names)]],
        naming("authorities"),
        Meta(description="The CAs, by names of your own. Left out: one embedded CA with the name local."),
    ] = msgspec.field(default_factory=_only_embedded)
    workloads: Annotated[
        tuple[WorkloadSettings, ...],
        listing("workloads"),
        Meta(description="The identities that the agent obtains certificates for."),
    ]
    keep_certificates: Annotated[
        bool,
        Meta(
            description="Whether the agent stores certificates and their private keys in the state directory, readable "
            "by its user alone, so that after a restart it serves at once what is still valid. With false "
            "it removes at its start what was stored before.",
        ),
    ] = True
    state_encryption: Annotated[
        StateEncryptionSettings | None,
        Meta(
            description="The key for what the agent stores in the state directory: certificates with their private "
            "keys, and trust anchors. Left out: they are stored unencrypted.",
        ),
    ] = None
    renewal: RenewalSettings = RenewalSettings()
    failover: FailoverSettings = FailoverSettings()
    requests: RequestSettings = RequestSettings()
    log: LogSettings = LogSettings()
    admin: AdminSettings = msgspec.field(default_factory=AdminSettings)  # as for sds.mode
    telemetry: Annotated[
        TelemetrySettings | None,
        Meta(description="Where metrics and spans are sent by OpenTelemetry. Left out: nowhere."),
    ] = None

    def authorities_of(self, workload: WorkloadSettings) -> tuple[str, ...]:
        """The names of the authorities that issue for `workload`, in order."""
        return workload.authority or tuple(self.authorities)[:1]

    def use_of(self, name: str) -> Use:
        """How this configuration uses the authority of this name, as far as it could be read."""
        only = len(self.authorities) == 1
        asking = {
            index: each
            for index, each in readable(self.workloads)
            if name in (each.authority or ()) or (only and each.authority is None)
        }
        return Use(name, asking, self.keep_certificates)

    @property
    def federation(self) -> Mapping[str, tuple[str, ...]]:
        """The other trust domains whose anchors each authority gives, by its name, as far as that could be read."""
        read = {name: each for name, each in self.authorities.items() if was_read(each)}
        found = {name: registry.kind_of(each).federated(each) for name, each in read.items()}
        return {name: tuple(domain for _, domain in readable(domains)) for name, domains in found.items()}

    @property
    def federated(self) -> tuple[str, ...]:
        """All those trust domains."""
        return tuple(domain for domains in self.federation.values() for domain in domains)

    @property
    def bundle_names(self) -> tuple[str, ...]:
        """The resource names of the trust bundle: Istio's users know the first, SPIRE's the second."""
        return (BUNDLE_NAME, f"spiffe://{self.trust_domain}")
