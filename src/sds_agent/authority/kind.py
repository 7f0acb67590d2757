"""What a kind of upstream CA offers to the agent: its settings, what to check and say of them, and how to open an
`Authority`.

A kind is a module or a package with an object `KIND`. Every command that reads a configuration with the kind's name
imports that module, so the module imports its client only in `open`. The settings class declares the keys of the file,
and an object of it is all of the configuration that the client gets.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Generic, Protocol, TypeVar

from msgspec import Struct
from msgspec.structs import StructConfig

from sds_agent.authority.protocol import Authority, Supplier
from sds_agent.errors import Problem, ProblemsError

if TYPE_CHECKING:
    from sds_agent.clock import Clock  # and with it asyncio, for which no reading of a configuration waits


class AuthoritySettings(Protocol):
    """What a configuration says of one CA: a struct that is tagged with the name of its kind, `tag_field="type"`."""

    __struct_config__: ClassVar[StructConfig]
    __struct_fields__: ClassVar[tuple[str, ...]]


S = TypeVar("S", bound=AuthoritySettings)


class AskingWorkload(Protocol):
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

    `name` is the authority's name in the file. `workloads` are those that it issues for, by their index in the file.
    `keep_certificates` says whether their certificates outlive a restart of the agent.
    """

    name: str
    workloads: Mapping[int, AskingWorkload]
    keep_certificates: bool


class Context(Struct, frozen=True):
    """What the agent gives to one authority.

    `name` is the authority's name in the file. `directory` is its own directory below the agent's state directory; the
    authority makes it if it needs one. `clock` is the clock to read and to sleep by.
    """

    name: str
    trust_domain: str
    directory: Path
    clock: "Clock"

    def key(self, key: str) -> str:
        """One of the authority's keys as messages name it: `authorities.mesh.ca_file`."""
        return f"authorities.{self.name}.{key}"


def reject(conflicts: Iterable[Problem], context: Context) -> None:
    """Raise ProblemsError for keys of an authority that contradict each other, each with its place in the file.

    For `open`: whatever made the settings, no client may send a token without TLS because of them.
    """
    if wrong := tuple(conflicts):
        raise ProblemsError(each._replace(where=(context.key(".".join(map(str, each.where))),)) for each in wrong)


def _nothing(*_: object) -> tuple[()]:
    return ()


def _no_check(*_: object) -> None:
    return


def _spends_nothing(_: object) -> None:
    return


def _asks_anew(_: object) -> bool:
    return False


class Kind(Struct, Generic[S], frozen=True, kw_only=True):
    """One kind of CA: the class of its settings, and functions of such settings.

    All but `open` change nothing. `conflicts`, `workload_conflicts` and `federated` may get settings in which a value
    could not be read: that value is then false, and they report nothing that follows from it. The others get complete
    settings.
    """

    settings: type[S]
    open: Callable[[S, Context], AbstractAsyncContextManager[Authority | Supplier]]
    """Give an authority for as long as the context manager is open; at its end, also by a cancellation, close all that
    the authority has opened.

    A CA that cannot be reached is no error here: the agent asks it later, and serves cached certificates until then.
    Raises ConfigurationError where a person has to act first.
    """
    sentence: Callable[[S, str], str]
    """What the authority of this name is, for people, from `The authority NAME` to the full stop."""
    conflicts: Callable[[S], Iterable[Problem]] = _nothing
    """Keys that contradict each other. A problem's place is the key alone: `("ca_file",)`."""
    workload_conflicts: Callable[[S, Use], Iterable[Problem]] = _nothing
    """Workloads that the CA would not issue for. A problem's place is `(INDEX, "spiffe_id")`."""
    opens_without_files: bool = True
    """Whether `open` succeeds without the `files`. `sds-agent check` then warns of a missing one."""
    check: Callable[[S, Context], None] = _no_check
    """Raise the error of `open` as far as it can be found without a change to anything."""
    warnings: Callable[[S, Use], Iterable[str]] = _nothing
    """What is allowed and probably not meant: lines that begin with the key."""
    federated: Callable[[S], Iterable[str]] = _nothing
    """The other trust domains, as its key `federated` lists them, whose anchors the authority gives
    (`AdvertisesFederation`). It may know of more: those are not served.
    """
    secrets: tuple[str, ...] = ()
    """The keys that name files with secrets, such as `token_file`, or `auth.token_file` in a section: the agent warns
    where every user could read one.
    """
    holds_keys: tuple[str, ...] = ()
    """The keys that name directories with private keys, of which the same holds."""
    credentials: Callable[[S, Context], Iterable[Problem]] = _nothing
    """What is wrong with the credentials in the operator's files as they are now: expired, of the wrong kind, not to be
    read. A problem's place is the key alone. Nothing is sent to the CA to find out. Called in a thread, as it may read
    files; the agent starts all the same, for a good file may come later, and logs what is found.
    """
    supplies: bool = False
    """Whether `open` gives a `Supplier`: the workloads' `key` and `ttl` then have no effect."""
    spends: Callable[[S], str | None] = _spends_nothing
    """What a request without a current certificate would use up for good, such as a join token, in words that begin
    with the key; None where it costs nothing. Called in a thread, as it may read files.
    """
    renews: Callable[[S], bool] = _asks_anew
    """Whether the current certificate proves who asks for the next one, where the secrets are gone."""
    stores_state: bool = False
    """Whether the authority uses the directory in its context."""
    holds_ca: bool = False
    """Whether what it stores there is a CA of its own: without it all peers would have to be given another root."""

    def files(self, chosen: S) -> Mapping[str, Path]:
        """What the operator provides, by the keys that name it: every path in the settings, of a file or directory, and
        those in their sections: `auth.jwt_file`.
        """
        return dict(_paths(chosen))


def _paths(section: AuthoritySettings, prefix: str = "") -> Iterator[tuple[str, Path]]:
    for key in section.__struct_fields__:
        value = getattr(section, key)
        if isinstance(value, Path):
            yield f"{prefix}{key}", value
        elif isinstance(value, Struct):
            yield from _paths(value, f"{prefix}{key}.")
