"""What the CA server's admin server answers: health, the status and metrics."""

from collections.abc import Callable

import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response

from sds_agent import log
from sds_agent.admin.application import answer, routed, text
from sds_agent.ca.observed import RunningCa
from sds_agent.clock import Clock
from sds_agent.tasks import NoThreadError, in_thread


def application(ca: RunningCa, clock: Clock) -> Starlette:
    """The application. All of it answers GET and HEAD alone."""

    async def live(_request: Request) -> Response:
        return text("live")

    async def ready(_request: Request) -> Response:
        missing = ca.status(clock.now()).lacks
        return text("\n".join(missing), 503) if missing else text("ready")

    async def status(_request: Request) -> Response:
        return answer(msgspec.json.encode(ca.status(clock.now())), "application/json")

    async def metrics(request: Request) -> Response:
        try:
            render = await in_thread(_renderer)
        except NoThreadError as error:
            return text(str(error), 503)
        return answer(*render(ca, clock, request.headers.get("accept", "")))

    return routed({"/livez": live, "/readyz": ready, "/status": status, "/metrics": metrics})


def _renderer() -> Callable[[RunningCa, Clock, str], tuple[bytes, str]]:
    """What is imported with the first scrape, in a thread: the event loop has callers to serve."""
    from sds_agent.admin.exposition import render  # noqa: PLC0415 - measured: 40 ms for prometheus_client
    from sds_agent.ca.families import families  # noqa: PLC0415 - measured: as above

    return lambda ca, clock, accept: render(families(ca.status(clock.now()), ca.ledger.counts, log.counts()), accept)
