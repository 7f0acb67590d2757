"""The JSON Schema of the status, and where it is published."""

from pathlib import Path
from typing import Any

import msgspec

from sds_agent.admin.model import Status
from sds_agent.configfile.schema import described

FILE = Path(__file__).with_name("sds-agent-status.schema.json")
"""The schema as it is published."""


def json_schema() -> dict[str, Any]:
    """The schema (JSON Schema draft 2020-12) of `/status` and of `sds-agent status -o json`.

    Readers must accept keys that it does not name: later versions add some.
    """
    made = msgspec.json.schema(Status)
    root = made.pop("$ref").rpartition("/")[2]
    definitions = {name: described(each) for name, each in made["$defs"].items()}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "sds-agent status",
        **{key: value for key, value in definitions.pop(root).items() if key != "title"},
        "$defs": definitions,
    }
