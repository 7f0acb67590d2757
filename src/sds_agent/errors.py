"""The root of every exception that this package raises on purpose, what it says, and the kinds a command ends with.

Every message is a sentence for the person who can act: what is wrong, where, and how to fix it. No message ever holds
key material, a token or a password.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple


class Problem(NamedTuple):  # not a Struct: every command imports this, and msgspec takes a quarter of `--help`
    """Something wrong, a value until it is printed: where it is, what was found there, and how to fix it.

    `where` leads to the place, the outermost first: `("authorities.mesh.directory", "/etc/ca", "ca-key.pem")`. `found`
    is a clause that begins with a verb, about the last of them; `fix` says what to do.
    """

    where: tuple[str, ...]
    found: str
    fix: str

    def within(self, *outer: str) -> "Problem":
        """The same problem, seen from further out."""
        return self._replace(where=(*outer, *self.where))

    def __str__(self) -> str:
        return f"{': '.join(self.where)}: {self.found}; {self.fix}" if self.where else f"{self.found}; {self.fix}"


class SdsAgentError(Exception):
    """Root of the package's exceptions. A command that ends with one prints it and exits with `exit_code`."""

    exit_code = 1


class ConfigurationError(SdsAgentError):
    """The operator's configuration, or a file that it names, cannot be used; the command exits with 2."""

    exit_code = 2


class ProblemsError(ConfigurationError):
    """The same, with every problem that was found. Its message has a line for each."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(map(str, self.problems)))


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
