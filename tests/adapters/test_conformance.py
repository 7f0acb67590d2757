"""Every kind of CA that is asked over a network passes the conformance suite that authors of adapters get."""

import asyncio
from pathlib import Path

import pytest
from fakes.subjects import SUBJECTS

from sds_agent.authority.protocol import AuthorityError, ErrorKind
from sds_agent.conformance import Case, Subject, cases


@pytest.mark.parametrize(
    ("subject", "case"),
    [pytest.param(subject, case, id=f"{subject.kind}-{case.name}") for subject in SUBJECTS for case in cases(subject)],
)
async def test_the_adapter_keeps_its_contract(subject: Subject, case: Case, tmp_path: Path) -> None:
    await case.run(subject, tmp_path)


async def test_a_case_that_does_not_end_says_what_did_not_come_about(tmp_path: Path) -> None:
    async def wait(_: object) -> None:
        await asyncio.Event().wait()

    with pytest.raises(AssertionError, match=r"^lets go: that was not over after 0\.01 s$"):
        await Case("lets go", wait).run(SUBJECTS[0], tmp_path, seconds=0.01)


async def test_a_case_that_meets_an_error_says_which(tmp_path: Path) -> None:
    async def fail(_: object) -> None:
        raise AuthorityError(ErrorKind.DENIED, "not for you")

    with pytest.raises(AssertionError, match=r"^issues: AuthorityError \(not for you\) came of it$"):
        await Case("issues", fail).run(SUBJECTS[0], tmp_path)
