"""The kind `cfssl`. The agent asks its CA for the first time after the start, so the start needs none of its files.

Each request has a connection of its own, so an authority has nothing to close.
"""

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from sds_agent.authority.cfssl.settings import CfsslSettings, conflicts
from sds_agent.authority.kind import Context, Kind, reject
from sds_agent.authority.protocol import Authority
from sds_agent.errors import Problem


@asynccontextmanager
async def _open(chosen: CfsslSettings, context: Context) -> AsyncIterator[Authority]:
    """A client of this server. Raises ProblemsError for keys that contradict each other."""
    from sds_agent.authority.cfssl.client import CfsslAuthority  # noqa: PLC0415 - measured: 54 ms

    reject(conflicts(chosen), context)
    yield CfsslAuthority(chosen, context.clock)


def _sentence(chosen: CfsslSettings, name: str) -> str:
    vouched = "without TLS" if chosen.ca_file is None else f"over TLS; the roots in {chosen.ca_file} vouch for it"
    profile = "the default profile" if chosen.profile is None else f"the profile {chosen.profile}"
    proofs = [f"signs its requests with the key in {chosen.auth_key_file}"] if chosen.auth_key_file is not None else []
    if chosen.certificate_file is not None:
        proofs.append(f"shows the certificate in {chosen.certificate_file}")
    how = " and ".join(proofs) or "shows nothing: every client gets a certificate"
    return f"The authority {name} is CFSSL at {chosen.url}, {vouched}. The agent asks for {profile} and {how}."


def _credentials(chosen: CfsslSettings, context: Context) -> Iterable[Problem]:
    from sds_agent.authority.cfssl.files import problems  # noqa: PLC0415 - measured: 54 ms

    return problems(chosen, context.clock.now())


KIND = Kind(
    settings=CfsslSettings,
    open=_open,
    sentence=_sentence,
    conflicts=conflicts,
    secrets=("auth_key_file", "key_file"),
    credentials=_credentials,
)
