"""The kinds of upstream CAs, by the name that a configuration gives as `type`. Each is imported on its first use.

Other packages add kinds through the entry point group GROUP: a distribution declares `NAME = "package.module:KIND"`
there, and the object is a `kind.Kind`. For a name in OURS the entry points are not read.
"""

from collections.abc import Mapping
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any

from msgspec import Struct

from sds_agent.authority.kind import AuthoritySettings, Kind
from sds_agent.configfile.phrases import quoted
from sds_agent.errors import Problem, ProblemsError
from sds_agent.text import one_line

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint, EntryPoints

OURS: Mapping[str, str] = {
    "embedded": "sds_agent.authority.embedded",
    "cacerts": "sds_agent.authority.cacerts",
    "istio": "sds_agent.authority.istio.kind",
    "step-ca": "sds_agent.authority.step_ca.kind",
    "vault": "sds_agent.authority.vault.kind",
    "cfssl": "sds_agent.authority.cfssl.kind",
    "est": "sds_agent.authority.est.kind",
    "kubernetes": "sds_agent.authority.kubernetes.kind",
    "spiffe": "sds_agent.authority.spiffe.kind",
    "files": "sds_agent.authority.files.kind",
}
"""The module of each kind of our own, in the order in which pages list them."""
GROUP = "sds_agent.authorities"

LONGEST_MESSAGE = 300
"""Characters of what another package's exception says."""


def names() -> list[str]:
    """Every name that a configuration may give: our own, then those of the other packages that are installed."""
    return [*OURS, *sorted({each.name for each in _installed()} - set(OURS))]


def find(name: str) -> Kind[Any] | None:
    """The kind of this name; None where there is none.

    Raises ProblemsError for another package's that cannot be used; the place of the problem is the key `type`.
    """
    return kind(name) if name in OURS or _installed().select(name=name) else None


def settings_of(name: str) -> type[Struct] | None:
    """The class of a kind's settings. Returns and raises as `find` does."""
    found = find(name)
    return None if found is None else found.settings


def kind_of(chosen: AuthoritySettings) -> Kind[Any]:
    """The kind whose settings these are."""
    return kind(name_of(chosen))


def name_of(chosen: AuthoritySettings) -> str:
    """The name of the kind whose settings these are."""
    return str(chosen.__struct_config__.tag)


@cache
def kind(name: str) -> Kind[Any]:
    """The kind of this name, which there is. Raises ProblemsError as `find` does."""
    if name in OURS:
        found: Kind[Any] = import_module(OURS[name]).KIND
        return found
    return _loaded(*_installed().select(name=name))


def _installed() -> "EntryPoints":
    from importlib.metadata import entry_points  # noqa: PLC0415 - measured: 20 ms

    return entry_points(group=GROUP)


def _loaded(offer: "EntryPoint", *others: "EntryPoint") -> Kind[Any]:
    if others:
        packages = " and ".join(sorted(_package(each) for each in (offer, *others)))
        raise _unusable(offer, f"which {packages} offer", "install one of them alone")
    offered, upgrade = f"which the package {_package(offer)} offers", "upgrade or remove that package"
    try:
        found = offer.load()
    except Exception as error:  # the import of another package may raise anything
        said = one_line(str(error), LONGEST_MESSAGE)
        cause = f"{offered} and which cannot be imported ({type(error).__name__}: {said})"
        raise _unusable(offer, cause, "install what it needs, or remove that package") from error
    if not isinstance(found, Kind) or not _declares_settings(found):
        cause = f"{offered}, but {offer.value} is no authority.kind.Kind with a settings class"
        raise _unusable(offer, cause, upgrade)
    tag = found.settings.__struct_config__.tag
    if tag != offer.name:
        cause = f"{offered}, but its settings have the type {quoted(str(tag))}"
        raise _unusable(offer, cause, upgrade)
    return found


def _declares_settings(found: Kind[Any]) -> bool:
    declared = getattr(found, "settings", None)
    return isinstance(declared, type) and issubclass(declared, Struct)


def _package(offer: "EntryPoint") -> str:
    return "unknown" if offer.dist is None else one_line(offer.dist.name, LONGEST_MESSAGE)


def _unusable(offer: "EntryPoint", found: str, fix: str) -> ProblemsError:
    return ProblemsError([Problem(("type",), f"is {quoted(offer.name)}, {found}", fix)])
