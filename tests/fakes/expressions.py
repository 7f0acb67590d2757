"""For programs that tests start: on whose behalf regular expressions are compiled."""

import re._compiler as engine  # type: ignore[import-not-found]  # it has no types
import sys
from types import FrameType


def compiled_for() -> set[str]:
    """The names of the modules for whose code an expression is compiled from now on."""
    modules, compile_one = set[str](), engine.compile

    def noted(pattern: object, flags: int = 0) -> object:
        frame: FrameType | None = sys._getframe(1)
        while frame is not None and frame.f_globals["__name__"] in {"re", "sds_agent.deferral"}:
            frame = frame.f_back
        if frame is not None:
            modules.add(frame.f_globals["__name__"])
        return compile_one(pattern, flags)

    engine.compile = noted
    return modules
