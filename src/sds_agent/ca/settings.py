"""The configuration file of `sds-agent ca serve`, typed; read by the agent's own shapes, with every error at once."""

import re
from collections.abc import Iterator
from datetime import timedelta
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path

from msgspec import Struct

from sds_agent.ca.policy import NodeAgent
from sds_agent.config.settings import LogSettings
from sds_agent.configfile import source
from sds_agent.configfile.problems import ConfigError, Problem, render
from sds_agent.configfile.scalars import FLAG, PATH, TRUST_DOMAIN, WORKLOAD_ID, choice, duration, text, whole
from sds_agent.configfile.shapes import (
    INVALID,
    Finding,
    Listing,
    Reading,
    Scalar,
    Section,
    UnacceptableError,
    setting,
    settings,
)
from sds_agent.identity.spiffe import fault_of_pattern
from sds_agent.pki.keys import KeyType

MINIMUM = "the least it needs is trust_domain, signer with cacerts or self_signed, and callers"

_DNS_NAME = re.compile(
    r"(?=.{1,253}$)(\*\.)?[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*", re.ASCII
)
_URL = re.compile(r"https://(?P<user>[^\s/?#@]*@)?(?P<host>\[[0-9A-Fa-f:.]+\]|[\w.-]+)(:(?P<port>[0-9]*))?([/?#]\S*)?")
_DOTTED = re.compile(r"[0-9]+(\.[0-9]+){3}")


class Address(Struct, frozen=True):
    """Where to listen: an IP address, or a name that resolves to one, and a port (0 lets the kernel choose)."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def _address(value: object, _base: Path) -> Address:
    host, colon, port = text(value).rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if not colon or not port.isascii() or not port.isdecimal() or len(port) > 5 or int(port) > 65535:
        raise UnacceptableError
    if (":" in host) is not host.startswith("["):
        raise UnacceptableError("write an IPv6 address in brackets")
    if not bare:
        raise UnacceptableError("write 0.0.0.0 or [::] to listen on every address")
    return Address(bare, int(port))


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
        raise UnacceptableError("without TLS, one who changes the key set on its way can be every caller")
    return str(PATH.parse(written, base))


def _url(written: str) -> str:
    found = _URL.fullmatch(written)
    if found is None or not written.isprintable():
        raise UnacceptableError("it must name a host, and hold no spaces")
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


def _pattern(value: object, _base: Path) -> str:
    written = text(value)
    if fault := fault_of_pattern(written):
        raise UnacceptableError(fault)
    return written


def _words(value: object, _base: Path) -> str:
    written = text(value)
    if not written or not written.isprintable():
        raise UnacceptableError
    return written


_ADDRESS = Scalar(
    "an address and a port such as 127.0.0.1:15012",
    _address,
    {"type": "string", "pattern": r"^(\[[^\[\]]+\]|[^\[\]:]+):[0-9]+$"},
)
_SERVER_NAME = Scalar(
    "a DNS name in lower case or an IP address",
    _server_name,
    {"type": "string", "pattern": r"^(\*\.)?[a-z0-9-]+(\.[a-z0-9-]+)*$|^[0-9A-Fa-f:.]+$"},
)
_JWKS = Scalar(
    "the path of a file, or a URL such as https://issuer.example/keys",
    _jwks,
    {
        "type": "string",
        "pattern": r"^https://(\[[0-9A-Fa-f:.]+\]|[^\s/?#@:\[\]]+)(:[0-9]{0,5})?([/?#]\S*)?$|^(?!.*://).",
    },
)
_PATTERN = Scalar(
    "a SPIFFE ID, or one that ends in /* for all below it",
    _pattern,
    {"type": "string", "pattern": r"^spiffe://[a-z0-9._-]+((/[A-Za-z0-9._-]+)+(/\*)?|/\*)$"},
)
_WORDS = Scalar("printable text", _words, {"type": "string", "minLength": 1})


@settings
class SignerSettings:
    """What signs: one of `cacerts` and `self_signed`."""

    cacerts: Path | None = setting(PATH, "A directory with a plugged-in CA, in Istio's cacerts layout.", default=None)
    self_signed: Path | None = setting(
        PATH, "A directory for a self-signed root, which is made there and kept.", default=None
    )
    passphrase_file: Path | None = setting(
        PATH, "A file with the passphrase of a plugged-in CA's key. Left out: the key is not encrypted.", default=None
    )
    key: KeyType = setting(choice(*KeyType), "The kind of a self-signed root's key.", default=KeyType.EC_P256)
    root_lifetime: timedelta = setting(
        duration(timedelta(minutes=1), timedelta(days=30 * 365)),
        "How long a self-signed root is valid. A new one is made in the last fifth of it.",
        default=timedelta(days=3650),
    )


@settings
class JwtSettings:
    """An issuer whose tokens are taken."""

    issuer: str = setting(_WORDS, "The claim iss of its tokens, to the letter.")
    audience: str = setting(_WORDS, "What the claim aud must contain. Istio's clients ask for istio-ca.")
    jwks: str = setting(
        _JWKS, "Its public keys, a JSON Web Key Set: a file, or an https URL. It is read again as it changes."
    )
    ca_file: Path | None = setting(
        PATH, "The CA certificates to trust at that URL. Left out: the system's.", default=None
    )
    token_file: Path | None = setting(
        PATH, "A file with a bearer token for that URL, as a kube-apiserver wants.", default=None
    )
    claim: str | None = setting(
        _WORDS,
        "The claim that holds the caller's SPIFFE ID. Left out: sub names a Kubernetes service account, which is "
        "mapped as Istio does.",
        default=None,
    )
    allow: tuple[str, ...] = setting(
        Listing(_PATTERN, "SPIFFE IDs"),
        "The identities that its tokens may name; one that ends in /* stands for all below it. Left out: every one of "
        "the trust domain.",
        default=(),
    )


@settings
class NodeAgentSettings:
    """A caller that may ask for the identities of others."""

    identity: str = setting(WORKLOAD_ID, "Its SPIFFE ID.")
    may_act_for: tuple[str, ...] = setting(
        Listing(_PATTERN, "SPIFFE IDs"), "The identities it may ask for; one that ends in /* stands for all below it."
    )


@settings
class CallerSettings:
    """Who may ask, by what proof."""

    jwt: tuple[JwtSettings, ...] = setting(
        Listing(Section(JwtSettings), "issuers"), "The issuers whose tokens are taken.", default=()
    )
    mtls: bool = setting(FLAG, "Whether a workload may renew with its current certificate.", default=True)
    join_tokens: Path | None = setting(PATH, "The directory of the join tokens.", default=None)
    node_agents: tuple[NodeAgentSettings, ...] = setting(
        Listing(Section(NodeAgentSettings), "node agents"), "The callers that may act for others.", default=()
    )
    deny_file: Path | None = setting(
        PATH, "A file with a SPIFFE ID in each line: those get nothing. It is read again as it changes.", default=None
    )


@settings
class LimitSettings:
    """What callers can make the CA do."""

    at_once: int = setting(whole(1, 100_000), "Requests in work at one time, of all callers.", default=256)
    per_caller: int = setting(whole(1, 1_000_000), "Requests of one caller in a minute.", default=120)
    connections: int = setting(whole(1, 100_000), "Connections at one time.", default=4096)
    connection_age: timedelta = setting(
        duration(timedelta(seconds=1), timedelta(days=1)),
        "How long a connection may last; then the caller is asked to open a new one.",
        default=timedelta(minutes=30),
    )


@settings
class CaSettings:
    """The whole configuration of `sds-agent ca serve`."""

    trust_domain: str = setting(TRUST_DOMAIN, "The trust domain of every certificate.")
    listen: Address = setting(_ADDRESS, "Where to listen.", default=Address("127.0.0.1", 15012))
    server_names: tuple[str, ...] = setting(
        Listing(_SERVER_NAME, "names"),
        "The names and IP addresses by which callers know the CA.",
        default=("istiod.istio-system.svc", "localhost"),
    )
    signer: SignerSettings = setting(Section(SignerSettings), "What signs.")
    callers: CallerSettings = setting(Section(CallerSettings), "Who may ask.")
    limits: LimitSettings = setting(
        Section(LimitSettings), "What callers can make the CA do.", default_factory=LimitSettings
    )
    audit: Path | None = setting(
        PATH, "The file that the audit log is appended to. Left out: standard output.", default=None
    )
    log: LogSettings = setting(Section(LogSettings), "What is logged, and how.", default_factory=LogSettings)

    @property
    def node_agents(self) -> dict[str, NodeAgent]:
        """The callers that may act for others, by their SPIFFE IDs."""
        return {each.identity: NodeAgent(each.identity, each.may_act_for) for each in self.callers.node_agents}


def load(path: Path) -> CaSettings:
    """Read the file; relative paths start from its directory. Raises ConfigError with every problem there is."""
    document, problems = source.read(path, minimum=MINIMUM)
    reading = Reading(document.base, document.written)
    read = Section(CaSettings).read(document.tree, (), reading)
    findings = [*reading.findings, *([] if read is INVALID else _conflicts(read))]
    problems += [Problem(document.origin(f.path), render(f.path), f.found, f.fix) for f in findings]
    if read is INVALID or problems:
        raise ConfigError(problems)
    return read


def _conflicts(chosen: CaSettings) -> Iterator[Finding]:
    """What shows only when keys are compared."""
    signer, callers = chosen.signer, chosen.callers
    if (signer.cacerts is None) is (signer.self_signed is None):
        found = "names no directory" if signer.cacerts is None else "names two directories"
        yield Finding(("signer",), found, "give one of cacerts and self_signed")
    if not callers.jwt and callers.join_tokens is None:
        yield Finding(("callers",), "give no caller a first certificate", "give jwt or join_tokens; mtls only renews")
    for index, issuer in enumerate(callers.jwt):
        for key in ("ca_file", "token_file"):
            if getattr(issuer, key) is not None and not issuer.jwks.startswith("https://"):
                at = ("callers", "jwt", index, key)
                yield Finding(at, "is of no use: jwks is a file", "remove it, or give jwks a URL")
        if (url := _URL.fullmatch(issuer.jwks)) is not None and url["user"]:
            # neither quoted here nor, where the URL is logged, ever there
            fix = "take out what stands before the @; token_file names a file with a bearer token to send"
            yield Finding(("callers", "jwt", index, "jwks"), "holds a user's name or a password", fix)
    yield from _foreign(chosen)


def _foreign(chosen: CaSettings) -> Iterator[Finding]:
    ours = f"spiffe://{chosen.trust_domain}/"
    for index, issuer in enumerate(chosen.callers.jwt):
        for number, each in enumerate(issuer.allow):
            if not each.startswith(ours):
                yield Finding(
                    ("callers", "jwt", index, "allow", number), "is not in the trust domain", f"begin it with {ours}"
                )
    for index, agent in enumerate(chosen.callers.node_agents):
        at = ("callers", "node_agents", index)
        fix = f"begin it with {ours}"
        if not agent.identity.startswith(ours):
            yield Finding((*at, "identity"), "is not in the trust domain", fix)
        for number, each in enumerate(agent.may_act_for):
            if not each.startswith(ours):
                yield Finding((*at, "may_act_for", number), "is not in the trust domain", fix)
