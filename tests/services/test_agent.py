"""The agent in this process: its parts and what can be seen of them, without a look at its log."""

from datetime import timedelta
from pathlib import Path

import anyio
import anyio.lowlevel
import grpc.aio
import pytest
from fakes.agents import write_config
from fakes.authorities import Hang, ScriptedAuthority, Step, UpstreamCa, answering, failing
from fakes.ca_servers import Shifted
from fakes.loops import anyio_backend, loop_of_the_module, one_loop  # noqa: F401 - fixtures
from sds_agent_proto.health_pb2 import HealthCheckRequest, HealthCheckResponse

from sds_agent.app import agent
from sds_agent.authority.protocol import ErrorKind
from sds_agent.clock import SystemClock
from sds_agent.config.loading import load
from sds_agent.pki.certificates import write_pem
from sds_agent.rpc import health
from sds_agent.sds import server
from sds_agent.secrets.readiness import complete


async def test_the_status_shows_what_is_served_and_why(tmp_path: Path) -> None:
    """A view of the agent needs no log: who has which certificate until when, below which root."""
    settings = load(write_config(tmp_path, default="1h", other="2h"), {}).settings
    clock = SystemClock()
    ca = UpstreamCa(clock.now)
    async with agent(settings, {"local": ScriptedAuthority(answering(ca))}, clock) as running:
        with anyio.fail_after(10):
            await complete(running.store)
        assert [(each.name, each.authority, each.served) for each in running.workloads] == [
            ("default", "local", True),
            ("other", "local", True),
        ]
        lifetimes = [each.current.not_after - each.current.issued_at for each in running.workloads if each.current]
        assert [round(lifetime / timedelta(hours=1)) for lifetime in lifetimes] == [1, 2]
        (anchor,) = running.trust.anchors
        assert (anchor.subject, anchor.advertised_by) == ("'CN=upstream root'", ("local",))
        assert anchor.needed_until == max(each.current.valid_until for each in running.workloads if each.current)
        assert running.lacks(clock.now()) == []


async def test_an_agent_that_started_with_a_wrong_clock_says_when_by_the_right_one(tmp_path: Path) -> None:
    settings = load(write_config(tmp_path, default="1h"), {}).settings
    clock = Shifted()
    clock.ahead = timedelta(days=-400)
    async with agent(settings, {"local": ScriptedAuthority(failing(ErrorKind.DENIED, "keep out"))}, clock) as running:
        assert clock.now() - running.about.started_at < timedelta(days=1)
        clock.ahead = timedelta(0)
        assert clock.now() - running.about.started_at < timedelta(days=1)
        assert running.about.uptime_seconds < 86400


async def test_the_status_shows_what_is_missing(tmp_path: Path) -> None:
    settings = load(write_config(tmp_path, default="1h"), {}).settings
    clock = SystemClock()
    async with agent(settings, {"local": ScriptedAuthority(failing(ErrorKind.DENIED, "keep out"))}, clock) as running:
        with anyio.fail_after(10):
            while (failure := running.issuers["default"].status.failure) is None:
                await anyio.lowlevel.checkpoint()
        assert (failure.kind, failure.attempts, failure.next_attempt > failure.at) == (ErrorKind.DENIED, 1, True)
        (lack,) = running.lacks(clock.now())
        assert lack.startswith("default: not issued yet; the last attempt failed at ")
        assert failure.cause == "keep out"
        assert "keep out" not in lack, "every client of the socket is told that, and the CA's words are not for them"
        assert (running.trust.version, running.trust.anchors) == (None, ())


async def test_a_prober_that_watches_before_the_first_certificate_hears_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it was there before the agent has looked whether its socket answers."""
    monkeypatch.setattr(server, "HEAD_START", 30.0)
    settings = load(write_config(tmp_path, default="1h"), {}).settings
    clock = SystemClock()
    answer, seen = Hang(answering(UpstreamCa(clock.now))), anyio.Event()

    async def run() -> None:
        async with agent(settings, {"local": ScriptedAuthority(answer)}, clock):
            await seen.wait()

    options = [("grpc.initial_reconnect_backoff_ms", 100)]
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(run)
        async with grpc.aio.insecure_channel(f"unix:{settings.sds.socket}", options=options) as channel:
            ask: grpc.aio.UnaryStreamMultiCallable[bytes, bytes] = channel.unary_stream(f"/{health.SERVICE}/Watch")
            call = ask(HealthCheckRequest().SerializeToString(), timeout=10, wait_for_ready=True)
            told = []
            for _ in range(2):
                data = await call.read()
                assert isinstance(data, bytes)
                told.append(HealthCheckResponse.FromString(data).status)
                answer.release.set()
            assert told == [HealthCheckResponse.NOT_SERVING, HealthCheckResponse.SERVING]
        seen.set()


TWO = """
trust_domain: demo.example
state_dir: state
sds: {socket: sds.sock}
authorities: {first: {type: embedded}, second: {type: embedded}}
workloads:
  - {name: default, spiffe_id: spiffe://demo.example/default, authority: [first, second]}
  - {name: other, spiffe_id: spiffe://demo.example/other, authority: second}
failover: {failures: 1, after: 1s, back_after: 1h}
requests: {timeout: 2s, concurrency: 3}
"""


class Advertising(ScriptedAuthority):
    """It advertises its root without issuing."""

    refresh_every = timedelta(hours=1)

    def __init__(self, ca: UpstreamCa, *script: Step) -> None:
        super().__init__(*script)
        self._ca = ca

    async def anchors(self) -> bytes:
        """The root."""
        return write_pem([self._ca.root.certificate])


async def test_a_workload_of_two_authorities_is_served_by_the_second_while_the_first_is_down(tmp_path: Path) -> None:
    """And peers trust both from the start: the way back needs no other bundle."""
    (tmp_path / "sds-agent.yaml").write_text(TWO)
    settings = load(tmp_path / "sds-agent.yaml", {}).settings
    clock = SystemClock()
    ours = {name: UpstreamCa(clock.now, name) for name in ("first", "second")}
    cas = {
        "first": Advertising(ours["first"], failing(ErrorKind.TRANSIENT, "down")),
        "second": Advertising(ours["second"], answering(ours["second"])),
    }
    async with agent(settings, cas, clock) as running:
        with anyio.fail_after(10):
            await complete(running.store)
            while len(running.trust.anchors) < 2:
                await anyio.lowlevel.checkpoint()
        default, other = running.workloads
        assert (default.authority, other.authority) == ("second", "second")
        assert [(each.name, each.in_use) for each in default.authorities] == [("first", False), ("second", True)]
        why = default.authorities[0].failure
        assert why is not None
        assert (why.kind, why.next_attempt - why.at >= timedelta(hours=1)) == (ErrorKind.TRANSIENT, True)
        assert other.authorities == ()
        assert {each.advertised_by for each in running.trust.anchors} == {("first",), ("second",)}
