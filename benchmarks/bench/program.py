"""How a benchmark is called, and what it does where it cannot run."""

import argparse
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from msgspec import Struct

from bench import figures
from bench.figures import Row

OUR_NAMES = (figures.FLOOR, "floor lean", "floor core", "agent", "agent beside", "sds-agent", "beside")
"""What our own rows are called."""

PEER_EXAMPLE = "pilot-agent 1.31=/run/peer/sds.sock:4711"

CANNOT_RUN = 3
"""The exit code of a benchmark that something is missing for; scripts/bench goes on with the next."""


class MissingError(Exception):
    """The benchmark cannot run here. The text says what is missing and how to install it."""


class FailedError(Exception):
    """What is measured did not do what it is there for. The text says what it did."""


class Peer(Struct, frozen=True):
    """Another program that serves secrets, running already: what its rows call it, its socket, and its process for time
    and memory.
    """

    name: str
    socket: Path
    pid: int

    @classmethod
    def parse(cls, text: str) -> "Peer":
        """Read NAME=SOCKET:PID; without a name it is called `peer PID`. Raises argparse.ArgumentTypeError."""
        name, place = label(text)
        path, _, pid = place.rpartition(":")
        if not path or not pid.isdecimal():
            raise argparse.ArgumentTypeError(f"{text!r} is not NAME=SOCKET:PID, such as {PEER_EXAMPLE!r}")
        if not Path(path).is_socket():
            raise argparse.ArgumentTypeError(f"there is no socket at {path}")
        if not Path(f"/proc/{pid}").is_dir():
            raise argparse.ArgumentTypeError(f"there is no process {pid}")
        return cls(name or f"peer {pid}", Path(path), int(pid))


class AppendPeer(argparse.Action):
    """Appends a peer to those before it, whose figures it would join if it had the name of one."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,  # noqa: ARG002 - argparse's
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,  # noqa: ARG002
    ) -> None:
        """Append it. Raises argparse.ArgumentError."""
        before: Sequence[Peer] = getattr(namespace, self.dest) or ()
        if any(each.name == values.name for each in before):
            raise argparse.ArgumentError(self, f"there are two peers called {values.name!r}: name each of them")
        setattr(namespace, self.dest, [*before, values])


def label(text: str) -> tuple[str, str]:
    """Read NAME=PLACE: what rows call a peer, with its version if it says so, and the rest; without NAME= the name is
    empty. What stands before a `=` in a path is no name. Raises argparse.ArgumentTypeError for a name that rows of ours
    have.
    """
    name, equals, place = text.partition("=")
    if not equals or "/" in name:
        return "", text
    if not name.strip():
        raise argparse.ArgumentTypeError(f"there is no name before the = in {text!r}")
    if name in OUR_NAMES:
        raise argparse.ArgumentTypeError(f"{name!r} is what rows of ours are called: give the peer another name")
    return name, place


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with what every benchmark takes: --json and --small."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--json", type=Path, metavar="FILE", help="write the figures to FILE too")
    made.add_argument("--small", action="store_true", help="a few seconds' worth: to see that it runs, not to measure")
    return made


def numbers(doc: str | None, **defaults: tuple[int, int]) -> list[int]:
    """The numbers that the program was called with: each has a default and a least. Exits with 2 for anything else."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, (default, least) in defaults.items():
        reads = partial(_at_least, least)
        made.add_argument(
            name, metavar=name.upper(), nargs="?", type=reads, default=default, help=f"default: {default}"
        )
    return list(vars(made.parse_args()).values())


def _at_least(least: int, text: str) -> int:
    """Raises argparse.ArgumentTypeError."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} on")
    return int(text)


def main(doc: str | None, arguments: argparse.Namespace, measure: Callable[[], Iterable[Row]]) -> None:
    """Measure, print, and write the JSON; the name of the benchmark is that of its program. Exits with `CANNOT_RUN`
    where something is missing, with 1 where what is measured fails, and with 130 for Ctrl-C.
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
    except KeyboardInterrupt:
        sys.exit(130)
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
