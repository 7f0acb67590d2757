"""What shows only when keys are compared: names that collide, and names that lead nowhere.

The settings may hold UNREAD values, which are false: a check passes over what could not be read and is made on the
rest, so that these problems are found together with those of single values.
"""

import os.path
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path

from sds_agent.admin.settings import unguarded, without_extra
from sds_agent.authority import registry
from sds_agent.config.settings import BUNDLE_NAME, Settings, WorkloadSettings
from sds_agent.configfile.phrases import KeyPath, did_you_mean, quoted
from sds_agent.configfile.reading import readable, was_read
from sds_agent.errors import Problem
from sds_agent.identity.spiffe import SpiffeId


def conflicts(chosen: Settings) -> Iterator[Problem]:
    """Everything that does not go together, by key path."""
    workloads = dict(readable(chosen.workloads))
    others = chosen.federated if was_read(chosen.authorities) else ()
    yield from _names(workloads, {BUNDLE_NAME, *(f"spiffe://{each}" for each in (chosen.trust_domain, *others))})
    yield from _identities(workloads)
    yield from _trust_domains(workloads, chosen.trust_domain)
    yield from _outputs(workloads)
    yield from _clients(workloads)
    yield from _given_to_everybody(workloads, chosen)
    yield from _encryption(chosen)
    yield from _sockets(chosen)
    if was_read(chosen.admin):
        yield from unguarded(chosen.admin)
    if was_read(chosen.telemetry):
        yield from without_extra(chosen.telemetry)
    if was_read(chosen.authorities):
        yield from _authorities(workloads, list(chosen.authorities))
        yield from _kinds(chosen)
        yield from _federated(chosen)


def _sockets(chosen: Settings) -> Iterator[Problem]:
    first = {os.path.normpath(chosen.state_dir): "state_dir"} if was_read(chosen.state_dir) else {}
    found = {
        "sds": was_read(chosen.sds) and chosen.sds.socket,
        "admin": was_read(chosen.admin) and chosen.admin.enabled and chosen.admin.socket,
    }
    for section, socket in found.items():
        key = f"{section}.socket"
        if socket and (other := first.setdefault(os.path.normpath(socket), key)) != key:
            fix = "give it one of its own, or leave it out"
            yield Problem((section, "socket"), f"is the path of {other} too", fix)


def _at(index: int, key: str) -> KeyPath:
    return ("workloads", index, key)


def _names(workloads: Mapping[int, WorkloadSettings], bundles: AbstractSet[str]) -> Iterator[Problem]:
    by_id = {each.spiffe_id: index for index, each in reversed(list(workloads.items())) if each.spiffe_id}
    by_name: dict[str, int] = {}
    for index, each in workloads.items():
        if not each.name:
            continue
        if each.name in bundles:
            found = f"is {quoted(each.name)}, a name of the trust bundle"
            yield Problem(_at(index, "name"), found, "choose another name")
        elif (other := by_id.get(each.name, index)) != index:
            found = f"is {quoted(each.name)}, which is also asked for as the SPIFFE ID of workloads[{other}]"
            yield Problem(_at(index, "name"), found, "choose another name")
        if (other := by_name.setdefault(each.name, index)) != index:
            found = f"is {quoted(each.name)}, the name of workloads[{other}] too"
            yield Problem(_at(index, "name"), found, "names must differ")


def _identities(workloads: Mapping[int, WorkloadSettings]) -> Iterator[Problem]:
    first: dict[str, int] = {}
    for index, each in workloads.items():
        if each.spiffe_id and (other := first.setdefault(each.spiffe_id, index)) != index:
            found = f"is {quoted(each.spiffe_id)}, the SPIFFE ID of workloads[{other}] too"
            fix = "one workload serves as many Envoys as ask for it: keep one"
            yield Problem(_at(index, "spiffe_id"), found, fix)


def _trust_domains(workloads: Mapping[int, WorkloadSettings], trust_domain: str) -> Iterator[Problem]:
    inside = f"spiffe://{trust_domain}/"
    for index, each in workloads.items():
        if not each.spiffe_id or not trust_domain or each.spiffe_id.startswith(inside):
            continue
        own = SpiffeId.parse(each.spiffe_id).trust_domain.name
        found = f"is {quoted(each.spiffe_id)}, in the trust domain {quoted(own)}"
        fix = f"it must be in trust_domain, which is {quoted(trust_domain)}: change one of the two"
        yield Problem(_at(index, "spiffe_id"), found, fix)


def _authorities(workloads: Mapping[int, WorkloadSettings], known: list[str]) -> Iterator[Problem]:
    for index, each in workloads.items():
        path = _at(index, "authority")
        if each.authority is None and len(known) > 1:
            fix = f"with several authorities it must be one of {', '.join(known)}, or a list of them in order"
            yield Problem(path, "is missing", fix)
        chosen = each.authority or ()
        for name in chosen:
            if name not in known:
                near = did_you_mean(name, known)
                fix = f"it must be one of {', '.join(known)}"
                found = f"is {quoted(name)}, which is no authority here"
                yield Problem(
                    path, found if len(chosen) == 1 else f"names {found[3:]}", f"{fix}; {near}" if near else fix
                )
        for name in sorted({name for name in chosen if chosen.count(name) > 1}):
            yield Problem(path, f"names {quoted(name)} more than once", "name each authority once, in order")


def _kinds(chosen: Settings) -> Iterator[Problem]:
    """What the kinds of the authorities find wrong with them, and with the workloads that they issue for."""
    for name, authority in chosen.authorities.items():
        if was_read(authority):
            kind = registry.kind_of(authority)
            yield from (each.within("authorities", name) for each in kind.conflicts(authority))
            found = kind.workload_conflicts(authority, chosen.use_of(name))
            yield from (each.within("workloads") for each in found)


def _federated(chosen: Settings) -> Iterator[Problem]:
    """A bundle of another trust domain comes from one authority, and never takes the place of the agent's own."""
    first: dict[str, str] = {}
    for name, domains in chosen.federation.items():
        for domain in domains:
            path: KeyPath = ("authorities", name, "federated")
            if domain == chosen.trust_domain:
                yield Problem(path, f"has {quoted(domain)}, the agent's own trust domain", "remove it")
            elif domain in first:
                other = "twice" if first[domain] == name else f"as authorities.{first[domain]}.federated has"
                yield Problem(path, f"has {quoted(domain)} {other}", "remove one: its bundle comes from one authority")
            first.setdefault(domain, name)


def _encryption(chosen: Settings) -> Iterator[Problem]:
    encryption = chosen.state_encryption
    if encryption is None or not was_read(encryption):
        return
    if encryption.key_file is None and encryption.credential is None:
        fix = "name the key: key_file for a file, or credential for one of systemd's"
        yield Problem(("state_encryption",), "names no key", fix)
    elif encryption.key_file is not None and encryption.credential is not None:
        yield Problem(("state_encryption", "credential"), "is given beside key_file", "keep one of the two")


def _clients(workloads: Mapping[int, WorkloadSettings]) -> Iterator[Problem]:
    for index, each in workloads.items():
        clients = each.clients
        if clients is None or not was_read(clients) or not all(map(was_read, (clients.users, clients.groups))):
            continue
        if not (clients.users or clients.groups):
            fix = "name users, groups or both; left out, every process that may connect may ask"
            yield Problem(_at(index, "clients"), "names nobody", fix)


def _given_to_everybody(workloads: Mapping[int, WorkloadSettings], chosen: Settings) -> Iterator[Problem]:
    """Keys that are for some alone, in files that each process may ask for by their names."""
    if not was_read(chosen.sds):
        return
    allowed = [os.path.normpath(each) for _, each in readable(chosen.sds.files)]
    for index, each in workloads.items():
        if each.clients is None or not each.output or not was_read(each.output.directory):
            continue
        directory = Path(os.path.normpath(each.output.directory))
        if above := next((place for place in allowed if directory.is_relative_to(place)), None):
            found = f"is below {quoted(above)}, from where every process that may connect gets files (sds.files)"
            yield Problem(_at(index, "output"), found, "write it elsewhere: clients says who may have its key")


def _outputs(workloads: Mapping[int, WorkloadSettings]) -> Iterator[Problem]:
    first: dict[str, int] = {}
    for index, each in workloads.items():
        directory = each.output and each.output.directory
        if directory and (other := first.setdefault(os.path.normpath(directory), index)) != index:
            found = f"is {quoted(str(directory))}, the output of workloads[{other}] too"
            fix = "each needs a directory of its own: the files have the same names"
            yield Problem(_at(index, "output"), found, fix)
