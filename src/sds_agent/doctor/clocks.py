"""This machine's clock beside a CA's: pure."""

from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime

from sds_agent.doctor.diagnosis import Diagnosis, bad, good, warning

NEAR, FAR = timedelta(seconds=5), timedelta(seconds=60)
"""Up to NEAR nothing is wrong; beyond FAR a fresh certificate is refused as not yet valid."""


def of_clock(authority: str, date: str | None, now: datetime) -> Diagnosis:
    """What the Date header of an answer (RFC 9110 section 6.6.1) says of this machine's clock at `now`."""
    subject = f"authority {authority}"
    try:
        theirs = None if date is None else parsedate_to_datetime(date)
    except (ValueError, OverflowError):  # the latter for a number too large
        theirs = None
    if theirs is None:
        return good(subject, "it answers; it does not tell its time")
    if theirs.tzinfo is None:  # it ends in -0000, or names no zone: the header is always in UTC
        theirs = theirs.replace(tzinfo=UTC)
    apart = now - theirs
    size = abs(apart)
    if size <= NEAR:
        return good(subject, "it answers, and its clock agrees with this machine's")
    which = "ahead of" if apart > timedelta(0) else "behind"
    text = f"this machine's clock is {size.total_seconds():.0f} s {which} the CA's; set both by NTP"
    return warning(subject, text) if size <= FAR else bad(subject, f"{text}: certificates are refused as not valid")
