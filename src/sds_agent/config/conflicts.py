"""What shows only when keys are compared: names that collide, and names that lead nowhere.

Every question is put to what could be read, so these findings come together with those about single values.
"""

import os.path
from collections.abc import Iterator, Mapping
from pathlib import Path

from msgspec import Struct

from sds_agent.configfile.shapes import Finding, KeyPath, did_you_mean, quoted
from sds_agent.identity.spiffe import SpiffeId

BUNDLE_NAME = "ROOTCA"
"""A resource name of the trust bundle, as pilot-agent has it."""


class Workload(Struct, frozen=True):
    """What could be read of one workload; None for what is missing or wrong."""

    index: int
    name: str | None
    spiffe_id: str | None
    authority: str | None
    has_authority: bool
    output: Path | None = None

    def at(self, key: str) -> KeyPath:
        """The path of one of its keys."""
        return ("workloads", self.index, key)


class Draft(Struct, frozen=True):
    """What could be read of a configuration. `authorities` is None where their section is wrong."""

    trust_domain: str | None
    authorities: tuple[str, ...] | None
    workloads: tuple[Workload, ...]


def draft(tree: Mapping[str, object], values: Mapping[KeyPath, object], default_authority: str) -> Draft:
    """A draft from a tree and the scalars that were read from it."""
    authorities = tree.get("authorities", {default_authority: None})
    workloads = tree.get("workloads")
    return Draft(
        trust_domain=_text(values.get(("trust_domain",))),
        authorities=tuple(authorities) if isinstance(authorities, dict) and authorities else None,
        workloads=tuple(_workloads(workloads, values)) if isinstance(workloads, list) else (),
    )


def _workloads(items: list[object], values: Mapping[KeyPath, object]) -> Iterator[Workload]:
    for index, item in enumerate(items):
        name, spiffe_id, authority = (
            _text(values.get(("workloads", index, key))) for key in ("name", "spiffe_id", "authority")
        )
        has_authority = not isinstance(item, dict) or "authority" in item
        output = values.get(("workloads", index, "output"))
        yield Workload(index, name, spiffe_id, authority, has_authority, output if isinstance(output, Path) else None)


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def conflicts(configuration: Draft) -> Iterator[Finding]:
    """Everything that does not go together."""
    yield from _names(configuration)
    yield from _identities(configuration)
    yield from _trust_domains(configuration)
    yield from _authorities(configuration)
    yield from _outputs(configuration)


def _names(configuration: Draft) -> Iterator[Finding]:
    bundle = {BUNDLE_NAME}
    if configuration.trust_domain is not None:
        bundle.add(f"spiffe://{configuration.trust_domain}")
    by_id = {each.spiffe_id: each.index for each in reversed(configuration.workloads) if each.spiffe_id}
    by_name: dict[str, int] = {}
    for each in configuration.workloads:
        if each.name is None:
            continue
        if each.name in bundle:
            found = f"is {quoted(each.name)}, a name of the trust bundle"
            yield Finding(each.at("name"), found, "choose another name")
        elif (other := by_id.get(each.name, each.index)) != each.index:
            found = f"is {quoted(each.name)}, which is also asked for as the SPIFFE ID of workloads[{other}]"
            yield Finding(each.at("name"), found, "choose another name")
        if (other := by_name.setdefault(each.name, each.index)) != each.index:
            found = f"is {quoted(each.name)}, the name of workloads[{other}] too"
            yield Finding(each.at("name"), found, "names must differ")


def _identities(configuration: Draft) -> Iterator[Finding]:
    first: dict[str, int] = {}
    for each in configuration.workloads:
        if each.spiffe_id is None:
            continue
        if (other := first.setdefault(each.spiffe_id, each.index)) != each.index:
            found = f"is {quoted(each.spiffe_id)}, the SPIFFE ID of workloads[{other}] too"
            yield Finding(each.at("spiffe_id"), found, "one workload serves as many Envoys as ask for it: keep one")


def _trust_domains(configuration: Draft) -> Iterator[Finding]:
    for each in configuration.workloads:
        if each.spiffe_id is None or configuration.trust_domain is None:
            continue
        own = SpiffeId.parse(each.spiffe_id).trust_domain.name
        if own != configuration.trust_domain:
            found = f"is {quoted(each.spiffe_id)}, in the trust domain {quoted(own)}"
            fix = f"it must be in trust_domain, which is {quoted(configuration.trust_domain)}: change one of the two"
            yield Finding(each.at("spiffe_id"), found, fix)


def _authorities(configuration: Draft) -> Iterator[Finding]:
    known = configuration.authorities
    if known is None:
        return
    for each in configuration.workloads:
        path = each.at("authority")
        if not each.has_authority and len(known) > 1:
            yield Finding(path, "is missing", f"with several authorities it must be one of {', '.join(known)}")
        elif each.authority is not None and each.authority not in known:
            near = did_you_mean(each.authority, list(known))
            fix = f"it must be one of {', '.join(known)}"
            found = f"is {quoted(each.authority)}, which is no authority here"
            yield Finding(path, found, f"{fix}; {near}" if near else fix)


def _outputs(configuration: Draft) -> Iterator[Finding]:
    first: dict[str, int] = {}
    for each in configuration.workloads:
        if each.output is None:
            continue
        if (other := first.setdefault(os.path.normpath(each.output), each.index)) != each.index:
            found = f"is {quoted(str(each.output))}, the output of workloads[{other}] too"
            yield Finding(each.at("output"), found, "each needs a directory of its own: the files have the same names")
