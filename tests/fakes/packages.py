"""Other people's packages with kinds of CAs, as pip would leave them in a directory of modules."""

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from sds_agent.authority import registry
from sds_agent.authority.registry import GROUP

LEASED = """
import os
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated

import asyncio
from msgspec import Meta, Struct

from sds_agent.authority.kind import Kind
from sds_agent.authority.protocol import AuthorityError, ErrorKind
from sds_agent.configfile.types import FilePath
from sds_agent.errors import ConfigurationError, Problem

class LeasedSettings(Struct, frozen=True, kw_only=True, tag="leased", tag_field="type"):
    '''A CA behind a connection that is leased.'''

    journal: Annotated[FilePath, Meta(description="Where each opening and closing is written.")]
    refuses: Annotated[bool, Meta(description="Whether to refuse to open.")] = False
    hangs: Annotated[bool, Meta(description="Whether to take for ever to open.")] = False
    breaks: Annotated[bool, Meta(description="Whether its credentials lead to a fault.")] = False
    reads: Annotated[FilePath | None, Meta(description="A file with its credentials.")] = None

class Leased:
    async def issue(self, request):
        raise AuthorityError(ErrorKind.TRANSIENT, "no lease is free")

@asynccontextmanager
async def _open(chosen, context):
    def write(what):
        with chosen.journal.open("a") as journal:
            journal.write(f"{what} {context.name}\\n")
    write("opening")
    try:
        if chosen.hangs:
            await asyncio.Event().wait()
        if chosen.refuses:
            raise ConfigurationError(f"{context.key('refuses')}: it is true")
        yield Leased()
    finally:
        await asyncio.sleep(0)
        write("closed")

def _conflicts(chosen):
    if chosen.refuses and chosen.hangs:
        yield Problem(("hangs",), "is true", "one of the two is enough")

def _credentials(chosen, context):
    if chosen.breaks:
        raise ImportError("cannot import name 'x' from 'y'")
    if chosen.reads is not None:
        chosen.reads.read_bytes()
    return ()

def _sentence(chosen, name):
    return f"The authority {name} is leased."

KIND = Kind(settings=LeasedSettings, open=_open, sentence=_sentence, conflicts=_conflicts, credentials=_credentials)
"""
"""A kind whose authorities write down that they were opened and closed."""


def install(folder: Path, package: str, offers: Mapping[str, str], modules: Mapping[str, str]) -> None:
    """Put a package with these entry points and modules where `folder` is a place for modules."""
    for module, source in modules.items():
        (folder / f"{module}.py").write_text(source)
    metadata = folder / f"{package.replace('-', '_')}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    lines = [f"{name} = {target}\n" for name, target in offers.items()]
    (metadata / "entry_points.txt").write_text(f"[{GROUP}]\n{''.join(lines)}")


@contextmanager
def leases(folder: Path) -> Iterator[Path]:
    """Install a package with the kind `leased` there, for this process, inside this context."""
    install(folder, "acme-leases", {"leased": "acme_leases:KIND"}, {"acme_leases": LEASED})
    sys.path.append(str(folder))
    try:
        yield folder
    finally:
        sys.path.remove(str(folder))
        registry.kind.cache_clear()
