"""How long a token of Vault's lasts, and when to renew it. No I/O and no clock.

A token ends with its lease, and a renewal gives it a new lease that counts from the renewal. A periodic token can be
renewed for ever. Others have a greatest age: a renewal past it still succeeds and gives only what is left of it, so
the end does not move. Renewals at two thirds of what is left would then come faster and faster and gain nothing.
Batch tokens, and those that were made so, cannot be renewed at all.

A server says how long a token lasts, and not until when. So all times here are of a clock that nobody sets: by the wall
clock, one that was set back would be renewed too late, and one that was set ahead be thrown away while it is good.
"""

from datetime import datetime, timedelta

from msgspec import Struct, structs

from sds_agent.authority.credentials import Token
from sds_agent.values import Sensitive

SHARE = 2 / 3
"""The part of its lease after which a token is renewed."""
LEAST_GAIN = 0.1
"""A renewal that moves the end by less than this part of the lease shows that the token's greatest age is near."""
LEAST_WAIT = timedelta(seconds=5)
"""Between two attempts to renew."""


class TokenLease(Struct, frozen=True):
    """What the server said of a token at `since`. `lasts` is None for one that does not end, such as a root token."""

    since: datetime
    lasts: timedelta | None
    renewable: bool
    tried: datetime | None = None
    """When a renewal failed that may succeed later."""

    @property
    def ends(self) -> datetime | None:
        """When the server forgets the token; None for never."""
        return None if self.lasts is None else self.since + self.lasts

    @property
    def renew_at(self) -> datetime | None:
        """When to renew it; None where that is not possible or not needed."""
        if self.lasts is None or not self.renewable:
            return None
        if self.tried is None:
            return self.since + self.lasts * SHARE
        left = self.since + self.lasts - self.tried
        return self.tried + max(left / 4, LEAST_WAIT) if left > timedelta(0) else None

    def has_ended(self, now: datetime) -> bool:
        """Whether the token is good no longer at `now`."""
        return self.ends is not None and now >= self.ends

    def followed_by(self, renewed: "TokenLease") -> "TokenLease":
        """The lease that a renewal gave, which is the last one where the renewal gained next to nothing."""
        if self.ends is None or renewed.ends is None or renewed.lasts is None:
            return renewed
        if renewed.ends - self.ends < renewed.lasts * LEAST_GAIN:
            return structs.replace(renewed, renewable=False)
        return renewed

    def final(self) -> "TokenLease":
        """The same lease, which nothing renews."""
        return structs.replace(self, renewable=False)

    def after_failure(self, now: datetime) -> "TokenLease":
        """The same lease after a renewal that failed at `now` and is worth another attempt."""
        return structs.replace(self, tried=now)


class HeldToken(Sensitive, frozen=True):
    """A token in use. `login` identifies the certificate that it was given for, which alone can renew it; it is empty
    with other methods. `lease` is None until the server has said how long it lasts.
    """

    token: Token
    lease: TokenLease | None = None
    login: str = ""

    def is_good(self, now: datetime, login: str) -> bool:
        """Whether to show it at `now`, to a server that sees the certificate `login`."""
        return self.login == login and (self.lease is None or not self.lease.has_ended(now))
