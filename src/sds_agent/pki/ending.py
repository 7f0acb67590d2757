"""When the end of a CA's certificate is near: the people who renew it need weeks."""

from datetime import datetime, timedelta

SHARES = (0.1, 0.03)
"""What is left of a CA's life at the warning and at the alarm, at most. SPIRE's CAs, as an example, are followed by the
next one when a sixth is left.
"""
TIMES = (timedelta(days=30), timedelta(days=7))
"""The same, at most: what people need who have to renew a CA of ten years."""


def near_end_of_ca(begin: datetime, end: datetime) -> tuple[datetime, datetime]:
    """When to warn and to raise the alarm of a CA's end."""
    warn, alarm = (end - min((end - begin) * share, most) for share, most in zip(SHARES, TIMES, strict=True))
    return warn, alarm
