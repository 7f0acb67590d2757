"""The settings of the kind `step-ca`, and which of them do not go together."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, TypeAlias

from msgspec import Meta, Struct

from sds_agent.authority.http_settings import REFRESH_EVERY, ClientKeyFile, RefreshEvery, ServerName, ServerUrl
from sds_agent.configfile.types import FilePath, UnacceptableError, custom, matching, text
from sds_agent.errors import Problem

_FINGERPRINT_PATTERN = "^([0-9A-Fa-f]{64}|([0-9A-Fa-f]{2}:){31}[0-9A-Fa-f]{2})$"


def _fingerprint(value: object, _base: Path) -> str:
    """In lower case and without the colons that OpenSSL prints."""
    written = text(value)
    if not re.fullmatch(_FINGERPRINT_PATTERN, written):
        raise UnacceptableError
    return written.replace(":", "").lower()


ProvisionerName: TypeAlias = Annotated[
    str, matching(r"^[ -~]{1,253}$", "1 to 253 printable characters of ASCII, as ca.json has the name")
]
Fingerprint: TypeAlias = Annotated[
    str,
    custom(
        _fingerprint,
        "the SHA-256 of a root in 64 hexadecimal digits, as `step certificate fingerprint` prints it",
        {"type": "string", "pattern": _FINGERPRINT_PATTERN},
    ),
]


class StepCaSettings(Struct, frozen=True, kw_only=True, tag="step-ca", tag_field="type"):
    """Smallstep's step-ca: certificates by a JWK or an X5C provisioner, renewed over mTLS."""

    url: Annotated[ServerUrl, Meta(description="Where step-ca listens, such as https://ca.example:9000.")]
    fingerprint: Annotated[
        Fingerprint | None,
        Meta(
            description="The SHA-256 of the root's DER. The agent gets that root from step-ca and trusts it, and the "
            "roots that step-ca announces later, for step-ca's server.",
        ),
    ] = None
    ca_file: Annotated[
        FilePath | None,
        Meta(
            description="The roots (PEM) that vouch for step-ca's server, read anew for every connection, in place of "
            "fingerprint.",
        ),
    ] = None
    server_name: Annotated[
        ServerName | None,
        Meta(
            description="One of step-ca's dnsNames, where the host in url is none: for its server's certificate, and "
            "the audience of tokens.",
        ),
    ] = None
    provisioner: Annotated[
        ProvisionerName, Meta(description="The name of the provisioner in ca.json that the agent's tokens are for.")
    ]
    jwk_file: Annotated[
        FilePath | None,
        Meta(
            description="The private key of a JWK provisioner, read anew for every token: a JWK, or the encrypted JWE "
            "that step writes.",
        ),
    ] = None
    password_file: Annotated[
        FilePath | None, Meta(description="The file with the password of the key in jwk_file, if that is encrypted.")
    ] = None
    certificate_file: Annotated[
        FilePath | None,
        Meta(
            description="The certificate for an X5C provisioner, with its intermediates (PEM), read anew for every "
            "token, in place of jwk_file.",
        ),
    ] = None
    key_file: ClientKeyFile = None
    rekey: Annotated[
        bool,
        Meta(
            description="Renew over mTLS with the current certificate; where that cannot be, with a token. Turned off: "
            "always with a token.",
        ),
    ] = True
    federation: Annotated[
        bool, Meta(description="Let workloads trust the roots in step-ca's federatedRoots beside its own.")
    ] = True
    revocation_lists: Annotated[
        bool,
        Meta(
            description="Serve step-ca's revocation list with the trust bundle, so that Envoys refuse revoked peers. "
            "Left out where that would make them refuse others."
        ),
    ] = False
    refresh_every: RefreshEvery = REFRESH_EVERY


def conflicts(chosen: StepCaSettings) -> Iterator[Problem]:
    """The keys of one authority that contradict each other. A problem's place is its key alone: `("ca_file",)`.

    A value that could not be read is false; no check reports it as missing or as wrong.
    """
    yield from _server(chosen)
    yield from _proof(chosen)


def _server(chosen: StepCaSettings) -> Iterator[Problem]:
    if chosen.url and not chosen.url.startswith("https:"):
        yield Problem(("url",), "begins with http", "step-ca issues over TLS alone: write https")
    elif chosen.ca_file and chosen.fingerprint:
        fix = "the file that ca_file names has the roots already: keep one of the two"
        yield Problem(("fingerprint",), "is given", fix)
    elif chosen.url and chosen.ca_file is None and chosen.fingerprint is None:
        fix = (
            "without it nothing vouches for step-ca's server: write what `step certificate fingerprint root_ca.crt` "
            "prints, or name the root's file in ca_file"
        )
        yield Problem(("fingerprint",), "is missing", fix)


def _proof(chosen: StepCaSettings) -> Iterator[Problem]:
    jwk, certificate, key = chosen.jwk_file, chosen.certificate_file, chosen.key_file
    if jwk is None and certificate is None and key is None:
        fix = "name the provisioner's private key, or certificate_file and key_file for an X5C provisioner"
        yield Problem(("jwk_file",), "is missing", fix)
    elif jwk and (certificate or key):
        fix = "it is for a JWK provisioner, and certificate_file and key_file are for an X5C one: keep one of the two"
        yield Problem(("jwk_file",), "is given", fix)
    elif jwk is None and certificate is None:
        yield Problem(("certificate_file",), "is missing", "name the certificate that belongs to key_file")
    elif jwk is None and key is None:
        yield Problem(("key_file",), "is missing", "name the key that belongs to certificate_file")
    if chosen.password_file and jwk is None and (certificate or key):
        fix = "it is the password of jwk_file; the key in key_file is not encrypted"
        yield Problem(("password_file",), "is given", fix)
