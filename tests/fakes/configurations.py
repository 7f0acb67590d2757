"""Configurations for tests: text that becomes a file, and the settings or problems that loading it gives."""

from pathlib import Path

from sds_agent.config.loading import load
from sds_agent.config.settings import Settings
from sds_agent.errors import Problem, ProblemsError

MINIMAL = """\
trust_domain: demo.example
workloads:
  - name: default
    spiffe_id: spiffe://demo.example/web
"""

UID = 4_000_000
"""A user id that no machine has an account for."""


def settings(folder: Path, text: str, **environ: str) -> Settings:
    file = folder / "sds-agent.yaml"
    file.write_text(text)
    return load(file, environ, uid=UID).settings


def problems(folder: Path, text: str | bytes, **environ: str) -> tuple[Problem, ...]:
    """The problems of a file; none if it is good."""
    file = folder / "sds-agent.yaml"
    file.write_bytes(text.encode() if isinstance(text, str) else text)
    try:
        load(file, environ, uid=UID)
    except ProblemsError as error:
        return error.problems
    return ()
