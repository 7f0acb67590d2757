"""Why a workload has no certificate that could be given out, in words for `sds-agent ready`: pure."""

from datetime import datetime

from msgspec import Struct

from sds_agent.authority.protocol import ErrorKind
from sds_agent.issuance.schedule import Failure, Holdings

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


class Standing(Struct, frozen=True):
    """A workload at one moment: its certificates, and the failure of the last attempt, if that failed."""

    workload: str
    holdings: Holdings
    failure: Failure | None


def lack(standing: Standing, now: datetime) -> str | None:
    """Why its certificate cannot be given out at `now`, or None if it can. Holds no word of the CA's."""
    served = standing.holdings.served
    if served is not None and served.valid(now):
        return None
    what = "not issued yet" if served is None else f"expired at {served.not_after:{_TIME}}"
    held = [each for each in (served, *standing.holdings.coming) if each is not None]
    if begins := [each.not_before for each in held if now < each.not_before]:
        what = f"not valid before {min(begins):{_TIME}}"
    return f"{standing.workload}: {what}{_failed(standing.failure)}"


def _failed(failure: Failure | None) -> str:
    if failure is None:
        return ""
    attempts = "the last attempt" if failure.count == 1 else f"the last of {failure.count} attempts"
    return f"; {attempts} failed at {failure.at:{_TIME}} ({failure.kind.value}: {_KINDS[failure.kind]})"
