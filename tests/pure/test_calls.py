"""The commonest calls of `run` are read without argparse: as argparse reads them, or not at all."""

from itertools import product

import pytest

from sds_agent.cli import run
from sds_agent.cli.parser import build

WORDS = ("", "-", "--", "-h", "--help", "--config", "--config=a.yaml", "--socket", "a.yaml", "b", "-a", "run")


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_a_service_manager_s_call_is_what_the_parser_makes_of_it(count: int) -> None:
    """Such a call is read without argparse, which delays the first secret."""
    read = 0
    for words in product(WORDS, repeat=count):
        short = run.plain(words)
        if short is not None:
            read += 1
            whole = vars(build().parse_args(["run", *words]))
            assert vars(short) == {key: value for key, value in whole.items() if key not in {"command", "name"}}
    assert read == {0: 1, 1: 3, 2: 3}.get(count, 0)
