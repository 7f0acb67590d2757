"""The configuration file of `sds-agent ca serve`, typed; read as the agent's own is, with every error at once."""

import re
from collections.abc import Iterator
from datetime import timedelta
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Annotated, TypeAlias

import msgspec
from msgspec import Meta, Struct

from sds_agent.admin.settings import AdminSettings, unguarded
from sds_agent.ca.policy import NodeAgent
from sds_agent.configfile import reading, source
from sds_agent.configfile.document import Document
from sds_agent.configfile.listening import Listen, ListenAddress
from sds_agent.configfile.phrases import KeyPath
from sds_agent.configfile.reading import readable, was_read
from sds_agent.configfile.types import (
    FilePath,
    TrustDomain,
    UnacceptableError,
    WorkloadId,
    custom,
    duration,
    file_path,
    listing,
    text,
)
from sds_agent.errors import Problem, ProblemsError
from sds_agent.identity.spiffe import fault_of_pattern
from sds_agent.log import LogSettings
from sds_agent.pki.keys import KeyType

MINIMUM = "the least it needs is trust_domain, signer with cacerts or self_signed, and callers"

MOST_WORKERS = 64
AUTO = 0
"""As many workers as the machine has cores for this process."""

_DNS_NAME = re.compile(
    r"(?=.{1,253}$)(\*\.)?[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*", re.ASCII
)
_URL = re.compile(r"https://(?P<host>\[[0-9A-Fa-f:.]+\]|[\w.-]+)(:(?P<port>[0-9]*))?([/?#]\S*)?")
_DOTTED = re.compile(r"[0-9]+(\.[0-9]+){3}")


def _server_name(value: object, _base: Path) -> str:
    name = text(value)
    try:
        return str(ip_address(name))
    except ValueError:
        if _DNS_NAME.fullmatch(name) is None:
            raise UnacceptableError from None
    return name


def _jwks(value: object, base: Path) -> str:
    written = text(value)
    if written.startswith("https://"):
        return _url(written)
    if "://" in written:
        raise UnacceptableError("without TLS, a program that changes the key set on its way can act as any caller")
    return str(file_path(written, base))


def _url(written: str) -> str:
    if _has_user(written):
        return written  # refused by _callers, which does not quote it
    found = _URL.fullmatch(written)
    if found is None or not written.isprintable():
        raise UnacceptableError("it must name a host, and have no spaces")
    host, port = found["host"], found["port"]
    if port and (len(port) > 5 or not 0 < int(port) < 65536):
        raise UnacceptableError("a port lies between 1 and 65535")
    try:
        if host.startswith("["):
            IPv6Address(host[1:-1])
        elif _DOTTED.fullmatch(host):
            IPv4Address(host)
        else:
            host.encode("idna")
    except ValueError as error:
        raise UnacceptableError("its host is neither a host's name nor an IP address") from error
    return written


def _has_user(written: str) -> bool:
    """Whether it is a URL, good or not, with a user's name or a password, which no message may quote."""
    return written.startswith("https://") and "@" in re.split("[/?#]", written, maxsplit=3)[2]


def _pattern(value: object, _base: Path) -> str:
    written = text(value)
    if fault := fault_of_pattern(written):
        raise UnacceptableError(fault)
    return written


ServerName: TypeAlias = Annotated[
    str,
    custom(
        _server_name,
        "a DNS name in lower case or an IP address",
        {"type": "string", "pattern": r"^(\*\.)?[a-z0-9-]+(\.[a-z0-9-]+)*$|^[0-9A-Fa-f:.]+$"},
    ),
]
KeySet: TypeAlias = Annotated[
    str,
    custom(
        _jwks,
        "the path of a file, or a URL such as https://issuer.example/keys",
        {
            "type": "string",
            "pattern": r"^https://(\[[0-9A-Fa-f:.]+\]|[^\s/?#@:\[\]]+)(:[0-9]{0,5})?([/?#]\S*)?$|^(?!.*://).",
        },
    ),
]
IdPattern: TypeAlias = Annotated[
    str,
    custom(
        _pattern,
        "a SPIFFE ID, or one that ends in /* for all below it",
        {"type": "string", "pattern": r"^spiffe://[a-z0-9._-]+((/[A-Za-z0-9._-]+)+(/\*)?|/\*)$"},
    ),
]
Claim: TypeAlias = Annotated[str, Meta(min_length=1)]


def _workers(value: object, _base: Path) -> int:
    if value == "auto":
        return AUTO
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_WORKERS:
        raise UnacceptableError
    return value


def _written_workers(count: int) -> object:
    return "auto" if count == AUTO else count


Workers: TypeAlias = Annotated[
    int,
    custom(
        _workers,
        f"auto, or a number from 1 to {MOST_WORKERS}",
        {"anyOf": [{"const": "auto"}, {"type": "integer", "minimum": 1, "maximum": MOST_WORKERS}]},
        _written_workers,
    ),
]


class SignerSettings(Struct, frozen=True, kw_only=True):
    """What signs: one of `cacerts` and `self_signed`."""

    cacerts: Annotated[
        FilePath | None,
        Meta(description="A directory with a plugged-in CA, in Istio's cacerts layout or with cert-manager's names."),
    ] = None
    self_signed: Annotated[
        FilePath | None, Meta(description="A directory for a self-signed root, which the CA makes and stores there.")
    ] = None
    passphrase_file: Annotated[
        FilePath | None,
        Meta(description="A file with the passphrase of a plugged-in CA's key. Left out: the key is not encrypted."),
    ] = None
    key: Annotated[KeyType, Meta(description="The kind of a self-signed root's key.")] = KeyType.EC_P256
    root_lifetime: Annotated[
        timedelta,
        duration(timedelta(minutes=1), timedelta(days=30 * 365)),
        Meta(
            description="How long a self-signed root is valid. The CA makes a new one in the last fifth of that time."
        ),
    ] = timedelta(days=3650)


class JwtSettings(Struct, frozen=True, kw_only=True):
    """An issuer whose tokens the CA accepts."""

    issuer: Annotated[Claim, Meta(description="The claim iss of its tokens, letter for letter.")]
    audience: Annotated[Claim, Meta(description="What the claim aud must contain. Istio's clients ask for istio-ca.")]
    jwks: Annotated[
        KeySet,
        Meta(
            description="Its public keys, a JSON Web Key Set: a file, or an https URL. The CA reads it again when it "
            "changes.",
        ),
    ]
    ca_file: Annotated[
        FilePath | None, Meta(description="The CA certificates to trust at that URL. Left out: the system's.")
    ] = None
    token_file: Annotated[
        FilePath | None, Meta(description="A file with a bearer token for that URL, as a kube-apiserver wants.")
    ] = None
    claim: Annotated[
        Claim | None,
        Meta(
            description="The claim that holds the caller's SPIFFE ID. Left out: sub names a Kubernetes service "
            "account, which is mapped as Istio does.",
        ),
    ] = None
    allow: Annotated[
        tuple[IdPattern, ...],
        listing("SPIFFE IDs"),
        Meta(
            description="The identities that its tokens may name; one that ends in /* stands for all below it. Left "
            "out: every one of the trust domain.",
        ),
    ] = ()


class NodeAgentSettings(Struct, frozen=True, kw_only=True):
    """A caller that may ask for the identities of others."""

    identity: Annotated[WorkloadId, Meta(description="Its SPIFFE ID.")]
    may_act_for: Annotated[
        tuple[IdPattern, ...],
        listing("SPIFFE IDs"),
        Meta(description="The identities it may ask for; one that ends in /* stands for all below it."),
    ]


class CallerSettings(Struct, frozen=True, kw_only=True):
    """Who may ask, by what proof."""

    jwt: Annotated[
        tuple[JwtSettings, ...], listing("issuers"), Meta(description="The issuers whose tokens the CA accepts.")
    ] = ()
    mtls: Annotated[bool, Meta(description="Whether a workload may renew with its current certificate.")] = True
    join_tokens: Annotated[FilePath | None, Meta(description="The directory of the join tokens.")] = None
    node_agents: Annotated[
        tuple[NodeAgentSettings, ...],
        listing("node agents"),
        Meta(description="The callers that may ask for the identities of others."),
    ] = ()
    deny_file: Annotated[
        FilePath | None,
        Meta(
            description="A file with a SPIFFE ID in each line, for which the CA issues nothing. The CA reads it again "
            "when it changes.",
        ),
    ] = None


class CallerLimitSettings(Struct, frozen=True, kw_only=True):
    """The limits for callers."""

    at_once: Annotated[
        int, Meta(ge=1, le=100_000, description="Requests that the CA works on at one time, of all callers together.")
    ] = 256
    per_caller: Annotated[int, Meta(ge=1, le=1_000_000, description="Requests of one caller in a minute.")] = 120
    connections: Annotated[int, Meta(ge=1, le=100_000, description="Connections at one time.")] = 4096
    connection_age: Annotated[
        timedelta,
        duration(timedelta(seconds=1), timedelta(days=1)),
        Meta(
            description="How long a connection may last; then the CA asks the caller to open a new one. No request is "
            "lost.",
        ),
    ] = timedelta(minutes=30)


class CaSettings(Struct, frozen=True, kw_only=True):
    """The whole configuration of `sds-agent ca serve`."""

    trust_domain: Annotated[TrustDomain, Meta(description="The trust domain of every certificate.")]
    listen: Annotated[
        Listen, Meta(description="The address and port to listen on. An IPv6 address is written in brackets.")
    ] = ListenAddress("127.0.0.1", 15012)
    server_names: Annotated[
        tuple[ServerName, ...],
        listing("names"),
        Meta(
            description="The DNS names and IP addresses by which callers know the CA, in the server's own certificate."
        ),
    ] = ("istiod.istio-system.svc", "localhost")
    signer: SignerSettings
    callers: CallerSettings
    limits: CallerLimitSettings = CallerLimitSettings()
    workers: Annotated[
        Workers,
        Meta(
            description="Processes that answer calls. With 1 it is the server itself; with more, each is a process of "
            "its own beside it, for a core of its own. auto: one for each core that the server may use."
        ),
    ] = 1
    audit: Annotated[
        FilePath | None, Meta(description="The file to which the CA appends its audit log. Left out: standard output.")
    ] = None
    log: LogSettings = LogSettings()
    admin: AdminSettings = msgspec.field(default_factory=AdminSettings)  # as for sds.mode

    @property
    def node_agents(self) -> dict[str, NodeAgent]:
        """The callers that may act for others, by their SPIFFE IDs."""
        return {each.identity: NodeAgent(each.identity, each.may_act_for) for each in self.callers.node_agents}


def load(path: Path, read: tuple[Document, list[Problem]] | None = None) -> CaSettings:
    """Read the file, unless it is given as it was `read`; relative paths start from its directory. Raises ProblemsError
    with every problem there is.
    """
    document, problems = source.read(path, minimum=MINIMUM) if read is None else read
    chosen, found = reading.read(CaSettings, document)
    problems += [document.place(problem) for problem in (*found, *_conflicts(chosen))]
    if problems and "workloads" in document.tree and {"signer", "callers"}.isdisjoint(document.tree):
        fix = "name the CA server's file; `sds-agent check` and `sds-agent run` read this one"
        raise ProblemsError([Problem((str(path),), "this is a configuration of the agent", fix)])
    if problems:
        raise ProblemsError(problems)
    return chosen


def _conflicts(chosen: CaSettings) -> Iterator[Problem]:
    """What shows only when keys are compared. Values that could not be read are UNREAD, which is false."""
    if was_read(chosen.admin):
        yield from unguarded(chosen.admin)
    if was_read(chosen.signer):
        yield from _signers(chosen.signer)
    if was_read(chosen.callers):
        yield from _callers(chosen.callers)
        if chosen.trust_domain:
            yield from _foreign(chosen.callers, f"spiffe://{chosen.trust_domain}/")


def _signers(signer: SignerSettings) -> Iterator[Problem]:
    if (signer.cacerts is None) is (signer.self_signed is None):
        found = "names no directory" if signer.cacerts is None else "names two directories"
        yield Problem(("signer",), found, "give one of cacerts and self_signed")
    elif signer.cacerts is None and signer.passphrase_file is not None:
        found = "has no effect: the key of self_signed is not encrypted"
        yield Problem(("signer", "passphrase_file"), found, "remove it, or plug in a CA with an encrypted key")


def _callers(callers: CallerSettings) -> Iterator[Problem]:
    if callers.jwt == () and callers.join_tokens is None:
        yield Problem(("callers",), "give no caller a first certificate", "give jwt or join_tokens; mtls only renews")
    for index, issuer in readable(callers.jwt):
        if not issuer.jwks:
            continue
        at: KeyPath = ("callers", "jwt", index)
        for key in ("ca_file", "token_file"):
            if getattr(issuer, key) is not None and not issuer.jwks.startswith("https://"):
                yield Problem((*at, key), "has no effect: jwks is a file", "remove it, or give jwks a URL")
        if _has_user(issuer.jwks):
            fix = "remove the part before the @; token_file names a file with a bearer token to send"
            yield Problem((*at, "jwks"), "has a user's name or a password in it", fix)


def _foreign(callers: CallerSettings, ours: str) -> Iterator[Problem]:
    """The SPIFFE IDs that do not begin with `ours`, so that no certificate of this CA can have them."""
    for path, identity in _identities(callers):
        if identity and not identity.startswith(ours):
            yield Problem(("callers", *path), "is not in the trust domain", f"begin it with {ours}")


def _identities(callers: CallerSettings) -> Iterator[tuple[KeyPath, str]]:
    for index, issuer in readable(callers.jwt):
        yield from ((("jwt", index, "allow", number), each) for number, each in readable(issuer.allow))
    for index, agent in readable(callers.node_agents):
        at: KeyPath = ("node_agents", index)
        yield (*at, "identity"), agent.identity
        yield from (((*at, "may_act_for", number), each) for number, each in readable(agent.may_act_for))
