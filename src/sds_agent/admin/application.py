"""What the agent's admin server answers: health, the status, metrics, the events and the page."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from datetime import datetime

import msgspec
from msgspec import Struct
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

from sds_agent.admin import page, view
from sds_agent.admin.events import EventFeed, NumberedEvent, Reading
from sds_agent.admin.families import Family
from sds_agent.admin.headers import NOTHING, POLICY
from sds_agent.admin.model import OmittedView
from sds_agent.admin.moment import Moment, taken
from sds_agent.admin.observed import Observed
from sds_agent.admin.slices import sliced
from sds_agent.clock import Clock
from sds_agent.issuance.status import WorkloadStatus
from sds_agent.log import timestamp
from sds_agent.tasks import NoThreadError, in_thread

Measure = Callable[[Moment], Sequence[Family]]
Render = Callable[[Sequence[Family], str], tuple[bytes, str]]

EVENT_STREAM = "text/event-stream"
READERS = 16
"""Readers of the events at one time."""
PAUSE = 0.25
"""Seconds between two batches of events for one reader."""
MOST_DIGITS = 10
"""From which on a number in a query is none."""
COMMENT = 15.0
"""Seconds of silence after which a reader is sent a comment, so that what is between does not close the connection."""


class Sources(Struct, frozen=True):
    """What the answers are made of: the agent, its events, and `unreachable`, which says why its SDS socket does not
    answer (None if it does).
    """

    observed: Observed
    feed: EventFeed
    clock: Clock
    unreachable: Callable[[], Awaitable[str | None]]


def application(sources: Sources) -> Starlette:
    """The application. All of it answers GET and HEAD alone."""
    answers = Answers(sources)
    return routed(
        {
            "/": answers.page,
            "/livez": answers.live,
            "/readyz": answers.ready,
            "/readyz/{workload:path}": answers.workload_ready,
            "/status": answers.status,
            "/metrics": answers.metrics,
            "/events": answers.events,
        }
    )


def routed(routes: Mapping[str, Callable[[Request], Awaitable[Response]]]) -> Starlette:
    """An application with these answers, to GET and HEAD alone. What asks for another path is told which there are."""
    there = " ".join(path.replace("{workload:path}", "WORKLOAD") for path in routes)

    async def nothing_here(_request: Request, _error: Exception) -> Response:
        return text(f"there are: {there}", 404)

    made = Starlette(
        routes=[Route(path, answering, methods=["GET"]) for path, answering in routes.items()],
        exception_handlers={404: nothing_here, 405: _read_only},
    )
    made.router.redirect_slashes = False  # to an address made of the request's Host
    return made


class Answers:
    """The answer to each path."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._page = page.read()
        self._readers = 0

    async def live(self, _request: Request) -> Response:
        """The event loop turns, or there would be no answer."""
        return text("live")

    async def ready(self, _request: Request) -> Response:
        """Whether every workload has a valid certificate, and the SDS socket answers."""
        lacks = self._sources.observed.lacks(self._now)
        return await self._health(list(lacks))

    async def workload_ready(self, request: Request) -> Response:
        """The same of one workload."""
        name = request.path_params["workload"]
        names = self._sources.observed.about.names
        if name not in names:
            known = ", ".join(sorted(names)[:50])
            return text(f"there is no workload of that name; there are: {known}", 404)
        lacks = self._sources.observed.lacks(self._now)
        return await self._health([each for each in lacks if each.startswith(f"{name}: ") and _of(each, names) == name])

    async def status(self, request: Request) -> Response:
        """The status model in JSON; with `most=N` in the query at most so many identities, subscribers and lacks."""
        asked = request.query_params.get("most")
        if asked is not None and not (asked.isascii() and asked.isdecimal() and 0 < len(asked) < MOST_DIGITS):
            return text("most is a number of identities and of subscribers, such as /status?most=50", 400)
        return answer(await self._status(None if asked is None else int(asked)), "application/json")

    async def _status(self, most: int | None) -> bytes:
        """The model, made and encoded in slices: the event loop has Envoys to serve, and there may be thousands."""
        observed = self._sources.observed
        workloads: Sequence[WorkloadStatus] = [each async for each in sliced(observed.each_workload())]
        streams, versions, about = observed.streams, observed.versions, observed.about
        found, omitted = view.frame(observed, self._now), None
        if most is not None:
            all_workloads, all_streams = len(workloads), len(streams)
            workloads, streams = view.first_workloads(workloads, most), view.first_streams(streams, versions, most)
            lacks = found.agent.lacks
            omitted = OmittedView(
                identities=all_workloads - len(workloads),
                subscribers=all_streams - len(streams),
                lacks=len(lacks[most:]),
            )
            departed = None if found.departed is None else found.departed[max(len(found.departed) - most, 0) :]
            agent = msgspec.structs.replace(found.agent, lacks=lacks[:most])
            found = msgspec.structs.replace(found, agent=agent, omitted=omitted, departed=departed)
        encode = msgspec.json.encode
        lists = {
            "identities": [msgspec.Raw(encode(view.identity(each, about))) async for each in sliced(workloads)],
            "subscribers": [msgspec.Raw(encode(view.subscriber(each, versions))) async for each in sliced(streams)],
        }
        return encode({**msgspec.structs.asdict(found), **lists})

    async def metrics(self, request: Request) -> Response:
        """The metrics, in the format that the client asks for."""
        try:
            measure, render = await in_thread(_renderer)
            seen, accept = await taken(self._sources.observed, self._now), request.headers.get("accept", "")
            body, media = await in_thread(lambda: render(measure(seen), accept))
        except NoThreadError as error:
            return text(str(error), 503)
        return answer(body, media)

    async def events(self, request: Request) -> Response:
        """What happens, for as long as the client listens (server-sent events, HTML Living Standard section 9.2)."""
        if self._readers >= READERS:
            return text(f"{READERS} readers listen already; close one of them", 503)
        if request.method == "HEAD":
            return answer(b"", EVENT_STREAM)
        request.scope["state"]["endless"] = True
        last = request.headers.get("last-event-id", "")
        events = self._events(int(last) if last.isdecimal() and len(last) < 20 else None)
        return StreamingResponse(events, media_type=EVENT_STREAM, headers={POLICY: NOTHING})

    async def page(self, _request: Request) -> Response:
        """The page."""
        return HTMLResponse(self._page.html, headers={POLICY: self._page.policy})

    async def _events(self, after: int | None) -> AsyncIterator[bytes]:
        self._readers += 1
        try:
            reader = self._sources.feed.reader(after)
            yield b"retry: 2000\n\n"
            while True:
                try:
                    async with asyncio.timeout(COMMENT):
                        reading = await reader.next()
                except TimeoutError:
                    yield b": nothing has happened\n\n"
                    continue
                yield written(reading)
                await asyncio.sleep(PAUSE)
        finally:
            self._readers -= 1

    async def _health(self, reasons: Sequence[str]) -> Response:
        fault = await self._sources.unreachable()
        found = [*reasons, *([] if fault is None else [fault])]
        return text("\n".join(found), 503) if found else text("ready")

    @property
    def _now(self) -> datetime:
        return self._sources.clock.now()


def _renderer() -> tuple[Measure, Render]:
    """What is imported with the first scrape, in a thread: the event loop has Envoys to serve."""
    from sds_agent.admin.agent_families import families  # noqa: PLC0415 - with the next
    from sds_agent.admin.exposition import render  # noqa: PLC0415 - measured: 40 ms for prometheus_client

    return families, render


def _of(reason: str, names: Iterable[str]) -> str:
    """The workload that the reason is about: its name may begin with that of another one and `: `."""
    return max((each for each in names if reason.startswith(f"{each}: ")), key=len)


def written(reading: Reading) -> bytes:
    """News for a reader as server-sent events."""
    parts = [f"event: missed\ndata: {reading.missed}\n\n".encode()] if reading.missed else []
    parts += [_log_event(each) for each in reading.events]
    if reading.status_changed:
        parts.append(b"event: status\ndata: {}\n\n")
    return b"".join(parts)


def _log_event(numbered: NumberedEvent) -> bytes:
    event = numbered.event
    line = {"time": timestamp(event.at), "level": event.level, "event": event.name, **event.fields}
    return b"id: %d\nevent: log\ndata: %s\n\n" % (numbered.number, msgspec.json.encode(line))


def answer(body: bytes, media: str, status: int = 200) -> Response:
    """An answer that no browser shows as a page, runs or keeps."""
    return Response(body, status, {POLICY: NOTHING}, media_type=media)


def text(words: str, status: int = 200) -> Response:
    """An answer in words."""
    return PlainTextResponse(f"{words}\n", status, {POLICY: NOTHING})


async def _read_only(_request: Request, _error: Exception) -> Response:
    response = text("this server only answers GET and HEAD", 405)
    response.headers["Allow"] = "GET, HEAD"
    return response
