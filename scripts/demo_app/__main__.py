"""The start of the demonstration, which can be stopped at any moment: also while its libraries are imported."""

import signal
import sys

STOPPED = 130


def start() -> int:
    """Run it; returns the exit code."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.default_int_handler)  # so that they too let it remove what it has made
    try:
        from .program import main  # noqa: PLC0415 - it imports for most of a second

        return main()
    except KeyboardInterrupt:
        return STOPPED


sys.exit(start())
