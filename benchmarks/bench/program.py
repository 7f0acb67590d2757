"""How a benchmark is called, and what it does where it cannot run."""

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from msgspec import Struct

from bench import figures
from bench.figures import Row

CANNOT_RUN = 3
"""The exit code of a benchmark that something is missing for; scripts/bench goes on with the next."""


class MissingError(Exception):
    """The benchmark cannot run here. The text says what is missing and how to install it."""


class FailedError(Exception):
    """What is measured did not do what it is there for. The text says what it did."""


class Peer(Struct, frozen=True):
    """Another program that serves secrets, running already: its socket, and its process for time and memory."""

    socket: Path
    pid: int

    @classmethod
    def parse(cls, text: str) -> "Peer":
        """Read SOCKET:PID. Raises argparse.ArgumentTypeError."""
        path, _, pid = text.rpartition(":")
        if not path or not pid.isdecimal():
            raise argparse.ArgumentTypeError(f"{text!r} is not SOCKET:PID, such as /run/peer/sds.sock:4711")
        if not Path(path).is_socket():
            raise argparse.ArgumentTypeError(f"there is no socket at {path}")
        if not Path(f"/proc/{pid}").is_dir():
            raise argparse.ArgumentTypeError(f"there is no process {pid}")
        return cls(Path(path), int(pid))


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes: --json and --small."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE too")
    made.add_argument("--small", action="store_true", help="a few seconds' worth: to see that it runs, not to measure")
    return made


def main(doc: str | None, arguments: argparse.Namespace, measure: Callable[[], Iterable[Row]]) -> None:
    """Measure, print, and write the JSON; the name of the benchmark is that of its program. Exits with `CANNOT_RUN`
    where something is missing, and with 1 where what is measured fails.
    """
    name = Path(sys.argv[0]).stem
    load = os.getloadavg()[0]
    try:
        rows = tuple(measure())
    except MissingError as missing:
        print(f"{name}: {missing}", file=sys.stderr)
        sys.exit(CANNOT_RUN)
    except FailedError as failed:
        print(f"{name}: {failed}", file=sys.stderr)
        sys.exit(1)
    print("\n".join(figures.lines(rows)))
    if arguments.json is not None:
        given = {key: _words(value) for key, value in vars(arguments).items() if key != "json" and value is not None}
        figures.write(figures.report(name, doc or "", given, rows, load), arguments.json)


def _words(value: object) -> str:
    """An argument as it is given on the command line."""
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def tool(name: str, package: str) -> str:
    """The path of a program. Raises MissingError."""
    found = shutil.which(name, path=os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))))
    if found is None:
        raise MissingError(f"it needs {name}: install it first ({package})")
    return found


def descriptors(needed: int) -> None:
    """See to it that this process and its children may open so many files. Raises MissingError."""
    import resource  # noqa: PLC0415 - not everywhere

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise MissingError(f"it opens {needed} files at one time and may open {hard}: raise the limit (ulimit -Hn)")
    if soft != resource.RLIM_INFINITY and soft < needed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment for a server that is measured: without what would change how Python or gRPC run."""
    unwanted = ("PYTHONDONTWRITEBYTECODE", "PYTHONPROFILEIMPORTTIME", "GRPC_TRACE", "GRPC_EXPERIMENTS")
    return {key: value for key, value in os.environ.items() if key not in unwanted} | dict(extra or {})
