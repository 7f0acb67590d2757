"""The JSON Schema of the CA's configuration file, and where it is published."""

from pathlib import Path

from sds_agent.ca.settings import CaSettings
from sds_agent.configfile.schema import Schema, schema_of

FILE = Path(__file__).with_name("sds-agent-ca.schema.json")
"""The schema as it is published."""


def json_schema() -> Schema:
    """The schema (JSON Schema draft 2020-12) of the whole file."""
    return schema_of(CaSettings, "sds-agent CA configuration", "What `sds-agent ca serve FILE` reads.")
