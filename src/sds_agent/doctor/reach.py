"""Whether an authority can be reached from here, and what its clock says."""

import asyncio
import socket
from collections.abc import Iterator
from datetime import datetime
from typing import Any

import httpx

from sds_agent.doctor.clocks import of_clock
from sds_agent.doctor.diagnosis import Diagnosis, bad, good
from sds_agent.inspection.web import cause_of

TIMEOUT = 5.0
"""Seconds that an authority may take."""


def places(chosen: Any) -> Iterator[str]:
    """The URLs and the addresses (HOST:PORT) in the settings of an authority; none for one without a server."""
    for key in ("url", "address"):
        value = getattr(chosen, key, None)
        yield from (str(each) for each in (value if isinstance(value, tuple) else (value,)) if each)


def of_place(authority: str, place: str, now: datetime) -> Diagnosis:
    """Connect to it. Nothing is sent but a request for its first page, without any credential."""
    return _of_url(authority, place, now) if "://" in place else _of_address(authority, place)


def _of_url(authority: str, url: str, now: datetime) -> Diagnosis:
    try:
        date = asyncio.run(_date(url))
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError, TimeoutError) as error:  # the third: a host of no name
        late = isinstance(error, TimeoutError | httpx.TimeoutException)
        why = f"nothing whole after {TIMEOUT:g} s" if late else cause_of(error) or type(error).__name__
        return bad(f"authority {authority}", f"{url} does not answer ({why}); check the network, and that it runs")
    return of_clock(authority, date, now)


async def _date(url: str) -> str | None:
    """The Date header of what answers there. Raises TimeoutError, also where an answer goes on and on."""
    async with asyncio.timeout(TIMEOUT):
        # Not verified: a clock that is wrong is what would make that fail, and nothing is told to the server.
        async with (
            httpx.AsyncClient(verify=False, timeout=TIMEOUT, trust_env=False) as client,  # noqa: S501 - see above
            client.stream("HEAD", url) as answer,
        ):
            date: str | None = answer.headers.get("date")
            return date


def _of_address(authority: str, address: str) -> Diagnosis:
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), TIMEOUT):
            pass
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or error
        return bad(f"authority {authority}", f"{address} does not accept ({why}); check the network, and that it runs")
    return good(f"authority {authority}", f"{address} accepts connections")
