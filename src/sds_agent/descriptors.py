"""File descriptors: how many connections the process has them for.

Most systems let a process have 1024 unless it asks for more. Without one to spare a server could not even write its
log, or read its files anew, so connections must never take the last.
"""

import logging
import resource

from sds_agent import log

LOG = logging.getLogger(__name__)

EACH = 3
"""What a connection takes: the client's side, and the two ends of the relay to gRPC."""
SPARE = 100
"""For all else: logs, files that are read anew, key sets that are fetched."""


def room_for(connections: int) -> int:
    """How many of so many connections there are descriptors for, once as many are asked for as the system allows."""
    wanted = EACH * connections + SPARE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return connections
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    fit = max(1, (allowed - SPARE) // EACH)
    if fit < connections:
        log.event(
            LOG, "few_descriptors", level=logging.WARNING, descriptors=allowed, connections=fit, configured=connections
        )
    return fit
