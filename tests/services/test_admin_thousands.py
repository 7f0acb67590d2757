"""An agent with thousands of workloads and streams: what a view of them costs its Envoys, and what it leaves out."""

import asyncio
import sys
from typing import Any

import httpx
import msgspec
import pytest
from fakes.clocks import HandClock
from fakes.hierarchy import NOW
from fakes.observed import ABOUT, FAILURE, STREAM, Seen, workload
from msgspec.structs import replace

from sds_agent.admin.application import Sources, application
from sds_agent.admin.events import EventFeed
from sds_agent.admin.slices import SLICE
from sds_agent.admin.view import status
from sds_agent.sds.departed import DepartedStream
from sds_agent.sds.status import Nack, NameStatus

MANY = 1000
GONE = tuple(DepartedStream(n, "StreamSecrets", f"gone-{n}", "pid 1", ("web",), NOW, NOW) for n in range(MANY))


def named(number: int, **changed: Any) -> Any:
    return replace(workload(**changed), name=f"w{number}")


def crowded() -> Seen:
    """A thousand of each; one workload has none, one fails; one Envoy refuses and one waits."""
    workloads = [named(number) for number in range(MANY)]
    workloads[700] = named(700, failure=FAILURE)
    workloads[900] = named(900, current=None, served=False)
    good = replace(STREAM, names=(NameStatus("web", "v1", "v1"),))
    streams = [replace(good, number=n, node=f"edge-{n}") for n in range(MANY)]
    streams[800] = replace(streams[800], names=(NameStatus("web", "v1", None, Nack("v1", "no such curve")),))
    streams[600] = replace(streams[600], names=(NameStatus("web"),))
    names = {each.name: (each.name,) for each in workloads}
    about = replace(ABOUT, names=names)
    lacking = tuple(f"{each.name}: not issued yet" for each in workloads)
    return Seen(workloads=tuple(workloads), streams=tuple(streams), departed=GONE, about=about, lacking=lacking)


async def get(seen: Seen, path: str) -> httpx.Response:
    async def reachable() -> None: ...

    clock = HandClock()
    app = application(Sources(seen, EventFeed(), clock, reachable))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        return await client.get(path)


async def test_a_status_in_slices_is_the_whole_status() -> None:
    seen = crowded()
    answered = msgspec.json.decode((await get(seen, "/status")).content)
    whole = msgspec.json.decode(msgspec.json.encode(status(seen, HandClock().now())))
    assert list(answered) == list(whole)
    assert answered == whole


async def test_envoys_have_their_turn_while_a_status_of_thousands_is_made() -> None:
    """Else each view of 10,000 workloads would hold up every Envoy of the node for half a second."""
    turns = 0

    async def counting() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    for path, least in (("/status", 3 * MANY / SLICE), ("/metrics", MANY / SLICE)):
        turns = 0
        others = asyncio.create_task(counting())
        assert (await get(crowded(), path)).status_code == 200
        others.cancel()
        assert turns >= least, "workloads are read, and for a status they and the streams are written"


async def test_the_numbers_of_thousands_are_written_beside_the_event_loop() -> None:
    """Else a scrape of 10,000 workloads would hold up every Envoy of the node for a third of a second."""
    seen = crowded()
    await get(Seen(), "/metrics")  # what is imported with the first scrape
    calls = 0

    def count(_frame: object, _event: str, _argument: object) -> None:
        nonlocal calls
        calls += 1

    sys.setprofile(count)  # of this thread
    try:
        answer = await get(seen, "/metrics")
    finally:
        sys.setprofile(None)
    assert f'sds_agent_workload_served{{workload="w{MANY - 1}"}}' in answer.text
    assert calls < 10 * MANY


async def test_a_page_gets_few_and_those_in_trouble_first() -> None:
    answer = await get(crowded(), "/status?most=50")
    found = answer.json()
    assert [each["name"] for each in found["identities"][:3]] == ["w900", "w700", "w0"]
    assert [each["node"] for each in found["subscribers"][:3]] == ["edge-800", "edge-600", "edge-0"]
    assert {key: len(found[key]) for key in ("identities", "subscribers", "departed")} == {
        "identities": 50,
        "subscribers": 50,
        "departed": 50,
    }
    assert found["departed"][-1]["node"] == f"gone-{MANY - 1}"
    assert len(found["agent"]["lacks"]) == 50
    assert found["omitted"] == {"identities": MANY - 50, "subscribers": MANY - 50, "lacks": MANY - 50}
    assert len(answer.content) < 100_000


async def test_what_fits_is_in_its_order_and_none_is_left_out() -> None:
    found = (await get(crowded(), f"/status?most={MANY}")).json()
    assert [each["name"] for each in found["identities"][899:902]] == ["w899", "w900", "w901"]
    assert found["omitted"] == {"identities": 0, "subscribers": 0, "lacks": 0}
    none = (await get(crowded(), "/status?most=0")).json()
    assert (none["identities"], none["subscribers"], none["departed"]) == ([], [], [])
    assert (none["agent"]["ready"], none["agent"]["lacks"], none["omitted"]["lacks"]) == (False, [], MANY)


@pytest.mark.parametrize("most", ["", "-1", "x", "1.5", "9" * 5000, "%C2%B2"])
async def test_a_number_that_is_none_is_refused(most: str) -> None:
    answer = await get(Seen(), f"/status?most={most}")
    assert (answer.status_code, "such as /status?most=50" in answer.text) == (400, True)
