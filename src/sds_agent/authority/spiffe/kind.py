"""The kind `spiffe`: certificates and keys from another SPIFFE Workload API, such as that of SPIRE's agent."""

from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager, suppress

from sds_agent.authority.kind import Context, Kind
from sds_agent.authority.protocol import Supplier
from sds_agent.authority.spiffe.settings import SpiffeSettings
from sds_agent.errors import Problem, ProblemsError


@asynccontextmanager
async def _open(chosen: SpiffeSettings, context: Context) -> AsyncIterator[Supplier]:
    """The client, with its stream in a task that ends with this context. Raises ProblemsError as `_check` does."""
    from sds_agent.authority.spiffe.client import SpiffeSupplier  # noqa: PLC0415 - measured: 68 ms with gRPC, 5 beside the server
    from sds_agent.tasks import background_tasks  # noqa: PLC0415 - measured: 25 ms, asyncio's

    _check(chosen, context)
    supplier = SpiffeSupplier(chosen, context.trust_domain, context.clock)
    async with background_tasks() as start:
        start(supplier.run())
        yield supplier


def _check(chosen: SpiffeSettings, context: Context) -> None:
    if context.trust_domain in chosen.federated:
        found = f"has {context.trust_domain}, the agent's own trust domain"
        raise ProblemsError([Problem((context.key("federated"),), found, "remove it")])


def _credentials(chosen: SpiffeSettings, _: Context) -> Iterator[Problem]:
    """Whether another thing than a socket has the path. One that is not there yet is warned of as every file is."""
    with suppress(OSError):
        if chosen.socket.exists() and not chosen.socket.is_socket():
            yield Problem(("socket",), f"cannot be used: {chosen.socket} is no socket", "name the Workload API's")


def _sentence(chosen: SpiffeSettings, name: str) -> str:
    which = "" if chosen.hint is None else f", from the entries with the hint {chosen.hint}"
    others = f" It also gives the CA certificates of {', '.join(chosen.federated)}." if chosen.federated else ""
    return (
        f"The authority {name} is the SPIFFE Workload API at {chosen.socket}: it makes certificates and keys by "
        f"itself{which}, and the agent serves them as they come.{others}"
    )


def _federated(chosen: SpiffeSettings) -> Iterable[str]:
    return chosen.federated


KIND = Kind(
    settings=SpiffeSettings,
    open=_open,
    sentence=_sentence,
    check=_check,
    credentials=_credentials,
    federated=_federated,
    supplies=True,
)
