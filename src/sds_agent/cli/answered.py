"""A status as whoever was asked for it has answered: read, and made printable.

An agent's own texts are printable ASCII. What answers at an address need not be an agent, and may be one of a later
version.
"""

import re
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from sds_agent import __version__
from sds_agent.admin.model import FORMAT, Status
from sds_agent.errors import SdsAgentError
from sds_agent.text import one_line, visible

Shape = TypeVar("Shape", bound=Struct)

_LONGEST_WORDS = 300
_LONGEST_VERSION = 40
_TO_CHECK = re.compile(rb'[^\x20-\x7e]|\\[^"\\/]')
"""What JSON has nowhere whose texts are printable ASCII."""


class NotStatusError(SdsAgentError):
    """What was answered is no status that can be shown. `is_other`: nor one of another version's."""

    def __init__(self, words: str, *, is_other: bool = False) -> None:
        super().__init__(words)
        self.is_other = is_other


class _AgentHead(Struct):
    version: str


class _Head(Struct):
    """What a status of any format has."""

    format: int
    agent: _AgentHead


def read_status(data: bytes, where: str) -> Status:
    """The status in an answer from `where`. Raises NotStatusError."""
    try:
        head = _decoded(data, _Head)
    except ValueError as error:
        raise NotStatusError(f"what answers at {where} is no agent: {error}", is_other=True) from error
    if head.format != FORMAT:
        raise NotStatusError(_of_another_format(head, where))
    try:
        return _decoded(data, Status)
    except ValueError as error:
        raise NotStatusError(
            f"what answers at {where} is no admin server of this version of sds-agent: {error}", is_other=True
        ) from error


def _decoded(data: bytes, shape: type[Shape]) -> Shape:
    """Raises ValueError."""
    try:
        if _TO_CHECK.search(data):
            data = msgspec.json.encode(_each_text(msgspec.json.decode(data), visible))
        return msgspec.json.decode(data, type=shape)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise ValueError(one_line(str(error), _LONGEST_WORDS)) from error


def _each_text(value: Any, change: Callable[[str], str]) -> Any:
    match value:
        case str():
            return change(value)
        case list():
            return [_each_text(each, change) for each in value]
        case dict():
            return {change(key): _each_text(each, change) for key, each in value.items()}
        case _:
            return value


def _of_another_format(head: _Head, where: str) -> str:
    version = one_line(head.agent.version, _LONGEST_VERSION)
    age, fix = (
        ("newer", f"upgrade this one to {version}, or use the sds-agent that the agent itself was started with")
        if head.format > FORMAT
        else ("older", "start the agent again after an upgrade")
    )
    return (
        f"the agent at {where} is {age} than this command: it is version {version} and its status has the format "
        f"{head.format}, where this command, version {__version__}, reads {FORMAT}; {fix}"
    )
