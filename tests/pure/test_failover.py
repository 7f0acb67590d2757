"""Which of several authorities is asked, and for how long: no outage of one becomes an outage of the workload."""

from datetime import datetime, timedelta

import pytest
from fakes.hierarchy import DAY, HOUR, NOW
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from sds_agent.authority.protocol import ErrorKind
from sds_agent.issuance.adapter_calls import NoAnswerError
from sds_agent.issuance.failover import (
    LONGEST_WAY_BACK,
    PATIENCE,
    PATIENCE_SHARE,
    SPREAD,
    Failover,
    FailoverPolicy,
    Tried,
    Turn,
)
from sds_agent.issuance.schedule import FLOOR, CurrentLeaf, Failure, Renewal

SECOND = timedelta(seconds=1)
MINUTE = timedelta(minutes=1)
POLICY = FailoverPolicy(failures=3, after=30 * SECOND, back_after=5 * MINUTE)
TWO = Failover.over(2, POLICY)
LEAF = CurrentLeaf(NOW - HOUR, NOW - HOUR, NOW + HOUR, "4f")
"""Half of its life is over: it is due."""
FRESH = CurrentLeaf(NOW, NOW, NOW + DAY, "50")
DUE = NOW
LATER = NOW + DAY / 2
kinds = st.sampled_from(ErrorKind)


def failure(
    at: datetime = NOW, count: int = 1, delay: timedelta = SECOND, kind: ErrorKind = ErrorKind.TRANSIENT
) -> Failure:
    return Failure(at, count, delay, kind)


def after(count: int, *, index: int = 0, of: Failover = TWO, delay: timedelta = SECOND) -> Failover:
    """The authority with that index has failed so often in a row, the last time NOW, each attempt a second after the
    one before.
    """
    for number in range(1, count + 1):
        at = NOW - (count - number) * SECOND
        of = of.failed(index, failure(at, number, delay), at)
    return of


def at_second(switched_at: datetime = NOW) -> Failover:
    """The second authority is in use since then, and the first has failed before."""
    return after(3).issued(1, switched_at)


# --- one authority ---


@given(kinds, st.integers(1, 1000), st.none() | st.just(LEAF))
def test_a_single_authority_is_always_asked_and_has_its_whole_time(
    kind: ErrorKind, count: int, served: CurrentLeaf | None
) -> None:
    alone = Failover.over(1, POLICY).failed(0, failure(count=count, kind=kind), NOW)
    assert alone.turn(NOW, DUE, served) == Turn(0, alone.tried[0].failure)
    assert alone.patience(0, NOW, served, waits=False) is None


# --- the next one ---


def test_the_first_is_asked_first_and_again_until_it_has_failed_often_enough() -> None:
    assert TWO.turn(NOW, DUE, LEAF).index == 0
    assert [after(count).turn(NOW, DUE, LEAF).index for count in (1, 2, 3)] == [0, 0, 1]


def test_the_next_is_asked_after_the_time_though_few_attempts_have_failed() -> None:
    """One hung attempt, or a CA that asks for an hour, would otherwise hold up the renewal."""
    state = TWO.failed(0, failure(NOW, 1, HOUR), NOW - 10 * SECOND)
    turn = state.turn(NOW, DUE, LEAF)
    assert (turn.index, turn.until) == (0, NOW + 20 * SECOND)
    assert state.turn(NOW + 20 * SECOND, DUE, LEAF).index == 1


@pytest.mark.parametrize("kind", ErrorKind)
def test_a_refusal_or_a_pending_approval_counts_like_any_failure(kind: ErrorKind) -> None:
    state = TWO.failed(0, failure(NOW, 1, HOUR, kind), NOW)
    assert state.turn(NOW + 30 * SECOND, DUE, LEAF).index == 1
    assert state.turn(NOW, DUE, None).index == 1


@pytest.mark.parametrize(
    ("served", "now"),
    [
        pytest.param(None, NOW, id="nothing is served"),
        pytest.param(LEAF, LEAF.not_after, id="what was served has ended"),
        pytest.param(LEAF, LEAF.alarm_at, id="what is served nears its end"),
        pytest.param(structs.replace(LEAF, not_before=NOW + SECOND), NOW, id="the clock was set back"),
    ],
)
def test_one_failure_is_enough_when_a_certificate_is_wanted_badly(served: CurrentLeaf | None, now: datetime) -> None:
    state = TWO.failed(0, failure(now), now)
    assert state.turn(now, now, served).index == 1


def test_where_all_fail_each_is_asked_at_its_own_time() -> None:
    three = Failover.over(3, POLICY)
    for index, delay in enumerate((50 * SECOND, 10 * SECOND, 20 * SECOND)):
        three = three.failed(index, failure(NOW, 3, delay), NOW)
    turn = three.turn(NOW, DUE, LEAF)
    assert (turn.index, turn.failure) == (1, three.tried[1].failure)
    three = three.failed(1, failure(NOW + 10 * SECOND, 4, 60 * SECOND), NOW)
    assert three.turn(NOW + 10 * SECOND, DUE, LEAF).index == 2


def test_a_delay_that_one_asks_for_holds_for_that_one_alone() -> None:
    state = TWO.failed(0, failure(NOW, 1, HOUR, ErrorKind.THROTTLED), NOW)
    assert state.turn(NOW, DUE, None) == Turn(1, until=NOW + 30 * SECOND)


def test_a_source_that_is_down_while_its_certificate_is_fresh_stays_the_one_to_ask() -> None:
    """It makes certificates when it wants to, so the agent asks it again long before one is due."""
    assert after(30).turn(NOW, LATER, FRESH).index == 0
    assert after(30).turn(LATER, LATER, FRESH).index == 1


def test_a_clock_that_was_set_back_leaves_no_authority_for_later() -> None:
    """A failure that is yet to come would else put off the next attempt by a day."""
    state = TWO.failed(0, failure(NOW + DAY, 3, SECOND), NOW + DAY).failed(1, failure(NOW + DAY, 3, HOUR), NOW + DAY)
    assert state.tried[0].retry_at(NOW) == NOW
    turn = TWO.failed(0, failure(NOW + DAY), NOW + DAY).issued(1, NOW + DAY).turn(NOW, LATER, FRESH)
    assert (turn.index, turn.ask_at) == (0, NOW)


# --- the way back ---


def test_the_first_is_asked_again_some_time_after_the_switch() -> None:
    state = at_second()
    waiting = state.turn(NOW + 5 * MINUTE - SECOND, LATER, FRESH)
    assert (waiting.index, waiting.ask_at, waiting.until) == (1, None, NOW + 5 * MINUTE)
    now = NOW + 5 * MINUTE
    assert state.turn(now, LATER, FRESH) == Turn(0, ask_at=now, until=LATER)


def test_the_first_is_asked_at_the_renewal_if_that_comes_sooner_and_once() -> None:
    state, due = at_second(), NOW + MINUTE
    assert state.turn(due, due, FRESH).index == 0
    tried = state.failed(0, failure(due, 4, SECOND), due)
    turn = tried.turn(due + 2 * SECOND, due, FRESH)
    assert (turn.index, turn.failure, turn.ask_at) == (1, None, None), "the one in use renews"


def test_the_first_that_asked_for_a_delay_is_not_asked_at_the_renewal() -> None:
    state, due = after(3, delay=HOUR).issued(1, NOW), NOW + MINUTE
    assert state.turn(due, due, FRESH).index == 1
    assert state.back_at(0, due) == NOW + HOUR


def test_the_way_back_is_not_taken_when_a_certificate_is_wanted_badly() -> None:
    """What worked last is asked first."""
    state = at_second(NOW - HOUR)
    assert state.turn(LEAF.alarm_at, DUE, LEAF).index == 1
    assert state.turn(NOW, NOW, None).index == 1


def test_attempts_to_go_back_become_rarer_up_to_an_hour() -> None:
    state, now, delays = at_second(), NOW, list[timedelta]()
    for count in range(4, 12):
        delays.append(state.back_at(0, now) - now)
        now = state.back_at(0, now)
        state = state.failed(0, failure(now, count), now)
    minutes = [delay / MINUTE for delay in delays]
    assert minutes == [5, 10, 20, 40, 60, 60, 60, 60]
    rare = structs.replace(state, policy=FailoverPolicy(back_after=DAY))
    assert rare.back_at(0, now) - now == DAY, "what is configured is never shortened"
    assert LONGEST_WAY_BACK == HOUR


def test_agents_that_switched_together_do_not_go_back_together() -> None:
    places = [structs.replace(at_second(), spread=each / 20).back_at(0, NOW) - NOW for each in range(20)]
    assert len({int(each / SECOND) for each in places}) == 20
    assert (places[0], max(places) < 5 * MINUTE * (1 + SPREAD)) == (5 * MINUTE, True)


def test_a_first_that_issues_again_is_in_use_and_its_failures_are_forgotten() -> None:
    back = at_second().issued(0, NOW + HOUR)
    assert back == TWO


def test_failures_from_before_the_way_back_are_held_against_no_other() -> None:
    back = after(3, index=1, of=after(3, of=Failover.over(3, POLICY))).issued(2, NOW - MINUTE).issued(0, NOW - MINUTE)
    assert after(3, of=back).turn(NOW, DUE, LEAF).index == 1


@given(st.timedeltas(-2 * DAY, 2 * DAY), st.timedeltas(-2 * DAY, 2 * DAY))
def test_after_a_failed_way_back_the_next_lies_ahead_however_the_clock_was_set(
    switched: timedelta, before: timedelta
) -> None:
    """The time of the switch may lie ahead after a clock was set back; it must not make each failure ask at once."""
    state = TWO.failed(0, failure(NOW + before), NOW + before).issued(1, NOW + switched)
    tried = state.failed(0, failure(NOW, 2), NOW)
    assert tried.back_at(0, NOW) >= NOW + 5 * MINUTE


def test_of_three_the_way_back_goes_over_the_second() -> None:
    three = Failover.over(3, POLICY)
    three = after(3, index=1, of=after(3, of=three)).issued(2, NOW)
    now = NOW + 5 * MINUTE
    assert three.turn(now, LATER, FRESH).index == 0
    three = three.failed(0, failure(now, 4), now)
    assert three.turn(now, LATER, FRESH).index == 1
    three = three.issued(1, now)
    assert three.in_use == 1
    assert three.back_at(0, now) == now + 5 * MINUTE, "the way to the first begins anew"


def test_a_restart_on_the_seconds_certificate_goes_on_with_the_second() -> None:
    restored = TWO.issued(1, NOW)
    assert restored.turn(NOW, LATER, FRESH).index == 1
    assert restored.turn(NOW + 5 * MINUTE, LATER, FRESH).index == 0


# --- patience ---


def test_a_first_that_hangs_is_given_up_in_seconds_while_nothing_valid_is_served() -> None:
    assert TWO.patience(0, NOW, None, waits=False) == PATIENCE
    assert TWO.patience(0, LEAF.not_after, LEAF, waits=False) == PATIENCE


def test_a_slow_one_that_is_the_only_one_to_work_is_given_its_time_in_the_end() -> None:
    growing = [after(count).patience(0, NOW, None, waits=False) for count in range(4)]
    assert growing == [PATIENCE, 2 * PATIENCE, 4 * PATIENCE, 8 * PATIENCE]


def test_an_attempt_leaves_the_others_time_before_the_certificate_ends() -> None:
    assert TWO.patience(0, NOW, LEAF, waits=False) == HOUR * PATIENCE_SHARE
    assert TWO.patience(0, LEAF.not_after - SECOND, LEAF, waits=False) == FLOOR


def test_a_source_may_wait_until_its_certificate_nears_its_end() -> None:
    """It decides when the next one comes, so waiting for that is no failure before it is late."""
    assert TWO.patience(0, NOW, LEAF, waits=True) == LEAF.alarm_at - NOW
    assert TWO.patience(0, LEAF.alarm_at, LEAF, waits=True) == PATIENCE
    assert at_second().patience(0, NOW, FRESH, waits=True) == 8 * PATIENCE, "on the way back it holds nothing up"
    assert TWO.patience(0, NOW, None, waits=True) == PATIENCE


# --- whatever happens ---


@given(st.data())
def test_from_every_history_an_authority_is_chosen_and_the_next_choice_lies_ahead(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 4))
    failover, now = Failover.over(count, POLICY), NOW
    served: CurrentLeaf | None = None
    for _ in range(data.draw(st.integers(0, 12))):
        now += timedelta(seconds=data.draw(st.integers(-100, 4000)))
        index = data.draw(st.integers(0, count - 1))
        if data.draw(st.booleans()):
            failover, served = failover.issued(index, now), CurrentLeaf(now, now, now + HOUR, "4f")
        else:
            delay = timedelta(seconds=data.draw(st.integers(0, 3600)))
            failover = failover.failed(index, Failure(now, 1, delay, data.draw(kinds)), now)
    due = now if served is None else served.renew_at(Renewal(jitter=0))
    turn = failover.turn(now, due, served)
    assert 0 <= turn.index < count
    assert turn.until is None or turn.until > now, "a moment that is past would be a hot loop"
    assert turn.failure in {None, *(each.failure for each in failover.tried)}
    if turn.ask_at is not None:
        assert turn.index < failover.in_use
    patience = failover.patience(turn.index, now, served, waits=data.draw(st.booleans()))
    assert patience is None or patience >= timedelta(0)
    assert failover.tried[failover.in_use] == Tried() or failover.tried[failover.in_use].failure is not None


def test_the_time_that_an_authority_had_is_said_to_a_tenth_of_a_second() -> None:
    """It is a share of the life that is left, and a log of microseconds is hard to read."""
    assert str(NoAnswerError(5.81835)) == "the CA did not answer within 5.8 s"
    assert str(NoAnswerError(120)) == "the CA did not answer within 120 s"
