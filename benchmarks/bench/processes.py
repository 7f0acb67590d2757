"""The programs that are measured: started, read and ended."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from bench.program import MissingError, environment

HERE = Path(__file__).parents[1]
STARTS_WITHIN = 30.0
"""Seconds in which a program has to listen at its socket."""


def agent_command(config: Path) -> list[str]:
    """The installed command, as a service manager would start it."""
    return [str(Path(sys.executable).with_name("sds-agent")), "run", str(config)]


def floor_command(socket: Path, *options: str) -> list[str]:
    """The bare server: see floor.py."""
    return [sys.executable, str(HERE / "floor.py"), str(socket), *options]


@contextmanager
def started(
    command: Sequence[str], path: Path, *, extra: Mapping[str, str] | None = None, log: Path | None = None
) -> Iterator[int]:
    """The pid of that program once it listens at its socket; it is ended when the context is left.

    Its standard error goes to `log`. Raises MissingError where it ends at once.
    """
    errors = subprocess.DEVNULL if log is None else os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with subprocess.Popen(command, env=environment(extra), stdout=subprocess.DEVNULL, stderr=errors) as program:
        try:
            deadline = time.monotonic() + STARTS_WITHIN
            while not _listens(path):
                if program.poll() is not None or time.monotonic() > deadline:
                    raise MissingError(f"{command[0]} does not serve at {path}")
                time.sleep(0.002)
            yield program.pid
        finally:
            program.terminate()
            if log is not None:
                os.close(errors)


def _listens(path: Path) -> bool:
    """Whether a server takes connections there: gRPC binds the path a moment before it listens."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        try:
            connection.connect(str(path))
        except OSError:
            return False
    return True


def processor_ms(pid: int) -> float:
    """Milliseconds that the threads of a process, those that are over too, have run (proc(5): stat, in ticks)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) * 1000 / os.sysconf("SC_CLK_TCK")


def precise_ms(pid: int) -> float:
    """Milliseconds that the threads of a process, those that are over too, have run, to the nanosecond.

    It is the process's CPU-time clock, by the number that clock_getcpuclockid(3) makes of the pid.
    """
    return time.clock_gettime_ns(~pid << 3 | 2) / 1e6


def family(pid: int) -> list[int]:
    """The process and all below it: a server may divide its work between processes."""
    found = [pid]
    for parent in found:
        for each in Path(f"/proc/{parent}/task").glob("*/children"):
            found += [int(child) for child in each.read_text().split()]
    return found


def clock_ms(pid: int) -> float:
    """Milliseconds that the process and those below it have run, threads that are over too, to the nanosecond: each
    process's clock (clock_getcpuclockid(3)).
    """
    return sum(time.clock_gettime((~each << 3) | 2) for each in family(pid)) * 1000


def resident_mb(pid: int) -> float:
    """Resident memory in MB (VmRSS)."""
    text = Path(f"/proc/{pid}/status").read_text().splitlines()
    return int(next(line for line in text if line.startswith("VmRSS")).split()[1]) / 1024


def open_files(pid: int) -> int:
    """How many descriptors it has open."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def threads(pid: int) -> int:
    """How many threads it has."""
    return len(list(Path(f"/proc/{pid}/task").iterdir()))
