"""A configuration as plain data that remembers where each part of it came from."""

from pathlib import Path
from typing import TypeAlias

import msgspec
from msgspec import Struct

from sds_agent.configfile.phrases import KeyPath, render
from sds_agent.errors import Problem

Tree: TypeAlias = dict[str, object]


class Origin(Struct, frozen=True):
    """Where a value came from: a file and the line of its key, an environment variable (`$NAME`) or a default.

    `written` is the text of a scalar as the file has it, `is_variable` tells a variable from a file of that name.
    """

    source: str
    line: int = 0
    written: str | None = None
    is_variable: bool = False


class Document(Struct):
    """`tree` holds dicts, lists and scalars; `origins` tells of each place in it. `base` is where relative paths start.

    It is built in steps (the file, the environment, the defaults) and read once.
    """

    tree: Tree
    origins: dict[KeyPath, Origin]
    base: Path
    variables: list[str] = msgspec.field(default_factory=list)

    def origin(self, path: KeyPath) -> Origin:
        """Where the value at `path` came from; for a place that is empty, where what surrounds it came from."""
        while path not in self.origins:
            path = path[:-1]
        return self.origins[path]

    def place(self, problem: Problem) -> Problem:
        """A problem of the tree with the place that its value came from."""
        path = problem.where
        origin = self.origin(path)
        return Problem((origin.source,), problem.found, problem.fix, render(path), origin.line)

    @property
    def written(self) -> dict[KeyPath, str]:
        """The text of the file's scalars."""
        return {path: each.written for path, each in self.origins.items() if each.written is not None}
