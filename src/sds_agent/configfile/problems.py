"""What is wrong with a configuration, for its operator: one line a problem, each with its place."""

import re
from collections.abc import Iterable

from msgspec import Struct

from sds_agent.configfile.document import Origin
from sds_agent.configfile.shapes import KeyPath, quoted
from sds_agent.errors import ConfigurationError

MOST_SHOWN = 100
_PLAIN_KEY = "[A-Za-z0-9_-]{1,80}"


class Problem(Struct, frozen=True):
    """One problem. `key` is a path such as `workloads[0].key`, empty where it is about the whole file; `found` says
    what is there and `fix` what to do.
    """

    origin: Origin
    key: str
    found: str
    fix: str

    @property
    def where(self) -> str:
        """`FILE:LINE` or `$VARIABLE`."""
        return self.origin.where

    def __str__(self) -> str:
        subject = f"{self.key} {self.found}" if self.key else self.found
        return f"{self.where}: {subject}; {self.fix}"


class ConfigError(ConfigurationError):
    """A configuration that cannot be used. `problems` holds all there is: the file's by line, then the variables'."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(sorted(problems, key=_order))
        super().__init__(self.problems)

    def __str__(self) -> str:
        shown = [str(problem) for problem in self.problems[:MOST_SHOWN]]
        more = len(self.problems) - len(shown)
        return "\n".join([*shown, f"there are {more} more problems"] if more else shown)


def render(path: KeyPath) -> str:
    """A key path as text: `workloads[0].key`."""
    written = ""
    for part in path:
        if isinstance(part, int):
            written += f"[{part}]"
        else:
            plain = part if re.fullmatch(_PLAIN_KEY, part) else quoted(part)
            written += f".{plain}" if written else plain
    return written


def _order(problem: Problem) -> tuple[bool, str, int]:
    return (problem.origin.is_variable, problem.origin.source, problem.origin.line)
