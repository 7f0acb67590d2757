"""How often functions are called, of Python and of C: what work costs, counted the same on every machine."""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import sds_agent

_OURS = str(Path(sds_agent.__file__).parent)


class Calls:
    """Calls by name: `json.loads`, or `Type.method`; and in `ours` all calls of functions of the package.

    A coroutine is called when it begins and each time it goes on.
    """

    def __init__(self) -> None:
        self.of = Counter[str]()
        self.ours = 0

    def seen(self, frame: FrameType, event: str, argument: Any) -> None:
        """Take an event of `sys.setprofile`."""
        if event == "call":
            self.of[frame.f_code.co_qualname] += 1
            self.ours += frame.f_code.co_filename.startswith(_OURS)
        elif event == "c_call":
            owner = getattr(argument, "__self__", None)
            name = owner.__name__ if isinstance(owner, type(sys)) else type(owner).__name__
            self.of[f"{name}.{argument.__name__}"] += 1


@contextmanager
def counted() -> Iterator[Calls]:
    """Count what this thread calls."""
    found = Calls()
    sys.setprofile(found.seen)
    try:
        yield found
    finally:
        sys.setprofile(None)
