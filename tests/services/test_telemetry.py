"""Metrics and spans over OTLP/HTTP, to a stand-in for a collector that reads them with OpenTelemetry's own messages."""

import asyncio
import json
import os
import re
import socket
import sys
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import msgspec
import pytest
from fakes.agents import write_config
from fakes.authorities import ScriptedAuthority, UpstreamCa, answering, failing
from fakes.events import recorded
from fakes.hierarchy import NOW
from fakes.loops import anyio_backend, loop_of_the_module, one_loop  # noqa: F401 - fixtures
from fakes.observed import Seen
from opentelemetry.proto.collector.metrics.v1.metrics_service_pb2 import ExportMetricsServiceRequest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from sds_agent import app
from sds_agent.admin import otel
from sds_agent.admin.otel import LARGEST_HEADERS, CollectorSession, Telemetry, send
from sds_agent.admin.settings import TelemetrySettings
from sds_agent.authority.protocol import ErrorKind
from sds_agent.clock import SystemClock
from sds_agent.config.loading import load
from sds_agent.errors import ProblemsError
from sds_agent.issuance.attempts import AttemptRecord

ATTEMPT = AttemptRecord("web", "vault", NOW, NOW + timedelta(seconds=2), "denied", "0a1b2c3d")


class Collector:
    """A stand-in for a collector: it keeps what it is sent, and answers with `status` and `location`."""

    def __init__(self) -> None:
        self.status = 200
        self.location = "/"
        self.port = 0
        self.metrics: list[ExportMetricsServiceRequest] = []
        self.traces: list[ExportTraceServiceRequest] = []
        self.headers: list[bytes] = []
        self.more = asyncio.Event()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = next(int(x.split(b":")[1]) for x in head.lower().split(b"\r\n") if b"content-length:" in x)
                body = await reader.readexactly(length)
                self.headers.append(head)
                if self.status == 200 and b"/v1/metrics" in head:
                    self.metrics.append(ExportMetricsServiceRequest.FromString(body))
                elif self.status == 200:
                    self.traces.append(ExportTraceServiceRequest.FromString(body))
                named = b"Location: %s\r\n" % self.location.encode()
                writer.write(b"HTTP/1.1 %d X\r\n%sContent-Length: 0\r\n\r\n" % (self.status, named))
                self.more.set()
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()

    @property
    def spans(self) -> dict[str, tuple[dict[str, str], int]]:
        """By the workload: the attributes, and the duration in nanoseconds."""
        found = {}
        for request in self.traces:
            for span in request.resource_spans[0].scope_spans[0].spans:
                facts = {each.key: each.value.string_value for each in span.attributes}
                found[facts["sds_agent.workload"]] = facts, span.end_time_unix_nano - span.start_time_unix_nano
        return found


@asynccontextmanager
async def collecting() -> AsyncIterator[Collector]:
    collector = Collector()
    server = await asyncio.start_server(collector.answer, "127.0.0.1", 0)
    collector.port = server.sockets[0].getsockname()[1]
    async with server:
        yield collector


def settings(port: int, headers_file: Path | None = None) -> TelemetrySettings:
    return TelemetrySettings(otlp_endpoint=f"http://127.0.0.1:{port}/", headers_file=headers_file)


async def sent(chosen: TelemetrySettings) -> tuple[str, int]:
    seen = Seen()
    seen.issuance_counts.succeeded("vault", "issued", timedelta(milliseconds=30))
    cause, unsent = await asyncio.to_thread(send, chosen, seen.moment, [ATTEMPT], NOW)
    return cause, len(unsent)


async def test_a_collector_gets_every_metric_and_a_span_for_each_attempt(tmp_path: Path) -> None:
    (tmp_path / "headers").write_text("Authorization: Bearer secret-token\n\nX-Scope: team\n")
    async with collecting() as collector:
        assert await sent(settings(collector.port, headers_file=tmp_path / "headers")) == ("", 0)
    (request,) = collector.metrics
    resource = {each.key: each.value.string_value for each in request.resource_metrics[0].resource.attributes}
    assert (resource["service.name"], resource["sds_agent.trust_domain"]) == ("sds-agent", "demo.example")
    found = {each.name: each for each in request.resource_metrics[0].scope_metrics[0].metrics}
    attempts = found["sds_agent_issuance_attempts_total"].sum
    assert (attempts.is_monotonic, sum(point.as_double for point in attempts.data_points)) == (True, 1)
    (took,) = [p for p in found["sds_agent_issuance_duration_seconds"].histogram.data_points if p.count]
    assert not took.HasField("min")
    assert (took.count, took.sum, list(took.bucket_counts)[3], len(took.explicit_bounds)) == (1, 0.03, 1, 11)
    assert found["sds_agent_ready"].gauge.data_points[0].as_double == 1
    assert found["process_resident_memory_bytes"].unit == "By"
    facts, duration = collector.spans["web"]
    assert facts == {
        "sds_agent.workload": "web",
        "sds_agent.authority": "vault",
        "sds_agent.result": "denied",
        "sds_agent.attempt_id": "0a1b2c3d",
    }
    assert duration == 2_000_000_000
    for head in collector.headers:
        assert b"authorization: bearer secret-token\r\n" in head.lower()
        assert b"x-scope: team\r\n" in head.lower()


async def test_no_proxy_of_the_environment_stands_between(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    async with collecting() as collector:
        assert await sent(settings(collector.port)) == ("", 0)


async def test_a_collector_that_refuses_is_a_cause_and_the_attempts_are_kept() -> None:
    async with collecting() as collector:
        collector.status = 401
        cause, unsent = await sent(settings(collector.port))
    assert "401" in cause
    assert unsent == 1


async def test_a_redirect_is_not_followed_and_no_success(tmp_path: Path) -> None:
    """It would take the headers, such as an API key, to another host."""
    (tmp_path / "headers").write_text("Api-Key: secret-token\n")
    async with collecting() as other, collecting() as collector:
        collector.status, collector.location = 307, f"http://localhost:{other.port}/v1/metrics"
        cause, unsent = await sent(settings(collector.port, headers_file=tmp_path / "headers"))
    assert other.headers == []
    assert cause == "the collector answered 307 X, and redirects are not followed"
    assert unsent == 1


async def test_the_session_itself_follows_no_redirect() -> None:
    """Earlier versions of OpenTelemetry ask for it."""
    async with collecting() as other, collecting() as collector:
        collector.status, collector.location = 307, f"http://localhost:{other.port}/"
        with CollectorSession() as session:
            url = f"http://127.0.0.1:{collector.port}/"
            answer = await asyncio.to_thread(session.post, url, data=b"x", headers={"Api-Key": "x"})
        status = answer.status_code
        del answer  # it holds the connection, whose end the collector waits for from Python 3.12 on
    assert (status, other.headers) == (307, [])


async def test_why_a_collector_cannot_be_reached_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(otel, "TIMEOUT", 0.5)
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # and does not listen
        chosen = settings(bound.getsockname()[1])
        assert await sent(chosen) == ("the collector cannot be reached: Connection refused", 1)


@pytest.mark.parametrize("written", ["secret-token\n", "A: \x01secret-token\n", "A: secret-tokén\n"])
async def test_a_wrong_file_of_headers_is_named_and_not_quoted(written: str, tmp_path: Path) -> None:
    (tmp_path / "headers").write_text(written)
    cause, unsent = await sent(settings(1, headers_file=tmp_path / "headers"))
    assert cause == "telemetry.headers_file: line 1 is not NAME: VALUE in ASCII"
    assert unsent == 1
    (tmp_path / "headers").write_bytes(b"A: \xff")
    no_text, _ = await sent(settings(1, headers_file=tmp_path / "headers"))
    assert no_text == "telemetry.headers_file: it is not text in UTF-8"
    missing, _ = await sent(settings(1, headers_file=tmp_path / "none"))
    assert missing == "telemetry.headers_file: No such file or directory"


async def test_what_is_no_file_of_headers_is_neither_waited_for_nor_read_without_an_end(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    cause, unsent = await sent(settings(1, headers_file=tmp_path / "pipe"))
    assert (cause, unsent) == ("telemetry.headers_file: it is a pipe, and not a file", 1)
    cause, _ = await sent(settings(1, headers_file=Path("/dev/zero")))
    assert cause == f"telemetry.headers_file: it has more than {LARGEST_HEADERS} bytes"


class Hurried(SystemClock):
    """The machine's clocks, but an interval of a minute is short."""

    async def sleep(self, seconds: float) -> None:
        await super().sleep(0.05 if seconds == 60 else seconds)


def configured(folder: Path, port: int) -> Path:
    file = write_config(folder, default="1h", web="1h")
    section = {"telemetry": {"otlp_endpoint": f"http://127.0.0.1:{port}"}, "admin": {"enabled": False}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **section}))
    return file


async def test_an_agent_sends_its_first_attempts_too_and_a_collector_that_is_down_is_logged_once(
    tmp_path: Path,
) -> None:
    clock = Hurried()
    cas = {"local": ScriptedAuthority(failing(ErrorKind.DENIED, "keep out"), answering(UpstreamCa(clock.now)))}
    async with collecting() as collector, asyncio.timeout(30):
        collector.status = 400
        chosen = load(configured(tmp_path, collector.port), {}).settings
        with recorded() as events:
            async with app.agent(chosen, cas, clock):
                while len(collector.headers) < 6:
                    collector.more.clear()
                    await collector.more.wait()
                (told,) = events.named("telemetry_not_exported", level="error")
                collector.status = 200
                while len(collector.spans) < 2:
                    collector.more.clear()
                    await collector.more.wait()
    assert "400" in told["cause"]
    assert {facts["sds_agent.result"] for facts, _ in collector.spans.values()} <= {"denied", "issued"}


async def test_a_fault_in_sending_does_not_end_what_serves_envoys() -> None:
    """A bug in a library may have the same effect."""
    attempts = deque([msgspec.structs.replace(ATTEMPT, began=None)], maxlen=1)
    async with collecting() as collector, asyncio.timeout(20):
        with recorded() as events:
            sending = asyncio.create_task(Telemetry(settings(collector.port), Seen(), attempts, Hurried()).run())
            while not collector.spans:
                collector.more.clear()
                await asyncio.wait(
                    [sending, more := asyncio.create_task(collector.more.wait())], return_when=asyncio.FIRST_COMPLETED
                )
                assert more.done(), "it has ended"
                if len(collector.metrics) == 3:
                    attempts.append(ATTEMPT)  # the newest takes the place of the one that cannot be sent
            sending.cancel()
            await asyncio.wait([sending])
    assert len(events.named("fault", part="telemetry")) == 1
    assert [e["cause"] for e in events.named("telemetry_not_exported")] == ["sending led to the fault AttributeError"]


@pytest.mark.parametrize("has_pip", [True, False], ids=["pip", "the image"])
def test_a_start_without_the_extra_says_how_to_install_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, has_pip: bool
) -> None:
    file = configured(tmp_path, 4318)
    load(file, {})
    for name in [each for each in sys.modules if each.partition(".")[0] == "opentelemetry"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    pip = ModuleType("pip")
    pip.__spec__ = ModuleSpec("pip", None)
    monkeypatch.setitem(sys.modules, "pip", pip if has_pip else None)
    # pipx has no pip on PATH for its environment, and another pip finds no sds-agent
    command = f"run {sys.executable} -m pip install 'sds-agent[otel]'"
    said = command if has_pip else f"install sds-agent[otel] into {sys.prefix}, which has no pip"
    with pytest.raises(ProblemsError, match=re.escape(said)):
        load(file, {})


@pytest.mark.parametrize("url", ["collector:4318", "ftp://x", "http://user:pass@x", "http://x/?q=1"])
def test_an_endpoint_that_is_no_url_is_refused(url: str, tmp_path: Path) -> None:
    file = configured(tmp_path, 1)
    file.write_text(file.read_text().replace("http://127.0.0.1:1", url))
    with pytest.raises(ProblemsError, match="otlp_endpoint"):
        load(file, {})
