"""Where the configuration of a running agent comes from, and what hears that it is read once more."""

from collections.abc import Callable
from pathlib import Path

from msgspec import Struct

from sds_agent.config.settings import Settings
from sds_agent.log import LogSettings


class ConfigSource(Struct, frozen=True):
    """Where the configuration comes from: its file, and what reads it once more and applies another `log` section.

    `load` raises ProblemsError, blocks on the disk, though on no pipe, and is called in a thread. `digest` is the
    SHA-256 of the content that is in force already, empty where that is not known.
    """

    file: Path
    load: Callable[[], Settings]
    relog: Callable[[LogSettings], None]
    digest: bytes = b""


class ReloadHooks(Struct, frozen=True):
    """What hears that a reload which was asked for begins, and that it is done, whatever came of it."""

    begins: Callable[[], None] = lambda: None
    ends: Callable[[], None] = lambda: None
