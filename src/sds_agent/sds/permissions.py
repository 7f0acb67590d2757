"""Which clients may have which secrets, by the user and the groups of the process that has connected.

The kernel says who that was when it connected (unix(7), SO_PEERCRED and SO_PEERGROUPS), and no process that comes to
its number later can take its place. A secret without a rule is for every process that may connect.
"""

import itertools
import socket
import struct
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from sds_agent import accounts
from sds_agent.directories import UNMAPPED
from sds_agent.errors import Problem, ProblemsError
from sds_agent.sds.acceptor import credentials
from sds_agent.sds.catalog import Catalog
from sds_agent.sds.protocol import (
    LONGEST_NAME,
    MOST_REFUSED,
    Absence,
    Finish,
    Note,
    Refused,
    Resource,
    StatusCode,
)
from sds_agent.sds.status import NameStatus
from sds_agent.text import listing

LISTED = 250
"""Names of which a refused client is told those that it may ask for."""
_PEER_GROUPS = 59
"""SO_PEERGROUPS (asm-generic/socket.h), for which Python has no name: all supplementary groups of the process."""
_GROUPS_SIZE = 1024
"""Bytes that Python takes from the kernel at most: 256 groups."""


class Rule(Struct, frozen=True):
    """Who may have a secret: processes of these users, and those that have one of these groups. All are ids."""

    users: frozenset[int] = frozenset()
    groups: frozenset[int] = frozenset()


Rules = Mapping[str, Rule]
"""Each under the name of a secret."""


class Accounts:
    """The ids of users and groups, each looked up once: thousands of secrets may have the same."""

    def __init__(self) -> None:
        self._users: dict[str, int] = {}
        self._groups: dict[str, int] = {}

    def rule(self, users: Iterable[str], groups: Iterable[str], setting: str) -> Rule:
        """The rule for these users and groups, by name or number.

        Raises ProblemsError with `setting`, where they stand, for one that is not on this machine, and for the one that
        stands for many.
        """
        return Rule(
            _ids(users, accounts.user_id, self._users, f"{setting}.users", "user"),
            _ids(groups, accounts.group_id, self._groups, f"{setting}.groups", "group"),
        )


def _ids(
    names: Iterable[str], look_up: Callable[[str, str, str], int], known: dict[str, int], setting: str, kind: str
) -> frozenset[int]:
    for name in names:
        if name in known:
            continue
        found = look_up(name, setting, "make it, or name another")
        if found == UNMAPPED:
            problem = f"names the {kind} {name!r}, whose id {found} stands for each {kind} of other user namespaces"
            raise ProblemsError([Problem((setting,), problem, f"run those who may ask under a {kind} of their own")])
        known[name] = found
    return frozenset(known[name] for name in names)


class ClientProcess(Struct, frozen=True):
    """A process that has connected: its user, its group, and all its groups with that one, as ids."""

    user: int
    group: int
    groups: frozenset[int]

    def __str__(self) -> str:
        """For messages."""
        return f"a process of uid {self.user} and gid {self.group}"


def process_of(connected: socket.socket | None) -> ClientProcess | None:
    """The process that has connected to this end of a Unix socket; None where it has been closed."""
    if connected is None:
        return None
    try:
        _, user, group = credentials(connected)
    except OSError:
        return None
    packed = b""
    with suppress(OSError):  # it has more of them: then its own group and its user count, and nothing else
        packed = connected.getsockopt(socket.SOL_SOCKET, _PEER_GROUPS, _GROUPS_SIZE)
    return ClientProcess(user, group, frozenset((group, *struct.unpack(f"{len(packed) // 4}I", packed))))


class Permissions:
    """The rules that are in force. Those who look at a secret see the ones of that moment."""

    def __init__(self, rules: Rules) -> None:
        self._rules = dict(rules)

    def replace(self, rules: Rules) -> Mapping[str, Rule | None]:
        """Have these rules from now on; returns what the rule of each name was that has another one now."""
        before, self._rules = self._rules, dict(rules)
        names = before.keys() | rules.keys()
        return {name: before.get(name) for name in names if before.get(name) != rules.get(name)}

    def may(self, process: ClientProcess | None, name: str) -> bool:
        """Whether this process may have the secret of this name. None is one of which nothing is known."""
        return _lets(self._rules.get(name), process)


def _lets(rule: Rule | None, process: ClientProcess | None) -> bool:
    if rule is None:
        return True
    return process is not None and (process.user in rule.users or not rule.groups.isdisjoint(process.groups))


class VisibleCatalog:
    """What one process may have of a catalog (`protocol.View`). The rest is not there for it."""

    def __init__(self, catalog: Catalog, permissions: Permissions, process: ClientProcess | None) -> None:
        self._catalog = catalog
        self._permissions = permissions
        self._process = process

    def __getitem__(self, name: str) -> Resource | Absence:
        """The resource of this exact name, or why there is none."""
        return self._catalog[name] if self._permissions.may(self._process, name) else Absence.UNKNOWN

    def allowed(self, names: Iterable[str]) -> frozenset[str]:
        """Those of the names that the process may have, whether there is anything under them or not."""
        return frozenset(name for name in names if self._permissions.may(self._process, name))

    def is_other(self, name: str, before: Rule | None) -> bool:
        """Whether the process might have had the secret of this name by the rule `before` and may not now, or the other
        way round.
        """
        return _lets(before, self._process) != self._permissions.may(self._process, name)

    def former(self, name: str, version: str) -> Resource | None:
        """What was served under the name at that version, if it is still kept."""
        return self._catalog.former(name, version) if self._permissions.may(self._process, name) else None

    def want(self, client: object, names: Iterable[str]) -> None:
        """`client` (any hashable) asks for these names, and for no others any more."""
        self._catalog.want(client, names)

    def shown(self, name: str) -> str:
        """A name as views have it."""
        return self._catalog.shown(name)

    @property
    def names(self) -> tuple[str, ...]:
        """Those of the first `LISTED` names that the process may have: there are thousands, and it may ask often."""
        listed = itertools.islice(self._catalog.names, LISTED)
        return tuple(name for name in listed if self._permissions.may(self._process, name))

    @property
    def directories(self) -> tuple[Path, ...]:
        """The directories of which files may be asked for by name."""
        return self._catalog.directories

    def marked(self, names: Iterable[str], statuses: Iterable[NameStatus]) -> tuple[NameStatus, ...]:
        """The status of these names: nothing is on its way to a process that may not have it."""
        may, process = self._permissions.may, self._process
        pairs = zip(names, statuses, strict=True)
        return tuple(each if may(process, name) else replace(each, denied=True) for name, each in pairs)

    def explained(self, action: Note | Finish) -> list[Note | Finish]:
        """The same action; one that refuses names which the process may not have says so, of these alone."""
        if isinstance(action, Finish):
            return [self.denied(action)]
        if not isinstance(action, Refused):
            return [action]
        allowed = self.allowed(action.names)
        hidden = tuple(name for name in action.names if name not in allowed)
        if not hidden:
            return [action]
        others = tuple(name for name in action.names if name in allowed)
        refused = Refused(hidden, self._cause(hidden))
        return [refused, Refused(others)] if others else [refused]

    def denied(self, finish: Finish) -> Finish:
        """The same end; one for the sake of names which the process may not have says so."""
        if finish.code is not StatusCode.NOT_FOUND:
            return finish
        hidden = tuple(name for name in finish.names if not self._permissions.may(self._process, name))
        return Finish(StatusCode.PERMISSION_DENIED, finish.names, self._cause(hidden)) if hidden else finish

    def _cause(self, hidden: tuple[str, ...]) -> str:
        """Why it does not get these names, which it may not have."""
        process = self._process or "a process that has left"
        names = listing(hidden, MOST_REFUSED, LONGEST_NAME)
        return f"{process} may not have {names}: workloads[].clients names who may"
