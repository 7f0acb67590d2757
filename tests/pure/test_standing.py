"""Why a workload has no certificate: the user of `sds-agent ready` acts on these words."""

from datetime import timedelta
from typing import Any

import pytest
from fakes.hierarchy import NOW
from msgspec import structs

from sds_agent.authority.protocol import ErrorKind
from sds_agent.issuance.standing import lack
from sds_agent.issuance.status import FailureStatus, LeafStatus, WorkloadStatus

SECOND = timedelta(seconds=1)
AT = f"{NOW:%Y-%m-%d %H:%M:%S} UTC"
END = f"{NOW + 10 * SECOND:%Y-%m-%d %H:%M:%S} UTC"


def leaf(begin: int, end: int) -> LeafStatus:
    """A certificate whose chain is valid from and until so many seconds after NOW, and whose leaf is valid longer."""
    valid_from, valid_until = NOW + begin * SECOND, NOW + end * SECOND
    return LeafStatus(
        serial="4f",
        issued_at=NOW,
        not_before=NOW - 60 * SECOND,
        not_after=NOW + 60 * SECOND,
        valid_from=valid_from,
        valid_until=valid_until,
        ends_with="'CN=root'",
        renew_at=NOW + 5 * SECOND,
    )


CURRENT, NEXT = leaf(0, 10), leaf(15, 30)
NOTHING = WorkloadStatus("web", "spiffe://demo.example/web", "local")


def failure(attempts: int, kind: ErrorKind) -> FailureStatus:
    return FailureStatus(kind, NOW, attempts, NOW + SECOND)


@pytest.mark.parametrize(
    ("leaves", "failure", "seconds", "said"),
    [
        ({}, None, 0, "web: not issued yet"),
        (
            {},
            failure(1, ErrorKind.DENIED),
            0,
            f"web: not issued yet; the last attempt failed at {AT} (denied: the CA refuses this identity or this "
            "request)",
        ),
        ({"coming": (CURRENT,)}, None, -1, f"web: not valid before {AT}"),
        ({"current": CURRENT}, None, -1, f"web: not valid before {AT}"),  # the clock was set back
        ({"current": CURRENT}, None, 0, None),
        ({"current": CURRENT}, failure(1, ErrorKind.TRANSIENT), 9, None),
        (
            {"current": CURRENT},
            failure(3, ErrorKind.TRANSIENT),
            10,
            f"web: expired at {END}; the last of 3 attempts failed at {AT} (transient: the CA cannot be reached, or is "
            "not ready)",
        ),
        ({"current": CURRENT, "coming": (NEXT,)}, None, 9, None),
        (
            {"current": CURRENT, "coming": (NEXT,)},
            None,
            10,
            f"web: not valid before {NOW + 15 * SECOND:%Y-%m-%d %H:%M:%S} UTC",
        ),
    ],
)
def test_the_workload_is_named_with_what_it_lacks_and_why(
    leaves: dict[str, Any], failure: FailureStatus | None, seconds: int, said: str | None
) -> None:
    status = structs.replace(NOTHING, **leaves, failure=failure)
    assert lack(status, NOW + seconds * SECOND) == said


@pytest.mark.parametrize("kind", ErrorKind)
def test_every_kind_of_failure_has_words(kind: ErrorKind) -> None:
    assert f"({kind.value}: " in str(lack(structs.replace(NOTHING, failure=failure(1, kind)), NOW))
