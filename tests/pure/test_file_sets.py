"""What counts as one set of files, and when a person hears that it does not come about."""

from datetime import timedelta

from fakes.hierarchy import NOW

from sds_agent.file_sets import CHECK_EVERY, MOST_READINGS, PATIENCE, RETRY_EVERY, Doubt, doubted, settled

SECOND = timedelta(seconds=1)


def test_two_equal_readings_in_a_row_are_one_set() -> None:
    """The first was made while the files were replaced: a certificate of one set and roots of the next."""
    readings = iter([("old", "new"), ("new", "new"), ("new", "new"), ("newer", "new")])
    assert settled(lambda: next(readings)) == ("new", "new")


def test_files_that_change_all_the_time_are_given_up_for_now() -> None:
    readings = iter(range(100))
    assert settled(lambda: next(readings)) is None
    assert next(readings) == MOST_READINGS + 1


def test_a_doubt_is_as_old_as_the_first_reading_that_failed_whatever_failed_since() -> None:
    first = doubted(None, "a", NOW)
    assert doubted(first, "b", NOW + SECOND) == Doubt("b", NOW)


def test_a_person_hears_of_it_after_a_while_and_the_files_are_read_often_until_then() -> None:
    doubt = doubted(None, "a", NOW)
    assert not doubt.overdue(NOW + PATIENCE - SECOND)
    assert doubt.pause(NOW) == RETRY_EVERY
    assert doubt.overdue(NOW + PATIENCE)
    assert doubt.pause(NOW + PATIENCE) == CHECK_EVERY


def test_a_clock_that_was_set_back_does_not_put_it_off() -> None:
    assert doubted(None, "a", NOW).overdue(NOW - SECOND)
