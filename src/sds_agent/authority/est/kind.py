"""The kind `est`. The agent asks its CA for the first time after the start, so the start needs none of its files.

Each request has a connection of its own. One with a password may outlive its attempt, until the authority is closed.
"""

from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager

from sds_agent.authority.est.settings import EstSettings, conflicts
from sds_agent.authority.kind import Context, Kind, Use, reject
from sds_agent.authority.protocol import Authority
from sds_agent.errors import Problem


@asynccontextmanager
async def _open(chosen: EstSettings, context: Context) -> AsyncIterator[Authority]:
    """A client of this server. Raises ProblemsError for keys that contradict each other."""
    from sds_agent.authority.est.client import EstAuthority  # noqa: PLC0415 - measured: 48 ms

    reject(conflicts(chosen), context)
    authority = EstAuthority(chosen, context.clock)
    try:
        yield authority
    finally:
        await authority.end()


def _sentence(chosen: EstSettings, name: str) -> str:
    proofs = [] if chosen.username is None else [f"the password of {chosen.username} in {chosen.password_file}"]
    if chosen.certificate_file is not None:
        proofs.append(f"the certificate in {chosen.certificate_file}")
    renewal = "renews with its current certificate" if chosen.reenroll else "does the same for every certificate"
    label = "" if chosen.label is None else f" (label {chosen.label})"
    return (
        f"The authority {name} speaks EST at {chosen.url}{label}; the roots in {chosen.ca_file} vouch for it. The "
        f"agent enrolls with {' and '.join(proofs)} and {renewal}."
    )


def _warnings(chosen: EstSettings, use: Use) -> Iterator[str]:
    if chosen.reenroll and not use.keep_certificates:
        yield (
            "keep_certificates: it is false, so after a restart the agent enrolls anew with the authority "
            f"{use.name}; a password that can be used only once is spent by then"
        )


def _credentials(chosen: EstSettings, context: Context) -> Iterable[Problem]:
    from sds_agent.authority.est.files import problems  # noqa: PLC0415 - measured: 47 ms

    return problems(chosen, context.clock.now())


KIND = Kind(
    settings=EstSettings,
    open=_open,
    sentence=_sentence,
    conflicts=conflicts,
    warnings=_warnings,
    secrets=("password_file", "key_file"),
    credentials=_credentials,
    renews=lambda chosen: chosen.reenroll,
)
