"""The kind `step-ca`. The agent asks its CA for the first time after the start, so the start needs none of its files.

Each request has a connection of its own, so an authority has nothing to close.
"""

from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from sds_agent.authority.kind import Context, Kind, reject
from sds_agent.authority.protocol import Authority
from sds_agent.authority.step_ca.settings import StepCaSettings, conflicts
from sds_agent.errors import Problem


@asynccontextmanager
async def _open(chosen: StepCaSettings, context: Context) -> AsyncIterator[Authority]:
    """A client of this server. Raises ProblemsError for keys that contradict each other."""
    from sds_agent.authority.step_ca.client import StepCaAuthority  # noqa: PLC0415 - measured: 78 ms

    reject(conflicts(chosen), context)
    yield StepCaAuthority(chosen, context)


def _sentence(chosen: StepCaSettings, name: str) -> str:
    roots = f"the roots in {chosen.ca_file}" if chosen.fingerprint is None else "the root with the pinned fingerprint"
    if chosen.jwk_file is not None:
        proof = f"the key in {chosen.jwk_file}"
    else:
        proof = f"the certificate in {chosen.certificate_file}"
    renewal = "and renews over mTLS" if chosen.rekey else "for every certificate"
    return (
        f"The authority {name} is step-ca at {chosen.url}; {roots} and those that it announces vouch for it. The agent "
        f"asks the provisioner {chosen.provisioner} with tokens by {proof} {renewal}."
    )


def _credentials(chosen: StepCaSettings, context: Context) -> Iterable[Problem]:
    from sds_agent.authority.step_ca.proof import StepCaProofs  # noqa: PLC0415 - measured: 100 ms

    return StepCaProofs(chosen).problems(context.clock.now())


KIND = Kind(
    settings=StepCaSettings,
    open=_open,
    sentence=_sentence,
    conflicts=conflicts,
    secrets=("jwk_file", "password_file", "key_file"),
    credentials=_credentials,
    renews=lambda chosen: chosen.rekey,
    stores_state=True,
)
