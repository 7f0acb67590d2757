"""The configuration file's JSON Schema, for editors, from the same shapes that read the file.

It knows every key, kind and pattern. What needs more than one key or arithmetic (names that collide, the bounds of a
duration) only `sds-agent check` finds.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

from sds_agent.config.settings import Settings
from sds_agent.configfile.shapes import Key, Listing, Named, Scalar, Section, Shape, Variant, keys

Schema: TypeAlias = dict[str, Any]

FILE = Path(__file__).with_name("sds-agent.schema.json")
"""The schema as it is published."""


def json_schema() -> Schema:
    """The schema (JSON Schema draft 2020-12) of the whole file."""
    return schema_of(Settings, "sds-agent configuration", "What `sds-agent run FILE` reads.")


def schema_of(root: type[Any], title: str, description: str) -> Schema:
    """The schema of a file whose keys a settings class declares."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": title,
        "description": description,
        **_section(root),
    }


def _schema(shape: Shape[Any]) -> Schema:
    match shape:
        case Scalar():
            return dict(shape.schema)
        case Section():
            return _section(shape.of)
        case Listing():
            return {"type": "array", "minItems": 1, "items": _schema(shape.item)}
        case Named():
            names, items = dict(shape.name.schema), _schema(shape.item)
            return {"type": "object", "minProperties": 1, "propertyNames": names, "additionalProperties": items}
        case Variant():
            kinds = [_section(kind, {"type": {"const": kind.type}}) for kind in shape.kinds]
            return kinds[0] if len(kinds) == 1 else {"oneOf": kinds}
    raise TypeError(shape)


def _section(of: type[Any], also: Mapping[str, Schema] | None = None) -> Schema:
    known, also = keys(of), also or {}
    required = [*also, *(name for name, key in known.items() if key.required)]
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {**also, **{name: _key(key) for name, key in known.items()}},
        **({"required": required} if required else {}),
    }


def _key(key: Key) -> Schema:
    schema = {"description": key.doc, **_schema(key.shape)}
    if key.default is not None and isinstance(key.shape, Scalar) and (default := key.default()) is not None:
        schema["default"] = key.shape.write(default)
    return schema
