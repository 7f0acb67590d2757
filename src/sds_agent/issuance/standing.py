"""Why a workload has no certificate that could be given out, in words for `sds-agent ready`: pure."""

from datetime import datetime

from sds_agent.authority.protocol import ErrorKind
from sds_agent.issuance.status import FailureStatus, WorkloadStatus

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


def _failed(failure: FailureStatus | None) -> str:
    if failure is None:
        return ""
    attempts = "the last attempt" if failure.attempts == 1 else f"the last of {failure.attempts} attempts"
    return f"; {attempts} failed at {failure.at:{_TIME}} ({failure.kind.value}: {_KINDS[failure.kind]})"
