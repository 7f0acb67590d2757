"""The kind `istio`. The agent asks its CA for the first time after the start, so the start needs none of its files.

Each request has a connection of its own, so an authority has nothing to close.
"""

import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

from sds_agent.authority.istio.settings import IstioSettings, conflicts, second_identities
from sds_agent.authority.kind import Context, Kind, Use, reject
from sds_agent.authority.protocol import Authority, AuthorityError
from sds_agent.errors import Problem

JOIN_TOKEN = "sds-join-"  # noqa: S105 - how a token begins, not a token
"""How `sds-agent ca token` begins each token."""


@asynccontextmanager
async def _open(chosen: IstioSettings, context: Context) -> AsyncIterator[Authority]:
    """A client of these addresses. Raises ProblemsError for keys that contradict each other."""
    from sds_agent.authority.istio.client import IstioAuthority  # noqa: PLC0415 - measured: 89 ms

    reject(conflicts(chosen), context)
    yield IstioAuthority(chosen, context.clock)


def _renews(chosen: IstioSettings) -> bool:
    """Over TLS, for the identity of the certificate itself."""
    return chosen.mtls and not chosen.impersonate and not chosen.plaintext_loopback


def _sentence(chosen: IstioSettings, name: str) -> str:
    plain = chosen.plaintext_loopback
    way = "without TLS" if plain else f"over TLS; the roots in {chosen.ca_file} vouch for it"
    proofs = []
    if _renews(chosen):
        proofs.append("its current certificate")
        if chosen.provisioned is not None:
            proofs.append(f"before the first the certificate in {chosen.provisioned}")
    if chosen.token_file is not None:
        proofs.append(f"the token in {chosen.token_file}")
    asks = "asks it for other identities than its own" if chosen.impersonate else "asks it for its own identity"
    return (
        f"The authority {name} speaks Istio's protocol at {', then '.join(chosen.address)}, {way}. The agent {asks} "
        f"and shows {', or else '.join(proofs)}."
    )


def _warnings(chosen: IstioSettings, use: Use) -> Iterator[str]:
    if chosen.token_file is not None and not use.keep_certificates:
        yield (
            f"keep_certificates: it is false, so after a restart the agent has only the token in {chosen.token_file} "
            f"for the authority {use.name}; a join token is spent by then, and the agent stays without a certificate"
        )


def _credentials(chosen: IstioSettings, context: Context) -> Iterator[Problem]:
    """Whether the token can be read, and has not expired. One that is gone was used, as a join token is."""
    from sds_agent.authority.credentials import as_problem, read_token, token_fault  # noqa: PLC0415 - measured: 20 ms

    if chosen.token_file is None or not os.path.lexists(chosen.token_file):
        return
    try:
        fault = token_fault(read_token(chosen.token_file), context.clock.now())
    except AuthorityError as error:
        yield as_problem("token_file", error)
    else:
        if fault is not None:
            yield fault.within("token_file")


def _spends(chosen: IstioSettings) -> str | None:
    """A join token of `sds-agent ca token` serves once; a provisioned certificate is shown before it."""
    from sds_agent.authority.credentials import read_token  # noqa: PLC0415 - measured: 20 ms

    if chosen.token_file is None or chosen.provisioned is not None:
        return None
    try:
        token = read_token(chosen.token_file)
    except AuthorityError:
        return None
    found = f"token_file: the join token in {chosen.token_file} serves once"
    return found if token.text.startswith(JOIN_TOKEN) else None


KIND = Kind(
    settings=IstioSettings,
    open=_open,
    sentence=_sentence,
    conflicts=conflicts,
    workload_conflicts=second_identities,
    warnings=_warnings,
    spends=_spends,
    renews=_renews,
    credentials=_credentials,
    secrets=("token_file",),
)
