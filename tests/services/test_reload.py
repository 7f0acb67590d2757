"""The configuration file is followed: however it is replaced it is applied once, and a bad one changes nothing."""

import asyncio
import json
import os
import pwd
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import anyio
import anyio.lowlevel
import grpc
import pytest
from fakes import packages
from fakes.events import Events, recorded
from fakes.hierarchy import make_ca, make_leaf, new_key
from fakes.loops import anyio_backend, loop_of_the_module, one_loop  # noqa: F401 - fixtures
from fakes.peers import Peer, connected
from fakes.replacing import WAYS, kubernetes

from sds_agent import app
from sds_agent.clock import Clock, SystemClock
from sds_agent.config.loading import load
from sds_agent.config.settings import Settings
from sds_agent.digest import sha256
from sds_agent.live.agent import Agent
from sds_agent.live.origin import ConfigSource, ReloadHooks
from sds_agent.live.reload import OPENING, Reload
from sds_agent.pki.certificates import write_pem
from sds_agent.pki.keys import to_pkcs8_pem
from sds_agent.secrets.readiness import complete

NAME = "agent.yaml"


def config(folder: Path, *names: str, **changed: Any) -> bytes:
    """A configuration with workloads of these names; JSON is YAML."""
    workloads = [{"name": name, "spiffe_id": f"spiffe://demo.example/{name}"} for name in names]
    keys = {
        "trust_domain": "demo.example",
        "state_dir": str(folder / "state"),
        "sds": {"socket": str(folder / "sds.sock")},
        "admin": {"enabled": False},
        "workloads": workloads,
    }
    return json.dumps(keys | changed).encode()


LOCAL = {"workloads": [{"name": "web", "spiffe_id": "spiffe://demo.example/web", "authority": "local"}]}


class Followed:
    """An agent that follows its file."""

    def __init__(self, folder: Path, file: Path, agent: Agent, peer: Peer, events: Events) -> None:
        self.folder = folder
        self.file = file
        self.agent = agent
        self.peer = peer
        self.events = events
        self.asked = asyncio.Event()
        self.heard: list[str] = []
        self.loads = 0

    def load(self) -> Settings:
        """What the file says."""
        self.loads += 1
        return load(self.file, {}, waits=False).settings

    @property
    def names(self) -> list[str]:
        """The workloads in force."""
        return [each.name for each in self.agent.workloads]

    def write(self, *names: str, **changed: Any) -> None:
        """Replace the file in one step."""
        new = self.folder / "new"
        new.write_bytes(config(self.folder, *names, **changed))
        new.rename(self.folder / NAME)

    async def ask(self) -> None:
        """Ask for a reload, and wait until it is done."""
        done = len(self.heard) + 2
        self.asked.set()
        while len(self.heard) < done:
            await self.events.next()


class SetBack(SystemClock):
    """A wall clock that is set back by an hour each time that it was read."""

    _back = timedelta()

    def now(self) -> datetime:
        """The wall clock."""
        self._back += timedelta(hours=1)
        return super().now() - self._back


class Waited(SetBack):
    """One that notes when somebody waits, as who follows the file does after each look at it."""

    def __init__(self) -> None:
        self.waits = asyncio.Event()

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        self.waits.set()
        await super().sleep(seconds)


@asynccontextmanager
async def followed(
    folder: Path, file: Path, wall: Clock | None = None, *, opening: float = OPENING, is_known: bool = False
) -> AsyncIterator[Followed]:
    """An agent that follows its file; `is_known`: it remembers what the file held when it was read for the start."""
    loaded, clock = load(file, {}), SystemClock()
    chosen = loaded.settings
    with recorded() as events:
        async with (
            app.authorities(chosen, clock) as cas,
            app.agent(chosen, cas, clock) as running,
            connected(folder / "sds.sock") as peer,
        ):
            await complete(running.store)
            found = Followed(folder, file, running, peer, events)
            source = ConfigSource(
                file,
                found.load,
                lambda chosen: found.heard.append(chosen.level),
                sha256(loaded.content) if is_known else b"",
            )
            hooks = ReloadHooks(lambda: found.heard.append("begins"), lambda: found.heard.append("ends"))
            reload = Reload(running, cas, source, wall or clock, hooks, opening=opening)
            following = asyncio.create_task(reload.run(found.asked))
            try:
                with anyio.fail_after(30):
                    yield found
            finally:
                following.cancel()
                await asyncio.wait([following])


@pytest.fixture
async def agent(tmp_path: Path) -> AsyncIterator[Followed]:
    (tmp_path / NAME).write_bytes(config(tmp_path, "web"))
    async with followed(tmp_path, tmp_path / NAME) as found:
        yield found


@pytest.mark.parametrize("way", [WAYS[0], WAYS[1], WAYS[2], kubernetes], ids=lambda way: way.__name__)
async def test_a_file_that_is_replaced_is_applied_each_time_however_it_is_done(tmp_path: Path, way: Any) -> None:
    directory, replace = way(tmp_path)
    replace({NAME: config(tmp_path, "web")})
    async with followed(tmp_path, directory / NAME) as found:
        for count, names in enumerate((("web", "api"), ("web",), ("web", "db")), start=1):
            replace({NAME: config(tmp_path, *names)})
            await found.events.wait("reloaded", count=count)
            assert found.names == list(names)
        assert found.events.named("reload_refused") == []
        assert [(e.get("workloads_added"), e.get("workloads_removed")) for e in found.events.named("reloaded")] == [
            (["api"], None),
            (None, ["api"]),
            (["db"], None),
        ]


async def test_a_workload_that_leaves_the_file_ends_its_stream(agent: Followed) -> None:
    agent.write("web", "api")
    await agent.events.wait("reloaded")
    stream = await agent.peer.stream().ask("api")
    await stream.read()
    agent.write("web")
    assert (await stream.end())[0] is grpc.StatusCode.NOT_FOUND


async def test_the_time_that_a_reload_takes_is_not_the_wall_clocks(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(config(tmp_path, "web"))
    async with followed(tmp_path, tmp_path / NAME, SetBack()) as found:
        found.write("web", "api")
        await found.ask()
        assert 0 <= (await found.events.wait("reloaded"))["took_ms"] < 30_000


async def test_the_file_that_the_agent_was_started_with_is_not_parsed_once_more(tmp_path: Path) -> None:
    """A node with thousands of identities would pay for it twice."""
    (tmp_path / NAME).write_bytes(config(tmp_path, "web"))
    wall = Waited()
    async with followed(tmp_path, tmp_path / NAME, wall, is_known=True) as agent:
        await wall.waits.wait()
        agent.write("web", "db")
        assert (await agent.events.wait("reloaded"))["workloads_added"] == ["db"]
        assert agent.loads == 1


async def test_a_file_that_changed_during_the_start_is_applied(tmp_path: Path) -> None:
    file = tmp_path / NAME
    file.write_bytes(config(tmp_path, "web"))
    known = load(file, {})
    file.write_bytes(config(tmp_path, "web", "db"))
    clock = SystemClock()
    source = ConfigSource(file, lambda: load(file, {}).settings, lambda _chosen: None, sha256(known.content))
    with recorded() as events:
        async with app.authorities(known.settings, clock) as cas, app.agent(known.settings, cas, clock) as running:
            following = asyncio.create_task(Reload(running, cas, source, clock).run(asyncio.Event()))
            assert (await events.wait("reloaded"))["workloads_added"] == ["db"]
            following.cancel()
            await asyncio.wait([following])


async def test_half_a_file_is_not_taken_for_the_whole(agent: Followed) -> None:
    """It may be good YAML with fewer workloads, whose streams would end."""
    agent.write("web", "api")
    await agent.events.wait("reloaded")
    for _ in range(2):
        (agent.folder / NAME).write_bytes(config(agent.folder, "web"))
        await asyncio.sleep(0)
        (agent.folder / NAME).write_bytes(config(agent.folder, "web", "api", "db"))
    await agent.events.wait("reloaded", count=2)
    assert agent.names == ["web", "api", "db"]
    assert "workloads_removed" not in agent.events.named("reloaded")[1]


async def test_a_bad_file_is_refused_in_words_once_and_what_was_in_force_stays(agent: Followed) -> None:
    bad = "trust_domain: demo.example\nworkload: []\n"
    (agent.folder / NAME).write_text(bad)
    refused = await agent.events.wait("reload_refused")
    assert refused["serving"] == "the configuration before"
    assert any("workload is not a known key" in cause for cause in refused["causes"])
    assert (len(agent.events.named("reload_refused")), agent.names) == (1, ["web"])
    assert list(agent.agent.about.reload_refused) == refused["causes"], "nobody who looks at the agent sees it"
    agent.write("web", "api")
    await agent.events.wait("reloaded")
    assert (agent.names, agent.agent.about.reload_refused) == (["web", "api"], ())
    (agent.folder / NAME).write_text(bad)
    await agent.events.wait("reload_refused", count=2)


async def test_who_asks_hears_each_time_that_the_file_is_bad(agent: Followed) -> None:
    """One who has tried to mend it, and hears nothing, takes it for good."""
    (agent.folder / NAME).write_text("trust_domain: demo.example\nworkload: []\n")
    for count in (1, 2, 3):
        await agent.ask()
        assert len(agent.events.named("reload_refused")) == count


def for_user(name: str) -> list[dict[str, Any]]:
    """The workload of the fixture, for this user alone."""
    return [{"name": "web", "spiffe_id": "spiffe://demo.example/web", "clients": {"users": [name]}}]


def known_as(monkeypatch: pytest.MonkeyPatch, **ids: int) -> None:
    """Have this machine know these users, and no others."""

    def found(name: str) -> pwd.struct_passwd:
        return pwd.struct_passwd((name, "x", ids[name], ids[name], "", "/", "/bin/false"))

    monkeypatch.setattr(pwd, "getpwnam", found)


async def test_a_user_who_is_not_there_has_the_file_refused_until_he_is(
    agent: Followed, monkeypatch: pytest.MonkeyPatch
) -> None:
    known_as(monkeypatch)
    agent.write(workloads=for_user("edge"))
    (cause,) = (await agent.events.wait("reload_refused"))["causes"]
    assert cause.startswith("workloads[0].clients.users: there is no user 'edge' on this machine")
    await agent.peer.fetch("web")
    known_as(monkeypatch, edge=4711)
    await agent.events.wait("reloaded")
    with pytest.raises(grpc.aio.AioRpcError, match="PERMISSION_DENIED"):
        await agent.peer.fetch("web")


async def test_who_asks_has_users_looked_up_anew(agent: Followed, monkeypatch: pytest.MonkeyPatch) -> None:
    """One may have got another id, and another user that one."""
    known_as(monkeypatch, edge=os.geteuid())
    agent.write(workloads=for_user("edge"))
    await agent.events.wait("reloaded")
    await agent.peer.fetch("web")
    known_as(monkeypatch, edge=4711)
    await agent.ask()
    with pytest.raises(grpc.aio.AioRpcError, match="PERMISSION_DENIED"):
        await agent.peer.fetch("web")
    known_as(monkeypatch)
    await agent.ask()
    assert "there is no user 'edge'" in agent.events.named("reload_refused")[-1]["causes"][0]


async def test_a_file_that_is_removed_is_reported_and_changes_nothing(agent: Followed) -> None:
    (agent.folder / NAME).unlink()
    refused = await agent.events.wait("reload_refused")
    assert "does not exist" in refused["causes"][0]
    agent.write("web")
    await agent.events.wait("nothing_to_reload")
    assert (agent.names, agent.agent.about.reload_refused) == (["web"], ())


async def test_a_pipe_in_the_files_place_is_refused_and_the_next_file_is_taken(agent: Followed) -> None:
    """A thread that waits for somebody to write to the pipe would read nothing else any more."""
    (agent.folder / NAME).unlink()
    os.mkfifo(agent.folder / NAME)
    refused = await agent.events.wait("reload_refused")
    assert "it is a pipe, and not a file); put a file in its place" in refused["causes"][0]
    agent.write("web", "api")
    assert (await agent.events.wait("reloaded"))["workloads_added"] == ["api"]


async def test_a_key_that_needs_a_restart_has_the_whole_file_refused(agent: Followed) -> None:
    agent.write("web", "api", keep_certificates=False)
    refused = await agent.events.wait("reload_refused")
    assert refused["causes"] == ["keep_certificates has changed, which only a restart of the agent applies"]
    assert agent.names == ["web"], "half of a file was applied"


async def test_an_authority_that_cannot_be_opened_is_refused_before_anything_changes(agent: Followed) -> None:
    """And tried again: what it lacks may come after the configuration that names it."""
    in_the_way = agent.folder / "state" / "authorities" / "mesh"
    in_the_way.write_text("")
    workloads = [
        {"name": name, "spiffe_id": f"spiffe://demo.example/{name}", "authority": "local"} for name in ("web", "api")
    ]
    agent.write(authorities={name: {"type": "embedded"} for name in ("local", "mesh")}, workloads=workloads)
    await agent.ask()
    (refused,) = agent.events.named("reload_refused")
    assert str(in_the_way) in refused["causes"][0]
    assert (agent.names, list(agent.agent.about.kinds)) == (["web"], ["local"])
    in_the_way.unlink()
    await agent.ask()
    assert (agent.names, list(agent.agent.about.kinds)) == (["web", "api"], ["local", "mesh"])


async def test_a_refusal_closes_the_authorities_that_were_opened_for_it(agent: Followed, tmp_path: Path) -> None:
    """Each new attempt would hold one more connection to a CA that is not in force."""
    (tmp_path / "packages").mkdir()
    lease = {"type": "leased", "journal": str(tmp_path / "journal")}
    with packages.leases(tmp_path / "packages"):
        agent.write(
            "web", authorities={"local": {"type": "embedded"}, "a": lease, "b": lease | {"refuses": True}}, **LOCAL
        )
        await agent.ask()
        (refused,) = agent.events.named("reload_refused")
        assert refused["causes"] == ["authorities.b.refuses: it is true"]
        opened = ["opening a", "opening b", "closed b", "closed a"]
        while (tmp_path / "journal").read_text().splitlines()[:4] != opened:
            await anyio.lowlevel.checkpoint()


async def test_what_a_start_warns_of_a_reload_takes_and_warns_of(agent: Followed, tmp_path: Path) -> None:
    """The key of a Secret that Kubernetes mounts can be read by every user, unless somebody has seen to that."""
    now, root, key = datetime.now(UTC), make_ca("root"), new_key()
    leaf = make_leaf(root, "spiffe://demo.example/web", key=key, not_before=now, not_after=now + timedelta(hours=1))
    files = tmp_path / "files"
    files.mkdir()
    files.chmod(0o777)
    for name, content in {"tls.crt": write_pem([leaf]), "tls.key": to_pkcs8_pem(key)}.items():
        (files / name).write_bytes(content)
        (files / name).chmod(0o644)
    (files / "ca.crt").write_bytes(write_pem([root.certificate]))
    given = {"local": {"type": "embedded"}, "given": {"type": "files", "directory": str(files)}}
    agent.write("web", authorities=given, **LOCAL)
    await agent.ask()
    assert agent.events.named("reload_refused") == []
    assert list(agent.agent.about.kinds) == ["local", "given"]
    (exposed,) = agent.events.named("credential_unusable", level="warning")
    assert exposed["cause"].startswith(
        f"authorities.given.directory: every user can read the secret in {files}/tls.key"
    )
    (shared,) = agent.events.named("source_shared", level="warning")
    assert shared["setting"] == "authorities.given.directory"


async def test_a_fault_in_examining_an_authoritys_files_ends_no_agent(agent: Followed, tmp_path: Path) -> None:
    (tmp_path / "packages").mkdir()
    broken = {"type": "leased", "journal": str(tmp_path / "journal"), "breaks": True}
    with packages.leases(tmp_path / "packages"):
        agent.write("web", authorities={"local": {"type": "embedded"}, "a": broken}, **LOCAL)
        await agent.ask()
    (refused,) = agent.events.named("reload_refused")
    assert refused["causes"][0].startswith("examining the files of authorities.a led to the fault ImportError")
    assert list(agent.agent.about.kinds) == ["local"]


async def test_an_authoritys_files_on_a_disk_that_is_gone_hold_up_no_reload(tmp_path: Path) -> None:
    """Or else the agent takes no configuration any more, and who asked for it waits for ever."""
    (tmp_path / NAME).write_bytes(config(tmp_path, "web"))
    (tmp_path / "packages").mkdir()
    os.mkfifo(tmp_path / "gone")
    hanging = {"type": "leased", "journal": str(tmp_path / "journal"), "reads": str(tmp_path / "gone")}
    async with followed(tmp_path, tmp_path / NAME, opening=0.05) as agent:
        with packages.leases(tmp_path / "packages"):
            agent.write("web", authorities={"local": {"type": "embedded"}, "a": hanging}, **LOCAL)
            await agent.ask()
        (refused,) = agent.events.named("reload_refused")
        assert refused["causes"] == [
            "the files of authorities.a cannot be read: no answer within 0.05 s; check that their disk is there"
        ]
        agent.write("web", "api")
        await agent.ask()
        assert agent.names == ["web", "api"]
        await asyncio.to_thread((tmp_path / "gone").write_bytes, b"")


async def test_an_authority_that_left_the_file_is_closed(agent: Followed, tmp_path: Path) -> None:
    """Or else each reload would leave a connection to a CA that nobody asks any more, and what the CA gave for it."""
    (tmp_path / "packages").mkdir()
    lease = {"type": "leased", "journal": str(tmp_path / "journal")}
    with packages.leases(tmp_path / "packages"):
        agent.write("web", authorities={"local": {"type": "embedded"}, "a": lease}, **LOCAL)
        await agent.ask()
        assert list(agent.agent.about.kinds) == ["local", "a"]
        agent.write("web", authorities={"local": {"type": "embedded"}}, **LOCAL)
        await agent.ask()
        assert list(agent.agent.about.kinds) == ["local"]
        while (tmp_path / "journal").read_text().splitlines() != ["opening a", "closed a"]:
            await anyio.lowlevel.checkpoint()


async def test_a_fault_in_reading_the_file_ends_no_agent(tmp_path: Path) -> None:
    """As after an upgrade of the package of an agent that runs: a kind of authority is imported when it is named."""
    (tmp_path / NAME).write_bytes(config(tmp_path, "web"))
    clock, asked = SystemClock(), asyncio.Event()
    chosen = load(tmp_path / NAME, {}).settings

    def broken() -> Settings:
        raise ImportError("cannot import name 'x' from 'y'")

    source = ConfigSource(tmp_path / NAME, broken, lambda _chosen: None)
    with recorded() as events:
        async with app.authorities(chosen, clock) as cas, app.agent(chosen, cas, clock) as running:
            following = asyncio.create_task(Reload(running, cas, source, clock).run(asked))
            asked.set()
            refused = await events.wait("reload_refused")
            assert not following.done()
            following.cancel()
            await asyncio.wait([following])
    assert "led to the fault ImportError" in refused["causes"][0]
    assert len(events.named("fault", part="reload")) == 1


async def test_who_asks_hears_the_end_whatever_comes_of_it(agent: Followed) -> None:
    await agent.ask()
    nothing = agent.events.named("nothing_to_reload")
    assert [each["cause"] for each in nothing] == [f"{agent.folder / NAME} says what is in force"]
    agent.write("web", log={"level": "debug"})
    await agent.ask()
    assert agent.heard == ["begins", "ends", "begins", "debug", "ends"]
    assert agent.events.named("reloaded")[0]["keys"] == ["log"]


async def test_an_agent_without_a_file_says_that_there_is_nothing_to_reload(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(config(tmp_path, "web"))
    chosen, clock = load(tmp_path / NAME, {}).settings, SystemClock()
    with recorded() as events:
        async with app.authorities(chosen, clock) as cas, app.agent(chosen, cas, clock) as running:
            asked = asyncio.Event()
            following = asyncio.create_task(Reload(running, cas, None, clock).run(asked))
            for count in (1, 2):
                asked.set()
                await events.wait("nothing_to_reload", count=count)
            following.cancel()
            await asyncio.wait([following])


async def test_a_refusal_leaves_a_ca_of_the_agents_the_roots_that_it_signs_with(tmp_path: Path) -> None:
    """One that finds others in its file renews none, and the agent would have no CA in the end."""

    def authorities(life: str) -> dict[str, Any]:
        return {name: {"type": "embedded", "root_lifetime": life} for name in ("local", "other")}

    (tmp_path / NAME).write_bytes(config(tmp_path, authorities=authorities("1h"), **LOCAL))
    async with followed(tmp_path, tmp_path / NAME) as found:
        roots, damaged = [tmp_path / "state" / "authorities" / name / "roots.pem" for name in ("local", "other")]
        before = roots.read_bytes()
        good = damaged.read_bytes()
        damaged.write_bytes(b"no roots")
        found.write(authorities=authorities("3650d"), **LOCAL)  # by which a root of an hour is to be renewed at once
        await found.events.wait("reload_refused")
        assert roots.read_bytes() == before
        damaged.write_bytes(good)
        await found.events.wait("reloaded")
        await found.events.wait("root_created", count=4)
        assert roots.read_bytes().startswith(before)
