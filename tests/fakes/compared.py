"""Names that count how often they are compared."""

from typing import ClassVar


class Name(str):
    """A name. `compared` is how often one was, of all of them, since a test set it."""

    __slots__ = ()
    __hash__ = str.__hash__
    compared: ClassVar[int] = 0

    def __eq__(self, other: object) -> bool:
        Name.compared += 1
        return str.__eq__(self, other)
