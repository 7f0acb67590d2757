"""A conformance suite for kinds of CA: the same cases for every adapter, ours and those of other packages.

It is for the author of an adapter, and no command of the agent imports it. The author writes a `Subject`: a CA of the
kind that runs on loopback and signs with the certificates of the suite, and the settings that lead to it. A test runs
each case; one that fails raises AssertionError, which says what a user would lose:

    SUBJECT = MySubject()

    @pytest.mark.parametrize("case", cases(SUBJECT), ids=lambda case: case.name)
    async def test_the_adapter_conforms(case: Case, tmp_path: Path) -> None:
        await case.run(SUBJECT, tmp_path)

The suite needs no other package than the agent does. Between the adapter and the author's CA stands a `front.Front`. It
passes the bytes on, or does in the CA's place what a broken or hostile one may do.
"""

from sds_agent.conformance.cases import Case, cases
from sds_agent.conformance.front import Fault, Front
from sds_agent.conformance.subject import Address, Subject
from sds_agent.conformance.suite_ca import SuiteCa

__all__ = ["Address", "Case", "Fault", "Front", "Subject", "SuiteCa", "cases"]
