"""The kind `vault`. The agent asks its server for the first time after the start, so the start needs none of its files.

Each request has a connection of its own. A task that renews the agent's token lives as long as the authority is open.
"""

from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager

from sds_agent.authority.kind import Context, Kind, Use, reject
from sds_agent.authority.protocol import Authority
from sds_agent.authority.vault.settings import (
    VaultAppRoleAuth,
    VaultJwtAuth,
    VaultKubernetesAuth,
    VaultSettings,
    VaultTokenAuth,
    conflicts,
)
from sds_agent.errors import Problem


@asynccontextmanager
async def _open(chosen: VaultSettings, context: Context) -> AsyncIterator[Authority]:
    """A client of these servers. Raises ProblemsError for keys that contradict each other."""
    from sds_agent.authority.vault.client import VaultAuthority  # noqa: PLC0415 - measured: 70 ms
    from sds_agent.authority.vault.nodes import VaultNodes  # noqa: PLC0415 - measured: as above
    from sds_agent.authority.vault.session import VaultSession  # noqa: PLC0415 - measured: as above
    from sds_agent.tasks import background_tasks  # noqa: PLC0415 - measured: as above

    reject(conflicts(chosen), context)
    nodes = VaultNodes(chosen, context.clock)
    session = VaultSession(context.name, chosen, nodes, context.clock)
    async with background_tasks() as start:
        start(session.keep())
        yield VaultAuthority(chosen, nodes, session)


def _sentence(chosen: VaultSettings, name: str) -> str:
    file = chosen.roots_file
    roots = "the engine's self-signed issuers" if file is None else f"the certificates in {file}"
    return (
        f"The authority {name} is the role {chosen.role} of the PKI engine {chosen.mount} of Vault or OpenBao at "
        f"{', then '.join(chosen.url)}. The agent authenticates by {_proof(chosen)}; the trust "
        f"domain's roots are {roots}."
    )


def _proof(chosen: VaultSettings) -> str:
    match chosen.auth:
        case VaultTokenAuth(token_file=file):
            return f"the token in {file}"
        case VaultAppRoleAuth(secret_id_file=secret):
            shown = "the role ID alone" if secret is None else f"the secret ID in {secret}"
        case VaultKubernetesAuth(jwt_file=file) | VaultJwtAuth(jwt_file=file):
            shown = f"the JWT in {file}"
        case _:
            shown = f"the certificate in {chosen.certificate_file}"
    return f"the auth method {chosen.auth.__struct_config__.tag} with {shown}"


def _warnings(chosen: VaultSettings, use: Use) -> Iterator[str]:
    if isinstance(chosen.auth, VaultAppRoleAuth) and chosen.auth.secret_id_file is None:
        yield f"authorities.{use.name}.auth.secret_id_file: it is left out, so the role ID alone logs the agent in"


def _credentials(chosen: VaultSettings, context: Context) -> Iterable[Problem]:
    from sds_agent.authority.vault.proofs import faults  # noqa: PLC0415 - measured: 73 ms

    return faults(chosen, context.clock.now())


KIND = Kind(
    settings=VaultSettings,
    open=_open,
    sentence=_sentence,
    conflicts=conflicts,
    warnings=_warnings,
    secrets=("auth.token_file", "auth.jwt_file", "auth.secret_id_file", "key_file"),
    credentials=_credentials,
)
