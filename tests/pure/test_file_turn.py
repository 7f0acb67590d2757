"""When a changed file is judged: what it holds for a moment is not a configuration."""

from datetime import timedelta

import pytest
from fakes.hierarchy import NOW
from msgspec import structs

from sds_agent.file_sets import CHECK_EVERY, PATIENCE, RETRY_EVERY
from sds_agent.live.file_turn import QUIET, FileTurn

MOMENT = timedelta(milliseconds=1)
TURN = FileTurn(b"one", NOW)


@pytest.mark.parametrize(
    ("turn", "after", "asked", "due"),
    [
        (TURN, timedelta(0), False, False),
        (TURN, QUIET - MOMENT, False, False),
        (TURN, QUIET, False, True),
        (TURN, -MOMENT, False, True),  # a clock that was set back
        (TURN, timedelta(0), True, True),
        (structs.replace(TURN, judged=True), QUIET, False, False),
        (structs.replace(TURN, judged=True), QUIET, True, True),
        (structs.replace(TURN, tried=True), QUIET, False, True),
    ],
)
def test_a_file_is_judged_once_it_stays_the_same(turn: FileTurn, after: timedelta, asked: bool, due: bool) -> None:
    assert turn.due(NOW + after, asked=asked) is due


def test_a_bad_file_is_reported_when_it_stays_bad_or_a_person_asks() -> None:
    assert not TURN.reports(NOW + PATIENCE - MOMENT, asked=False)
    assert TURN.reports(NOW + PATIENCE, asked=False)
    assert TURN.reports(NOW - MOMENT, asked=False)
    assert TURN.reports(NOW, asked=True)


def test_the_same_content_again_is_no_change_and_another_begins_anew() -> None:
    judged = structs.replace(TURN, judged=True)
    assert judged.read(b"one", NOW + QUIET) is judged
    assert judged.read(b"two", NOW + QUIET) == FileTurn(b"two", NOW + QUIET)


def test_what_was_judged_or_refused_is_read_less_often() -> None:
    assert TURN.pause == RETRY_EVERY
    assert structs.replace(TURN, judged=True).pause == structs.replace(TURN, tried=True).pause == CHECK_EVERY
