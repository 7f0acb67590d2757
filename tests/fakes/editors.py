"""What an editor says of a configuration, by the JSON Schema that it is given."""

from typing import Any

import jsonschema  # type: ignore[import-untyped]  # it ships no types


def editor(schema: Any) -> Any:
    """Holds files to the schema, by `validate`. That this is one is looked at once: it takes longer than the rest."""
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)
