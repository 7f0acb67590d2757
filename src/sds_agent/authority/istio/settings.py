"""The settings of the kind `istio`, and which of them do not go together."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, TypeAlias

from msgspec import Meta, Struct

from sds_agent.authority.http_settings import ServerNameKey, check_brackets, is_loopback
from sds_agent.authority.kind import Use
from sds_agent.configfile.phrases import quoted
from sds_agent.configfile.types import FilePath, UnacceptableError, matching, one_or_several, text
from sds_agent.errors import Problem

_ADDRESS_PATTERN = r"^(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}$"


def _address(value: object, _base: Path) -> str:
    written = text(value)
    if not re.fullmatch(_ADDRESS_PATTERN, written) or not 0 < int(written.rpartition(":")[2]) < 65_536:
        raise UnacceptableError(
            f"{quoted(written)} is no such address: write a host and a port from 1 to 65535, and no scheme"
        )
    check_brackets(written)
    return written


Addresses: TypeAlias = Annotated[tuple[str, ...], one_or_several(_address, "HOST:PORT", _ADDRESS_PATTERN)]
Word: TypeAlias = Annotated[str, matching("^[!-~]{1,253}$", "1 to 253 printable characters of ASCII without spaces")]


class IstioSettings(Struct, frozen=True, kw_only=True, tag="istio", tag_field="type"):
    """A CA that speaks Istio's protocol: istiod, cert-manager's istio-csr, or `sds-agent ca serve`."""

    address: Annotated[
        Addresses,
        Meta(
            description="Where the CA is, HOST:PORT. Of several the first that is there is asked; after one has "
            "stepped in, the first has its turn again five minutes later.",
        ),
    ]
    ca_file: Annotated[
        FilePath | None,
        Meta(
            description="The roots (PEM) that vouch for the CA's server, read anew for every connection. Required with "
            "TLS.",
        ),
    ] = None
    server_name: ServerNameKey = None
    plaintext_loopback: Annotated[
        bool,
        Meta(
            description="Speak without TLS, to a CA on this machine alone. The token is then readable for every "
            "process that can read loopback.",
        ),
    ] = False
    token_file: Annotated[
        FilePath | None,
        Meta(description="The token that names the caller, read anew for every request; its audience is istio-ca."),
    ] = None
    mtls: Annotated[
        bool, Meta(description="Renew with the current certificate; where the CA refuses it, with the token alone.")
    ] = True
    provisioned: Annotated[
        FilePath | None,
        Meta(
            description="A directory with a certificate to ask with until the first one is issued: cert-chain.pem and "
            "key.pem.",
        ),
    ] = None
    impersonate: Annotated[
        bool,
        Meta(
            description="Ask for the workload's identity in the name of this node agent (ImpersonatedIdentity). "
            "Otherwise the CA signs the identity that the token or the certificate names.",
        ),
    ] = False
    cert_signer: Annotated[
        Word | None, Meta(description="The signer to use where the CA has several (CertSigner).")
    ] = None
    cluster_id: Annotated[
        Word | None, Meta(description="The cluster whose tokens these are (clusterid). Left out: the CA's own.")
    ] = None
    extra_anchors: Annotated[
        FilePath | None,
        Meta(description="Roots (PEM) to trust besides those that the CA advertises, read for every certificate."),
    ] = None


def conflicts(chosen: IstioSettings) -> Iterator[Problem]:
    """The keys of one authority that contradict each other. A problem's place is its key alone: `("ca_file",)`.

    A value that could not be read is false; no check reports it as missing or as wrong.
    """
    yield from _transport(chosen)
    yield from _caller(chosen)


def second_identities(chosen: IstioSettings, use: Use) -> Iterator[Problem]:
    """The workloads for which the CA of an authority does not sign. A problem's place is `(INDEX, "spiffe_id")`.

    The CA signs the identity that the token or the certificate names, and an authority has one of each.
    """
    asked = [(index, each.spiffe_id) for index, each in use.workloads.items() if each.spiffe_id]
    if chosen.impersonate or not asked:
        return
    first, own = asked[0]
    for index, identity in asked:
        if identity != own:
            yield Problem(
                (index, "spiffe_id"),
                f"is {quoted(identity)}, a second identity from the authority {use.name}",
                f"its CA signs one, the caller's own, which workloads[{first}] has: give this workload an authority "
                f"with a token of its own, or set authorities.{use.name}.impersonate where the CA lets this agent ask "
                "for others",
            )


def _transport(chosen: IstioSettings) -> Iterator[Problem]:
    if not chosen.plaintext_loopback:
        if chosen.ca_file is None:
            yield Problem(("ca_file",), "is missing", "without roots nothing vouches for the CA's server: name them")
        return
    if chosen.ca_file is not None:
        fix = "plaintext_loopback speaks without TLS and has no use for it: keep one of the two"
        yield Problem(("ca_file",), "is given", fix)
    for address in chosen.address or ():
        if not is_loopback(address.rpartition(":")[0].strip("[]")):
            fix = "a token never leaves it without TLS: turn plaintext_loopback off, or use 127.0.0.1"
            yield Problem(("address",), f"is {quoted(address)}, which is not on this machine", fix)


def _caller(chosen: IstioSettings) -> Iterator[Problem]:
    if chosen.token_file is not None:
        return
    if chosen.impersonate or chosen.plaintext_loopback:
        fix = "impersonate and plaintext_loopback go with a token alone: name its file"
    elif chosen.mtls is False:
        fix = "without mtls only a token names the caller: name its file"
    elif chosen.provisioned is None:
        fix = "the first certificate takes a token: name its file, or provisioned"
    else:
        return
    yield Problem(("token_file",), "is missing", fix)
