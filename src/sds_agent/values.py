"""Values that hold key material and do not show it.

All values of this package are frozen `msgspec.Struct`s rather than dataclasses: a class costs a fortieth to define,
and the time from start to the first secret is mostly that of imports.
"""

from typing import Any

from msgspec import Struct


class Sensitive(Struct, frozen=True):
    """A value whose representation, in every form, is its type's name alone."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}(...)"

    def __rich_repr__(self) -> Any:
        yield "..."
