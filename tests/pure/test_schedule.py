"""When a certificate is asked for: too late is an outage, too often is an attack on the CA."""

from datetime import UTC, datetime, timedelta
from itertools import pairwise
from random import Random

import pytest
from fakes.hierarchy import DAY, HOUR, NOW
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from sds_agent.authority.protocol import ErrorKind
from sds_agent.issuance.schedule import (
    ALARM,
    FIRST_RETRY,
    FIRST_RETRY_REFUSED,
    FLOOR,
    LONGEST_RETRY,
    LONGEST_RETRY_AFTER,
    LONGEST_RETRY_SUPPLIED,
    LONGEST_RETRY_UNSERVED,
    LONGEST_WAIT,
    RECHECK,
    SETTLING,
    SETTLING_SHARE,
    SHORTEST_DELAY,
    SPREAD_FROM,
    Ask,
    CurrentLeaf,
    Decision,
    Failure,
    IssuanceState,
    OfferAgain,
    Publish,
    Release,
    Renewal,
    Wait,
    Withhold,
    decide,
    failed,
    share_of,
)
from sds_agent.issuance.validity import SKEW

SECOND = timedelta(seconds=1)
MINUTE = timedelta(minutes=1)
HALF = Renewal(jitter=0)
REFUSED = [ErrorKind.UNAUTHENTICATED, ErrorKind.DENIED, ErrorKind.INVALID, ErrorKind.MISMATCH]
PASSING = [ErrorKind.TRANSIENT, ErrorKind.THROTTLED, ErrorKind.PENDING]

serials = st.integers(-(2**200), 2**400).map("{:x}".format)
spans = st.timedeltas(timedelta(0), timedelta(days=400))
uniform = st.floats(0, 1, exclude_max=True)
kinds = st.sampled_from(ErrorKind)


def current_leaf(lifetime: timedelta = HOUR, *, backdated: timedelta = 2 * MINUTE, serial: str = "4f") -> CurrentLeaf:
    """A certificate issued NOW."""
    return CurrentLeaf(NOW, NOW - backdated, NOW + lifetime, serial)


def acted(state: IssuanceState, decision: Decision) -> IssuanceState:
    """The state after the decision was acted on; an attempt is under way after Ask."""
    match decision:
        case Ask():
            return structs.replace(state, asking=True)
        case Publish(index=index):
            return state.publish(index)
        case Withhold():
            return state.withhold()
        case OfferAgain():
            return state.offer_again()
        case Release(index=index):
            return state.release(index)
        case Wait():
            return state


def settled(now: datetime, state: IssuanceState, renewal: Renewal = HALF) -> tuple[IssuanceState, Ask | Wait]:
    """The state after all that is due was acted on, and what is left: to ask, or to wait. There has to be an end."""
    for _ in range(len(state.coming) + len(state.earlier) + 4):
        decision = decide(now, state, renewal)
        if isinstance(decision, Ask | Wait):
            return state, decision
        state = acted(state, decision)
    raise AssertionError(f"at {now} there is always something to do: {state}")


def after(
    kind: ErrorKind = ErrorKind.TRANSIENT,
    *,
    before: Failure | None = None,
    having: CurrentLeaf | None = None,
    ttl: timedelta = HOUR,
    retry_after: float | None = None,
    randomness: float = 0.5,
) -> Failure:
    """The failure of an attempt made NOW."""
    return failed(NOW, kind, before=before, served=having, ttl=ttl, retry_after=retry_after, randomness=randomness)


# --- when to renew ---


@pytest.mark.parametrize(
    ("later", "expected"),
    [
        (timedelta(0), Wait(NOW + HOUR / 2)),
        (HOUR / 2 - SECOND, Wait(NOW + HOUR / 2)),
        (HOUR / 2, Ask()),
        (HOUR - SECOND, Ask()),
        (HOUR, Withhold()),
        (DAY, Withhold()),  # the clock was set ahead, or the machine was suspended
        (-MINUTE, Wait(NOW + HOUR / 2)),  # set back a little: everybody still takes the certificate
        (-2 * MINUTE, Wait(NOW + HOUR / 2)),
        (-2 * MINUTE - SECOND, Ask()),  # set back to before its NotBefore
        (-DAY, Ask()),
    ],
)
def test_renewal_is_due_at_half_the_life_or_when_the_clock_makes_the_certificate_useless(
    later: timedelta, expected: Ask | Withhold | Wait
) -> None:
    assert decide(NOW + later, IssuanceState(current_leaf()), HALF) == expected


def test_without_a_certificate_it_is_asked_for_at_once() -> None:
    assert decide(NOW, IssuanceState(), HALF) == Ask()


@pytest.mark.parametrize(
    ("answered", "failure", "expected"),
    [
        (None, None, Ask()),  # the first, or one that was restored
        (timedelta(0), None, Wait(NOW + FLOOR)),
        (-FLOOR, None, Ask()),
        (MINUTE, None, Ask()),  # the clock was set back
        (-MINUTE, Failure(NOW, 1, 3 * SECOND), Wait(NOW + 3 * SECOND)),
    ],
)
def test_what_is_supplied_is_waited_for_from_the_last_answer_on(
    answered: timedelta | None, failure: Failure | None, expected: Ask | Wait
) -> None:
    state = IssuanceState(
        current_leaf(),
        failure=failure,
        supplied=True,
        answered_at=None if answered is None else NOW + answered,
    )
    assert decide(NOW, state, HALF) == expected
    waiting = structs.replace(state, asking=True)
    assert decide(NOW, waiting, HALF) == Wait(NOW + HOUR)
    assert decide(NOW + HOUR, waiting, HALF) == Withhold()


@given(kinds, uniform, st.integers(0, 100))
def test_a_source_on_this_machine_is_asked_again_within_seconds(kind: ErrorKind, share: float, count: int) -> None:
    before = Failure(NOW, count, SECOND) if count else None
    for served in (None, current_leaf()):
        failure = failed(
            NOW,
            kind,
            before=before,
            served=served,
            ttl=HOUR,
            retry_after=None,
            randomness=share,
            supplied=True,
        )
        assert SHORTEST_DELAY <= failure.delay <= LONGEST_RETRY_SUPPLIED


def test_lifetime_counts_from_issue_and_not_from_a_backdated_not_before() -> None:
    """Else a 20 s leaf that the CA backdates by two minutes would be 87 % through its life on arrival."""
    renewals = [current_leaf(20 * SECOND, serial=f"{n:x}").renew_at(Renewal()) - NOW for n in range(500)]
    assert all(timedelta(seconds=9) <= renewal <= timedelta(seconds=11) for renewal in renewals)
    assert max(renewals) - min(renewals) > timedelta(seconds=1.9)


# --- when to publish ---


AHEAD = CurrentLeaf(NOW, NOW + 40 * SECOND, NOW + HOUR, "4f")
"""Just issued by a CA whose clock is 40 s ahead."""
SERVED = CurrentLeaf(NOW - HOUR, NOW - HOUR, NOW + HOUR, "4e")


@pytest.mark.parametrize(
    ("later", "expected"),
    [
        (timedelta(0), Wait(NOW + 40 * SECOND)),
        (39 * SECOND, Wait(NOW + 40 * SECOND)),
        (40 * SECOND, Publish(0)),
        (HOUR - SECOND, Publish(0)),  # suspended in between
        (HOUR, Ask()),  # and for too long
        (-20 * SECOND, Wait(NOW + 40 * SECOND)),  # set back a little
        (-21 * SECOND, Ask()),  # further ahead than it would have been accepted
    ],
)
def test_a_certificate_is_published_when_it_is_valid_and_no_sooner(
    later: timedelta, expected: Ask | Publish | Wait
) -> None:
    """Peers refuse it until then, and whatever waits for a first one is helped by none that is refused."""
    assert decide(NOW + later, IssuanceState(coming=(AHEAD,)), HALF) == expected


def test_a_certificate_that_is_valid_already_is_published_at_once() -> None:
    for served in (None, SERVED):
        assert decide(NOW, IssuanceState(served, coming=(current_leaf(),)), HALF) == Publish(0)


@pytest.mark.parametrize(
    ("served_until", "lifetime", "margin"),
    [
        (DAY, DAY, 30),
        (DAY, 200 * SECOND, 10),  # a twentieth of a short life
        (20 * SECOND, DAY, 10),  # half of what is left of the one before
        (timedelta(0), DAY, 0),
        (-SECOND, DAY, 0),
    ],
)
def test_a_renewal_waits_for_peers_whose_clocks_are_behind_while_there_is_another_to_serve(
    served_until: timedelta, lifetime: timedelta, margin: int
) -> None:
    """Of a CA that does not backdate. Clocks 5 to 30 s apart are usual."""
    begin = NOW + 40 * SECOND
    served = CurrentLeaf(NOW - HOUR, NOW - HOUR, begin + served_until, "4e")
    coming = CurrentLeaf(NOW, begin, begin + lifetime, "4f")
    assert IssuanceState(served, coming=(coming,)).publish_at(NOW) == {0: begin + margin * SECOND}


def test_a_served_certificate_that_a_clock_set_back_made_invalid_holds_up_no_other() -> None:
    served = CurrentLeaf(NOW, NOW + MINUTE, NOW + HOUR, "4e")
    assert IssuanceState(served, coming=(AHEAD,)).publish_at(NOW) == {0: AHEAD.not_before}


def test_of_several_that_wait_the_newest_that_is_valid_overtakes_the_others() -> None:
    coming = tuple(CurrentLeaf(NOW, NOW + n * SECOND, NOW + HOUR, "4f") for n in (1, 3, 2, 50))
    state = IssuanceState(coming=coming)
    assert decide(NOW, state, HALF) == Wait(NOW + SECOND)
    assert decide(NOW + SECOND, state, HALF) == Publish(0)
    assert decide(NOW + 5 * SECOND, state, HALF) == Publish(2)


def test_a_failing_renewal_delays_no_publication() -> None:
    failure = Failure(NOW, 3, 50 * SECOND)
    assert decide(NOW, IssuanceState(SERVED, coming=(current_leaf(),), failure=failure), HALF) == Publish(0)
    assert decide(NOW, IssuanceState(coming=(AHEAD,), failure=failure), HALF) == Wait(AHEAD.not_before)


# --- when to withhold, offer again and release ---


ENDED = CurrentLeaf(NOW - DAY, NOW - DAY, NOW, "4d")
COMING = CurrentLeaf(NOW, NOW - HOUR, NOW + DAY, "50")
LATER = CurrentLeaf(NOW, NOW + 50 * SECOND, NOW + DAY, "51")
RETRY = Failure(NOW, 1, MINUTE)


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        pytest.param(IssuanceState(ENDED), Withhold(), id="what has ended is withheld"),
        pytest.param(IssuanceState(ENDED, asking=True), Withhold(), id="whatever the CA does"),
        pytest.param(IssuanceState(ENDED, failure=RETRY), Withhold(), id="or has done"),
        pytest.param(IssuanceState(ENDED, coming=(LATER,)), Withhold(), id="or will be valid later"),
        pytest.param(IssuanceState(ENDED, coming=(COMING,)), Publish(0), id="but for one that is valid"),
        pytest.param(IssuanceState(ENDED, withheld=True), Ask(), id="once"),
        pytest.param(IssuanceState(SERVED, withheld=True), OfferAgain(), id="what is valid again is offered again"),
        pytest.param(IssuanceState(SERVED, withheld=True, asking=True), OfferAgain(), id="also during an attempt"),
        pytest.param(IssuanceState(SERVED, withheld=True, coming=(COMING,)), Publish(0), id="but for a newer one"),
        pytest.param(IssuanceState(SERVED, earlier=(SERVED, ENDED)), Release(1), id="an earlier one ends"),
        pytest.param(IssuanceState(SERVED, earlier=(ENDED,), asking=True), Release(0), id="also during an attempt (2)"),
        pytest.param(
            IssuanceState(SERVED, earlier=(ENDED,), coming=(COMING,)), Publish(0), id="publication goes first"
        ),
    ],
)
def test_each_certificate_is_given_out_and_vouched_for_until_it_ends(state: IssuanceState, expected: Decision) -> None:
    assert decide(NOW, state, HALF) == expected


@pytest.mark.parametrize(
    ("state", "until"),
    [
        pytest.param(IssuanceState(asking=True), NOW + LONGEST_WAIT, id="nothing but an attempt"),
        pytest.param(IssuanceState(SERVED, asking=True), SERVED.not_after, id="its end, whatever the CA does"),
        pytest.param(IssuanceState(SERVED, failure=Failure(NOW, 9, DAY)), SERVED.not_after, id="or has done"),
        pytest.param(IssuanceState(ENDED, withheld=True, asking=True), NOW + RECHECK, id="withheld"),
        pytest.param(
            IssuanceState(ENDED, withheld=True, failure=RETRY), NOW + RECHECK, id="withheld, and a late retry"
        ),
        pytest.param(
            IssuanceState(ENDED, withheld=True, failure=Failure(NOW, 1, SECOND)),
            NOW + SECOND,
            id="withheld, and an early retry",
        ),
        pytest.param(IssuanceState(SERVED, coming=(LATER,), asking=True), NOW + 80 * SECOND, id="one that comes"),
        pytest.param(
            IssuanceState(SERVED, coming=(CurrentLeaf(NOW, NOW + 5 * MINUTE, NOW + DAY, "52"),), asking=True),
            NOW + 5 * MINUTE - SKEW,
            id="one that a clock set back has put far ahead",
        ),
        pytest.param(
            IssuanceState(structs.replace(SERVED, not_after=NOW + DAY), earlier=(SERVED,), asking=True),
            SERVED.not_after,
            id="the end of an earlier one",
        ),
    ],
)
def test_the_next_moment_is_waited_for_though_an_attempt_is_under_way_or_far(
    state: IssuanceState, until: datetime
) -> None:
    assert decide(NOW, state, HALF) == Wait(until)


def test_a_certificate_is_followed_by_the_one_that_replaces_it() -> None:
    state = IssuanceState(SERVED, coming=(AHEAD, COMING, LATER))
    assert state.publish(1) == IssuanceState(COMING, coming=(LATER,), earlier=(SERVED,))


def test_a_withheld_certificate_becomes_no_earlier_one_as_its_anchors_are_released() -> None:
    assert IssuanceState(ENDED, coming=(COMING,)).withhold().publish(0) == IssuanceState(COMING)


moments = st.integers(-3 * 3600, 3 * 3600).map(lambda seconds: NOW + seconds * SECOND)


@st.composite
def leaves(draw: st.DrawFn) -> CurrentLeaf:
    """Of any age, valid at any time, with times that coincide with those of others."""
    not_before, not_after = sorted(draw(st.tuples(moments, moments).filter(lambda ends: ends[0] != ends[1])))
    return CurrentLeaf(draw(moments), not_before, not_after, draw(st.sampled_from("abc")), foreign=draw(st.booleans()))


failures = st.builds(Failure, moments, st.integers(1, 9), st.timedeltas(SHORTEST_DELAY, LONGEST_RETRY_AFTER), kinds)
some = st.lists(leaves(), max_size=3).map(tuple)
states = st.builds(
    IssuanceState,
    served=st.none() | leaves(),
    withheld=st.booleans(),
    coming=some,
    earlier=some,
    failure=st.none() | failures,
    asking=st.booleans(),
).map(lambda state: state if state.served is not None else structs.replace(state, withheld=False))


@given(states, moments)
def test_from_every_state_the_decisions_end_in_a_wait_until_a_moment(state: IssuanceState, now: datetime) -> None:
    """A state in which there was always something to do would stop the agent with all its workloads."""
    state, decision = settled(now, state)
    if state.served is not None:
        assert state.withheld is state.served.expired(now)
    assert not any(leaf.expired(now) for leaf in state.earlier)
    assert not any(now >= time for time in state.publish_at(now).values())
    if isinstance(decision, Ask):
        assert not state.asking
        state, decision = settled(now, acted(state, decision))
    assert isinstance(decision, Wait), "it asks twice"
    assert decision.until > now


@given(states, moments, st.data())
def test_nothing_that_is_due_is_slept_through(state: IssuanceState, now: datetime, data: st.DataObject) -> None:
    """Between now and the end of a wait nothing ends, begins or is due but the renewal that is under way."""
    state, decision = settled(now, state)
    if isinstance(decision, Wait):
        longest = decision.until - now - timedelta.resolution
        between = data.draw(st.timedeltas(timedelta(0), longest))
        assert isinstance(decide(now + between, state, HALF), Wait)


@given(states, moments, st.none() | failures)
def test_an_attempt_and_its_failure_delay_only_the_next_attempt(
    state: IssuanceState, now: datetime, failure: Failure | None
) -> None:
    """A CA that hangs must not keep a certificate from being published in time, nor from being withheld."""
    idle = decide(now, structs.replace(state, asking=False, failure=None), HALF)
    busy = decide(now, structs.replace(state, asking=True, failure=failure), HALF)
    if isinstance(idle, Ask | Wait):
        assert isinstance(busy, Wait)
    else:
        assert busy == idle


steps = st.one_of(
    st.tuples(st.just("pass"), st.floats(0, 4000)),
    st.tuples(st.just("set"), st.floats(-90_000, 90_000)),
    st.tuples(st.just("wait"), st.just(0.0)),
    st.tuples(st.just("answer"), st.floats(1, 7200)),
    st.tuples(st.just("fail"), uniform),
)


@given(st.lists(steps, max_size=40), st.integers(0, 60))
def test_through_outages_and_clocks_that_are_set_what_is_given_out_has_not_ended(
    course: list[tuple[str, float]], lead: int
) -> None:
    now, state = NOW, IssuanceState()
    for number, (what, amount) in enumerate(course):
        state, decision = settled(now, state)
        match what:
            case "wait" if isinstance(decision, Wait):
                now = decision.until
            case "pass" | "set":
                now += timedelta(seconds=amount)
            case _ if isinstance(decision, Ask):
                state = acted(state, decision)
            case "answer" if state.asking:
                begin = now + lead * SECOND
                leaf = CurrentLeaf(now, begin, begin + timedelta(seconds=amount), f"{number:x}")
                state = structs.replace(state, asking=False, failure=None).add(leaf)
            case "fail" if state.asking:
                failure = failed(
                    now,
                    ErrorKind.TRANSIENT,
                    before=state.failure,
                    served=state.served,
                    ttl=HOUR,
                    retry_after=None,
                    randomness=amount,
                )
                state = structs.replace(state, asking=False, failure=failure)
        state, _ = settled(now, state)
        assert state.served is None or state.withheld or not state.served.expired(now)
        assert all(not leaf.expired(now) for leaf in state.earlier)
        assert not state.withheld or not state.publish_at(now) or min(state.publish_at(now).values()) > now


# --- the course of many renewals ---


def course(*, lead: timedelta, lifetime: timedelta, renewal: Renewal, until: timedelta) -> tuple[int, timedelta, int]:
    """Let a CA whose clock is ahead by `lead` issue for so long, without backdating.

    Returns how many certificates it took, how long no valid one was served after the first, and how many waited at
    most at the same time.
    """
    now, issued, waiting, gap = NOW, 0, 0, timedelta(0)
    state = IssuanceState()
    while now < NOW + until:
        match decision := decide(now, state, renewal):
            case Ask():
                issued += 1
                begin = now + lead
                state = state.add(CurrentLeaf(now, begin, begin + lifetime, f"{issued:x}"))
                waiting = max(waiting, len(state.coming))
            case Wait(until=time):
                assert time > now
                now = time
            case _:
                if isinstance(decision, Publish) and state.served is not None:
                    gap += max(now - state.served.not_after, timedelta(0))
                state = acted(state, decision)
                assert state.served is None or state.withheld or state.served.valid(now)
    return issued, gap, waiting


@pytest.mark.parametrize("lead", [0, 1, 10, 40, 60])
@pytest.mark.parametrize("lifetime", [10, 20, 60, 3600])
@pytest.mark.parametrize("fraction", [0.2, 0.5, 0.8])
def test_a_ca_whose_clock_is_ahead_costs_no_moment_without_a_valid_certificate(
    lead: int, lifetime: int, fraction: float
) -> None:
    """Nor more certificates: its clock shifts every renewal by as much, however short they live."""
    span = 20 * lifetime * SECOND
    issued, gap, waiting = course(
        lead=lead * SECOND, lifetime=lifetime * SECOND, renewal=Renewal(fraction), until=lead * SECOND + span
    )
    assert gap == timedelta(0)
    assert issued <= (span + 2 * lead * SECOND) / (lifetime * (fraction - 0.05) * SECOND) + 1
    assert waiting <= SKEW / FLOOR


@given(serials, st.floats(0.2, 0.8), st.floats(0, 0.1))
def test_jitter_gives_one_answer_and_stays_in_its_bounds(serial: str, fraction: float, jitter: float) -> None:
    renewal = Renewal(fraction, jitter)
    share = (current_leaf(serial=serial).renew_at(renewal) - NOW) / HOUR
    assert fraction - jitter - 1e-9 <= share <= fraction + jitter + 1e-9
    assert current_leaf(serial=serial).renew_at(renewal) == NOW + HOUR * share


def test_a_fleet_spreads_evenly_over_a_tenth_of_the_lifetime() -> None:
    """Else all that were restarted together stampede the CA together, for ever."""
    certificates, tenths = 5000, [0] * 10
    for serial in range(certificates):
        share = (current_leaf(serial=f"{serial:x}").renew_at(Renewal()) - NOW) / HOUR
        tenths[int((share - 0.45) / 0.1 * 10)] += 1
    assert all(abs(count - certificates / 10) < certificates / 10 * 0.15 for count in tenths), tenths


def placed(leaf: CurrentLeaf, before: CurrentLeaf | None, renewal: Renewal) -> CurrentLeaf:
    """The certificate, which came after the one `before`, in its place."""
    return structs.replace(leaf, elapsed=leaf.place(before, renewal))


def requests_of_a_fleet(agents: int, away: tuple[timedelta, timedelta], until: timedelta) -> list[timedelta]:
    """When each of so many agents asks a CA for certificates of a day; all start together. While the CA is away,
    between those moments, it is asked in vain.
    """
    random, begin, times = Random(agents), current_leaf(DAY), []  # noqa: S311 - the same at every run
    for _ in range(agents):
        leaf = placed(structs.replace(begin, serial=f"{random.getrandbits(127):x}"), None, Renewal())
        while (now := leaf.renew_at(Renewal())) < NOW + until:
            if away[0] <= now - NOW < away[1]:
                now = NOW + away[1]
            times.append(now - NOW)
            after = CurrentLeaf(now, now - MINUTE, now + DAY, f"{random.getrandbits(127):x}")
            leaf = placed(after, leaf, Renewal())
    return times


def test_a_fleet_that_started_in_one_moment_asks_evenly_from_then_on_and_after_an_outage() -> None:
    """Jitter alone takes weeks for that: until then the CA sees five times the mean, and nothing in between."""
    agents, back = 6000, 50 * HOUR
    times = requests_of_a_fleet(agents, (back - 2 * HOUR, back), 4 * DAY)
    mean = agents / 12
    for hour in range(96):
        if hour not in {48, 49, 50}:  # two with the outage, and one with those that waited for its end
            count = sum(1 for time in times if time // HOUR == hour)
            assert 0.8 * mean < count < 1.2 * mean, hour


@given(serials, st.floats(0.2, 0.8), st.floats(0.001, 0.1), st.timedeltas(SPREAD_FROM, 400 * DAY))
def test_a_first_certificate_is_renewed_at_any_moment_from_minutes_on_up_to_the_regular_one(
    serial: str, fraction: float, jitter: float, lifetime: timedelta
) -> None:
    renewal, leaf = Renewal(fraction, jitter), current_leaf(lifetime, serial=serial)
    first = placed(leaf, None, renewal)
    settled = min(SETTLING, (leaf.renew_at(renewal) - NOW) * SETTLING_SHARE)
    assert NOW + settled * 0.49 <= first.renew_at(renewal) <= leaf.renew_at(renewal)
    assert first.place(None, renewal) == first.elapsed, "asking twice gives one answer"


def test_first_renewals_are_even_up_to_the_middle_of_the_life() -> None:
    tenths = [0] * 10
    for serial in range(5000):
        leaf = placed(current_leaf(DAY, serial=f"{serial:x}"), None, Renewal(jitter=1e-6))
        tenths[int((leaf.renew_at(Renewal(jitter=1e-6)) - NOW) / (DAY / 2) * 10)] += 1
    assert all(abs(count - 500) < 75 for count in tenths), tenths


@given(
    st.timedeltas(-2 * DAY, 9 * DAY),
    st.floats(0.2, 0.8),
    st.timedeltas(HOUR, 9 * DAY),
    st.booleans(),
)
def test_what_came_late_or_early_is_renewed_when_one_in_time_would_be(
    late: timedelta, fraction: float, lifetime: timedelta, foreign: bool
) -> None:
    """Else all that waited for one outage's end, or were given another CA, ask together from then on."""
    renewal, before = Renewal(fraction, 1e-9), structs.replace(current_leaf(DAY), foreign=foreign)
    due = before.term_ends_at(renewal)
    leaf = CurrentLeaf(due + late, due + late, due + late + lifetime, "50")
    term, renew_at = share_of(lifetime, fraction), placed(leaf, before, renewal).renew_at(renewal)
    assert leaf.issued_at < renew_at <= leaf.issued_at + term + FLOOR
    off = (renew_at - due) % term
    assert min(off, term - off) <= FLOOR


def test_what_came_in_time_has_its_whole_term() -> None:
    before = current_leaf(DAY)
    due = before.renew_at(Renewal())
    assert CurrentLeaf(due, due, due + DAY, "50").place(before, Renewal()) == 0


@pytest.mark.parametrize("before", [None, current_leaf(DAY)])
def test_without_jitter_or_in_a_short_life_every_moment_is_the_regular_one(before: CurrentLeaf | None) -> None:
    """Who set the jitter to 0 wants to know the moment; a second certificate of 20 s after the first helps nobody."""
    assert current_leaf(DAY).place(before, Renewal(jitter=0)) == 0
    assert current_leaf(SPREAD_FROM - SECOND).place(before, Renewal()) == 0
    assert current_leaf(SPREAD_FROM).place(before, Renewal()) > 0


@given(spans, spans, serials, st.floats(0.2, 0.8), st.floats(0, 0.1))
def test_no_certificate_makes_a_hot_loop(
    age: timedelta, rest: timedelta, serial: str, fraction: float, jitter: float
) -> None:
    """A CA may answer with a leaf that is past its renewal time already, or about to expire."""
    now, state = NOW, IssuanceState(CurrentLeaf(NOW, NOW - age, NOW + rest, serial))
    while now < NOW + FLOOR:
        state, decision = settled(now, state, Renewal(fraction, jitter))
        assert isinstance(decision, Wait), "it asks again at once"
        assert decision.until > now
        now = decision.until


@given(st.timedeltas(timedelta(seconds=3), timedelta(days=400)), serials, st.floats(0.2, 0.8), st.floats(0, 0.1))
def test_renewal_leaves_time_before_the_expiry(
    lifetime: timedelta, serial: str, fraction: float, jitter: float
) -> None:
    certificate = current_leaf(lifetime, serial=serial)
    assert certificate.renew_at(Renewal(fraction, jitter)) <= NOW + lifetime * 0.9000001


@pytest.mark.parametrize(
    ("later", "expired"), [(-DAY, False), (HOUR - SECOND, False), (HOUR, True), (HOUR + SECOND, True)]
)
def test_a_certificate_is_good_until_its_not_after(later: timedelta, expired: bool) -> None:
    assert current_leaf().expired(NOW + later) is expired


@pytest.mark.parametrize(
    ("share", "alarming"), [(0.5, False), (0.79, False), (1 - ALARM, True), (0.9, True), (2, True)]
)
def test_little_life_left_is_alarming(share: float, alarming: bool) -> None:
    assert current_leaf().alarming(NOW + HOUR * share) is alarming


# --- when to try again ---


@pytest.mark.parametrize(
    ("later", "expected"),
    [
        (timedelta(0), Wait(NOW + 10 * SECOND)),
        (9 * SECOND, Wait(NOW + 10 * SECOND)),
        (10 * SECOND, Ask()),
        (DAY, Ask()),
        (-SECOND, Ask()),  # the clock was set back: the wait that was noted means nothing any more
        (-DAY, Ask()),
    ],
)
@pytest.mark.parametrize("certificate", [None, current_leaf()])
def test_a_retry_waits_its_delay_and_no_longer(
    later: timedelta, expected: Ask | Wait, certificate: CurrentLeaf | None
) -> None:
    failure = Failure(NOW, 1, 10 * SECOND)
    state = IssuanceState(certificate, withheld=later == DAY and certificate is not None, failure=failure)
    assert decide(NOW + later, state, HALF) == expected


def bounds(kind: ErrorKind, having: CurrentLeaf | None, ttl: timedelta = HOUR) -> list[float]:
    """The bounds of the delays, in seconds, of twelve failures in a row."""
    failure, delays = None, []
    for _ in range(12):
        failure = after(kind, before=failure, having=having, ttl=ttl, randomness=0.999)
        delays.append(round(failure.delay.total_seconds() / 0.999, 3))
    return delays


@pytest.mark.parametrize("kind", PASSING)
def test_the_bound_of_the_delay_doubles_up_to_a_minute_and_stays_there(kind: ErrorKind) -> None:
    assert bounds(kind, SERVED) == [0.5, 1, 2, 4, 8, 16, 32, 60, 60, 60, 60, 60]


@pytest.mark.parametrize("kind", PASSING)
@pytest.mark.parametrize(
    ("lifetime", "cap"), [(DAY, 10), (20 * SECOND, 10), (8 * SECOND, 4), (2 * SECOND, 1), (SECOND, 1)]
)
def test_while_nothing_valid_is_served_no_delay_is_long(kind: ErrorKind, lifetime: timedelta, cap: float) -> None:
    """Requests fail until the CA is asked again: a CA that is back is noticed within seconds, not within a minute."""
    expired = CurrentLeaf(NOW - lifetime, NOW - lifetime, NOW, "4f")
    assert bounds(kind, expired)[-5:] == [cap] * 5
    assert bounds(kind, None, lifetime)[-5:] == [cap] * 5


@pytest.mark.parametrize("kind", REFUSED)
def test_the_agent_repeats_a_refused_request_slowly(kind: ErrorKind) -> None:
    """An operator has to act first; until then each attempt is one more line in the CA's log of refusals."""
    failure, delays = None, []
    for _ in range(6):
        failure = after(kind, before=failure, randomness=0)
        delays.append(failure.delay.total_seconds())
    assert delays == [5, 10, 20, 30, 30, 30]
    assert after(kind, randomness=0.999999).delay == pytest.approx(FIRST_RETRY_REFUSED, abs=SECOND / 1000)


@pytest.mark.parametrize("kind", REFUSED)
def test_a_refusal_at_the_end_of_an_outage_costs_no_more_than_any_first_refusal(kind: ErrorKind) -> None:
    """A CA that starts, or a proxy before it, may refuse once; the agent has no certificate until it asks again."""
    failure = None
    for _ in range(20):
        failure = after(before=failure)
    first = after(kind, before=failure, randomness=0.999999)
    assert first.delay <= FIRST_RETRY_REFUSED
    assert after(kind, before=first, randomness=0).delay == FIRST_RETRY_REFUSED
    assert after(kind, before=after(before=first), randomness=0).delay == FIRST_RETRY_REFUSED / 2


def test_every_failure_in_a_row_counts_however_many() -> None:
    failure = Failure(NOW, 1_000_000, SECOND)
    assert after(before=failure, having=SERVED, randomness=0.5) == Failure(
        NOW, 1_000_001, LONGEST_RETRY / 2, ErrorKind.TRANSIENT
    )


@pytest.mark.parametrize("randomness", [0, 0.25, 0.5, 0.75])
def test_the_whole_delay_is_random(randomness: float) -> None:
    """Full jitter: thousands of agents that lost their CA in one moment come back spread over the whole bound."""
    delay = after(before=Failure(NOW, 20, SECOND), having=SERVED, randomness=randomness).delay
    assert delay == max(LONGEST_RETRY * randomness, SHORTEST_DELAY)


@pytest.mark.parametrize(
    ("retry_after", "seconds"),
    [
        (None, 0.25),
        (0.1, 0.25),
        (30, 30),
        (600, 600),
        (10**9, 3600),
        (float("inf"), 3600),
        (0, 0.25),
        (-5, 0.25),
        (-1e300, 0.25),
        (float("nan"), 0.25),
    ],
)
def test_retry_after_is_honoured_as_far_as_it_makes_sense(retry_after: float | None, seconds: float) -> None:
    """A CA that says when to come back is asked no sooner; what no CA can mean does not end the agent."""
    assert after(ErrorKind.THROTTLED, retry_after=retry_after).delay.total_seconds() == seconds


def test_no_delay_takes_more_than_half_of_the_life_that_is_left() -> None:
    certificate = current_leaf(40 * SECOND)
    assert after(before=Failure(NOW, 30, SECOND), having=certificate, randomness=0.999).delay == 20 * SECOND
    refused = Failure(NOW, 30, SECOND, ErrorKind.DENIED, 30)
    assert after(ErrorKind.DENIED, before=refused, having=certificate).delay == 20 * SECOND
    assert after(ErrorKind.THROTTLED, having=certificate, retry_after=3600).delay == 20 * SECOND


def test_once_it_has_expired_the_delays_grow_again() -> None:
    """Otherwise an outage that outlasts a certificate would end in asking five times a second."""
    expired = CurrentLeaf(NOW - HOUR, NOW - HOUR, NOW, "4f")
    assert after(before=Failure(NOW, 30, SECOND), having=expired).delay == LONGEST_RETRY_UNSERVED / 2


def outage(agents: int, lifetime: timedelta, random: Random) -> list[timedelta]:
    """How long after its return each of so many agents asks a CA that was away for two minutes.

    Their certificates end one after another in the first of the two.
    """
    back, returns = NOW + 2 * MINUTE, []
    for _ in range(agents):
        end = NOW + MINUTE * random.random()
        served, now, failure = CurrentLeaf(end - lifetime, end - lifetime, end, "4f"), end - lifetime / 2, None
        while True:
            state = IssuanceState(served, withheld=served.expired(now), failure=failure)
            decision = decide(now, state, HALF)
            if isinstance(decision, Wait):
                now = decision.until
            elif now < back:
                randomness = random.random()
                failure = failed(
                    now,
                    ErrorKind.TRANSIENT,
                    before=failure,
                    served=served,
                    ttl=HOUR,
                    retry_after=None,
                    randomness=randomness,
                )
            else:
                break
        returns.append(now - back)
    return returns


@pytest.mark.parametrize("agents", [20, 1000])
@pytest.mark.parametrize("lifetime", [8, 20, 120])
def test_after_an_outage_all_are_back_within_seconds_and_do_not_stampede(agents: int, lifetime: int) -> None:
    """No more than twice as many ask in a second as when renewals of certificates of 20 s, or shorter, go well; but
    for what the jitter adds to a few.
    """
    within = min(10, lifetime // 2)
    returns = outage(agents, lifetime * SECOND, Random(agents))  # noqa: S311 - the same at every run
    each_second = [sum(1 for time in returns if time // SECOND == second) for second in range(within)]
    assert sum(each_second) == agents
    assert max(each_second) <= 2 * agents / within + agents**0.5, each_second


@given(
    kinds,
    st.integers(1, 2000) | st.none(),
    st.none() | spans,
    st.none() | st.floats(),
    uniform,
)
def test_every_delay_has_a_floor_and_a_ceiling(
    kind: ErrorKind, count: int | None, rest: timedelta | None, retry_after: float | None, randomness: float
) -> None:
    before = None if count is None else Failure(NOW, count, SECOND)
    certificate = None if rest is None else CurrentLeaf(NOW - HOUR, NOW - HOUR, NOW + rest, "4f")
    failure = after(kind, before=before, having=certificate, retry_after=retry_after, randomness=randomness)
    assert failure.at == NOW
    assert failure.count == (count or 0) + 1
    assert SHORTEST_DELAY <= failure.delay <= LONGEST_RETRY_AFTER
    if retry_after is None or not retry_after > 60:
        assert failure.delay <= LONGEST_RETRY
    if rest:
        assert failure.delay <= max(rest / 2, SHORTEST_DELAY)


@given(st.timedeltas(timedelta(seconds=20), timedelta(minutes=10)), kinds, st.none() | st.floats(0, 1e6), st.randoms())
def test_the_agent_makes_a_last_attempt_right_before_the_expiry(
    lifetime: timedelta, kind: ErrorKind, retry_after: float | None, random: Random
) -> None:
    """An outage that ends half a second before the certificate does has cost nothing."""
    certificate, failure = current_leaf(lifetime), None
    now, attempts = NOW, []
    while now < certificate.not_after:
        decision = decide(now, IssuanceState(certificate, failure=failure), HALF)
        if isinstance(decision, Wait):
            now = decision.until
        else:
            attempts.append(now)
            randomness = random.random()
            failure = failed(
                now, kind, before=failure, served=certificate, ttl=HOUR, retry_after=retry_after, randomness=randomness
            )
    assert certificate.not_after - attempts[-1] <= SHORTEST_DELAY * 2
    assert all(later - earlier >= SHORTEST_DELAY for earlier, later in pairwise(attempts))


def test_the_first_delay_is_short() -> None:
    """A CA that restarts costs a moment, not a minute."""
    assert after(randomness=0.999).delay < FIRST_RETRY


@pytest.mark.parametrize(
    ("served", "held", "expected"),
    [
        pytest.param(SERVED, 10 * SECOND, 10 * SECOND, id="it waits for peers to load its anchor"),
        pytest.param(None, 10 * SECOND, -2 * MINUTE, id="but not while nothing is served"),
        pytest.param(ENDED, 10 * SECOND, -2 * MINUTE, id="nor after the end of what was"),
        pytest.param(
            structs.replace(SERVED, not_after=NOW + 8 * SECOND), 10 * SECOND, 4 * SECOND, id="nor for most of its rest"
        ),
    ],
)
def test_a_certificate_below_a_new_anchor_is_held_back_while_another_is_served(
    served: CurrentLeaf | None, held: timedelta, expected: timedelta
) -> None:
    leaf = structs.replace(current_leaf(), held_until=NOW + held)
    publish_at = IssuanceState(served, coming=(leaf,)).publish_at(NOW)[0]
    assert publish_at == NOW + expected


@pytest.mark.parametrize("begin", [datetime.min.replace(tzinfo=UTC), NOW - DAY])
def test_a_certificate_that_has_always_been_valid_can_be_held_back_too(begin: datetime) -> None:
    """A CA that sets no NotBefore may write the year 1."""
    leaf = structs.replace(current_leaf(), not_before=begin, held_until=NOW + 10 * SECOND)
    assert decide(NOW, IssuanceState(SERVED, coming=(leaf,)), HALF) == Wait(NOW + 10 * SECOND)
