"""The SDS server on its socket, spoken to by a real gRPC client."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path

import anyio
import grpc
import pytest
from envoy_data_plane.envoy.config.core.v3 import Node
from envoy_data_plane.envoy.service.discovery.v3 import DiscoveryRequest
from fakes.events import Events, recorded
from fakes.loops import anyio_backend, loop_of_the_module, one_loop  # noqa: F401 - fixtures
from fakes.peers import Peer, SotwStream, chain_of, connected

from sds_agent.sds import pushes
from sds_agent.sds.endpoint import SocketFile
from sds_agent.sds.protocol import Finish, StatusCode
from sds_agent.sds.server import Limits, serving
from sds_agent.sds.service import FETCH_TIMEOUT, SecretDiscoveryService, explain
from sds_agent.secrets.model import BundleSecret, CertificateSecret, Secret
from sds_agent.secrets.store import SecretStore

LATER = datetime(2036, 1, 1, tzinfo=UTC)


def certificate(content: bytes) -> CertificateSecret:
    return CertificateSecret(content, b"key", LATER)


@asynccontextmanager
async def running(
    directory: Path,
    limits: Limits | None = None,
    *,
    fetch_timeout: float = FETCH_TIMEOUT,
    check_every: float = 60,
) -> AsyncIterator[tuple[SecretStore, Peer, Events]]:
    """A store with one certificate, one bundle and one name without a secret, served to one client."""
    store = SecretStore(("default", "ROOTCA", "late"))
    store.publish({"default": certificate(b"chain 1"), "ROOTCA": BundleSecret(b"roots")})
    limits = limits or Limits()
    service = SecretDiscoveryService(
        store, most_streams=limits.streams, most_names=limits.names, fetch_timeout=fetch_timeout
    )
    socket = directory / "sds.sock"
    with recorded() as events:
        async with (
            serving(service, SocketFile(socket), limits, check_every=check_every),
            connected(socket) as peer,
        ):
            yield store, peer, events


async def test_client_gets_its_secret_and_every_later_one(tmp_path: Path) -> None:
    async with running(tmp_path) as (store, peer, events):
        stream = await peer.stream().ask("default", node="envoy-a")
        assert chain_of((await stream.read())["default"]) == b"chain 1"
        await stream.ack("default")
        await events.wait("acked", node="envoy-a")
        store.publish({"default": certificate(b"chain 2")})
        assert chain_of((await stream.read())["default"]) == b"chain 2"


async def test_delta_client_gets_its_secret_and_every_later_one(tmp_path: Path) -> None:
    async with running(tmp_path) as (store, peer, events):
        stream = await peer.delta().subscribe("default")
        first = await stream.read()
        assert [(r.name, r.version) for r in first.resources] == [("default", certificate(b"chain 1").version)]
        await stream.ack()
        await events.wait("acked")
        store.publish({"default": certificate(b"chain 2")})
        assert (await stream.read()).resources[0].version == certificate(b"chain 2").version


async def test_nack_is_not_inferred_from_the_version(tmp_path: Path) -> None:
    """An Envoy that repeats its old version without an error has taken the answer."""
    async with running(tmp_path) as (_, peer, events):
        stream = await peer.stream().ask("default", version="of an earlier stream")
        await stream.read()
        await stream.ack("default", version="older")
        await events.wait("acked", names=["default"])
        assert events.named("nacked") == []


@pytest.mark.parametrize("version", [certificate(b"chain 1").version, "older"])
async def test_reconnecting_delta_client_is_answered_whatever_it_says_it_holds(tmp_path: Path, version: str) -> None:
    """Silence for an equal version would leave an Envoy that waits for its first answer without a listener."""
    async with running(tmp_path) as (_, peer, _events):
        stream = await peer.delta().subscribe("default", versions={"default": version, "ROOTCA": "any"})
        assert [r.name for r in (await stream.read()).resources] == ["default"], "what it holds subscribes to nothing"


async def test_delta_client_learns_what_is_not_served(tmp_path: Path) -> None:
    async with running(tmp_path) as (_, peer, _events):
        stream = await peer.delta().subscribe("nobody", "ROOTCA")
        answer = await stream.read()
        assert answer.removed_resources == ["nobody"]
        assert [r.name for r in answer.resources] == ["ROOTCA"]


async def test_secret_that_is_not_issued_yet_arrives_when_it_is(tmp_path: Path) -> None:
    async with running(tmp_path) as (store, peer, events):
        stream = await peer.stream().ask("late")
        await events.wait("subscribed", pending=["late"])
        assert store.awaited(["late"]), "issuance is to know that an Envoy waits"
        store.publish({"late": certificate(b"at last")})
        assert chain_of((await stream.read())["late"]) == b"at last"
        await stream.ack("late")
        await events.wait("acked")
        assert not store.awaited(["late"])


async def test_expired_secret_is_given_to_no_new_stream_and_taken_from_no_old_one(tmp_path: Path) -> None:
    async with running(tmp_path) as (store, peer, events):
        old = await peer.stream().ask("default", node="old")
        await old.read()
        await old.ack("default")
        await events.wait("acked", node="old")
        store.withhold(["default"])
        new = await peer.stream().ask("default", node="new")
        delta = await peer.delta().subscribe("default", node="delta")
        await events.wait("subscribed", node="new", pending=["default"])
        await events.wait("subscribed", node="delta", pending=["default"])
        assert store.awaited(["default"]), "its renewal goes first"
        store.publish({"default": certificate(b"chain 2")})
        for stream in (old, new):
            assert chain_of((await stream.read())["default"]) == b"chain 2"
        assert [r.name for r in (await delta.read()).resources] == ["default"]
        await events.wait("sent", count=4)
        assert len(events.named("sent")) == 4


async def test_waiting_ends_with_the_stream(tmp_path: Path) -> None:
    async with running(tmp_path) as (store, peer, events):
        stream = await peer.stream().ask("late")
        subscribed = await events.wait("subscribed")
        stream.leave()
        await events.wait("left", stream=subscribed["stream"])
        assert not store.awaited(["late"])


async def test_one_stream_of_a_connection_ends_and_the_others_go_on(tmp_path: Path) -> None:
    async with running(tmp_path) as (store, peer, events):
        good = await peer.stream().ask("default")
        await good.read()
        await good.ack("default")
        await events.wait("acked")
        bad = await peer.stream().ask("nobody")
        assert (await bad.end())[0] is grpc.StatusCode.NOT_FOUND
        store.publish({"default": certificate(b"chain 2")})
        assert chain_of((await good.read())["default"]) == b"chain 2"


async def test_unknown_name_is_answered_with_what_may_be_asked_for(tmp_path: Path) -> None:
    async with running(tmp_path) as (_, peer, _events):
        stream = await peer.stream().ask("defualt")
        code, message = await stream.end()
        assert code is grpc.StatusCode.NOT_FOUND
        assert message == "no secret named 'defualt'; this agent serves 'default', 'ROOTCA', 'late'"


@pytest.mark.parametrize("name", ["ü", "ü" * 70_000, "n" * 70_000, "a\nb\x00"])
async def test_message_about_an_odd_or_huge_name_is_bounded_and_lists_what_there_is(tmp_path: Path, name: str) -> None:
    """A status of 70 KB makes Envoy reset the whole connection, with every stream on it."""
    async with running(tmp_path) as (_, peer, _events):
        other = await peer.stream().ask("default")
        await other.read()
        stream = await peer.stream().ask(name)
        code, message = await stream.end()
        assert code is grpc.StatusCode.NOT_FOUND
        assert len(message) <= 1010
        assert message.isascii()
        assert message.isprintable()
        assert message.endswith("; this agent serves 'default', 'ROOTCA', 'late'")
        await other.ack("ROOTCA")
        assert set(await other.read()) == {"ROOTCA"}, "the other streams of the connection go on"


def test_message_about_many_names_is_bounded() -> None:
    offered = tuple(f"spiffe://demo.example/workload/{number}" for number in range(500))
    text = explain(Finish(StatusCode.NOT_FOUND, ("nobody",) * 500), offered)
    assert len(text) <= 1010
    assert "'nobody', 'nobody', ...; this agent serves 'spiffe://demo.example/workload/0', " in text


def test_message_names_nothing_where_the_first_names_are_for_others() -> None:
    finish = Finish(StatusCode.NOT_FOUND, ("nobody",))
    assert explain(finish, ()) == "no secret named 'nobody'"
    files = "file-cert: and file-root: names of files below '/srv'"
    assert explain(finish, (), (Path("/srv"),)) == f"no secret named 'nobody'; this agent serves {files}"
    assert explain(finish, ("web",), (Path("/srv"),)).endswith(f"; this agent serves 'web', and {files}")


async def test_same_refusal_is_logged_once(tmp_path: Path) -> None:
    """An Envoy with a wrong name asks for it for ever."""
    async with running(tmp_path) as (_, peer, events):
        for _ in range(5):
            stream = await peer.stream().ask("nobody", node="envoy-a")
            await stream.end()
        assert len(events.named("refused")) == 1
        assert events.named("subscribed") == []
        stream = await peer.stream().ask("nobody", node="envoy-b")
        await stream.end()
        assert len(events.named("refused")) == 2


async def test_nack_is_logged_with_the_clients_reason_and_node(tmp_path: Path) -> None:
    async with running(tmp_path) as (_, peer, events):
        stream = await peer.stream().ask("default", node="envoy-a")
        await stream.read()
        await stream.ack("default", error="Failed to load certificate\nchain")
        event = await events.wait("nacked", node="envoy-a")
        assert event["reason"] == "Failed to load certificate\nchain"
        assert event["names"] == ["default"]
        assert event["level"] == "warning"


async def test_node_is_remembered_from_the_first_message(tmp_path: Path) -> None:
    async with running(tmp_path) as (_, peer, events):
        stream = await peer.stream().ask("default", node="envoy-a")
        await stream.read()
        await stream.ack("default")
        assert (await events.wait("acked"))["node"] == "envoy-a"


@pytest.mark.parametrize("method", ["StreamSecrets", "DeltaSecrets", "FetchSecrets"])
async def test_garbage_is_refused_and_the_server_goes_on(tmp_path: Path, method: str) -> None:
    async with running(tmp_path) as (_, peer, _events):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await peer.call(method, b"\xff\xff\xff")
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "default" in await peer.fetch("default")


class BrokenStore(SecretStore):
    """A stand-in for a store with a bug: one name makes it raise, with a key in its words."""

    def secret(self, name: str) -> Secret | None:
        """What is served, but for that name."""
        if name == "broken":
            raise RuntimeError("PLANTED")
        return super().secret(name)


async def test_bug_is_logged_and_not_shown_to_the_peer(tmp_path: Path) -> None:
    """The text of an exception might hold a key."""
    store, socket = BrokenStore(("late",)), tmp_path / "sds.sock"
    store.publish({"late": certificate(b"chain")})
    with recorded() as events:
        async with (
            serving(SecretDiscoveryService(store), SocketFile(socket), Limits()),
            connected(socket) as peer,
        ):
            ends = [
                await (await peer.stream().ask("broken")).end(),
                await (await peer.delta().subscribe("broken")).end(),
            ]
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await peer.fetch("broken")
            ends.append((caught.value.code(), str(caught.value.details())))
            assert ends == [(grpc.StatusCode.INTERNAL, "the agent has a fault; see its log")] * 3
            for method in ("StreamSecrets", "DeltaSecrets", "FetchSecrets"):
                (fault,) = events.named("fault", level="error", part=f"SDS {method}")
                assert any("BrokenStore.secret" in frame for frame in fault["frames"]), "the log says where it is"
            assert "late" in await peer.fetch("late")


@pytest.mark.parametrize("method", ["StreamSecrets", "FetchSecrets"])
async def test_foreign_type_is_refused(tmp_path: Path, method: str) -> None:
    async with running(tmp_path) as (_, peer, _events):
        request = DiscoveryRequest(resource_names=["default"], type_url="type.googleapis.com/x.Cluster")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await peer.call(method, bytes(request))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_message_over_the_limit_is_refused_and_the_server_goes_on(tmp_path: Path) -> None:
    async with running(tmp_path, Limits(request_bytes=100_000)) as (_, peer, _events):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await peer.call("StreamSecrets", b"\x1a\xff\xff\x7f" + b"x" * 200_000)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "default" in await peer.fetch("default")


async def test_streams_over_the_limit_are_refused_and_the_others_live(tmp_path: Path) -> None:
    async with running(tmp_path, Limits(streams=2)) as (store, peer, _events):
        streams: list[SotwStream] = []

        async def fill() -> None:
            for _ in range(5):
                stream = await peer.stream().ask("default")
                await stream.read()
                streams.append(stream)

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await fill()
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert 1 <= len(streams) <= 2, "the server's own probe may just be leaving"
        store.publish({"default": certificate(b"chain 2")})
        for stream in streams:
            await stream.ack("default")
            assert chain_of((await stream.read())["default"]) == b"chain 2"


async def test_names_over_the_limit_end_the_stream(tmp_path: Path) -> None:
    async with running(tmp_path, Limits(names=3)) as (_, peer, _events):
        code, message = await (await peer.stream().ask("a", "b", "c", "d")).end()
        assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "3" in message


async def test_names_over_the_limit_end_a_delta_stream_and_a_fetch_too(tmp_path: Path) -> None:
    async with running(tmp_path, Limits(names=3)) as (_, peer, _events):
        code, message = await (await peer.delta().subscribe("a", "b", "c", "d")).end()
        assert (code, message) == (grpc.StatusCode.RESOURCE_EXHAUSTED, "a stream may ask for at most 3 names")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await peer.fetch("a", "b", "c", "d")
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_no_two_streams_share_a_nonce_and_no_two_servers_do(tmp_path: Path) -> None:
    """A nonce that an Envoy brings from an old stream must match none on the new one."""
    nonces = []
    for directory in (tmp_path / "a", tmp_path / "b"):
        async with running(directory) as (_, peer, _events):
            for stream in (peer.stream(), peer.stream()):
                await stream.ask("default")
                await stream.read()
                nonces.append(stream.nonce)
            delta = await peer.delta().subscribe("default")
            await delta.read()
            nonces.append(delta.nonce)
    assert len(set(nonces)) == 6


async def test_each_of_many_streams_gets_its_status_at_shutdown(tmp_path: Path) -> None:
    async with connected(tmp_path / "sds.sock") as peer:
        streams = []
        async with running(tmp_path) as (_, _peer, _events):
            for _ in range(100):
                streams.append(await peer.stream().ask("default"))
                await streams[-1].read()
        assert {(await stream.end())[0] for stream in streams} == {grpc.StatusCode.OK}


async def test_streams_that_are_opened_anew_while_the_server_stops_are_not_cancelled(tmp_path: Path) -> None:
    """An Envoy opens a stream anew when it ends, and warns of one that is cancelled."""
    last: list[grpc.StatusCode] = []

    async def come_back(peer: Peer) -> None:
        code: grpc.StatusCode = grpc.StatusCode.OK
        while code is grpc.StatusCode.OK:
            stream = peer.stream()
            with suppress(grpc.aio.AioRpcError):
                await stream.ask("default")
                await stream.read()
            code, _ = await stream.end()
        last.append(code)

    async with (
        connected(tmp_path / "sds.sock") as peer,
        anyio.create_task_group() as tasks,
        running(tmp_path) as (_, _peer, events),
    ):
        for _ in range(20):
            tasks.start_soon(come_back, peer)
        await events.wait("sent", count=20)
    assert last == [grpc.StatusCode.UNAVAILABLE] * 20, "the socket is gone"


async def test_stream_that_comes_while_the_server_ends_is_ended_too(tmp_path: Path) -> None:
    store, socket = SecretStore(("late",)), tmp_path / "sds.sock"
    service = SecretDiscoveryService(store)
    async with serving(service, SocketFile(socket), Limits()), connected(socket) as peer:
        service.drain()
        stream = await peer.stream().ask("late")
        assert (await stream.end())[0] is grpc.StatusCode.OK


async def test_fetch_that_waits_gets_a_status_at_shutdown(tmp_path: Path) -> None:
    async with connected(tmp_path / "sds.sock") as peer, anyio.create_task_group() as tasks:
        codes: list[grpc.StatusCode] = []

        async def fetch() -> None:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await peer.fetch("late")
            assert caught.value.details() == "the secret is not issued yet; ask again"
            codes.append(caught.value.code())

        async with running(tmp_path) as (store, _peer, _events):
            tasks.start_soon(fetch)
            await awaited(store, "late")
    assert codes == [grpc.StatusCode.UNAVAILABLE]


async def test_refused_fetch_is_logged_with_its_client(tmp_path: Path) -> None:
    """The agent's log has each peer that asked for a name that is not served, by whatever method."""
    async with running(tmp_path) as (_, peer, events):
        for data in (b"\xff\xff\xff", bytes(DiscoveryRequest(resource_names=["nobody"], node=Node(id="envoy-a")))):
            with pytest.raises(grpc.aio.AioRpcError):
                await peer.call("FetchSecrets", data)
        garbage, unknown = events.named("refused")
        assert garbage["cause"] == "the message is not a DiscoveryRequest"
        assert (unknown["cause"], unknown["names"], unknown["node"]) == ("not found", ["nobody"], "envoy-a")


async def test_one_of_two_fetches_alike_that_leaves_does_not_take_the_others_turn(tmp_path: Path) -> None:
    """Issuance prefers the names that clients wait for."""
    async with running(tmp_path) as (store, peer, events), anyio.create_task_group() as tasks:
        for timeout in (1, 10):
            tasks.start_soon(_fetch_late, peer, timeout)
        await events.wait("refused", cause="the secret is not issued yet; ask again")
        assert store.awaited(["late"])
        store.publish({"late": certificate(b"at last")})
        await events.wait("sent", names=["late"])


async def _fetch_late(peer: Peer, seconds: float) -> None:
    with suppress(grpc.aio.AioRpcError):
        await peer.fetch("late", seconds=seconds)


async def awaited(store: SecretStore, name: str) -> None:
    """Wait until a client waits for the name."""
    with anyio.fail_after(10):
        while not store.awaited([name]):
            await anyio.lowlevel.checkpoint()


async def test_fetch_gives_what_is_there(tmp_path: Path) -> None:
    async with running(tmp_path) as (_, peer, _events):
        assert set(await peer.fetch("default", "ROOTCA", "nobody")) == {"default", "ROOTCA"}


async def test_fetch_of_an_unknown_name(tmp_path: Path) -> None:
    async with running(tmp_path) as (_, peer, _events):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await peer.fetch("nobody")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_fetch_without_names(tmp_path: Path) -> None:
    async with running(tmp_path) as (_, peer, _events):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await peer.fetch()
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_fetch_waits_for_a_secret_that_is_on_its_way(tmp_path: Path) -> None:
    async with running(tmp_path) as (store, peer, _events), anyio.create_task_group() as tasks:
        got: list[bytes] = []

        async def fetch() -> None:
            got.append(chain_of((await peer.fetch("late"))["late"]))

        tasks.start_soon(fetch)
        await awaited(store, "late")
        store.publish({"late": certificate(b"at last")})
    assert got == [b"at last"]


async def test_fetch_of_a_secret_that_never_comes_ends_with_unavailable(tmp_path: Path) -> None:
    async with running(tmp_path, fetch_timeout=0.05) as (store, peer, events):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await peer.fetch("late", seconds=60)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert caught.value.details() == "the secret is not issued yet; ask again"
        assert events.named("refused")[0]["names"] == ["late"]
        assert not store.awaited(["late"])


async def test_push_to_which_a_client_does_not_reply_is_logged_though_nothing_more_happens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pushes, "LONGEST", 0.01)
    async with running(tmp_path, check_every=0.05) as (store, peer, events):
        stream = await peer.stream().ask("default")
        await stream.read()
        await stream.ack("default")
        await events.wait("acked")
        store.publish({"default": certificate(b"chain 2")})
        await stream.read()
        pushed = await events.wait("pushed")
        assert (pushed["streams"], pushed["acked"], pushed["waiting"]) == (1, 0, 1)


async def test_streams_end_with_ok_at_shutdown(tmp_path: Path) -> None:
    """Envoy logs a stream that ends with OK at debug; anything else is a warning for every Envoy at every restart."""
    async with connected(tmp_path / "sds.sock") as peer:
        async with running(tmp_path) as (_, _peer, _events):
            stream = await peer.stream().ask("default")
            await stream.read()
            late = await peer.stream().ask("late")
            await _events.wait("subscribed", names=["late"])
        assert (await stream.end())[0] is grpc.StatusCode.OK
        assert (await late.end())[0] is grpc.StatusCode.OK
    assert not (tmp_path / "sds.sock").exists()


async def test_client_that_asks_and_leaves_again_and_again_leaves_nothing_behind(tmp_path: Path) -> None:
    async with running(tmp_path) as (store, peer, events):
        before = dict(store._watchers)
        for _ in range(50):
            stream = await peer.stream().ask("default", "late")
            await stream.read()
            stream.leave()
        await events.wait("left", count=51)  # with the server's own probe
        assert not store.awaited(["late"])
        assert (store._watchers, store.acknowledgements._versions) == (before, {})


async def test_streams_end_with_ok_when_the_agent_is_stopped_before_it_has_probed_itself(tmp_path: Path) -> None:
    """The socket is there already, and an Envoy that waited for it should not count an error."""
    socket = tmp_path / "sds.sock"
    store = SecretStore()
    store.publish({"ROOTCA": BundleSecret(b"roots")})

    listening = asyncio.Event()

    async def wait() -> None:
        listening.set()
        await asyncio.Event().wait()

    async def serve() -> None:
        async with serving(SecretDiscoveryService(store), SocketFile(socket), Limits(), before_probe=wait):
            await wait()

    agent = asyncio.create_task(serve())
    await asyncio.wait_for(listening.wait(), 10)
    async with connected(socket) as peer:
        stream = await peer.stream().ask("ROOTCA")
        await stream.read()
        agent.cancel()
        assert (await stream.end())[0] is grpc.StatusCode.OK
    await asyncio.wait([agent], timeout=10)
    assert agent.cancelled()
