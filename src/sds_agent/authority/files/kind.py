"""The kind `files`. Another program writes the files, perhaps after the start, so the start needs none of them."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

from sds_agent.authority.files.settings import FilesSettings, conflicts, second_workloads
from sds_agent.authority.kind import Context, Kind, reject
from sds_agent.authority.protocol import Supplier
from sds_agent.errors import Problem


@asynccontextmanager
async def _open(chosen: FilesSettings, context: Context) -> AsyncIterator[Supplier]:
    """The files, followed for as long as this is open. Raises ProblemsError for keys that contradict each other."""
    from sds_agent.authority.files.client import FilesAuthority  # noqa: PLC0415 - measured: 12 ms
    from sds_agent.tasks import background_tasks  # noqa: PLC0415 - measured: 90 ms, those of asyncio

    reject(conflicts(chosen), context)
    authority = FilesAuthority(chosen, context.clock)
    async with background_tasks() as start:
        start(authority.follow())
        yield authority


def _sentence(chosen: FilesSettings, name: str) -> str:
    place = chosen.directory or chosen.credential_file or f"{chosen.certificate_file} and {chosen.key_file}"
    roots = "" if chosen.roots_file is None else f", with the roots in {chosen.roots_file},"
    return (
        f"The authority {name} is a program that writes a certificate and its key to {place}; the agent serves them"
        f"{roots} and reads them again when they change."
    )


def _credentials(chosen: FilesSettings, context: Context) -> Iterator[Problem]:
    from sds_agent.authority.files.client import find_problems  # noqa: PLC0415 - measured: 12 ms

    yield from find_problems(chosen, context.clock.now())


KIND = Kind(
    settings=FilesSettings,
    open=_open,
    sentence=_sentence,
    conflicts=conflicts,
    workload_conflicts=second_workloads,
    secrets=("credential_file", "key_file", "password_file"),
    holds_keys=("directory",),
    credentials=_credentials,
    supplies=True,
)
