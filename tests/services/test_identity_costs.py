"""What an identity costs the agent, in counts that no other program on the machine changes: a node may have hundreds.

How long all that takes, benchmarks/identities.py measures.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fakes.counting_agent import ENCODE, SIGN, VERIFY
from msgspec import Struct

from sds_agent.pki.certificates import MOST_PAIRS_REMEMBERED

TESTS = Path(__file__).parents[1]
FEW, MANY = 2 * MOST_PAIRS_REMEMBERED, 12 * MOST_PAIRS_REMEMBERED
"""After both as much is remembered of the last certificates, which would otherwise count as what each of them keeps.
Many are several times few: what the agent itself has just then, divided by their difference, is little.
"""
WITHIN = 120.0


class Took(Struct, frozen=True):
    """What an agent had when all of its identities were issued: one with few, and one with many."""

    few: dict[str, int]
    many: dict[str, int]

    def each(self, what: str) -> int:
        """How many of these an identity has, or took: what the agent itself does just then is rounded away."""
        return round((self.many[what] - self.few[what]) / (MANY - FEW))


@pytest.fixture(scope="module")
def took(tmp_path_factory: pytest.TempPathFactory) -> Took:
    """An agent before these two has made all warm, such as what is imported on first use."""
    command = [sys.executable, "-m", "fakes.counting_agent", str(tmp_path_factory.mktemp("identities"))]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, sys.path)])}
    numbers = [str(each) for each in (FEW, FEW, MANY)]
    done = subprocess.run(
        [*command, *numbers], env=environment, stdout=subprocess.PIPE, text=True, timeout=WITHIN, check=True
    )
    _, few, many = map(json.loads, done.stdout.splitlines())
    return Took(few, many)


def test_an_identity_is_one_line_of_the_log(took: Took) -> None:
    """It is issued, and that is what there is to say."""
    assert took.each("lines") == 1


def test_an_identity_is_one_task(took: Took) -> None:
    """Which waits for its renewal."""
    assert took.each("tasks") == 1


def test_an_identity_holds_no_thread_and_no_descriptor(took: Took) -> None:
    assert took.each("threads") == 0
    assert took.each("descriptors") == 0


def test_an_identity_is_issued_with_few_calls(took: Took) -> None:
    """From its key to its place in the store: the request, the CA's signature, the checks of what came back."""
    assert took.each("functions") <= 584


def test_an_identity_is_signed_once_and_verified_once(took: Took) -> None:
    """The two take nearly a third of it all. Nor is a certificate encoded again that was just read."""
    assert (took.each(SIGN), took.each(VERIFY), took.each(ENCODE)) == (1, 1, 0)


def test_many_identities_cost_nothing_that_grows_faster_than_they_do(took: Took) -> None:
    """A look at all of them for each of them, and 10,000 would take hours."""
    few, many = (each["functions"] / each["identities"] for each in (took.few, took.many))
    assert many <= 1.1 * few


def test_an_identity_keeps_little(took: Took) -> None:
    """In bytes of Python's objects: its certificate in its forms, its key, its schedule and its task."""
    assert took.each("bytes") <= 8_500
