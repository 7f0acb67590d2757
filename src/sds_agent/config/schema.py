"""The JSON Schema of the agent's configuration file, and where it is published."""

from pathlib import Path

from sds_agent.config.settings import Settings
from sds_agent.configfile.schema import Schema, schema_of

FILE = Path(__file__).with_name("sds-agent.schema.json")
"""The schema as it is published."""


def json_schema() -> Schema:
    """The schema (JSON Schema draft 2020-12) of the whole file."""
    return schema_of(Settings, "sds-agent configuration", "What `sds-agent run FILE` reads.")
