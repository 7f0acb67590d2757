"""What a configuration says of files that another program writes, and what goes together."""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from msgspec import Meta, Struct

from sds_agent.authority.kind import Use
from sds_agent.configfile.phrases import quoted
from sds_agent.configfile.types import FilePath
from sds_agent.errors import Problem


class FilesSettings(Struct, frozen=True, kw_only=True, tag="files", tag_field="type"):
    """A certificate, its key and the roots in files that another program writes; the agent serves them as they change.

    Name either `directory`, or `credential_file`, or `certificate_file` and `key_file`.
    """

    directory: Annotated[
        FilePath | None,
        Meta(
            description="A directory in which the files have the names of a known layout: tls.crt, tls.key and ca.crt; "
            "cert-chain.pem, key.pem and root-cert.pem; svid.pem, svid_key.pem and svid_bundle.pem; svid.0.pem, "
            "svid.0.key and bundle.0.pem; certificates.pem, private_key.pem and ca_certificates.pem; fullchain.pem and "
            "privkey.pem.",
        ),
    ] = None
    credential_file: Annotated[
        FilePath | None,
        Meta(description="One file (PEM) with the key, the certificate and its intermediates."),
    ] = None
    certificate_file: Annotated[
        FilePath | None, Meta(description="The certificate, and behind it its intermediates (PEM).")
    ] = None
    key_file: Annotated[
        FilePath | None, Meta(description="The key of the certificate (PEM): PKCS#8, PKCS#1 or SEC1.")
    ] = None
    roots_file: Annotated[
        FilePath | None,
        Meta(
            description="The roots (PEM) that the agent serves as the trust bundle. With `directory` it may be left "
            "out: the roots are then the layout's own file."
        ),
    ] = None
    password_file: Annotated[
        FilePath | None,
        Meta(description="The file with the password of the key. Left out: the key is not encrypted."),
    ] = None


def conflicts(chosen: FilesSettings) -> Iterator[Problem]:
    """The keys that contradict each other. A value that could not be read is false, and counts as given."""
    ways: dict[str, Path | None] = {
        "directory": chosen.directory,
        "credential_file": chosen.credential_file,
        "certificate_file": chosen.certificate_file,
    }
    given = [key for key, value in ways.items() if value is not None]
    if not given:
        fix = "name the file with the certificate, or credential_file, or directory"
        yield Problem(("certificate_file",), "is missing", fix)
    first, *others = [key for key in given if ways[key]] or [""]
    for key in others:
        yield Problem((key,), f"is given beside {first}", "each names the certificate: keep one of the two")
    if chosen.certificate_file is not None and chosen.key_file is None:
        yield Problem(("key_file",), "is missing", "name the file with the key of the certificate in certificate_file")
    if chosen.key_file and chosen.certificate_file is None and first:
        yield Problem(("key_file",), f"is given beside {first}", f"{first} leads to the key too: keep one of the two")
    if chosen.roots_file is None and chosen.directory is None and given:
        yield Problem(
            ("roots_file",), "is missing", "name the file with the roots, which vouch for the peers of the Envoys"
        )


def second_workloads(chosen: FilesSettings, use: Use) -> Iterator[Problem]:
    """The workloads beyond the first: the files hold one certificate, which has one SPIFFE ID."""
    del chosen
    asked = [(index, each.spiffe_id) for index, each in use.workloads.items() if each.spiffe_id]
    for index, identity in asked[1:]:
        yield Problem(
            (index, "spiffe_id"),
            f"is {quoted(identity)}, a second identity from the authority {use.name}",
            f"its files hold one certificate, which workloads[{asked[0][0]}] has: give this workload an authority with "
            "files of its own",
        )
