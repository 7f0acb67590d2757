"""File descriptors: how many connections the process can have with those that it is allowed.

Most systems allow a process 1024 unless it asks for more. Without a spare one a server could neither write its log nor
read its files again, so connections must not take the last.
"""

import logging
import resource

from sds_agent import log

LOG = logging.getLogger(__name__)

EACH = 3
"""Descriptors of a connection: the client's side, and the two ends of the relay to gRPC."""
SPARE = 100
"""Descriptors for all else: logs, files that are read again, key sets that are fetched."""
NEEDED = 40
"""Descriptors of `SPARE` that a process needs in any case. Where there are few, connections get half of the others."""


def room_for(connections: int) -> int:
    """Raise the process's limit as far as needed and allowed; returns how many of `connections` it is enough for."""
    wanted = EACH * connections + SPARE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return connections
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    fit = max(1, (allowed - SPARE) // EACH, (allowed - NEEDED) // (2 * EACH))
    if fit < connections:
        log.event(
            LOG, "few_descriptors", level=logging.WARNING, descriptors=allowed, connections=fit, configured=connections
        )
    return fit


def share_for(connections: int) -> int:
    """How many of `connections` a part that is not what the process is for may have, where there are few descriptors.

    Each of them takes one. They get a quarter of what the process does not need in any case, and one at least.
    """
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if allowed == resource.RLIM_INFINITY:
        return connections
    return max(1, min(connections, (allowed - NEEDED) // 4))
