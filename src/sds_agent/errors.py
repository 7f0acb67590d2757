"""The root of every exception that this package raises on purpose, what it says, and the kinds a command ends with.

Every message is a sentence for the person who can act: what is wrong, where, and how to fix it. No message ever holds
key material, a token or a password.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

MOST_SHOWN = 100
"""Problems that a message shows."""


class Problem(NamedTuple):  # not a Struct: every command imports this, and msgspec takes a quarter of `--help`
    """Something wrong, a value until it is printed: where it is, what was found there, and how to fix it.

    `where` leads to the place, the outermost first: `("authorities.mesh.directory", "/etc/ca", "ca-key.pem")`. `found`
    is a clause that begins with a verb, about the last of them; `fix` says what to do. In a configuration `where` is
    the key's path, `("workloads", 0, "ttl")`, until it is known where that was written: then it is the file or the
    variable, with the `line` in that file, and `key` is the path as text.
    """

    where: tuple[str | int, ...]
    found: str
    fix: str
    key: str = ""
    line: int = 0

    def within(self, *outer: str | int) -> "Problem":
        """The same problem, seen from further out."""
        return self._replace(where=(*outer, *self.where))

    def __str__(self) -> str:
        place = ": ".join(map(str, self.where)) + (f":{self.line}" if self.line else "")
        found = f"{self.key} {self.found}" if self.key else self.found
        return f"{place}: {found}; {self.fix}" if place else f"{found}; {self.fix}"


class SdsAgentError(Exception):
    """Root of the package's exceptions. A command that ends with one prints it and exits with `exit_code`."""

    exit_code = 1


class ConfigurationError(SdsAgentError):
    """The operator's configuration, or a file that it names, cannot be used; the command exits with 2."""

    exit_code = 2


class ProblemsError(ConfigurationError):
    """The same, with every problem that was found: first those with a line, by line. Its message has a line for each,
    but not for more than MOST_SHOWN.
    """

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(sorted(problems, key=lambda problem: (problem.line == 0, problem.line)))
        shown = [str(problem) for problem in self.problems[:MOST_SHOWN]]
        more = len(self.problems) - len(shown)
        super().__init__("\n".join([*shown, f"there are {more} more problems"] if more else shown))


@contextmanager
def within(*outer: str) -> Iterator[None]:
    """Put `outer` before the place of every problem of a ProblemsError that leaves this block."""
    try:
        yield
    except ProblemsError as error:
        raise ProblemsError(problem.within(*outer) for problem in error.problems) from error


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The exceptions that an exception group holds, at whatever depth; one that is no group is its own leaf.

    A task group wraps what its tasks raise, and the group's own type says nothing.
    """
    if isinstance(error, BaseExceptionGroup):
        for each in error.exceptions:
            yield from leaves(each)
    else:
        yield error
