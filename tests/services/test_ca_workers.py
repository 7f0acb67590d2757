"""`sds-agent ca serve` with `workers`: what is one stays one, whatever process a caller reaches, and whatever ends."""

import asyncio
import errno
import json
import os
import select
import signal
import socket
import ssl
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anyio
import grpc.aio
import httpx
import pytest
from anyio.abc import ByteReceiveStream
from fakes.ca_servers import (
    AUDIENCE,
    ISSUER,
    METHOD,
    TRUST_DOMAIN,
    WEB,
    Identity,
    Served,
    Shifted,
    TokenIssuer,
    ask,
    fresh,
    plug,
)
from fakes.events import recorded
from fakes.processes import Program, started
from fakes.scraped import series, value
from sds_agent_proto.istio_pb2 import CertificateRequest, CertificateResponse

from sds_agent.ca.acceptor import Arrival
from sds_agent.ca.audit import AuditLog
from sds_agent.ca.books import Ledger
from sds_agent.ca.cores import usable
from sds_agent.ca.denied import Denied
from sds_agent.ca.jwks import SOONEST
from sds_agent.ca.settings import AUTO, MOST_WORKERS, load
from sds_agent.ca.workers import parent
from sds_agent.ca.workers.channel import Channel
from sds_agent.ca.workers.desk import Desk
from sds_agent.ca.workers.messages import (
    Admit,
    Begin,
    Denials,
    GiveBack,
    HandOver,
    Here,
    SignerMaterial,
    ToWorker,
    to_worker,
)
from sds_agent.ca.workers.pool import LONGEST_PAUSE, STEADY, Pace
from sds_agent.ca.workers.process import WorkerError, end_of
from sds_agent.ca.workers.process import started as start_worker
from sds_agent.ca.workers.silence import ASK_EVERY, LATE, MOST_UNANSWERED, SUSPECT, Silence
from sds_agent.cli import ca_worker
from sds_agent.clock import Beginning, SystemClock
from sds_agent.errors import ProblemsError
from sds_agent.pki.certificates import read_pem, serial_hex, write_pem
from sds_agent.pki.csr import make_csr
from sds_agent.pki.keys import KeyType, generate

HEALTH = "/grpc.health.v1.Health/Check"
ROUNDS = 40
"""Join tokens that several workers get at the same moment."""
SECONDS = 30


@dataclass(frozen=True)
class Running:
    """The server as a program, and as its callers see it."""

    program: Program
    ca: Served

    async def admin(self, path: str) -> httpx.Response:
        transport = httpx.AsyncHTTPTransport(uds=str(self.ca.directory / "admin.sock"))
        async with httpx.AsyncClient(transport=transport, base_url="http://ca", timeout=SECONDS) as client:
            return await client.get(path)

    async def status(self) -> Any:
        return (await self.admin("/status")).json()

    async def busy_worker(self) -> int:
        """The process id of the one worker that has connections."""
        (found,) = [each for each in (await self.status())["workers"] if each["connections"]]
        pid: int = found["pid"]
        return pid

    async def until_connected(self, *counts: int) -> Any:
        """Wait until the workers have so many connections; returns the status."""
        with anyio.fail_after(SECONDS):
            while True:
                status = await self.status()
                if sorted(each["connections"] for each in status["workers"]) == sorted(counts):
                    return status


def configured(directory: Path, workers: object = 2, more: str = "", callers: str = "join_tokens: tokens") -> Path:
    file = directory / "ca.yaml"
    file.write_text(
        f"trust_domain: {TRUST_DOMAIN}\nlisten: 127.0.0.1:0\nserver_names: [localhost]\nsigner: {{self_signed: root}}\n"
        f"audit: audit.log\ncallers: {{{callers}}}\nlog: {{format: json}}\nadmin: {{socket: admin.sock}}\n"
        f"workers: {workers}\n{more}\n"
    )
    return file


def command(file: Path) -> list[str]:
    return [sys.executable, "-m", "sds_agent", "ca", "serve", str(file)]


@asynccontextmanager
async def running(file: Path, issuer: TokenIssuer | None = None) -> AsyncIterator[Running]:
    async with started(command(file)) as program:
        address = json.loads(await program.line('"listening"'))["address"]
        await program.line('"admin_listening"')
        stored = (file.parent / "root" / "roots.pem").read_bytes()
        ca = Served(address, file.parent, issuer or TokenIssuer(), write_pem(read_pem(stored)))
        yield Running(program, ca)


async def connect(
    server: Running, until_the_end: AsyncExitStack, count: int, identity: Identity | None = None
) -> list[grpc.aio.Channel]:
    """So many connections, each open: the server gives the next one to the worker that has fewest."""
    channels = []
    for _ in range(count):
        channel = await until_the_end.enter_async_context(server.ca.connected(identity))
        check: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(HEALTH)
        await check(b"", timeout=SECONDS)
        channels.append(channel)
    return channels


async def granted(channel: grpc.aio.Channel, token: str | None = None) -> Identity | grpc.StatusCode:
    """A certificate, or the code of the refusal."""
    try:
        return await ask(channel, token)
    except grpc.aio.AioRpcError as error:
        return error.code()


async def ended(stream: ByteReceiveStream) -> None:
    """Wait for the end of a connection, whatever comes before it."""
    with anyio.fail_after(SECONDS), suppress(anyio.EndOfStream, anyio.BrokenResourceError):
        while True:
            await stream.receive()


def opened(pids: Sequence[int]) -> list[int]:
    """Descriptors of processes, by which one sees their end whoever their parent is (pidfd_open(2))."""
    return [os.pidfd_open(pid) for pid in pids]


def have_ended(processes: Sequence[int]) -> bool:
    """Whether they end while this waits; it closes their descriptors."""
    try:
        return all(select.select([each], [], [], SECONDS)[0] for each in processes)
    finally:
        for each in processes:
            os.close(each)


async def test_a_join_token_is_spent_once_whatever_workers_get_it_at_the_same_moment(tmp_path: Path) -> None:
    """Or else a token that leaked joins a second machine under the first one's name."""
    async with running(configured(tmp_path, 4)) as server, AsyncExitStack() as until_the_end:
        channels = await connect(server, until_the_end, 4)
        await server.until_connected(1, 1, 1, 1)
        for number in range(ROUNDS):
            token = server.ca.join_token(f"{WEB}{number}")
            got = await asyncio.gather(*(granted(channel, token) for channel in channels))
            assert [each for each in got if not isinstance(each, Identity)] == [grpc.StatusCode.UNAUTHENTICATED] * 3
    issued = [line["spiffe_id"] for line in server.ca.audit if line["outcome"] == "issued"]
    assert sorted(issued) == sorted(f"{WEB}{number}" for number in range(ROUNDS))


async def test_a_caller_has_one_quota_whatever_workers_it_reaches(tmp_path: Path) -> None:
    """Or else each worker more would let a caller that runs wild ask as often again."""
    limit = 6
    async with running(configured(tmp_path, 3, f"limits: {{per_caller: {limit}}}")) as server:
        identity = await server.ca.ask(server.ca.join_token())
        async with AsyncExitStack() as until_the_end:
            began = time.monotonic()
            channels = await connect(server, until_the_end, 3, identity)
            await server.until_connected(1, 1, 1)
            got = await asyncio.gather(*(granted(channel) for channel in channels for _ in range(limit)))
            refilled = int((time.monotonic() - began) * limit / 60)
    refusals = [each for each in got if not isinstance(each, Identity)]
    assert set(refusals) == {grpc.StatusCode.RESOURCE_EXHAUSTED}
    assert limit <= len(got) - len(refusals) <= limit + refilled


async def test_the_audit_log_has_each_certificate_once_and_whole_under_load(tmp_path: Path) -> None:
    """A torn or a lost line is a certificate that nobody can account for."""
    callers, each = 9, 20
    async with running(configured(tmp_path, 3, "limits: {per_caller: 10000}")) as server:

        async def renew(number: int) -> list[str]:
            # long names, so that a line is longer than a pipe's atomic write
            identity = await server.ca.ask(server.ca.join_token(f"{WEB}/{'n' * 1700}{number}"))
            async with server.ca.connected(identity) as channel:
                return [serial_hex((await ask(channel)).leaf) for _ in range(each)]

        received = await asyncio.gather(*map(renew, range(callers)))
        status = await server.status()
        text = (await server.admin("/metrics")).text
    renewed = [line for line in server.ca.audit if line["proof"] == "certificate"]
    for number, serials in enumerate(received):
        of_caller = [line["serial"] for line in renewed if line["caller"].endswith(f"n{number}")]
        assert of_caller == serials, "in the order in which they were given out"
    assert len({line["serial"] for line in server.ca.audit}) == len(server.ca.audit) == callers * (each + 1)
    assert status["counts"]["issued"] == callers * (each + 1), "of all workers together"
    assert value(series(text), "sds_agent_ca_requests_total", result="issued", proof="certificate") == callers * each


async def test_an_audit_log_that_takes_nothing_stops_every_worker(tmp_path: Path) -> None:
    async with running(configured(tmp_path)) as server, AsyncExitStack() as until_the_end:
        (tmp_path / "audit.log").unlink()
        (tmp_path / "audit.log").mkdir()
        channels = await connect(server, until_the_end, 2)
        got = [await granted(channel, server.ca.join_token()) for channel in channels]
        assert got == [grpc.StatusCode.INTERNAL] * 2
        status = await server.status()
        await server.program.line('"audit_not_written"')
    assert (status["in_work"], status["counts"]["issued"]) == (0, 0)


async def test_a_worker_that_is_killed_loses_no_call_of_another_and_is_replaced(tmp_path: Path) -> None:
    file = configured(tmp_path, 2, "limits: {per_caller: 1000000}")
    async with running(file) as server, AsyncExitStack() as until_the_end:
        identity = await server.ca.ask(server.ca.join_token())
        await server.until_connected(0, 0)
        (lasting,) = await connect(server, until_the_end, 1, identity)
        survivor = await server.busy_worker()
        (victims,) = await connect(server, until_the_end, 1, identity)
        before = (await server.until_connected(1, 1))["workers"]
        (victim,) = [each["pid"] for each in before if each["pid"] != survivor]
        replaced = asyncio.create_task(server.program.line('"worker_started"', 3))
        unanswered: grpc.aio.StreamUnaryMultiCallable[bytes, bytes] = victims.stream_unary(METHOD)
        lost = unanswered()
        await lost.wait_for_connection()  # before that it would be made anew, at another worker
        os.kill(victim, signal.SIGKILL)
        answers = 0
        while not replaced.done():
            await ask(lasting)
            answers += 1
        assert answers
        ended = json.loads(await server.program.line('"worker_ended"'))
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await lost
        assert error.value.code() is grpc.StatusCode.UNAVAILABLE
        assert (ended["level"], ended["process"], ended["cause"]) == ("error", victim, "it was ended by SIGKILL")
        (fresh,) = await connect(server, until_the_end, 1, identity)
        await ask(fresh)
        after = (await server.status())["workers"]
        assert {each["worker"] for each in after} == {1, 2}
        assert survivor in {each["pid"] for each in after}
        assert victim not in {each["pid"] for each in after}
        assert (await server.admin("/readyz")).status_code == 200
        assert value(series((await server.admin("/metrics")).text), "sds_agent_ca_workers") == 2
        assert value(series((await server.admin("/metrics")).text), "sds_agent_ca_workers_ended_total") == 1
        assert await server.program.stop() == 0
        ends = [line for line in server.program.lines if '"worker_not_drained"' in line]
        assert ends == [], "an error at the end of a good day"


class Hasty(SystemClock):
    """The machine's clocks, but workers are asked sooner whether they are alive."""

    async def sleep(self, seconds: float) -> None:
        await super().sleep(seconds / 5 if seconds == ASK_EVERY else seconds)


async def test_a_worker_that_hangs_is_replaced(tmp_path: Path) -> None:
    """Its socket takes connections for ever, and who calls there waits as long."""
    settings = load(configured(tmp_path))
    with recorded() as events:
        async with parent.serving(settings, Hasty(), 2, ca_worker.command) as address:
            hung, lively = [each["process"] for each in events.named("worker_started")]
            os.kill(hung, signal.SIGSTOP)
            ended = await events.wait("worker_ended", within=SECONDS)
            assert (ended["process"], ended["cause"].split(",")[0]) == (hung, "it hung")
            await events.wait("worker_started", count=3, within=SECONDS)
            assert lively not in {each["process"] for each in events.named("worker_ended")}
            roots = write_pem(read_pem((tmp_path / "root" / "roots.pem").read_bytes()))
            ca = Served(str(address), tmp_path, TokenIssuer(), roots)
            for _ in range(2):
                await ca.ask(ca.join_token())


async def test_a_connection_for_which_no_worker_has_room_is_not_closed_in_silence(tmp_path: Path) -> None:
    """While a worker that ended is replaced, the others may have no room, though there are places."""
    desk = Desk(Ledger(AuditLog(tmp_path / "audit.log"), at_once=2, per_caller=1), SystemClock(), most=2, room=1)
    silent = [sys.executable, "-c", "import time; time.sleep(600)"]
    worker = await start_worker(1, lambda _: silent, Beginning(SystemClock()), desk.receive)
    with socket.socket() as plain, recorded() as events:
        for name in ("one", "two"):
            desk.hand_over(Arrival(plain, f"192.0.2.1:{name}", "192.0.2.1", name), [worker])
        assert worker.connections == {"one"}
        (full,) = events.named("too_many_connections", level="warning")
        assert full["closed"] == "192.0.2.1:two"
    worker.kill()
    await worker.process.wait()
    worker.close()


async def test_a_connection_goes_to_a_worker_that_answers_though_it_has_more(tmp_path: Path) -> None:
    desk = Desk(Ledger(AuditLog(tmp_path / "audit.log"), at_once=2, per_caller=1), SystemClock(), most=10, room=10)
    silent = [sys.executable, "-c", "import time; time.sleep(600)"]
    workers = [await start_worker(n, lambda _: silent, Beginning(SystemClock()), desk.receive) for n in (1, 2)]
    busy, stopped = workers
    with socket.socket() as plain:
        busy.connections.add("one")
        for _ in range(SUSPECT):
            stopped.check(ASK_EVERY)
        desk.hand_over(Arrival(plain, "192.0.2.1:1", "192.0.2.1", "two"), workers)
        assert (busy.connections, stopped.connections) == ({"one", "two"}, set())
        desk.receive(stopped, Here())
        desk.hand_over(Arrival(plain, "192.0.2.1:1", "192.0.2.1", "three"), workers)
        assert stopped.connections == {"three"}
    for worker in workers:
        worker.kill()
        await worker.process.wait()
        worker.close()


def test_a_worker_hangs_when_it_leaves_questions_unanswered_that_the_parent_could_ask() -> None:
    silence = Silence()
    for _ in range(3):
        assert not any(silence.ask(ASK_EVERY) for _ in range(MOST_UNANSWERED))
        silence.answered()
    assert [silence.ask(ASK_EVERY) for _ in range(MOST_UNANSWERED + 1)][-1]


def test_no_worker_hangs_because_the_machine_was_suspended_or_all_of_its_processes_were() -> None:
    """Judged by a time, every worker would be killed at the moment when the machine wakes up."""
    silence = Silence()
    for _ in range(MOST_UNANSWERED):
        silence.ask(ASK_EVERY)
    assert not any(silence.ask(LATE + each) for each in (0, 3600))
    assert not any(silence.ask(ASK_EVERY) for _ in range(MOST_UNANSWERED - 1))
    assert silence.ask(ASK_EVERY)


async def test_no_worker_outlives_a_server_that_was_killed(tmp_path: Path) -> None:
    """It would hold the CA's key and go on answering, with no audit log."""
    async with running(configured(tmp_path, 3)) as server:
        processes = opened([each["pid"] for each in (await server.status())["workers"]])
        await server.program.stop(signal.SIGKILL)
        assert have_ended(processes)


async def test_signals_for_all_processes_leave_the_workers_to_the_server(tmp_path: Path) -> None:
    """A service manager sends SIGTERM to every process of a service: calls in work must still be answered."""
    async with running(configured(tmp_path)) as server, AsyncExitStack() as until_the_end:
        token = server.ca.join_token()
        channels = await connect(server, until_the_end, 2)
        workers = [each["pid"] for each in (await server.status())["workers"]]
        processes = opened(workers)
        calls = []
        for channel in channels:
            unfinished: grpc.aio.StreamUnaryMultiCallable[bytes, bytes] = channel.stream_unary(METHOD)
            calls.append(unfinished(metadata=[("authorization", f"Bearer {token}")]))
            await granted(channel)  # the call is there when this one is answered, on the same connection
        for pid in workers:
            os.kill(pid, signal.SIGTERM)
            os.kill(pid, signal.SIGINT)
            os.kill(pid, signal.SIGHUP)
        server.program.process.send_signal(signal.SIGTERM)
        await server.program.line('"stopping"')
        key = generate(KeyType.EC_P256)
        request = CertificateRequest(csr=make_csr(key, WEB).decode(), validity_duration=3600).SerializeToString()
        for call in calls:  # the same key, for one token
            await call.write(request)
            await call.done_writing()
        for call in calls:
            assert CertificateResponse.FromString(await call).cert_chain
        with anyio.fail_after(SECONDS):
            assert await server.program.process.wait() == 0
        assert have_ended(processes)
    assert not [line for line in server.program.lines if '"worker_ended"' in line]


SIGNALLED = """
import os, signal, sys

def end(event, arguments):
    if event == "import" and arguments[0] == "grpc":
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGHUP)

sys.addaudithook(end)
"""


async def test_signals_for_all_processes_end_no_worker_that_starts(tmp_path: Path) -> None:
    """A server that is stopped while it starts would say that it failed."""

    def signalled(descriptor: int) -> Sequence[str]:
        words = list(ca_worker.command(descriptor))
        program = words.index("-c") + 1
        return [*words[:program], SIGNALLED + words[program], *words[program + 1 :]]

    with recorded() as events:
        async with parent.serving(load(configured(tmp_path)), SystemClock(), 2, signalled):
            assert len(events.named("worker_started")) == 2


async def test_connections_have_one_limit_and_give_way_whatever_worker_has_them(tmp_path: Path) -> None:
    async with (
        running(configured(tmp_path, 2, "limits: {connections: 2}")) as server,
        AsyncExitStack() as until_the_end,
    ):
        context = ssl.create_default_context(cadata=server.ca.roots.decode())
        context.set_alpn_protocols(["h2"])
        host, port = server.ca.address.split(":")
        streams = []
        for _ in range(3):
            stream = await anyio.connect_tcp(
                host, int(port), ssl_context=context, tls_hostname="localhost", tls_standard_compatible=False
            )
            streams.append(await until_the_end.enter_async_context(stream))
        await ended(streams[0])
        await server.program.line('"too_many_connections"')
        status = await server.until_connected(1, 1)
    assert status["connections"] == 2


async def test_who_is_shut_out_is_shut_out_at_every_worker(tmp_path: Path) -> None:
    denied = tmp_path / "denied"
    denied.write_text("# nobody\n")
    callers = "join_tokens: tokens, deny_file: denied"
    async with running(configured(tmp_path, 2, "limits: {per_caller: 1000000}", callers)) as server:
        identity = await server.ca.ask(server.ca.join_token())
        async with AsyncExitStack() as until_the_end:
            channels = await connect(server, until_the_end, 2, identity)
            await ask(channels[0])
            await ask(channels[1])
            denied.write_text(f"{WEB}\n")
            with anyio.fail_after(SECONDS):
                for channel in channels:
                    while (answer := await granted(channel)) is not grpc.StatusCode.PERMISSION_DENIED:
                        assert isinstance(answer, Identity)


async def test_tokens_of_an_issuer_are_taken_by_every_worker(tmp_path: Path) -> None:
    """The parent reads the key set, and tells all of them."""
    issuer = TokenIssuer()
    (tmp_path / "jwks.json").write_bytes(issuer.key_set())
    callers = f'jwt: [{{issuer: "{ISSUER}", audience: {AUDIENCE}, jwks: jwks.json}}]'
    async with running(configured(tmp_path, callers=callers), issuer) as server, AsyncExitStack() as until_the_end:
        for channel in await connect(server, until_the_end, 2):
            await ask(channel, issuer.token())
            stranger = TokenIssuer().token()  # its key is unknown: the worker asks for the set anew, and none is due
            assert await granted(channel, stranger) is grpc.StatusCode.UNAUTHENTICATED


async def test_a_new_signer_and_new_keys_of_an_issuer_reach_every_worker(tmp_path: Path) -> None:
    """Or else some of the callers get certificates of a CA that was replaced, or have their tokens refused."""
    root, clock, issuer, successor = fresh("root"), Shifted(), TokenIssuer(), TokenIssuer()
    first, second = fresh("first", root), fresh("second", root)
    plug(tmp_path / "cacerts", first, [first], [root])
    (tmp_path / "jwks.json").write_bytes(issuer.key_set())
    callers = f'jwt: [{{issuer: "{ISSUER}", audience: {AUDIENCE}, jwks: jwks.json}}]'
    file = configured(tmp_path, 2, "limits: {per_caller: 1000000}", callers)
    file.write_text(file.read_text().replace("{self_signed: root}", "{cacerts: cacerts}"))
    async with (
        parent.serving(load(file), clock, 2, ca_worker.command) as address,
        AsyncExitStack() as until_the_end,
    ):
        ca = Served(str(address), tmp_path, issuer, write_pem([root.certificate]))
        channels = [await until_the_end.enter_async_context(ca.connected()) for _ in range(2)]
        for channel in channels:
            assert (await ask(channel, issuer.token())).leaf.issuer == first.certificate.subject
        plug(tmp_path / "cacerts", second, [second], [root])
        with anyio.fail_after(SECONDS):
            for channel in channels:
                while (await ask(channel, issuer.token())).leaf.issuer != second.certificate.subject:
                    pass
        (tmp_path / "jwks.json").write_bytes(successor.key_set())
        clock.ahead = SOONEST
        for channel in channels:
            assert isinstance(await granted(channel, successor.token()), Identity)
            assert await granted(channel, issuer.token()) is grpc.StatusCode.UNAUTHENTICATED


async def test_requests_in_work_are_counted_over_all_workers_and_given_back_by_one_that_ended(tmp_path: Path) -> None:
    """Or else each worker that ends takes places with it, until the CA is busy for good."""
    ledger = Ledger(AuditLog(tmp_path / "audit.log"), at_once=2, per_caller=1)
    desk = Desk(ledger, SystemClock(), most=10, room=10)
    silent = [sys.executable, "-c", "import time; time.sleep(600)"]
    first, second = [await start_worker(n, lambda _: silent, Beginning(SystemClock()), desk.receive) for n in (1, 2)]
    for worker, call in ((first, 1), (second, 1), (second, 2)):
        desk.receive(worker, Begin(call))
    assert (len(first.places), len(second.places), ledger.in_work) == (1, 1, 2)
    desk.receive(second, GiveBack(2))  # which got none
    assert ledger.in_work == 2
    desk.take_back(first)
    desk.receive(second, Begin(3))
    assert (len(second.places), ledger.in_work) == (2, 2)
    for worker in (first, second):
        worker.kill()
        assert end_of(await worker.process.wait()) == "was ended by SIGKILL"
        worker.close()


async def test_a_connection_for_which_no_descriptor_is_left_ends_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was accepted with the last one, and is handed over with a copy."""
    desk = Desk(Ledger(AuditLog(tmp_path / "audit.log"), at_once=2, per_caller=1), SystemClock(), most=10, room=10)
    silent = [sys.executable, "-c", "import time; time.sleep(600)"]
    worker = await start_worker(1, lambda _: silent, Beginning(SystemClock()), desk.receive)

    def fail(_: int) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with socket.socket() as plain, recorded() as events:
        with monkeypatch.context() as patched:
            patched.setattr(os, "dup", fail)
            for number in range(2):
                desk.hand_over(Arrival(plain, "192.0.2.1:1", "192.0.2.1", f"lost {number}"), [worker])
        assert (desk.connections, worker.connections) == (0, set())
        (reported,) = events.named("not_accepted", level="error")
        assert reported["cause"] == "Too many open files"
        desk.hand_over(Arrival(plain, "192.0.2.1:1", "192.0.2.1", "good"), [worker])
        assert (desk.connections, worker.connections) == (1, {"good"})
    worker.kill()
    await worker.process.wait()
    worker.close()


async def test_a_worker_takes_no_module_from_the_working_directory(tmp_path: Path) -> None:
    """Who may write there could make the CA run a program of theirs."""
    (tmp_path / "grpc.py").write_text("raise SystemExit(9)\n")
    program = Path(sys.executable).parent / "sds-agent"
    async with started([str(program), "ca", "serve", str(configured(tmp_path))], directory=tmp_path) as server:
        await server.line('"listening"')
        assert await server.stop() == 0


@pytest.mark.parametrize("place", ["parent", "worker"])
async def test_what_is_wrong_is_said_once(tmp_path: Path, place: str) -> None:
    """A line from each worker would bury the one that says what to do."""
    file = configured(tmp_path, 3)
    environment = {}
    if place == "parent":
        file.write_text(file.read_text().replace("audit.log", "no/such/directory/audit.log"))
    else:  # only a worker makes a directory for gRPC's socket
        long = tmp_path / ("d" * 100)
        long.mkdir()
        environment["TMPDIR"] = str(long)
    async with started(command(file), environment) as program:
        with anyio.fail_after(SECONDS):
            assert await program.process.wait() == 2
        await program.line("sds-agent: ")
    words = {"parent": "audit: cannot write", "worker": "set TMPDIR to a shorter one"}[place]
    assert len([line for line in program.lines if words in line]) == 1
    assert not [line for line in program.lines if "Traceback" in line]


async def test_a_server_whose_workers_cannot_run_says_so_and_ends(tmp_path: Path) -> None:
    settings = load(configured(tmp_path))
    failing = parent.serving(settings, SystemClock(), 2, lambda _: [sys.executable, "-c", "raise SystemExit(7)"])
    with pytest.RaisesGroup(pytest.RaisesExc(WorkerError, match="exit code 7"), flatten_subgroups=True):
        async with failing:
            pass


async def test_a_worker_that_cannot_be_replaced_is_tried_again_ever_later(tmp_path: Path) -> None:
    """The others serve on; and a machine that is out of memory is not made to start processes all the time."""
    settings = load(configured(tmp_path, 1))
    lives = iter([True])

    def once(descriptor: int) -> Sequence[str]:
        return ca_worker.command(descriptor) if next(lives, False) else [sys.executable, "-c", "raise SystemExit(7)"]

    with recorded() as events:
        async with parent.serving(settings, SystemClock(), 1, once):
            (begun,) = events.named("worker_started")
            os.kill(begun["process"], signal.SIGKILL)
            first = await events.wait("worker_not_started", within=SECONDS)
            second = await events.wait("worker_not_started", count=2, within=SECONDS)
    assert events.named("worker_ended")[0]["again_in"] == 0
    assert (first["again_in"], second["again_in"]) == (1, 2)


def test_the_pause_before_a_worker_is_started_again_grows_and_is_forgotten() -> None:
    pace = Pace()
    assert [pace.pause(0) for _ in range(8)] == [0, 1, 2, 4, 8, 16, LONGEST_PAUSE, LONGEST_PAUSE]
    assert [pace.pause(STEADY), pace.pause(0)] == [0, 1]


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("auto", AUTO),
        ("1", 1),
        ("64", MOST_WORKERS),
        ("", None),
        ("0", None),
        ("65", None),
        ("true", None),
        ("many", None),
        ("1.5", None),
    ],
)
def test_the_number_of_workers_is_read_as_it_is_written(tmp_path: Path, written: str, meant: int | None) -> None:
    file = configured(tmp_path, written)
    if meant is not None:
        assert load(file).workers == meant
        return
    with pytest.raises(ProblemsError) as caught:
        load(file)
    assert "workers" in str(caught.value)
    assert "auto, or a number from 1 to 64" in str(caught.value) or not written


def test_auto_is_the_cores_that_the_control_group_leaves(tmp_path: Path) -> None:
    """A container that may use one core of a large machine must not start a process for each of them."""
    group, inner = tmp_path / "cgroup", tmp_path / "groups" / "outer" / "inner"
    inner.mkdir(parents=True)
    group.write_text("12:cpu:/elsewhere\n0::/outer/inner\n")
    every = len(os.sched_getaffinity(0))
    assert usable(group, tmp_path / "groups") == every
    (inner / "cpu.max").write_text("max 100000\n")
    assert usable(group, tmp_path / "groups") == every
    (inner.parent / "cpu.max").write_text("150000 100000\n")
    assert usable(group, tmp_path / "groups") == 1
    (inner / "cpu.max").write_text("50000 100000\n")
    assert usable(group, tmp_path / "groups") == 1
    group.unlink()
    assert usable(group, tmp_path / "groups") == every


async def test_messages_arrive_whole_in_order_and_with_their_descriptors() -> None:
    """Lists of revocations are larger than what a socket takes at once."""
    ours, theirs = socket.socketpair()
    large = SignerMaterial(b"c", b"k", (), (), (os.urandom(3 << 20),))
    sent: list[ToWorker] = [Denials(Denied(frozenset([WEB]))), large, HandOver("a", "x", "o"), HandOver("b", "y", "o")]
    got = list[tuple[ToWorker, int | None]]()
    done = asyncio.Event()

    def receive(message: ToWorker, descriptor: Any) -> None:
        got.append((message, descriptor() if isinstance(message, HandOver) else None))
        if len(got) == len(sent):
            done.set()

    lost = asyncio.Event()
    there = Channel[ToWorker](theirs, to_worker, receive, lost.set)
    here = Channel[ToWorker](ours, to_worker, lambda *_: None, lambda: None)
    pipes = [os.pipe() for _ in range(2)]
    ends = iter(pipes)
    for message in sent:
        here.send(message, next(ends)[1] if isinstance(message, HandOver) else None)
    async with asyncio.timeout(SECONDS):
        await done.wait()
    assert [message for message, _ in got] == sent
    for (reading, writing), (_, descriptor) in zip(pipes, got[2:], strict=True):
        assert descriptor is not None
        assert not os.get_inheritable(descriptor)
        os.write(descriptor, b"!")
        assert os.read(reading, 1) == b"!"
        for each in (reading, writing, descriptor):
            os.close(each)
    here.close()
    async with asyncio.timeout(SECONDS):
        await lost.wait()
    there.close()


async def test_what_is_no_message_ends_the_channel() -> None:
    ours, theirs = socket.socketpair()
    lost = asyncio.Event()
    there = Channel[ToWorker](theirs, to_worker, lambda *_: None, lost.set)
    here = Channel[ToWorker](ours, to_worker, lambda *_: None, lambda: None)
    here.send(Admit(1, WEB))  # which is for the parent
    async with asyncio.timeout(SECONDS):
        await lost.wait()
    here.close()
    there.close()
