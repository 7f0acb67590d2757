"""For programs that tests start: on whose behalf regular expressions are compiled."""

import re._compiler as engine  # type: ignore[import-not-found]  # it has no types
import sys
from types import FrameType


def compiled_for() -> set[str]:
    """The names of the modules that are at work, down to the program, when an expression is compiled from now on."""
    modules, compile_one = set[str](), engine.compile

    def noted(pattern: object, flags: int = 0) -> object:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            modules.add(frame.f_globals["__name__"])
            frame = frame.f_back
        return compile_one(pattern, flags)

    engine.compile = noted
    return modules
