"""The admin server of a running agent, by real HTTP on its socket and its address, and hostile clients of it."""

import asyncio
import json
import logging
import re
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

import anyio
import httpx
import pytest
from fakes.agents import PATHS, write_config
from fakes.authorities import ScriptedAuthority, failing
from fakes.observed import ABOUT, Seen
from fakes.peers import connected
from fakes.ports import reserved_port
from fakes.processes import started
from msgspec import structs

from sds_agent import app, log
from sds_agent.admin import connections, server
from sds_agent.admin.application import READERS, Sources, application
from sds_agent.admin.asgi import Application
from sds_agent.admin.events import KEPT, EventFeed
from sds_agent.admin.settings import AdminSettings
from sds_agent.authority.protocol import ErrorKind
from sds_agent.clock import SystemClock
from sds_agent.config.loading import load
from sds_agent.configfile.listening import ListenAddress
from sds_agent.live.agent import Agent


class Admin:
    """A running agent, and clients of its admin server."""

    def __init__(self, agent: Agent, folder: Path, port: int) -> None:
        self.agent = agent
        self.socket = folder / "sds.admin.sock"
        self.sds = folder / "sds.sock"
        self.port = port

    def client(self, *, tcp: bool = False) -> httpx.AsyncClient:
        """A client of the Unix socket, or of the address."""
        if tcp:
            return httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.port}", trust_env=False)
        transport = httpx.AsyncHTTPTransport(uds=str(self.socket))
        return httpx.AsyncClient(base_url="http://localhost", transport=transport, timeout=30)

    async def get(self, path: str, **headers: str) -> httpx.Response:
        """One answer on the Unix socket."""
        async with self.client() as client:
            return await client.get(path, headers=headers)

    async def raw(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to the Unix socket, for bytes of any kind."""
        return await asyncio.open_unix_connection(str(self.socket))

    async def answer_to(self, *sent: bytes) -> bytes:
        """All that comes back for these bytes, until the server ends the connection."""
        reader, writer = await self.raw()
        for each in sent:
            writer.write(each)
            await writer.drain()
        with anyio.fail_after(10):
            found = await reader.read()
        writer.close()
        return found


@asynccontextmanager
async def administered(folder: Path, *, issuing: bool = True, **admin: object) -> AsyncIterator[Admin]:
    """An agent with an admin server on a socket and on loopback."""
    file = write_config(folder, default="1h", web="1h")
    async with AsyncExitStack() as stack:
        port = stack.enter_context(reserved_port())
        config = json.loads(file.read_text())
        file.write_text(json.dumps({**config, "admin": {"address": f"127.0.0.1:{port}", **admin}}))
        settings, clock = load(file, {}).settings, SystemClock()
        down = {
            "local": ScriptedAuthority(failing(ErrorKind.DENIED, "keep out"), failing(ErrorKind.DENIED, "keep out"))
        }
        cas = await stack.enter_async_context(app.authorities(settings, clock)) if issuing else down
        running = await stack.enter_async_context(app.agent(settings, cas, clock))
        with anyio.fail_after(10):
            while not (folder / "sds.admin.sock").exists() or (issuing and running.lacks(clock.now())):
                await anyio.lowlevel.checkpoint()
        yield Admin(running, folder, port)


@pytest.fixture
async def admin(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> AsyncIterator[Admin]:
    caplog.set_level("INFO", "sds_agent")
    async with administered(tmp_path) as running:
        yield running


async def test_an_agent_that_serves_is_live_and_ready_and_so_is_each_workload(admin: Admin) -> None:
    for path, words in (
        ("/livez", "live"),
        ("/readyz", "ready"),
        ("/readyz/default", "ready"),
        ("/readyz/web", "ready"),
    ):
        answer = await admin.get(path)
        assert (answer.status_code, answer.text) == (200, f"{words}\n"), path


async def test_an_agent_without_certificates_is_live_and_says_what_is_missing(tmp_path: Path) -> None:
    async with administered(tmp_path, issuing=False) as admin:
        assert (await admin.get("/livez")).status_code == 200
        answer = await admin.get("/readyz")
        assert answer.status_code == 503
        assert {line.partition(":")[0] for line in answer.text.splitlines()} == {"default", "web"}
        one = await admin.get("/readyz/web")
        assert (one.status_code, one.text.count("\n")) == (503, 1)
        assert one.text.startswith("web: not issued yet")


async def test_a_workload_whose_name_begins_with_anothers_does_not_answer_for_it() -> None:
    class Lacking(Seen, frozen=True):
        def lacks(self, _now: object) -> tuple[str, ...]:
            return ("web: b: not issued yet",)

    async def reached() -> None:
        return None

    about = structs.replace(ABOUT, names=dict.fromkeys(("web", "web: b", "web: bc"), ()))
    sources = Sources(Lacking(about=about), EventFeed(), SystemClock(), reached)
    transport = httpx.ASGITransport(application(sources))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        found = {name: (await client.get(f"/readyz/{quote(name)}")).text for name in about.names}
    assert found == {"web": "ready\n", "web: b": "web: b: not issued yet\n", "web: bc": "ready\n"}


async def test_an_agent_whose_socket_was_removed_is_not_ready(admin: Admin) -> None:
    admin.sds.unlink()
    answer = await admin.get("/readyz")
    assert answer.status_code == 503
    assert answer.text == f"the SDS socket {admin.sds} does not answer: No such file or directory\n"


async def test_a_workload_that_is_not_configured_is_answered_with_those_that_are(admin: Admin) -> None:
    answer = await admin.get("/readyz/wbe")
    assert (answer.status_code, answer.text) == (404, "there is no workload of that name; there are: default, web\n")


async def test_the_status_shows_who_is_served_what(admin: Admin) -> None:
    async with connected(admin.sds) as peer:
        stream = await peer.stream().ask("default", node="edge-1")
        await stream.read()
        found = (await admin.get("/status")).json()
    assert [each["name"] for each in found["identities"]] == ["default", "web"]
    (subscriber,) = found["subscribers"]
    assert (subscriber["node"], subscriber["subscriptions"][0]["name"]) == ("edge-1", "default")


async def test_no_answer_has_a_private_key(admin: Admin) -> None:
    for path in ("/", "/status", "/metrics", "/readyz", "/livez", "/nowhere"):
        answer = await admin.get(path)
        assert b"PRIVATE KEY" not in answer.content, path


async def test_prometheus_is_answered_in_the_format_that_it_asks_for(admin: Admin) -> None:
    plain = await admin.get("/metrics")
    assert plain.headers["content-type"].startswith("text/plain")
    assert 'sds_agent_workload_served{workload="web"} 1.0' in plain.text
    opened = await admin.get("/metrics", Accept="application/openmetrics-text; version=1.0.0")
    assert opened.headers["content-type"].startswith("application/openmetrics-text")
    assert opened.text.endswith("# EOF\n")


async def test_browsers_may_show_the_page_and_run_nothing_but_its_own_script(admin: Admin) -> None:
    page = await admin.get("/")
    policy = page.headers["content-security-policy"]
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in policy
    assert "script-src 'sha256-" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy


async def test_no_answer_of_whatever_kind_may_be_kept_framed_or_taken_for_something_else(admin: Admin) -> None:
    heads = [str((await admin.get(path)).headers) for path in ("/", "/status", "/metrics", "/livez", "/nowhere")]
    async with admin.client() as client:
        heads.append(str((await client.post("/status")).headers))
        heads.append(str((await client.head("/events")).headers))
    async with admin.client(tcp=True) as client:
        heads.append(str((await client.get("/status", headers={"Host": "evil.example"})).headers))
    heads.append((await admin.answer_to(b"nonsense\r\n\r\n")).decode())
    for head in heads:
        for line in (
            "nosniff",
            "no-referrer",
            "same-origin",
            "no-store",
            "default-src 'none'",
            "frame-ancestors 'none'",
        ):
            assert line in head, head


async def test_a_request_by_another_name_is_refused_as_a_page_elsewhere_could_have_made_it(admin: Admin) -> None:
    async with admin.client(tcp=True) as client:
        for host, status in (
            ("localhost", 200),
            (f"127.0.0.1:{admin.port}", 200),
            ("[::1]:1", 200),
            ("evil.example", 421),
            (f"evil.example:{admin.port}", 421),
            ("127.0.0.1.evil.example", 421),
            ("localhost@evil.example", 421),
            ("", 421),
        ):
            answer = await client.get("/livez", headers={"Host": host})
            assert answer.status_code == status, host
    assert (await admin.get("/livez", Host="anything.example")).status_code == 200, "no browser reaches a Unix socket"


async def test_a_name_of_the_configuration_is_one_of_ours(tmp_path: Path) -> None:
    async with administered(tmp_path, hosts=["Agent.demo.example"]) as admin, admin.client(tcp=True) as client:
        assert (await client.get("/livez", headers={"Host": "agent.DEMO.example"})).status_code == 200


def test_the_name_in_the_address_is_one_of_ours_and_so_is_what_it_was_bound_to() -> None:
    chosen = AdminSettings(address=ListenAddress("Agent.demo.example", 9902))
    ours = {"localhost", "127.0.0.1", "::1", "agent.demo.example", "192.0.2.1"}
    assert server.hosts(chosen, "192.0.2.1") == ours


async def test_the_address_that_a_client_has_connected_to_is_one_of_ours(tmp_path: Path) -> None:
    """As the kubelet calls a pod, whose address no configuration knows."""
    with reserved_port() as port:
        async with (
            administered(tmp_path, address=f"0.0.0.0:{port}", beyond_loopback=True),
            httpx.AsyncClient(base_url=f"http://127.0.0.2:{port}", trust_env=False) as client,
        ):
            for host, status in ((f"127.0.0.2:{port}", 200), ("127.0.0.3", 421), ("", 421)):
                assert (await client.get("/livez", headers={"Host": host})).status_code == status, host


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
async def test_nothing_can_be_changed(admin: Admin, method: str) -> None:
    async with admin.client() as client:
        answer = await client.request(method, "/status", content=b"x" * 100_000)
    assert (answer.status_code, answer.headers["allow"]) == (405, "GET, HEAD")


async def test_a_head_has_the_headers_alone(admin: Admin) -> None:
    async with admin.client() as client:
        answer = await client.head("/status")
    assert (answer.status_code, answer.content) == (200, b"")


async def test_a_head_of_the_events_ends_and_takes_no_readers_place(admin: Admin) -> None:
    async with admin.client() as client:
        for _ in range(READERS + 1):
            answer = await client.head("/events")
            assert answer.status_code == 200
            assert answer.headers["content-type"].startswith("text/event-stream")


async def test_a_path_with_a_slash_too_many_leads_nowhere_else(admin: Admin) -> None:
    answer = await admin.get("/livez/")
    assert (answer.status_code, answer.text.split()[:2]) == (404, ["there", "are:"])


async def test_old_and_hasty_clients_are_answered(admin: Admin) -> None:
    old = await admin.answer_to(b"GET /livez HTTP/1.0\r\n\r\n")
    assert old.startswith(b"HTTP/1.1 200 ")
    assert old.endswith(b"\r\n\r\nlive\n")
    last = b"GET /readyz/default HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    hasty = await admin.answer_to(
        b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\nHEAD /livez HTTP/1.1\r\nHost: x\r\n\r\n"
        b"GET /nowhere HTTP/1.1\r\nHost: x\r\n\r\n" + last
    )
    assert re.findall(rb"HTTP/1\.1 ([0-9]{3}) ", hasty) == [b"200", b"200", b"404", b"200"]
    assert hasty.count(b"live\n") == 1, "the answer to HEAD has no body"
    upgrade = b"Connection: upgrade, close\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    assert (await admin.answer_to(b"GET /livez HTTP/1.1\r\nHost: x\r\n" + upgrade + b"\r\n")).endswith(b"live\n")


# --- events ---


async def events(lines: AsyncIterator[str], kind: str) -> dict[str, object]:
    """The data of the next event of that kind."""
    wanted = False
    async for line in lines:
        if line.startswith("event: "):
            wanted = line == f"event: {kind}"
        elif wanted and line.startswith("data: "):
            found: dict[str, object] = json.loads(line.removeprefix("data: "))
            return found
    raise AssertionError("the stream has ended")


async def test_a_reader_gets_what_was_and_what_comes(admin: Admin) -> None:
    async with admin.client() as client, client.stream("GET", "/events") as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = answer.aiter_lines()
        with anyio.fail_after(10):
            while (await events(lines, "log"))["event"] != "issued":
                pass
            await events(lines, "status")
            async with connected(admin.sds) as peer:
                await (await peer.stream().ask("default")).read()
                await events(lines, "status")


async def test_a_reader_that_comes_back_gets_what_it_has_missed(admin: Admin) -> None:
    async with admin.client() as client:
        async with client.stream("GET", "/events") as answer, anyio.create_task_group():
            seen = [line async for line in until_status(answer.aiter_lines()) if line.startswith("id: ")]
        async with client.stream("GET", "/events", headers={"Last-Event-ID": seen[1].removeprefix("id: ")}) as answer:
            again = [line async for line in until_status(answer.aiter_lines()) if line.startswith("id: ")]
    assert again == seen[2:]


async def test_a_reader_learns_exactly_how_many_events_it_has_missed() -> None:
    feed = EventFeed()
    event = log.Event(datetime.now(UTC), "info", "pushed", {})
    for _ in range(3):
        feed.add(event)
    reader = feed.reader(after=2)
    assert [each.number for each in (await reader.next()).events] == [3]
    for _ in range(KEPT + 5):
        feed.add(event)
    reading = await reader.next()
    assert (reading.missed, len(reading.events), reading.events[0].number) == (5, KEPT, 9)


async def test_a_reader_that_followed_an_earlier_run_of_the_agent_gets_the_events_of_this_one(admin: Admin) -> None:
    async with admin.client() as client, client.stream("GET", "/events", headers={"Last-Event-ID": "100000"}) as answer:
        assert [line async for line in until_status(answer.aiter_lines()) if line.startswith("id: ")]


async def until_status(lines: AsyncIterator[str]) -> AsyncIterator[str]:
    async for line in lines:
        if line == "event: status":
            return
        yield line


async def test_more_readers_than_fit_are_refused_and_those_there_go_on(admin: Admin) -> None:
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(admin.client())
        readers = []
        for _ in range(READERS):
            answer = await stack.enter_async_context(client.stream("GET", "/events"))
            assert answer.status_code == 200
            readers.append(answer.aiter_lines())
            await anext(readers[-1])
        assert await status_of_events(client) == 503
        admin.agent.store.announce(frozenset())
        with anyio.fail_after(10):
            for each in readers:
                await events(each, "status")
    async with admin.client() as client:
        with anyio.fail_after(10):
            while await status_of_events(client) != 200:
                await anyio.lowlevel.checkpoint()


async def status_of_events(client: httpx.AsyncClient) -> int:
    async with client.stream("GET", "/events") as answer:
        return answer.status_code


async def test_the_agent_ends_while_readers_listen(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        async with administered(tmp_path) as admin:
            client = await stack.enter_async_context(admin.client())
            answer = await stack.enter_async_context(client.stream("GET", "/events"))
            lines = answer.aiter_lines()
            await anext(lines)
        with anyio.fail_after(5), pytest.raises(httpx.TransportError):
            _ = [line async for line in lines]


async def test_a_failure_that_changes_nothing_else_is_a_change_of_the_status(admin: Admin) -> None:
    async with admin.client() as client, client.stream("GET", "/events") as answer:
        lines = answer.aiter_lines()
        await events(lines, "status")
        log.event(app.LOG, "retrying", level=logging.WARNING, cause="the CA does not answer")
        with anyio.fail_after(10):
            while (await events(lines, "log"))["event"] != "retrying":
                pass
            await events(lines, "status")


# --- hostile clients ---


async def sds_serves(admin: Admin) -> None:
    async with connected(admin.sds) as peer:
        assert await peer.fetch("default", "ROOTCA")


async def test_bytes_that_are_not_http_are_answered_with_an_error_and_no_line_in_the_log(
    admin: Admin, caplog: pytest.LogCaptureFixture
) -> None:
    await admin.get("/livez")
    before = len(caplog.records)
    chunked = b"POST /status HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nno chunk\r\n\r\n"
    for sent in (b"\x16\x03\x01\x02\x00garbage\r\n\r\n", b"GET\r\n\r\n", chunked):
        reader, writer = await admin.raw()
        writer.write(sent)
        assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
        writer.close()
    reader, writer = await admin.raw()
    writer.write(b"GET /" + b"a" * (connections.LARGEST_REQUEST + 1))
    assert (await reader.read()).startswith(b"HTTP/1.1 400 "), "a request's head has a limit"
    writer.close()
    assert len(caplog.records) == before
    await sds_serves(admin)


async def test_garbage_in_the_middle_of_an_answer_ends_it_without_a_line_in_the_log(
    admin: Admin, caplog: pytest.LogCaptureFixture
) -> None:
    reader, writer = await admin.raw()
    writer.write(b"GET /events HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")
    await reader.readuntil(b"event: status")
    before = len(caplog.records)
    writer.write(b"no chunk\r\n\r\n")
    with anyio.fail_after(10), suppress(ConnectionError):
        await reader.read()
    writer.close()
    assert caplog.records[before:] == []
    await sds_serves(admin)


async def test_a_thousand_idle_connections_keep_out_neither_a_reader_nor_an_envoy(admin: Admin) -> None:
    await admin.get("/livez")  # it has all that it serves with, and accepts as fast as they come
    following, followed = await admin.raw()
    followed.write(b"GET /events HTTP/1.1\r\nHost: x\r\n\r\n")
    await following.readuntil(b"event: status")
    idle = [await admin.raw() for _ in range(1000)]
    try:
        assert (await admin.get("/readyz")).status_code == 200
        await sds_serves(admin)
        with anyio.fail_after(5):  # the oldest gave way, or else they would take the descriptors that Envoys need
            for reader, _ in idle[: -connections.MOST]:
                assert await reader.read() == b""
            admin.agent.store.announce(frozenset())
            await following.readuntil(b"event: status")  # and not the page, which was there before all of them
        followed.close()
    finally:
        for _, writer in idle:
            writer.close()


def test_an_address_of_all_of_ipv6_leaves_ipv4_to_others() -> None:
    """Another system's default would let machines of IPv4 in, which the address does not name."""
    with server.bound(ListenAddress("::", 0)) as listener:
        assert listener.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY) == 1


async def test_a_request_that_never_arrives_is_given_up(admin: Admin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "REQUEST_TIMEOUT", 0.05)
    reader, writer = await admin.raw()
    writer.write(b"GET /livez HTTP/1.1\r\nX-Slow: ")
    with anyio.fail_after(5):
        assert await reader.read() == b""
    writer.close()


async def test_an_answer_that_is_not_taken_is_given_up(admin: Admin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "ANSWER_TIMEOUT", 0.05)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as peer:
        peer.connect(str(admin.socket))
        peer.setblocking(False)
        loop = asyncio.get_running_loop()
        requests = (
            b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n" * 100_000
        )  # answers fill the buffers until one is not taken
        with anyio.fail_after(10), pytest.raises(ConnectionError):
            await loop.sock_sendall(peer, requests)
    await sds_serves(admin)


async def test_a_reader_that_reads_nothing_costs_no_memory_and_is_told_what_it_missed(admin: Admin) -> None:
    reader, writer = await admin.raw()
    writer.write(b"GET /events HTTP/1.1\r\nHost: x\r\n\r\n")
    await reader.readuntil(b"event: status")
    for number in range(5000):
        log.event(app.LOG, "stopped", number=number)
    with anyio.fail_after(10):
        assert await reader.readuntil(b"event: missed\ndata: ")
        assert int(await reader.readline()) > 4000
    writer.close()


async def test_readers_that_take_nothing_give_their_places_back(admin: Admin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "ANSWER_TIMEOUT", 0.05)
    async with AsyncExitStack() as until_the_end:
        until_the_end.enter_context(anyio.fail_after(20))
        for _ in range(READERS):
            stalled = until_the_end.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            stalled.connect(str(admin.socket))
            stalled.sendall(b"GET /events HTTP/1.1\r\nHost: x\r\n\r\n")
        client = await until_the_end.enter_async_context(admin.client())
        while await status_of_events(client) != 503:
            await anyio.lowlevel.checkpoint()
        for _ in range(20):
            log.event(app.LOG, "stopped", words=["x" * 200] * 250)
        while await status_of_events(client) != 200:
            await anyio.lowlevel.checkpoint()


# --- what it costs, and where it cannot listen ---


async def test_nothing_of_it_is_imported_before_the_first_client(tmp_path: Path) -> None:
    program = (
        "import sys, threading, os, signal\n"
        "def show():\n"
        "    names = {'starlette', 'uvicorn', 'h11', 'prometheus_client', 'anyio', 'httpx'} & set(sys.modules)\n"
        "    print('loaded', sorted(names), file=sys.stderr, flush=True)\n"
        "from sds_agent import log\n"
        "inner = log.event\n"
        "def event(logger, name, **more):\n"
        "    inner(logger, name, **more)\n"
        "    if name == 'admin_listening': show()\n"
        "log.event = event\n"
        "from sds_agent.cli.main import main\n"
        "sys.exit(main())\n"
    )
    command = [sys.executable, "-c", program, "run", str(write_config(tmp_path, default="1h"))]
    async with started(command, PATHS) as agent:
        assert (await agent.line("loaded")).endswith("loaded []")


async def test_an_address_in_use_is_reported_and_the_agent_serves(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        async with administered(tmp_path, address=address) as admin:
            assert (await admin.get("/readyz")).status_code == 200
            with anyio.fail_after(10):
                while not (found := [each for each in caplog.records if each.getMessage() == "admin_unavailable"]):
                    await anyio.lowlevel.checkpoint()
    assert len(found) == 1
    cause = found[0].__dict__["sds_agent_fields"]["cause"]
    assert cause == f"admin.address: cannot listen on {address}: Address already in use; choose another port"


async def test_a_socket_that_was_removed_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "CHECK", 0.01)
    async with administered(tmp_path) as admin:
        admin.socket.unlink()
        with anyio.fail_after(10):
            while not admin.socket.exists():
                await anyio.lowlevel.checkpoint()
        assert (await admin.get("/livez")).status_code == 200


async def test_the_agent_serves_where_the_admin_server_cannot_be_loaded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def missing() -> Application:
        raise ModuleNotFoundError("No module named 'starlette'", name="starlette")

    def broken() -> Application:
        raise ZeroDivisionError

    for number, (make, cause) in enumerate(((missing, "install sds-agent again"), (broken, "has a fault"))):
        chosen = AdminSettings(socket=tmp_path / f"{number}.sock")
        async with server.serving(chosen, make, SystemClock()):
            with anyio.fail_after(10):
                while not (tmp_path / f"{number}.sock").exists():
                    await anyio.lowlevel.checkpoint()
                reader, writer = await asyncio.open_unix_connection(str(tmp_path / f"{number}.sock"))
                assert await reader.read() == b""
                writer.close()
                while not any(cause in str(each.__dict__.get("sds_agent_fields")) for each in caplog.records):
                    await anyio.lowlevel.checkpoint()


async def test_an_agent_without_an_admin_server_has_no_socket_for_it(tmp_path: Path) -> None:
    file = write_config(tmp_path, default="1h")
    file.write_text(json.dumps({**json.loads(file.read_text()), "admin": {"enabled": False}}))
    settings, clock = load(file, {}).settings, SystemClock()
    async with app.authorities(settings, clock) as cas, app.agent(settings, cas, clock):
        assert not (tmp_path / "sds.admin.sock").exists()
