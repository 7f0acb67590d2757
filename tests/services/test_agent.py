"""The agent in this process: its parts and what can be seen of them, without a look at its log."""

from datetime import timedelta
from pathlib import Path

import anyio
import anyio.lowlevel
from fakes.agents import write_config
from fakes.authorities import ScriptedAuthority, UpstreamCa, answering, failing
from fakes.loops import anyio_backend, loop_of_the_module, one_loop  # noqa: F401 - fixtures

from sds_agent.app import agent
from sds_agent.authority.protocol import ErrorKind
from sds_agent.clock import SystemClock
from sds_agent.config.loading import load
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
        assert "keep out" not in repr(running.workloads) + lack, "a CA's words are in the log alone"
        assert (running.trust.version, running.trust.anchors) == (None, ())
