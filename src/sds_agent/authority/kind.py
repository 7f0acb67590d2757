"""What the agent has to know of a kind of upstream CA before there is an `Authority`, and how one is opened and closed.

A kind is a module or a package of its own with an object `KIND`. It is imported as soon as a configuration names it, by
`sds-agent check` too, and imports its client only in `open`. Its settings class declares the keys of the file, and an
object of that class is all that the client gets of the configuration.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Generic, Protocol, TypeVar

from msgspec import Struct
from msgspec.structs import StructConfig

from sds_agent.authority.protocol import Authority
from sds_agent.errors import Problem

if TYPE_CHECKING:
    from sds_agent.clock import Clock  # and with it asyncio, for which no reading of a configuration waits


class AuthoritySettings(Protocol):
    """What a configuration says of one CA: a struct that is tagged with the name of its kind, `tag_field="type"`."""

    __struct_config__: ClassVar[StructConfig]


S = TypeVar("S", bound=AuthoritySettings)


class Client(Protocol):
    """What a kind may know of a workload that one of its authorities issues for."""

    @property
    def spiffe_id(self) -> str:
        """Its identity."""
        ...

    @property
    def ttl(self) -> timedelta:
        """How long its certificates are asked to be valid."""
        ...


class Use(Struct, frozen=True):
    """How a configuration uses an authority.

    `name` is the authority's in the file, `workloads` are those that it issues for, by their index in the file, and
    `keep_certificates` says whether the agent has their certificates again after a restart.
    """

    name: str
    workloads: Mapping[int, Client]
    keep_certificates: bool


class Context(Struct, frozen=True):
    """What the agent gives to an authority of its own.

    `name` is the authority's in the file. `directory` is its own place below the agent's state directory, and not there
    before the authority makes it. `clock` is the one to read and to wait by.
    """

    name: str
    trust_domain: str
    directory: Path
    clock: "Clock"

    def key(self, key: str) -> str:
        """One of the authority's keys as messages name it: `authorities.mesh.ca_file`."""
        return f"authorities.{self.name}.{key}"


def _nothing(*_: object) -> tuple[()]:
    return ()


def _no_files(_: object) -> Mapping[str, Path]:
    return {}


def _no_check(*_: object) -> None:
    return


class Kind(Struct, Generic[S], frozen=True, kw_only=True):
    """One kind of CA: the class of its settings, and functions of such settings.

    All but `open` change nothing. They are called with settings whose keys are right one by one; for `conflicts` and
    `misfits` a value that could not be read is false, so that every problem of a file is found at once.
    """

    settings: type[S]
    open: Callable[[S, Context], AbstractAsyncContextManager[Authority]]
    """Make an authority that lives as long as the context manager, and ends with all it holds, also when cancelled.

    A CA that cannot be reached is no reason to fail: the agent asks again, and serves what is cached meanwhile. Raises
    ConfigurationError where a person has to act first.
    """
    sentence: Callable[[S, str], str]
    """What the authority of this name is, for people, from `The authority NAME` to the full stop."""
    conflicts: Callable[[S], Iterable[Problem]] = _nothing
    """Keys that do not go together. A problem's place is its key alone: `("ca_file",)`."""
    misfits: Callable[[S, Use], Iterable[Problem]] = _nothing
    """Workloads that the CA would not issue for. A problem's place is `(INDEX, "spiffe_id")`."""
    files: Callable[[S], Mapping[str, Path]] = _no_files
    """What the operator provides, files and directories, by the keys that name them."""
    opens_without_files: bool = True
    """Whether `open` does not need these files, so that one that is missing is only worth a warning."""
    check: Callable[[S, Context], None] = _no_check
    """Raise what `open` would raise here and now, as far as it shows without a change to anything."""
    warnings: Callable[[S, Use], Iterable[str]] = _nothing
    """What is allowed and probably not meant, each a line that begins with the key."""
    keeps_state: bool = False
    """Whether the authority uses the directory in its context."""
