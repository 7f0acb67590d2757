"""When the agents of a fleet ask their CA: the schedule alone, simulated on a virtual clock.

    python benchmarks/fleet.py [--agents 10000] [--lifetime 86400] [--days 7] [--outage 7200] [--hang SECONDS]

Every agent starts in the same moment, the hard case. On the middle day the CA is away for a while; on the last day but
one, half of the agents restart in one moment, once with the certificates that they stored and once without. A second
fleet has certificates of a minute and an outage of two, in which all of them end. What an agent does next is what the
product's own functions decide (`sds_agent.issuance.schedule`); the CA answers in 50 ms, or refuses the connection, or
(`--hang`) lets each request hang for so long. The figures:

steady, peak to mean
    The busiest hour over the mean hour of a fleet that is evenly spread, outside the hours that begin with the start,
    the end of the outage and a restart without certificates. An hour, as 10,000 agents with certificates of a day send
    833 requests in it, give or take 29 (3.5%): chance alone makes the busiest of a week's hours 1.1 times the mean. In
    a minute they send 14, give or take 3.7, and chance alone makes the busiest minute twice the mean.
hours until spread
    From the start on: after so many hours no hour had more than 1.3 times the mean, up to the outage.

The floor is a fleet whose requests come at moments that are drawn evenly and apart from each other: chance alone.
"""

import heapq
import random
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import repeat

from bench import program
from bench.figures import FLOOR, Figure, Row
from msgspec import Struct, structs

from sds_agent.authority.protocol import ErrorKind
from sds_agent.configfile.durations import format_duration as said
from sds_agent.issuance import schedule
from sds_agent.issuance.schedule import (
    Ask,
    CurrentLeaf,
    IssuanceState,
    OfferAgain,
    Publish,
    Release,
    Renewal,
    Wait,
    Withhold,
)

START = datetime(2026, 1, 1, tzinfo=UTC)
SECOND = timedelta(seconds=1)
MINUTE = timedelta(minutes=1)
HOUR = timedelta(hours=1)
DAY = timedelta(days=1)
ANSWER = timedelta(seconds=0.05)
BACKDATED = MINUTE
BUDGET = 1.3
RENEWAL = Renewal()


class Plan(Struct, frozen=True):
    """What happens to a fleet. `kept`: whether those that restart have stored their certificates."""

    agents: int
    lifetime: timedelta
    span: timedelta
    outage_at: timedelta
    outage: timedelta
    hang: timedelta
    restart_at: timedelta | None = None
    kept: bool = True

    @property
    def usual(self) -> float:
        """Requests a second of the fleet while all is well and evenly spread."""
        return self.agents / (self.lifetime * RENEWAL.fraction).total_seconds()

    @property
    def back_at(self) -> timedelta:
        """The end of the outage."""
        return self.outage_at + self.outage


class Seen(Struct):
    """What the CA and the agents saw: requests by the second since the start; the agents that were without a valid
    certificate after their first one; when the last of those that the outage cost something had a new one.
    """

    seconds: Counter[int]
    expired: set[int]
    recovered_at: timedelta = timedelta(0)

    def peak(self, begin: timedelta, end: timedelta, width: timedelta = SECOND) -> float:
        """The most requests a second in any window of that width."""
        return max(self.rates(begin, end, width), default=0.0)

    def rates(self, begin: timedelta, end: timedelta, width: timedelta) -> tuple[float, ...]:
        """The requests a second in each window of that width."""
        return tuple(count / width.total_seconds() for count in self.windows(begin, end, width))

    def windows(self, begin: timedelta, end: timedelta, width: timedelta) -> list[int]:
        """The requests in each window of that width."""
        counts = Counter[int]()
        first, last, step = (int(each.total_seconds()) for each in (begin, end, width))
        for second, count in self.seconds.items():
            if first <= second < last:
                counts[(second - first) // step] += count
        return [counts[number] for number in range((last - first) // step)]


class Agent:
    """One workload's certificates in one agent, and what the schedule says of them."""

    def __init__(self) -> None:
        self.state = IssuanceState()

    def restart(self, *, kept: bool) -> None:
        """As a new process, which has the certificate that was served at most."""
        self.state = IssuanceState(self.state.served if kept else None)

    def issue(self, now: datetime, lifetime: timedelta, serial: str) -> None:
        """The CA has answered."""
        leaf = CurrentLeaf(now, now - BACKDATED, now + lifetime, serial)
        leaf = structs.replace(leaf, elapsed=leaf.place(self.state.newest(now), RENEWAL))
        self.state = structs.replace(self.state, failure=None, asking=False).add(leaf)

    def fail(self, now: datetime, lifetime: timedelta, randomness: float) -> None:
        """The CA has not."""
        state = self.state
        failure = schedule.failed(
            now,
            ErrorKind.TRANSIENT,
            before=state.failure,
            served=state.served,
            ttl=lifetime,
            retry_after=None,
            randomness=randomness,
        )
        self.state = structs.replace(state, failure=failure, asking=False)

    def act(self, now: datetime) -> datetime | None:
        """Do all that is due. Returns until when there is nothing to do, or None where the CA is to be asked."""
        while True:
            match schedule.decide(now, self.state, RENEWAL):
                case Ask():
                    return None
                case Publish(index=index):
                    self.state = self.state.publish(index)
                case Withhold():
                    self.state = self.state.withhold()
                case OfferAgain():
                    self.state = self.state.offer_again()
                case Release(index=index):
                    self.state = self.state.release(index)
                case Wait(until=until):
                    return until


def simulate(plan: Plan, seed: int = 1) -> Seen:
    """Let the fleet live for the whole span."""
    chance = random.Random(seed)  # noqa: S311 - the same at every run
    agents = [Agent() for _ in range(plan.agents)]
    seen = Seen(Counter(), set())
    due = list(zip(repeat(START), range(plan.agents), repeat(0)))
    turns = [0] * plan.agents  # a restart makes what an agent waited for meaningless
    down, up, end = START + plan.outage_at, START + plan.back_at, START + plan.span
    restart = None if plan.restart_at is None else START + plan.restart_at
    while due and due[0][0] < end:
        if restart is not None and due[0][0] >= restart:
            for number in range(0, plan.agents, 2):
                agents[number].restart(kept=plan.kept)
                turns[number] += 1
                heapq.heappush(due, (restart, number, turns[number]))
            restart = None
        now, number, turn = heapq.heappop(due)
        if turn != turns[number]:
            continue
        agent = agents[number]
        until = agent.act(now)
        if agent.state.withheld:
            seen.expired.add(number)
        if until is None:
            seen.seconds[int((now - START).total_seconds())] += 1
            if down <= now < up:
                until = now + plan.hang
                agent.fail(until, plan.lifetime, chance.random())
            else:
                if agent.state.failure is not None:
                    seen.recovered_at = now - START
                until = now + ANSWER
                agent.issue(until, plan.lifetime, f"{chance.getrandbits(127):x}")
        elif agent.state.withheld and agent.state.failure is not None:
            # what it would check again in between are roots that were renewed, and there are none here
            until = max(until, agent.state.failure.retry_at)
        heapq.heappush(due, (until, number, turn))
    return seen


def chance_alone(plan: Plan, seed: int = 2) -> Seen:
    """As many requests as a spread fleet sends, at moments that are drawn evenly."""
    drawn = random.Random(seed)  # noqa: S311 - the same at every run
    seconds = int(plan.span.total_seconds())
    count = round(plan.usual * seconds)
    return Seen(Counter(drawn.randrange(seconds) for _ in range(count)), set())


def steady(plan: Plan, seen: Seen, width: timedelta) -> list[float]:
    """Each window's requests over the mean, without those that hold what cannot be spread."""
    mean = plan.usual * width.total_seconds()
    counts = seen.windows(timedelta(0), plan.span, width)
    apart = {0, *range(plan.outage_at // width, -(-plan.back_at // width) + 1)}
    if plan.restart_at is not None and not plan.kept:
        apart.add(plan.restart_at // width)
    return [count / mean for number, count in enumerate(counts) if number not in apart]


def until_spread(plan: Plan, seen: Seen) -> float:
    """Hours from the start until no hour is above the budget any more, up to the outage."""
    counts = seen.windows(timedelta(0), plan.outage_at, HOUR)
    over = [number for number, count in enumerate(counts) if count > plan.usual * HOUR.total_seconds() * BUDGET]
    return float(over[-1] + 1 if over else 0)


def ratios(plan: Plan, seen: Seen) -> Iterator[Figure]:
    """How even the requests are."""
    yield Figure("steady, peak to mean, by the hour", "", (max(steady(plan, seen, HOUR)),))
    yield Figure("steady, peak to mean, by 10 minutes", "", (max(steady(plan, seen, 10 * MINUTE)),))
    yield Figure("steady, peak to mean, by the minute", "", (max(steady(plan, seen, MINUTE)),))


def bursts(plan: Plan, seen: Seen) -> Iterator[Figure]:
    """The most requests a second at the moments that draw them together."""
    back, after = plan.back_at, plan.back_at + max(plan.outage, MINUTE)
    yield Figure("mean of a spread fleet", "CSR/s", (plan.usual,))
    yield Figure("at the start, peak second", "CSR/s", (seen.peak(timedelta(0), 10 * SECOND),))
    yield Figure("in the outage, last minute", "CSR/s", (seen.peak(back - MINUTE, back, MINUTE),))
    yield Figure("after the outage, peak second", "CSR/s", (seen.peak(back, after),))
    yield Figure("after the outage, peak minute", "CSR/s", (seen.peak(back, after, MINUTE),))
    yield Figure("after the outage, all renewed in", "s", ((seen.recovered_at - back).total_seconds(),))
    if plan.restart_at is not None:
        at = plan.restart_at
        yield Figure("at the restart, peak second", "CSR/s", (seen.peak(at, at + 10 * SECOND),))
        yield Figure("at the restart, peak minute", "CSR/s", (seen.peak(at, at + MINUTE, MINUTE),))
    yield Figure("agents whose certificate ended", "%", (100 * len(seen.expired) / plan.agents,))
    if plan.span >= DAY:
        yield Figure("each hour", "CSR/s", seen.rates(timedelta(0), plan.span, HOUR))
        around = seen.rates(plan.outage_at - HOUR, back + HOUR, MINUTE)
        yield Figure("each minute, from an hour before the outage to one after", "CSR/s", around)
        yield Figure("certificates for each agent and day", "", (_a_day(plan, seen),))


def _a_day(plan: Plan, seen: Seen) -> float:
    within = sum(count for second, count in seen.seconds.items() if second < plan.outage_at.total_seconds())
    return within / plan.agents / (plan.outage_at / DAY)


def measure(chosen: Namespace) -> Iterator[Row]:
    """The fleets, one after another."""
    span = chosen.days * DAY
    plan = Plan(
        chosen.agents,
        chosen.lifetime * SECOND,
        span,
        span * 3 / 7,
        chosen.outage * SECOND,
        max(chosen.hang * SECOND, timedelta(milliseconds=1)),
    )
    case: dict[str, str | int] = {"agents": plan.agents, "lifetime": said(plan.lifetime), "outage": said(plan.outage)}
    yield Row(FLOOR, case, tuple(ratios(plan, chance_alone(plan))))
    for name, kept in (("stored certificates", True), ("no certificates", False)):
        each = structs.replace(plan, restart_at=span * 5 / 7, kept=kept)
        seen = simulate(each)
        found = (
            *ratios(each, seen),
            Figure("hours until spread", "h", (until_spread(each, seen),)),
            *bursts(each, seen),
        )
        yield Row(f"half restarts with {name}", case, found)
    short = Plan(plan.agents, MINUTE, 10 * MINUTE, 4 * MINUTE, 2 * MINUTE, plan.hang)
    case = {"agents": plan.agents, "lifetime": said(short.lifetime), "outage": said(short.outage)}
    yield Row("an outage that outlasts them", case, tuple(bursts(short, simulate(short))))


def main() -> None:
    parser = program.parser(__doc__)
    parser.add_argument("--agents", type=int, default=10_000)
    parser.add_argument("--lifetime", type=int, default=86_400, help="seconds that a certificate is valid")
    parser.add_argument("--days", type=int, default=7)
    parser.add_argument("--outage", type=int, default=7200, help="seconds")
    parser.add_argument("--hang", type=float, default=0, help="seconds that a request hangs in the outage")
    chosen = parser.parse_args()
    if chosen.small:
        chosen.agents = 500
    program.main(__doc__, chosen, lambda: measure(chosen))


if __name__ == "__main__":
    main()
