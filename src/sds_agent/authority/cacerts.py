"""The kind `cacerts`: a plugged-in CA in a directory of its operator's, followed as it changes."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Annotated

from msgspec import Meta, Struct

from sds_agent.authority.kind import Context, Kind
from sds_agent.authority.protocol import Authority
from sds_agent.configfile.types import FilePath
from sds_agent.errors import within

REFRESH = timedelta(seconds=5)
"""How often the directory is read when the agent requests no certificate. It is read for each certificate too."""


class CacertsSettings(Struct, frozen=True, kw_only=True, tag="cacerts", tag_field="type"):
    """A CA that is plugged in from a directory, in Istio's layout; the agent signs with it."""

    directory: Annotated[
        FilePath,
        Meta(
            description="The directory with ca-cert.pem, ca-key.pem, root-cert.pem and cert-chain.pem, or tls.crt, "
            "tls.key and ca.crt. It is read again when its content changes.",
        ),
    ]
    passphrase_file: Annotated[
        FilePath | None, Meta(description="The file with the key's passphrase. Left out: the key is not encrypted.")
    ] = None


@asynccontextmanager
async def _open(chosen: CacertsSettings, context: Context) -> AsyncIterator[Authority]:
    """The CA in the directory. Raises ProblemsError with everything that is wrong there."""
    from sds_agent.authority.in_process import InProcessAuthority  # noqa: PLC0415 - measured: 59 ms
    from sds_agent.signing.plugged import PluggedCa  # noqa: PLC0415 - measured: 59 ms

    with within(context.key("directory")):
        ca = await PluggedCa.open(
            chosen.directory,
            trust_domain=context.trust_domain,
            passphrase_file=chosen.passphrase_file,
            clock=context.clock,
        )
    yield InProcessAuthority(ca, f"the CA in {chosen.directory}", context.clock, REFRESH)


def _sentence(chosen: CacertsSettings, name: str) -> str:
    return (
        f"The authority {name} is the CA in the directory {chosen.directory}; the agent signs with it and reads it "
        "again when its files change."
    )


def _check(chosen: CacertsSettings, context: Context) -> None:
    from sds_agent.signing import directory  # noqa: PLC0415 - measured: 70 ms

    now = context.clock.now()
    with within(context.key("directory")):
        directory.check(chosen.directory, context.trust_domain, chosen.passphrase_file, now)


KIND = Kind(
    settings=CacertsSettings,
    open=_open,
    sentence=_sentence,
    opens_without_files=False,
    check=_check,
    secrets=("passphrase_file",),
    holds_keys=("directory",),
)
