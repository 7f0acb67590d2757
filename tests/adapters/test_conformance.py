"""Every kind of CA that is asked over a network passes the conformance suite that authors of adapters get."""

from pathlib import Path

import pytest
from fakes.subjects import SUBJECTS

from sds_agent.conformance import Case, Subject, cases


@pytest.mark.parametrize(
    ("subject", "case"),
    [pytest.param(subject, case, id=f"{subject.kind}-{case.name}") for subject in SUBJECTS for case in cases(subject)],
)
async def test_the_adapter_keeps_its_contract(subject: Subject, case: Case, tmp_path: Path) -> None:
    await case.run(subject, tmp_path)
