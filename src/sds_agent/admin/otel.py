"""The agent's metrics, and a span for each attempt at a CA, over OTLP/HTTP (the extra `otel`).

One task sends what there is at each interval, in one thread at a time, and drops what it could not send but the newest
attempts. The SDK's own readers and processors are not used: each would run threads for as long as the process lives. A
collector that is down changes nothing for the agent: it logs `telemetry_not_exported` once.

Imported only where the configuration has the section `telemetry`, after the first secret.
"""

import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Self

import requests
from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    HistogramDataPoint,
    Metric,
    MetricExportResult,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.metrics.export import Histogram as OtlpHistogram
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import SpanExportResult
from opentelemetry.sdk.trace.sampling import ALWAYS_ON
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanKind, Status, StatusCode

from sds_agent import log
from sds_agent.admin.agent_families import families
from sds_agent.admin.exposition import process_families
from sds_agent.admin.families import Family, HistogramFamily
from sds_agent.admin.moment import Moment, taken
from sds_agent.admin.observed import About, Observed
from sds_agent.admin.settings import TelemetrySettings
from sds_agent.clock import Clock
from sds_agent.files import read_at_once
from sds_agent.issuance.attempts import AttemptRecord
from sds_agent.tasks import NoThreadError, in_thread

LOG = logging.getLogger(__name__)

LARGEST_HEADERS = 64 << 10
"""Bytes of the file with the headers."""
TIMEOUT = 10.0
"""Seconds for one kind of data to be taken, with every repetition of the library's."""
_UNSAID = "the collector did not take them"


class Telemetry:
    """What is to be sent, and the loop that sends it."""

    def __init__(
        self, settings: TelemetrySettings, observed: Observed, attempts: deque[AttemptRecord], clock: Clock
    ) -> None:
        """`attempts` gets those that end, and is bounded: without a collector the oldest are dropped."""
        self._settings = settings
        self._observed = observed
        self._attempts = attempts
        self._clock = clock
        self._failed = log.LogOnChange(LOG, "telemetry_not_exported")

    async def run(self) -> None:
        """Send what there is at each interval, until cancelled."""
        while True:
            await self._clock.sleep(self._settings.interval.total_seconds())
            attempts = tuple(self._attempts)
            self._attempts.clear()
            unsent = await self._sent(attempts)
            newer = tuple(self._attempts)
            self._attempts.clear()
            self._attempts.extend((*unsent, *newer))

    async def _sent(self, attempts: Sequence[AttemptRecord]) -> Sequence[AttemptRecord]:
        """Send what there is, once; returns the attempts that were not taken."""
        now = self._clock.now()
        seen = await taken(self._observed, now)
        try:
            cause, unsent = await in_thread(send, self._settings, seen, attempts, now)
        except NoThreadError as error:
            cause, unsent = str(error), attempts
        except Exception as error:  # noqa: BLE001 - a bug in a library must not end what serves Envoys
            if self._failed.report(f"sending led to the fault {type(error).__name__}"):
                log.fault(LOG, "telemetry", error)
            return attempts
        self._failed.report(cause)
        return unsent


def send(
    settings: TelemetrySettings, seen: Moment, attempts: Sequence[AttemptRecord], now: datetime
) -> tuple[str, Sequence[AttemptRecord]]:
    """Send these; returns why that failed, empty where it did not, and the attempts that were not taken."""
    about = seen.about
    try:
        headers = read_headers(settings.headers_file)
    except (OSError, ValueError) as error:
        return f"telemetry.headers_file: {getattr(error, 'strerror', None) or error}", attempts
    base, resource = settings.otlp_endpoint.rstrip("/"), _resource(about)
    with _Words() as words, CollectorSession() as session:
        metrics = OTLPMetricExporter(f"{base}/v1/metrics", headers=headers, timeout=TIMEOUT, session=session)
        spans = OTLPSpanExporter(f"{base}/v1/traces", headers=headers, timeout=TIMEOUT, session=session)
        given = metrics_data((*families(seen), *process_families()), resource, about.started_at, now)
        good = metrics.export(given, timeout_millis=TIMEOUT * 1000) is MetricExportResult.SUCCESS
        causes = [_cause(session, words, good=good)]
        if attempts:
            good = spans.export(spans_of(attempts, resource)) is SpanExportResult.SUCCESS
            causes.append(_cause(session, words, good=good))
    return next(filter(None, causes), ""), attempts if causes[-1] else ()


def read_headers(file: Path | None) -> Mapping[str, str]:
    """The headers in a file of `NAME: VALUE` lines. Raises OSError, and ValueError without what is in the file."""
    found = {}
    for number, line in enumerate(() if file is None else _text(file).splitlines(), start=1):
        name, colon, value = line.partition(":")
        if line.strip() and not (colon and name.strip() and value.strip() and line.isprintable() and line.isascii()):
            raise ValueError(f"line {number} is not NAME: VALUE in ASCII")
        if line.strip():
            found[name.strip()] = value.strip()
    return found


def _text(file: Path) -> str:
    data = read_at_once(file, LARGEST_HEADERS)
    if len(data) > LARGEST_HEADERS:
        raise ValueError(f"it has more than {LARGEST_HEADERS} bytes")
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError("it is not text in UTF-8") from error


class CollectorSession(requests.Session):
    """Follows no redirect, which would take the headers to another host, and knows what came of the last request: the
    library takes a redirect for success, and says of a connection that fails only that it gave up.
    """

    def __init__(self) -> None:
        super().__init__()
        self.trust_env = False  # no proxy and no .netrc of the agent's user
        self.cause = ""  # why the last request was not taken

    def send(self, request: requests.PreparedRequest, **kwargs: Any) -> requests.Response:
        """Send it."""
        try:
            response = super().send(request, **{**kwargs, "allow_redirects": False})
        except requests.RequestException as error:
            self.cause = f"the collector cannot be reached: {_root_of(error)}"
            raise
        redirect = ", and redirects are not followed" if 300 <= response.status_code < 400 else ""
        told = f"the collector answered {response.status_code} {response.reason}{redirect}"
        self.cause = "" if 200 <= response.status_code < 300 else told
        return response


def _cause(session: CollectorSession, words: "_Words", *, good: bool) -> str:
    """Why they were not taken, where the library calls the export good or not; empty where they were."""
    return session.cause or ("" if good else words.last or _UNSAID)


def _root_of(error: BaseException) -> str:
    """What the operating system or TLS said, which is at the end of a chain of the libraries' errors."""
    said, below = str(error), error.__cause__ or error.__context__
    while below is not None:
        said = below.strerror or str(below) if isinstance(below, OSError) else said
        below = below.__cause__ or below.__context__
    return said


class _Words(logging.Handler):
    """Keeps what the library logs, which would reach the agent's log in words that are not the agent's."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.last = ""

    def __enter__(self) -> Self:
        logger = logging.getLogger("opentelemetry")
        logger.handlers[:], logger.propagate = [self], False
        return self

    def __exit__(self, *_: object) -> None:
        logging.getLogger("opentelemetry").removeHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep it."""
        self.last = record.getMessage()


def _resource(about: About) -> Resource:
    return Resource(
        {
            "service.name": "sds-agent",
            "service.version": about.version,
            "process.pid": about.pid,
            "sds_agent.trust_domain": about.trust_domain,
        }
    )


def metrics_data(found: Iterable[Family], resource: Resource, began: datetime, now: datetime) -> MetricsData:
    """The families as the SDK's values, cumulative since `began`."""
    metrics = [_metric(family, _nanoseconds(began), _nanoseconds(now)) for family in found]
    scope = ScopeMetrics(InstrumentationScope("sds_agent"), metrics, "")
    return MetricsData([ResourceMetrics(resource, [scope], "")])


def _metric(family: Family, began: int, now: int) -> Metric:
    unit = "s" if "_seconds" in family.name else "By" if family.name.endswith("_bytes") else ""
    return Metric(family.name, family.says, unit, _data(family, began, now))


def _data(family: Family, began: int, now: int) -> Gauge | Sum | OtlpHistogram:
    cumulative = AggregationTemporality.CUMULATIVE
    if isinstance(family, HistogramFamily):
        return OtlpHistogram(list(_distributions(family, began, now)), cumulative)
    points = [
        NumberDataPoint(dict(zip(family.labels, labels, strict=True)), began, now, float(value))
        for labels, value in family.values.items()
    ]
    return Gauge(points) if family.kind == "gauge" else Sum(points, cumulative, is_monotonic=True)


def _distributions(family: HistogramFamily, began: int, now: int) -> Iterator[HistogramDataPoint]:
    for labels, found in family.values.items():
        yield HistogramDataPoint(
            attributes=dict(zip(family.labels, labels, strict=True)),
            start_time_unix_nano=began,
            time_unix_nano=now,
            count=found.count,
            sum=found.total,
            bucket_counts=list(found.counts),
            explicit_bounds=list(found.bounds),
            min=None,  # type: ignore[arg-type] # not known; optional on the wire, and the encoder takes it
            max=None,  # type: ignore[arg-type] # likewise
        )


class _Ended(SpanProcessor):
    def __init__(self) -> None:
        self.spans: list[ReadableSpan] = []

    def on_end(self, span: ReadableSpan) -> None:
        self.spans.append(span)


def spans_of(attempts: Iterable[AttemptRecord], resource: Resource) -> Sequence[ReadableSpan]:
    """A span for each attempt, with its times."""
    ended = _Ended()
    provider = TracerProvider(sampler=ALWAYS_ON, resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(ended)
    tracer = provider.get_tracer("sds_agent")
    for each in attempts:
        facts = {
            "sds_agent.workload": each.workload,
            "sds_agent.authority": each.authority,
            "sds_agent.result": each.result,
            "sds_agent.attempt_id": each.attempt_id,
        }
        span = tracer.start_span("issue", kind=SpanKind.CLIENT, attributes=facts, start_time=_nanoseconds(each.began))
        span.set_status(Status(StatusCode.ERROR, each.result) if each.failed else Status(StatusCode.OK))
        span.end(_nanoseconds(each.ended))
    return ended.spans


def _nanoseconds(moment: datetime) -> int:
    return int(moment.timestamp() * 1e9)
