"""When to ask for a certificate: pure decisions, with the time as an argument.

A certificate's lifetime is counted from the moment it was issued to its NotAfter. CAs backdate NotBefore, so counting
from there would call a short certificate old on arrival. Jitter comes from the certificate itself: asking twice gives
one answer, and a fleet spreads evenly.
"""

import hashlib
from datetime import datetime, timedelta

from msgspec import Struct

from sds_agent.authority.protocol import ErrorKind

FLOOR = timedelta(seconds=1)
"""The least time between two certificates of a workload, however short they live."""
FIRST_RETRY = timedelta(seconds=0.5)
LONGEST_RETRY = timedelta(seconds=60)
FIRST_RETRY_REFUSED = timedelta(seconds=10)
"""After a refusal somebody has to act, so asking often does not help."""
SHORTEST_DELAY = timedelta(seconds=0.2)
"""The least time before a retry, whatever chance says."""
LONGEST_RETRY_AFTER = timedelta(hours=1)
"""A CA that asks for more patience than this is asked again all the same."""
ALARM = 0.2
"""The share of a lifetime that may be left before a failing renewal is logged as an error."""


class Renewal(Struct, frozen=True):
    """At which share of its lifetime a certificate is renewed: `fraction`, give or take `jitter`."""

    fraction: float = 0.5
    jitter: float = 0.05


class Held(Struct, frozen=True):
    """The certificate now served, as far as time is concerned. `serial`, in hexadecimal, feeds the jitter."""

    issued_at: datetime
    not_before: datetime
    not_after: datetime
    serial: str

    def renew_at(self, renewal: Renewal) -> datetime:
        """When to ask for the next one."""
        digest = hashlib.sha256(self.serial.encode()).digest()
        spread = int.from_bytes(digest[:8], "big") / 2**63 - 1  # -1 to 1, evenly
        share = renewal.fraction + spread * renewal.jitter
        return max(self.issued_at + (self.not_after - self.issued_at) * share, self.issued_at + FLOOR)

    def expired(self, now: datetime) -> bool:
        """Whether nobody would take the certificate any more."""
        return now >= self.not_after

    def alarming(self, now: datetime) -> bool:
        """Whether so little lifetime is left that a person should look."""
        return self.not_after - now <= (self.not_after - self.issued_at) * ALARM


class Failure(Struct, frozen=True):
    """The last attempt failed: when, for the how many-th time in a row, and how long to wait because of it."""

    at: datetime
    count: int
    delay: timedelta


class Ask(Struct, frozen=True):
    """Ask the CA now."""


class Wait(Struct, frozen=True):
    """Nothing to do before this time, unless the wall clock is set."""

    until: datetime


def decide(now: datetime, held: Held | None, failure: Failure | None, renewal: Renewal) -> Ask | Wait:
    """What to do now.

    A wall clock that went backwards past a noted moment makes that moment meaningless: it never delays an attempt.
    """
    if failure is not None and failure.at <= now < failure.at + failure.delay:
        return Wait(failure.at + failure.delay)
    if held is None or failure is not None or now < min(held.issued_at, held.not_before):
        # the last of these: the clock was set back, and to everybody else the certificate is not valid yet
        return Ask()
    renew_at = held.renew_at(renewal)
    return Ask() if now >= renew_at else Wait(renew_at)


def failed(
    now: datetime,
    kind: ErrorKind,
    *,
    before: Failure | None,
    held: Held | None,
    retry_after: float | None,
    chance: float,
) -> Failure:
    """The failure of this attempt, after the one before it.

    The delay has full jitter (`chance` is uniform in [0, 1)) under a bound that doubles from failure to failure and
    stays at its cap. A CA's own Retry-After (seconds) is a lower bound. While a certificate is held, at most half the
    rest of its life passes before the next attempt, so that none sleeps past the expiry it is to prevent.
    """
    count = before.count + 1 if before else 1
    first = FIRST_RETRY_REFUSED if kind.refused else FIRST_RETRY
    bound = min(first * 2 ** min(count - 1, 16), LONGEST_RETRY)
    delay = bound * chance
    if kind.refused:
        delay = bound / 2 + delay / 2
    if retry_after is not None and retry_after > 0:  # so a CA's "nan" does not count either
        delay = max(delay, timedelta(seconds=min(retry_after, LONGEST_RETRY_AFTER.total_seconds())))
    if held is not None and not held.expired(now):
        delay = min(delay, (held.not_after - now) / 2)
    return Failure(now, count, max(delay, SHORTEST_DELAY))
