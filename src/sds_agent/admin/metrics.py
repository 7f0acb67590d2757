"""`/metrics` of the agent: its families of metrics in one of Prometheus' formats. Imported at the first scrape."""

from datetime import datetime

from sds_agent.admin import exposition
from sds_agent.admin.agent_families import families
from sds_agent.admin.observed import Observed


def render(observed: Observed, now: datetime, accept: str) -> tuple[bytes, str]:
    """The body and the Content-Type of the answer to a scrape at `now` with that Accept header."""
    return exposition.render(families(observed, now), accept)
