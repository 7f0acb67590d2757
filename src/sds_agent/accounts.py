"""The users and groups that a configuration names, and whether this process may give them a file.

All functions take the name of the setting, for messages, and raise ProblemsError.
"""

import grp
import os
import pwd
from contextlib import suppress
from pathlib import Path

from sds_agent.errors import Problem, ProblemsError

_CAP_CHOWN = 0
"""The number of the capability (linux/capability.h)."""

UNCHANGED = -1
"""The id that chown(2) takes for "leave it as it is"."""


def user_id(name: str | None, setting: str, otherwise: str = "") -> int:
    """The id of a user, by name or number; UNCHANGED for None. `otherwise` is what to do where nobody has the name."""
    if name is None:
        return UNCHANGED
    try:
        return int(name) if name.isdecimal() else pwd.getpwnam(name).pw_uid
    except KeyError as error:
        raise _unknown("user", name, setting, otherwise) from error


def group_id(name: str | None, setting: str, otherwise: str = "") -> int:
    """The id of a group, by name or number; UNCHANGED for None. `otherwise` likewise."""
    if name is None:
        return UNCHANGED
    try:
        return int(name) if name.isdecimal() else grp.getgrnam(name).gr_gid
    except KeyError as error:
        raise _unknown("group", name, setting, otherwise) from error


def may_give_to_user(user: int) -> bool:
    """Whether this process may give its files to the user."""
    return user in {UNCHANGED, os.geteuid()} or may_change_owner()


def may_give_to_group(group: int) -> bool:
    """Whether this process may give its files to the group."""
    return group in {UNCHANGED, os.getegid(), *os.getgroups()} or may_change_owner()


def may_change_owner() -> bool:
    """Whether this process may change a file's owner (capabilities(7)). True where the kernel does not say."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("CapEff:"):
                return bool(int(line.split()[1], 16) & 1 << _CAP_CHOWN)
    return True


def _unknown(what: str, name: str, setting: str, otherwise: str) -> ProblemsError:
    found = f"there is no {what} {name!r} on this machine"
    return ProblemsError([Problem((setting,), found, otherwise or f"make it, name another, or leave {setting} out")])
