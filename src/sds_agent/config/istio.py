"""The settings of the authority `istio`, and which of them do not go together."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Literal

from sds_agent.config.conflicts import Workload
from sds_agent.configfile.scalars import FLAG, PATH, text
from sds_agent.configfile.shapes import Finding, KeyPath, Scalar, UnacceptableError, quoted, setting, settings

MOST_ADDRESSES = 8
_ADDRESS_PATTERN = r"^(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}$"
_NAME_PATTERN = "^[A-Za-z0-9._-]{1,253}$"
_WORD_PATTERN = "^[!-~]{1,253}$"


def _addresses(value: object, _base: Path) -> tuple[str, ...]:
    written = value if isinstance(value, list) else [value]
    if not 0 < len(written) <= MOST_ADDRESSES:
        raise UnacceptableError(f"it has {len(written)} of them")
    return tuple(_address(each) for each in written)


def _address(value: object) -> str:
    written = text(value)
    if not re.fullmatch(_ADDRESS_PATTERN, written) or not 0 < int(written.rpartition(":")[2]) < 65_536:
        raise UnacceptableError(f"{quoted(written)} is no such address: no scheme, and a port from 1 to 65535")
    return written


def _matching(pattern: str, allowed: str) -> Scalar[str]:
    def parse(value: object, _base: Path) -> str:
        written = text(value)
        if not re.fullmatch(pattern, written):
            raise UnacceptableError
        return written

    return Scalar(allowed, parse, {"type": "string", "pattern": pattern})


ADDRESSES = Scalar(
    f"HOST:PORT, or a list of 1 to {MOST_ADDRESSES} of them",
    _addresses,
    {
        "type": ["string", "array"],
        "pattern": _ADDRESS_PATTERN,
        "minItems": 1,
        "maxItems": MOST_ADDRESSES,
        "items": {"type": "string", "pattern": _ADDRESS_PATTERN},
    },
    list,
)
_HOST_NAME = _matching(_NAME_PATTERN, "a host's name such as istiod.istio-system.svc")
_WORD = _matching(_WORD_PATTERN, "1 to 253 printable characters of ASCII without spaces")


@settings
class IstioSettings:
    """A CA that speaks Istio's protocol: istiod, cert-manager's istio-csr, or `sds-agent ca serve`."""

    type: ClassVar[Literal["istio"]] = "istio"

    address: tuple[str, ...] = setting(
        ADDRESSES,
        "Where the CA is, HOST:PORT. Of several the first that is there is asked; after one has stepped in, the first "
        "has its turn again five minutes later.",
    )
    ca_file: Path | None = setting(
        PATH,
        "The roots (PEM) that vouch for the CA's server, read anew for every connection. Required with TLS.",
        default=None,
    )
    token_file: Path | None = setting(
        PATH, "The token that names the caller, read anew for every request; its audience is istio-ca.", default=None
    )
    server_name: str | None = setting(
        _HOST_NAME, "The name in the certificate of the CA's server. Left out: the host of the address.", default=None
    )
    cluster_id: str | None = setting(
        _WORD, "The cluster whose tokens these are (clusterid). Left out: the CA's own.", default=None
    )
    cert_signer: str | None = setting(_WORD, "The signer to use where the CA has several (CertSigner).", default=None)
    impersonate: bool = setting(
        FLAG,
        "Ask for the workload's identity in the name of this node agent (ImpersonatedIdentity). Otherwise the CA signs "
        "the identity that the token or the certificate names.",
        default=False,
    )
    mtls: bool = setting(
        FLAG,
        "Renew with the certificate held; where the CA does not take it, with the token alone.",
        default=True,
    )
    provisioned: Path | None = setting(
        PATH,
        "A directory with a certificate to ask with until the first one is issued: cert-chain.pem and key.pem.",
        default=None,
    )
    extra_anchors: Path | None = setting(
        PATH, "Roots (PEM) to trust besides those that the CA tells, read anew with every certificate.", default=None
    )
    plaintext_loopback: bool = setting(
        FLAG,
        "Speak without TLS, to a CA on this machine alone. The token is then readable for every process that can read "
        "loopback.",
        default=False,
    )


def conflicts(
    tree: Mapping[str, object], values: Mapping[KeyPath, object], workloads: Sequence[Workload]
) -> Iterator[Finding]:
    """Everything that does not go together in the tree's authorities of this type, and in the workloads that they
    issue for. `values` are the tree's scalars.
    """
    authorities = tree.get("authorities")
    if not isinstance(authorities, dict):
        return
    for name, given in authorities.items():
        if isinstance(given, dict) and given.get("type") == IstioSettings.type:
            at = ("authorities", name)
            yield from _transport(at, given, values)
            yield from _caller(at, given, values)
            if values.get((*at, "impersonate")) is not True:
                only = len(authorities) == 1
                asking = [each for each in workloads if each.authority == name or (only and not each.has_authority)]
                yield from _identities(name, asking)


def _identities(authority: str, workloads: Sequence[Workload]) -> Iterator[Finding]:
    """What the CA signs is the identity that the token or the certificate names, and an authority has one of each."""
    first: Workload | None = None
    for each in workloads:
        if each.spiffe_id is None:
            continue
        first = first or each
        if each.spiffe_id != first.spiffe_id:
            found = f"is {quoted(each.spiffe_id)}, a second identity from the authority {authority}"
            fix = (
                f"its CA signs one, the caller's own, which workloads[{first.index}] has: give this workload an "
                f"authority with a token of its own, or set authorities.{authority}.impersonate where the CA lets this "
                "agent ask for others"
            )
            yield Finding(each.at("spiffe_id"), found, fix)


def _transport(at: KeyPath, given: Mapping[str, object], values: Mapping[KeyPath, object]) -> Iterator[Finding]:
    if values.get((*at, "plaintext_loopback")) is not True:
        if "ca_file" not in given:
            yield Finding(
                (*at, "ca_file"), "is missing", "without roots nothing vouches for the CA's server: name them"
            )
        return
    if "ca_file" in given:
        fix = "plaintext_loopback speaks without TLS and has no use for it: keep one of the two"
        yield Finding((*at, "ca_file"), "is given", fix)
    addresses = values.get((*at, "address"))
    for address in addresses if isinstance(addresses, tuple) else ():
        if not _on_this_machine(address):
            fix = "a token never leaves it without TLS: turn plaintext_loopback off, or use 127.0.0.1"
            yield Finding((*at, "address"), f"is {quoted(address)}, which is not on this machine", fix)


def _caller(at: KeyPath, given: Mapping[str, object], values: Mapping[KeyPath, object]) -> Iterator[Finding]:
    if "token_file" in given:
        return
    path = (*at, "token_file")
    if values.get((*at, "impersonate")) is True or values.get((*at, "plaintext_loopback")) is True:
        yield Finding(path, "is missing", "impersonate and plaintext_loopback go with a token alone: name its file")
    elif values.get((*at, "mtls")) is False:
        yield Finding(path, "is missing", "without mtls only a token names the caller: name its file")
    elif "provisioned" not in given:
        yield Finding(path, "is missing", "the first certificate takes a token: name its file, or provisioned")


def _on_this_machine(address: str) -> bool:
    import ipaddress  # noqa: PLC0415 - only asked where TLS is turned off

    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
