"""How the attempts at a workload's CAs go, as statuses, and why it has no certificate that could be given out, in words
for `sds-agent ready`: pure.
"""

from collections.abc import Mapping
from datetime import datetime

from sds_agent import log
from sds_agent.authority.protocol import AuthorityError, ErrorKind
from sds_agent.issuance.failover import Failover
from sds_agent.issuance.schedule import Failure
from sds_agent.issuance.status import AuthorityStatus, FailureStatus, WorkloadStatus
from sds_agent.text import printable

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


def failure_status(
    failure: Failure, error: AuthorityError | None, next_attempt: datetime | None = None
) -> FailureStatus:
    """What can be seen of a failure that `error` was; the next attempt is at its own time unless another is given."""
    cause = "" if error is None else printable(str(error), log.LONGEST_VALUE)
    return FailureStatus(failure.kind, failure.at, failure.count, next_attempt or failure.retry_at, cause)


def authority_statuses(
    errors: Mapping[str, AuthorityError | None], failover: Failover, now: datetime
) -> tuple[AuthorityStatus, ...]:
    """What can be seen of a workload's authorities, in order; nothing where there is one. `errors` has that of the last
    attempt at each, by its name.
    """
    if failover.alone:
        return ()
    return tuple(
        AuthorityStatus(
            name,
            index == failover.in_use,
            None
            if tried.failure is None
            else failure_status(
                tried.failure, error, failover.back_at(index, now) if index < failover.in_use else None
            ),
        )
        for index, ((name, error), tried) in enumerate(zip(errors.items(), failover.tried, strict=True))
    )


def _failed(failure: FailureStatus | None) -> str:
    if failure is None:
        return ""
    attempts = "the last attempt" if failure.attempts == 1 else f"the last of {failure.attempts} attempts"
    return f"; {attempts} failed at {failure.at:{_TIME}} ({failure.kind.value}: {_KINDS[failure.kind]})"
