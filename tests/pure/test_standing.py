"""Why a workload has no certificate: whoever asks `ready` acts on these words."""

from datetime import timedelta

import pytest
from fakes.hierarchy import NOW

from sds_agent.authority.protocol import ErrorKind
from sds_agent.issuance.schedule import CurrentLeaf, Failure, Holdings
from sds_agent.issuance.standing import Standing, lack

SECOND = timedelta(seconds=1)
HELD = CurrentLeaf(NOW, NOW, NOW + 10 * SECOND, "4f")
NEXT = CurrentLeaf(NOW, NOW + 15 * SECOND, NOW + 30 * SECOND, "50")
NOTHING = Holdings()
SERVED = Holdings(HELD)
AT = f"{NOW:%Y-%m-%d %H:%M:%S} UTC"
END = f"{NOW + 10 * SECOND:%Y-%m-%d %H:%M:%S} UTC"


@pytest.mark.parametrize(
    ("holdings", "failure", "seconds", "said"),
    [
        (NOTHING, None, 0, "web: not issued yet"),
        (
            NOTHING,
            Failure(NOW, 1, SECOND, ErrorKind.DENIED),
            0,
            f"web: not issued yet; the last attempt failed at {AT} (denied: the CA refuses this identity or this "
            "request)",
        ),
        (Holdings(None, (HELD,)), None, -1, f"web: not valid before {AT}"),
        (SERVED, None, 0, None),
        (SERVED, Failure(NOW, 1, SECOND, ErrorKind.TRANSIENT), 9, None),
        (
            SERVED,
            Failure(NOW, 3, SECOND, ErrorKind.TRANSIENT),
            10,
            f"web: expired at {END}; the last of 3 attempts failed at {AT} (transient: the CA cannot be reached, or is "
            "not ready)",
        ),
        (Holdings(HELD, (NEXT,)), None, 9, None),
        (Holdings(HELD, (NEXT,)), None, 10, f"web: not valid before {NOW + 15 * SECOND:%Y-%m-%d %H:%M:%S} UTC"),
    ],
)
def test_the_workload_is_named_with_what_it_lacks_and_why(
    holdings: Holdings, failure: Failure | None, seconds: int, said: str | None
) -> None:
    assert lack(Standing("web", holdings, failure), NOW + seconds * SECOND) == said


@pytest.mark.parametrize("kind", ErrorKind)
def test_every_kind_of_failure_has_words(kind: ErrorKind) -> None:
    assert f"({kind.value}: " in str(lack(Standing("web", NOTHING, Failure(NOW, 1, SECOND, kind)), NOW))
