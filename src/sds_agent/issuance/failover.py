"""Which of a workload's authorities to ask next, and for how long: pure decisions, with the time as an argument.

A workload may have several authorities, in order. The one `in_use` issued last; at the start it is the first. It is
asked for the next certificate until it has failed often or long enough, and then the one after it has its turn, and so
on around. Failures count by authority, each with its own delay (`schedule.failed`): what one asks for holds for it
alone. A refusal and a pending approval are failures like any other, for the workload has no certificate by them.

Where no valid certificate is served, or what is served nears its end, one failure is enough, and an authority that does
not answer is given up after a few seconds. That time doubles with each failure of the authority: one that is slow, and
the only one that works, is given its time in the end.

The way back is an attempt: an authority before the one in use is asked for a real certificate some time after the
switch, and at the next renewal if that comes sooner. If it issues, it is in use again; if it fails, what is served
stays, and the next such attempt is twice as far away.
"""

from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Self

from msgspec import Struct, structs

from sds_agent.issuance.schedule import FLOOR, CurrentLeaf, Failure

PATIENCE = timedelta(seconds=3)
"""The first time that an authority has to answer while another one could be asked and nothing valid is served: ten
times what a healthy CA takes over a bad network.
"""
PATIENCE_SHARE = 0.25
"""The same while a valid certificate is served, as a share of the rest of its life: the other authorities have to have
their turn in it.
"""
LONGEST_WAY_BACK = timedelta(hours=1)
"""Between two attempts at an authority before the one in use, unless more is configured."""


SPREAD = 0.25
"""The most that is added to the time of the way back, as a share of it: all agents switch in the same moment, and must
not all ask the first again in the same one.
"""


class FailoverPolicy(Struct, frozen=True):
    """When the next authority has its turn: after so many failures in a row, or so long after the beginning of the
    first of them. `back_after` is from the switch to the first attempt to go back.
    """

    failures: int = 3
    after: timedelta = timedelta(seconds=30)
    back_after: timedelta = timedelta(minutes=5)


DEFAULT_POLICY = FailoverPolicy()


class Tried(Struct, frozen=True):
    """What came of one authority since it issued last: its last `failure`, when the first attempt of that row began,
    and how many attempts to go back to it have failed (`returns`).
    """

    failure: Failure | None = None
    since: datetime | None = None
    returns: int = 0

    def retry_at(self, now: datetime) -> datetime:
        """When it may be asked again. A moment that a clock set back made meaningless delays nothing."""
        return now if self.failure is None or self.failure.at > now else self.failure.retry_at


class Turn(Struct, frozen=True):
    """Whose turn it is: the authority with that index, and its last failure.

    `ask_at` is when to ask it whatever the age of the certificate, None where that age decides. The choice may be
    another one from `until` on.
    """

    index: int
    failure: Failure | None = None
    ask_at: datetime | None = None
    until: datetime | None = None


class Failover(Struct, frozen=True):
    """How a workload's authorities, in their order, have done so far. `switched_at` is when the one in use came in.

    `spread`, in [0, 1), is where in the time that many agents share for their way back this one has its place.
    """

    tried: tuple[Tried, ...] = (Tried(),)
    policy: FailoverPolicy = DEFAULT_POLICY
    in_use: int = 0
    switched_at: datetime | None = None
    spread: float = 0.0

    @classmethod
    def over(cls, count: int, policy: FailoverPolicy, spread: float = 0.0) -> Self:
        """Before the first attempt at so many authorities."""
        return cls((Tried(),) * count, policy, spread=spread)

    @property
    def alone(self) -> bool:
        """Whether there is one authority."""
        return len(self.tried) == 1

    def issued(self, index: int, now: datetime) -> Self:
        """The authority with that index has issued a certificate, or one of its certificates was restored."""
        changed = index != self.in_use
        tried = tuple(
            # to those before it the way back begins anew; those after it were not needed
            Tried() if n >= index else structs.replace(each, returns=0 if changed else each.returns)
            for n, each in enumerate(self.tried)
        )
        switched_at = None if index == 0 else now if changed else self.switched_at
        return structs.replace(self, tried=tried, in_use=index, switched_at=switched_at)

    def failed(self, index: int, failure: Failure, began: datetime) -> Self:
        """An attempt at the authority with that index, which began at `began`, has failed."""
        before = self.tried[index]
        after = Tried(failure, before.since or began, before.returns + (index < self.in_use))
        return structs.replace(self, tried=(*self.tried[:index], after, *self.tried[index + 1 :]))

    def turn(self, now: datetime, due: datetime, served: CurrentLeaf | None) -> Turn:
        """Whose turn it is, where the certificate that is `served` is `due` for renewal by its age."""
        if self.alone:
            return Turn(0, self.tried[0].failure)
        until = min((moment for moment in self._moments(now, due, served) if moment > now), default=None)
        pressing = _pressing(served, now)
        if not pressing:
            for index in range(self.in_use):
                if self._goes_back(index, now, due):
                    return Turn(index, ask_at=now, until=until)
        index = self.in_use if now < due and not pressing else self._next(now, pressing=pressing)
        return Turn(index, self.tried[index].failure, until=until)

    def patience(self, index: int, now: datetime, served: CurrentLeaf | None, *, waits: bool) -> timedelta | None:
        """How long an attempt at that authority may take from now, its wait for others included. None: no limit.

        Where it `waits` for what the authority makes by itself, the one in use has until the certificate nears its end.
        """
        if self.alone:
            return None
        if waits and index == self.in_use and served is not None and not _pressing(served, now):
            return served.alarm_at - now
        failure = self.tried[index].failure
        growing = PATIENCE * float(2 ** min(0 if failure is None else failure.count, 16))
        if served is None or not served.valid(now):
            return growing
        rest = max((served.not_after - now) * PATIENCE_SHARE, FLOOR)
        return min(growing, rest) if waits else rest

    def back_at(self, index: int, now: datetime) -> datetime:
        """When an authority before the one in use is asked again, unless the certificate is due sooner."""
        tried, back_after = self.tried[index], self.policy.back_after
        marks = (self.switched_at, None if tried.failure is None else tried.failure.at)
        begin = max((mark for mark in marks if mark is not None and mark <= now), default=None)
        if begin is None:
            return now
        delay = min(back_after * float(2 ** min(tried.returns, 16)), max(LONGEST_WAY_BACK, back_after))
        return max(begin + delay * (1 + SPREAD * self.spread), tried.retry_at(now))

    def _goes_back(self, index: int, now: datetime, due: datetime) -> bool:
        """Whether to ask this authority, which comes before the one in use. Once for each renewal it is asked first."""
        failure = self.tried[index].failure
        renewing = now >= due and (failure is None or failure.at < due) and now >= self.tried[index].retry_at(now)
        return renewing or now >= self.back_at(index, now)

    def _next(self, now: datetime, *, pressing: bool) -> int:
        """From the one in use on and around, the first that has not failed enough, or else the first to be retried."""
        order = [(self.in_use + n) % len(self.tried) for n in range(len(self.tried))]
        good = (index for index in order if not self._exhausted(index, now, pressing=pressing))
        return next(good, min(order, key=lambda index: self.tried[index].retry_at(now)))

    def _exhausted(self, index: int, now: datetime, *, pressing: bool) -> bool:
        """Whether another authority should be asked in place of this one."""
        tried = self.tried[index]
        if tried.failure is None or tried.since is None:
            return False
        return pressing or tried.failure.count >= self.policy.failures or now >= tried.since + self.policy.after

    def _moments(self, now: datetime, due: datetime, served: CurrentLeaf | None) -> Iterator[datetime]:
        """When the choice may become another one."""
        yield due
        if served is not None:
            yield from (served.not_before, served.alarm_at, served.not_after)
        for index, tried in enumerate(self.tried):
            if tried.since is not None:
                yield tried.since + self.policy.after
                yield tried.retry_at(now)
            if index < self.in_use:
                yield self.back_at(index, now)


def _pressing(served: CurrentLeaf | None, now: datetime) -> bool:
    """Whether requests fail for want of a certificate, or soon will."""
    return served is None or not served.valid(now) or served.alarming(now)
