"""A worker of `sds-agent ca serve`: a process that the server starts, and no command of its own.

It finds the package where the server did, whatever directory both are in, and takes no module from the working
directory.
"""

import signal
import sys
from collections.abc import Sequence

from sds_agent.cli import output
from sds_agent.hardening import keep_memory_private
from sds_agent.signals import SIGNALS

_PROGRAM = "import sys; sys.path[:] = sys.argv[2:]; from sds_agent.cli.ca_worker import main; main(int(sys.argv[1]))"


def command(descriptor: int) -> Sequence[str]:
    """What starts a worker whose parent is at the other end of that descriptor."""
    flags = [flag for flag, given in (("-E", sys.flags.ignore_environment), ("-s", sys.flags.no_user_site)) if given]
    return [sys.executable, "-P", *flags, "-c", _PROGRAM, str(descriptor), *sys.path]


def main(descriptor: int) -> None:
    """Work until the parent says that it is over, or ends."""
    for number in SIGNALS:  # at once: the imports below take a second
        signal.signal(number, signal.SIG_IGN)
    output.silence_warnings()
    keep_memory_private()  # where that fails, it failed for the parent too, which has said so
    from sds_agent.ca.workers import worker  # noqa: PLC0415 - gRPC comes after the protection

    worker.main(descriptor)
