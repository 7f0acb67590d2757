"""An Envoy's `/config_dump` as plain JSON, of which any value may have another shape than Envoy's: pure."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

SHOWN = "`sds-agent envoy-config` prints a right one"


def clusters_of(value: Any) -> Iterator[Mapping[str, Any]]:
    """Every cluster, static or dynamic."""
    match value:
        case dict():
            for key, inner in value.items():
                if key == "cluster" and isinstance(inner, dict):
                    yield inner
                elif key != "bootstrap":
                    yield from clusters_of(inner)
        case list():
            for inner in value:
                yield from clusters_of(inner)


def pipes(value: Any) -> Iterator[str]:
    """The paths of all Unix sockets in it."""
    match value:
        case {"pipe": {"path": str(path)}}:
            yield path
        case dict():
            for inner in value.values():
                yield from pipes(inner)
        case list():
            for inner in value:
                yield from pipes(inner)


def mapping(value: Any) -> Mapping[str, Any]:
    """The value if it is an object, or else an empty one."""
    return value if isinstance(value, dict) else {}


def items(value: Any) -> Sequence[Any]:
    """The value if it is a list, or else an empty one."""
    return value if isinstance(value, list) else ()
