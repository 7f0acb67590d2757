"""A process that holds private keys keeps its memory to itself: no core dump, and no other process may read it.

A core dump would put every key on disk, or send it to a crash collector. The kernel makes none of a process that is not
dumpable, whatever its core_pattern says, and gives what is in `/proc/PID` of it, its memory and its open files, to
privileged processes alone (prctl(2), PR_SET_DUMPABLE; proc(5)). The limit on core files is beside it for programs that
this one would start, as execve(2) makes them dumpable again.
"""

import os
import resource
from collections.abc import Mapping

from sds_agent import libc

ALLOW = "SDS_AGENT_DUMPABLE"
"""The environment variable that turns this off when it is 1: for a debugger, a profiler or a core dump."""

_PR_SET_DUMPABLE = 4


def keep_memory_private(environ: Mapping[str, str] = os.environ) -> bool:
    """Protect this process, before it has its first key; returns whether it is protected.

    The environment can turn it off, a sandbox may forbid it, and some Pythons can call no function of the C library.
    """
    if environ.get(ALLOW) == "1":
        return False
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))
    try:
        libc.call("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0)
    except OSError:
        return False
    return True
