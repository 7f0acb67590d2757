"""A configuration as plain data that remembers where each part of it came from."""

from pathlib import Path
from typing import TypeAlias

import msgspec
from msgspec import Struct

from sds_agent.configfile.phrases import KeyPath, render
from sds_agent.errors import ConfigurationError, Problem

Tree: TypeAlias = dict[str, object]


class Origin(Struct, frozen=True):
    """Where a value came from: a file and the line of its key, an environment variable (`$NAME`) or a default.

    `written` is a scalar's text in the file. `is_variable` distinguishes a variable from a file of that name.
    """

    source: str
    line: int = 0
    written: str | None = None
    is_variable: bool = False


class Document(Struct):
    """A configuration before it is typed: `tree` of dicts, lists and scalars, and the origin of each place in it.

    Relative paths start from the directory `base`. `variables` are the names of the environment variables that changed
    something. `content` is the file's, empty where there is none. It is built in steps (the file, the environment, the
    defaults) and read once.
    """

    tree: Tree
    origins: dict[KeyPath, Origin]
    base: Path
    variables: list[str] = msgspec.field(default_factory=list)
    content: bytes = b""

    def origin(self, path: KeyPath) -> Origin:
        """Where the value at `path` came from; for a place without a value, the origin of what surrounds it."""
        while path not in self.origins:
            path = path[:-1]
        return self.origins[path]

    def place(self, problem: Problem) -> Problem:
        """The same problem, whose `where` is a key path, with the file and line, or the variable, of that value."""
        path = problem.where
        origin = self.origin(path)
        return Problem((origin.source,), problem.found, problem.fix, render(path), origin.line)


def working_directory() -> Path:
    """Where relative paths start from that stand in no file of a directory. Raises ConfigurationError where it was
    removed.
    """
    try:
        return Path.cwd()
    except FileNotFoundError as error:
        raise ConfigurationError("the working directory was removed; change to another one") from error
