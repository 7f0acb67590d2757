"""How the attempts at a workload's CAs go, as statuses, and why it has no certificate that could be given out, in words
for `sds-agent ready`: pure.
"""

from collections.abc import Sequence
from datetime import datetime

from sds_agent.authority.protocol import ErrorKind
from sds_agent.issuance.failover import Failover
from sds_agent.issuance.schedule import Failure
from sds_agent.issuance.status import AuthorityStatus, FailureStatus, WorkloadStatus

_TIME = "%Y-%m-%d %H:%M:%S UTC"
_KINDS = {
    ErrorKind.TRANSIENT: "the CA cannot be reached, or is not ready",
    ErrorKind.THROTTLED: "the CA asks to slow down",
    ErrorKind.PENDING: "the CA waits for an approval",
    ErrorKind.UNAUTHENTICATED: "the token, certificate or roots to ask with are missing, or the CA does not take them",
    ErrorKind.DENIED: "the CA refuses this identity or this request",
    ErrorKind.INVALID: "the CA's answer cannot be used, or the CA calls the request malformed",
    ErrorKind.MISMATCH: "the CA issued something else than was asked for",
}


def lack(status: WorkloadStatus, now: datetime) -> str | None:
    """Why the workload's certificate cannot be given out at `now`, or None if it can. Holds no word of the CA's."""
    current = status.current
    if current is not None and current.valid(now):
        return None
    what = "not issued yet" if current is None else f"expired at {current.valid_until:{_TIME}}"
    accepted = [leaf for leaf in (current, *status.coming) if leaf is not None]
    if begins := [leaf.valid_from for leaf in accepted if now < leaf.valid_from]:
        what = f"not valid before {min(begins):{_TIME}}"
    return f"{status.name}: {what}{_failed(status.failure)}"


def failure_status(failure: Failure, next_attempt: datetime | None = None) -> FailureStatus:
    """What can be seen of a failure; the next attempt is at its own time unless another is given."""
    return FailureStatus(failure.kind, failure.at, failure.count, next_attempt or failure.retry_at)


def authority_statuses(names: Sequence[str], failover: Failover, now: datetime) -> tuple[AuthorityStatus, ...]:
    """What can be seen of a workload's authorities, by their names in order; nothing where there is one."""
    if failover.alone:
        return ()
    return tuple(
        AuthorityStatus(
            name,
            index == failover.in_use,
            None
            if tried.failure is None
            else failure_status(tried.failure, failover.back_at(index, now) if index < failover.in_use else None),
        )
        for index, (name, tried) in enumerate(zip(names, failover.tried, strict=True))
    )


def _failed(failure: FailureStatus | None) -> str:
    if failure is None:
        return ""
    attempts = "the last attempt" if failure.attempts == 1 else f"the last of {failure.attempts} attempts"
    return f"; {attempts} failed at {failure.at:{_TIME}} ({failure.kind.value}: {_KINDS[failure.kind]})"
