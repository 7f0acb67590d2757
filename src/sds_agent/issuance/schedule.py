"""What to do next for one workload's certificate: pure decisions, with the time as an argument.

`decide` maps an `IssuanceState` to one action: ask the CA, publish an accepted certificate, withhold one that has
ended, offer it again, release the anchors of an earlier one, or wait. The loop in `issuer` acts and decides again.

A certificate's lifetime is counted from the moment it was issued to its end. CAs backdate NotBefore, so counting from
there would call a short certificate old on arrival. Jitter comes from the certificate itself: asking twice gives one
answer, and a fleet spreads evenly.

Jitter alone spreads a fleet that started in one moment over many renewals: weeks, with certificates of a day. So each
certificate also has a place in its term (`elapsed`). A first one is given any, evenly, and one that came late or early,
as after an outage of the CA, takes the place that one in time would have by now. What was spread stays so.

Beside the certificate that is `served` a workload can have some that are `coming`: accepted, but their NotBefore lies
ahead, so that peers would still refuse them. What is served stays until one of them is published. An attempt at the CA
may take long, so it is part of the state and delays no other action: what ends meanwhile is withheld in time. Times are
those of the whole chain and its trust anchor (`validity`).
"""

from collections.abc import Callable
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Generic, Self, TypeVar

from msgspec import Struct, structs

from sds_agent.authority.protocol import ErrorKind
from sds_agent.digest import sha256
from sds_agent.issuance.validity import SKEW

C = TypeVar("C")

FLOOR = timedelta(seconds=1)
"""The least time between two certificates of a workload, however short they live."""
FIRST_RETRY = timedelta(seconds=0.5)
LONGEST_RETRY = timedelta(seconds=60)
FIRST_RETRY_REFUSED = timedelta(seconds=10)
"""After a refusal a person has to act, so asking often does not help."""
LONGEST_RETRY_UNSERVED = timedelta(seconds=10)
"""Between two attempts while nothing valid is served, and requests fail for want of a certificate."""
RETRY_SHARE_UNSERVED = 0.5
"""The same, as a share of a lifetime: about what passes between two renewals, for which the CA was made."""
LONGEST_RETRY_SUPPLIED = timedelta(seconds=10)
"""Between two attempts at a source on this machine, which makes certificates by itself."""
SHORTEST_DELAY = timedelta(seconds=0.2)
"""The least time before a retry, whatever the jitter."""
LONGEST_RETRY_AFTER = timedelta(hours=1)
"""A CA that asks for a longer delay than this is asked again all the same."""
RECHECK = timedelta(seconds=5)
"""The longest wait while a certificate is withheld, which is good again as soon as a root that ended first is renewed.
"""
LONGEST_WAIT = timedelta(hours=1)
"""While an attempt is under way, whose end ends the wait, and nothing else is due: thousands may wait for a turn."""
ALARM = 0.2
"""The share of a lifetime that may be left before a failing renewal is logged as an error."""
SPREAD_FROM = timedelta(minutes=10)
"""The shortest life in which certificates have a place in their term. The jitter alone spreads shorter ones in an hour
or two, and a second certificate seconds after the first would help nobody.
"""
SETTLING = timedelta(minutes=5)
SETTLING_SHARE = 0.1
"""For so long a first certificate is not renewed, or this share of its term if that is less: Envoys still start, and
people look at what they began.
"""
PEER_SKEW = timedelta(seconds=30)
PEER_SKEW_SHARE = 0.05
"""A peer's clock may be behind ours: a renewed certificate is published `PEER_SKEW` after its NotBefore, or this share
of its life if that is less, while there is another to serve. CAs that backdate NotBefore make this nothing.
"""


class Renewal(Struct, frozen=True):
    """At which share of its lifetime a certificate is renewed: `fraction`, give or take `jitter`."""

    fraction: float = 0.5
    jitter: float = 0.05


class CurrentLeaf(Struct, frozen=True):
    """A certificate, as far as time is concerned. `serial`, in hexadecimal, feeds the jitter.

    Of the time from its issue to its renewal, the share `elapsed` counts as over when it is issued (`place`).
    One that is `foreign` is served as long as any, and the workload's own CA is asked for another at once. One that is
    held back waits until `held_until` for peers to load its trust anchor, while another one is served.
    """

    issued_at: datetime
    not_before: datetime
    not_after: datetime
    serial: str
    foreign: bool = False
    held_until: datetime | None = None
    elapsed: float = 0.0

    def renew_at(self, renewal: Renewal) -> datetime:
        """When to ask for the next one."""
        return self.issued_at if self.foreign else self.term_ends_at(renewal)

    def term_ends_at(self, renewal: Renewal) -> datetime:
        """The same by its age alone, whichever CA issued it."""
        share = renewal.fraction + (2 * self._drawn(0) - 1) * renewal.jitter
        return self.issued_at + max(share_of(self.lifetime, share * (1 - self.elapsed)), FLOOR)

    @property
    def lifetime(self) -> timedelta:
        """How long it is valid from its issue on.

        Where the CA's clock is ahead, this one has to be waited for, and the next one will be too: what counts is how
        long it is valid, and the waiting for it takes place in that time.
        """
        return self.not_after - max(self.issued_at, self.not_before)

    def place(self, before: Self | None, renewal: Renewal) -> float:
        """The share of its term, in [0, 1], that is to count as over at its issue, so that many agents stay spread.

        Without a certificate `before` it, any: its serial decides. Else what has passed since that one was due, without
        whole terms: nothing if it came in time. None of this without jitter, for then the moment is to be known.
        """
        term = share_of(self.lifetime, renewal.fraction)
        if not renewal.jitter or self.lifetime < SPREAD_FROM:
            return 0.0
        if before is None:
            return self._drawn(1) * (1 - min(SETTLING / term, SETTLING_SHARE))
        return (self.issued_at - before.term_ends_at(renewal)) % term / term

    def _drawn(self, number: int) -> float:
        """One of four numbers that are even in [0, 1) over all serials."""
        digest = _digest_of(self.serial)
        return (int.from_bytes(digest[8 * number : 8 * number + 8], "big") >> 11) / 2**53

    def expired(self, now: datetime) -> bool:
        """Whether peers refuse the certificate, as it has ended."""
        return now >= self.not_after

    def valid(self, now: datetime) -> bool:
        """Whether peers accept the certificate now."""
        return self.not_before <= now < self.not_after

    @property
    def alarm_at(self) -> datetime:
        """From when on so little lifetime is left that a person should act."""
        return self.not_after - share_of(self.not_after - self.issued_at, ALARM)

    def alarming(self, now: datetime) -> bool:
        """Whether so little lifetime is left that a person should act."""
        return now >= self.alarm_at


def share_of(span: timedelta, share: float) -> timedelta:
    """Their product. The one of Python's own computes with fractions, which takes as long as all else about a time."""
    return timedelta(0, span.total_seconds() * share)


@lru_cache(maxsize=64)
def _digest_of(serial: str) -> bytes:
    """Remembered: what is due is asked several times on the way of one certificate to Envoys."""
    return sha256(serial.encode())


class Failure(Struct, frozen=True):
    """The last attempt failed: when, for the how many-th time in a row, how long to wait because of it, and why.

    `refusals` is how many attempts in a row, up to this one, the CA refused; 0 if this one failed otherwise.
    """

    at: datetime
    count: int
    delay: timedelta
    kind: ErrorKind = ErrorKind.TRANSIENT
    refusals: int = 0

    @property
    def retry_at(self) -> datetime:
        """When the next attempt is due."""
        return self.at + self.delay


class Succession(Struct, Generic[C], frozen=True):
    """A workload's certificates, in whatever form: a value, and what each action makes of it.

    `served` was published last; it is `withheld` from when it has ended. Those `coming` are accepted and not published
    yet, the newest last. Those `earlier` were served before, and what they chain to is trusted until they have ended.
    """

    served: C | None = None
    withheld: bool = False
    coming: tuple[C, ...] = ()
    earlier: tuple[C, ...] = ()

    def add(self, certificate: C) -> Self:
        """With one more that is to be published."""
        return structs.replace(self, coming=(*self.coming, certificate))

    def replace_newest(self, certificate: C) -> Self:
        """With the newest one, which there is, in another form."""
        if self.coming:
            return structs.replace(self, coming=(*self.coming[:-1], certificate))
        return structs.replace(self, served=certificate)

    def publish(self, index: int) -> Self:
        """With the one of that index among those coming served, and those before it dropped.

        What was served becomes an earlier one, unless it is withheld, for which nothing is trusted any longer.
        """
        before = () if self.served is None or self.withheld else (self.served,)
        return structs.replace(
            self,
            served=self.coming[index],
            withheld=False,
            coming=self.coming[index + 1 :],
            earlier=(*self.earlier, *before),
        )

    def withhold(self) -> Self:
        """With the one that is served withheld."""
        return structs.replace(self, withheld=True)

    def offer_again(self) -> Self:
        """With the one that was withheld served again."""
        return structs.replace(self, withheld=False)

    def map(self, change: Callable[[C], C]) -> Self:
        """With each of them as `change` makes it."""
        return structs.replace(
            self,
            served=None if self.served is None else change(self.served),
            coming=tuple(map(change, self.coming)),
            earlier=tuple(map(change, self.earlier)),
        )

    def release(self, index: int) -> Self:
        """Without the one of that index among the earlier ones."""
        return structs.replace(self, earlier=self.earlier[:index] + self.earlier[index + 1 :])


class IssuanceState(Succession[CurrentLeaf], frozen=True):
    """All that decides what to do next: the certificates as far as time is concerned, the failure of the last attempt
    at the CA if it failed, and whether one is under way (`asking`).

    Where certificates are `supplied`, their source decides when there is another, and an attempt waits for that. The
    last one succeeded at `answered_at`.

    Of several authorities all this is about the one whose turn it is (`failover`). It is asked at `ask_at` even if no
    certificate is due, and from `choose_at` on it may be another's turn.
    """

    failure: Failure | None = None
    asking: bool = False
    supplied: bool = False
    answered_at: datetime | None = None
    ask_at: datetime | None = None
    choose_at: datetime | None = None

    def newest(self, now: datetime) -> CurrentLeaf | None:
        """The certificate whose age says when to ask for the next one."""
        return next((leaf for leaf in reversed(self.coming) if _awaited(leaf, now)), self.served)

    def publish_at(self, now: datetime) -> dict[int, datetime]:
        """When to publish each of those coming, by its index.

        No peer accepts a certificate before its NotBefore. A peer whose clock is behind ours does so later still, for
        which there is a margin while another certificate can be served. In that time peers also load a trust anchor
        that is new to them. Neither takes more than half of what is left of the other certificate's life.
        """
        if not self.coming:
            return {}
        return {n: self._publish_at(leaf, now) for n, leaf in enumerate(self.coming) if _awaited(leaf, now)}

    def _publish_at(self, leaf: CurrentLeaf, now: datetime) -> datetime:
        served = self.served
        if served is None or not served.valid(now):
            return leaf.not_before
        rest = max(served.not_after - leaf.not_before, timedelta(0))
        begin = leaf.not_before + min(PEER_SKEW, (leaf.not_after - leaf.not_before) * PEER_SKEW_SHARE, rest / 2)
        if leaf.held_until is None:
            return begin
        return max(begin, min(leaf.held_until, leaf.issued_at + (served.not_after - leaf.issued_at) / 2))


def _awaited(leaf: CurrentLeaf, now: datetime) -> bool:
    """Whether a certificate that is not served yet is worth waiting for.

    One that is further ahead than would be accepted is not: the clock was set back.
    """
    return not leaf.expired(now) and leaf.not_before <= now + SKEW


class Ask(Struct, frozen=True):
    """Begin an attempt at the CA."""


class Publish(Struct, frozen=True):
    """Serve the certificate with that index among those coming; those before it have been overtaken."""

    index: int


class Withhold(Struct, frozen=True):
    """The certificate that is served has ended: stop serving it and the anchors that only it needs."""


class OfferAgain(Struct, frozen=True):
    """The certificate that was withheld is valid: the clock was set back, or its root was renewed. Serve it."""


class Release(Struct, frozen=True):
    """The certificate with that index among the earlier ones has ended: stop serving the anchors that only it needs."""

    index: int


class Wait(Struct, frozen=True):
    """Nothing to do before this time, unless the wall clock is set or an attempt under way ends."""

    until: datetime


Decision = Ask | Publish | Withhold | OfferAgain | Release | Wait


def decide(now: datetime, state: IssuanceState, renewal: Renewal) -> Decision:
    """The one action to take now.

    A certificate that can be served is published before the one that it replaces is withheld, so that there is no
    moment without any. A wall clock that went backwards past a noted moment makes that moment meaningless: it never
    delays an attempt.
    """
    publish_at = state.publish_at(now)
    if due := [index for index, time in publish_at.items() if now >= time]:
        return Publish(due[-1])
    if ended := [index for index, leaf in enumerate(state.earlier) if leaf.expired(now)]:
        return Release(ended[0])
    if state.served is not None and state.served.expired(now) is not state.withheld:
        return OfferAgain() if state.withheld else Withhold()
    ask_at = [] if state.asking else [_ask_at(now, state, renewal)]
    if ask_at and now >= ask_at[0]:
        return Ask()
    return Wait(_next(now, state, [*publish_at.values(), *ask_at]))


def _next(now: datetime, state: IssuanceState, others: list[datetime]) -> datetime:
    """When a certificate ends or comes within reach, or the first of the other moments."""
    moments = [*others, *(leaf.not_after for leaf in state.earlier)]
    moments += [leaf.not_before - SKEW for leaf in state.coming if now + SKEW < leaf.not_before]
    if state.served is not None:
        moments.append(now + RECHECK if state.withheld else state.served.not_after)
    if state.choose_at is not None and not state.asking:
        moments.append(max(state.choose_at, now))
    return min(moments, default=now + LONGEST_WAIT)


def _ask_at(now: datetime, state: IssuanceState, renewal: Renewal) -> datetime:
    failure = state.failure
    if failure is not None:
        return failure.retry_at if failure.at <= now else now
    if state.ask_at is not None:
        return state.ask_at
    if state.supplied:
        answered_at = state.answered_at
        return now if answered_at is None or answered_at > now else answered_at + FLOOR
    return due_at(now, state, renewal)


def due_at(now: datetime, state: IssuanceState, renewal: Renewal) -> datetime:
    """When the next certificate is due by the age of the newest one."""
    newest = state.newest(now)
    if newest is None:
        return now
    if newest is state.served and now < min(newest.issued_at, newest.not_before):
        return now  # the clock was set back, and to everybody else the certificate is not valid yet
    return newest.renew_at(renewal)


def failed(
    now: datetime,
    kind: ErrorKind,
    *,
    before: Failure | None,
    served: CurrentLeaf | None,
    ttl: timedelta,
    retry_after: float | None,
    randomness: float,
    supplied: bool = False,
) -> Failure:
    """The failure of this attempt, after the one before it.

    The delay has full jitter (`randomness` is uniform in [0, 1)) under a bound that doubles from failure to failure and
    stays at its cap. The cap is low while nothing valid is served, unless the CA refused, which asking does not fix;
    `ttl` is the lifetime asked for. After a refusal the bound doubles with the refusals in a row alone: what a CA
    answers once while it starts after an outage must not cost a minute. A CA's own Retry-After (seconds) is a lower
    bound. While a valid certificate is served, at most half the rest of its life passes before the next attempt, so
    that none sleeps past the expiry it is to prevent. Where certificates are `supplied`, asking costs a CA nothing: the
    delays are short, whatever the cause.
    """
    count = before.count + 1 if before else 1
    refusals = (before.refusals if before else 0) + 1 if kind.refused else 0
    valid = served is not None and not served.expired(now)
    slow = kind.refused and not supplied
    cap = LONGEST_RETRY if valid or slow else _longest_unserved(served, ttl)
    if supplied:
        cap = LONGEST_RETRY_SUPPLIED
    delay = _jittered(refusals if slow else count, cap, randomness, slow=slow)
    if retry_after is not None and retry_after > 0:  # so a CA's "nan" does not count either
        delay = max(delay, timedelta(seconds=min(retry_after, LONGEST_RETRY_AFTER.total_seconds())))
    if served is not None and valid:
        delay = min(delay, (served.not_after - now) / 2)
    return Failure(now, count, max(delay, SHORTEST_DELAY), kind, refusals)


def _jittered(count: int, cap: timedelta, randomness: float, *, slow: bool) -> timedelta:
    first = FIRST_RETRY_REFUSED if slow else FIRST_RETRY
    bound = min(first * float(2 ** min(count - 1, 16)), cap)
    return bound / 2 + bound * randomness / 2 if slow else bound * randomness


def _longest_unserved(served: CurrentLeaf | None, ttl: timedelta) -> timedelta:
    life = ttl if served is None else served.not_after - served.issued_at
    return max(min(LONGEST_RETRY_UNSERVED, life * RETRY_SHARE_UNSERVED), FLOOR)
