"""What an operator sees of the streams that are open: which Envoy has which version, and why it has no newer one."""

import asyncio
import os
import tracemalloc
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import timedelta
from pathlib import Path

import anyio
import grpc
import msgspec
import pytest
from envoy_data_plane.envoy.config.core.v3 import BuildVersion, Node
from envoy_data_plane.envoy.service.discovery.v3 import DeltaDiscoveryRequest, DiscoveryRequest
from envoy_data_plane.envoy.type.v3 import SemanticVersion
from fakes.clocks import HandClock
from fakes.events import recorded
from fakes.loops import anyio_backend, loop_of_the_module, one_loop  # noqa: F401 - fixtures
from fakes.peers import Peer, SotwStream, chain_of, connected

from sds_agent.sds.catalog import MOST_FORMER
from sds_agent.sds.endpoint import SocketFile
from sds_agent.sds.journal import LINES
from sds_agent.sds.refusals import MOST_SENT
from sds_agent.sds.server import Limits, serving
from sds_agent.sds.service import CROWD, SecretDiscoveryService
from sds_agent.sds.status import Nack, NameStatus, StreamStatus
from sds_agent.secrets.model import BundleSecret, CertificateSecret
from sds_agent.secrets.readiness import acknowledged
from sds_agent.secrets.store import SecretStore

KEY = b"-----BEGIN PRIVATE KEY-----PLANTED"
ME = f"pid {os.getpid()} (uid {os.getuid()})"


def certificate(content: bytes) -> CertificateSecret:
    return CertificateSecret(content, KEY, HandClock().now() + timedelta(days=1))


ONE, TWO, THREE = (certificate(content) for content in (b"chain 1", b"chain 2", b"chain 3"))


def of(node: str) -> Callable[[StreamStatus], bool]:
    """Whether a stream is that Envoy's."""
    return lambda stream: stream.node == node


class Bench:
    """A store that is served, a client, and the clock of the agent."""

    def __init__(self, store: SecretStore, service: SecretDiscoveryService, peer: Peer, clock: HandClock) -> None:
        self.store = store
        self.service = service
        self.peer = peer
        self.clock = clock

    async def seen(self, *wanted: Callable[[StreamStatus], bool]) -> list[StreamStatus]:
        """The streams that are open, once there is one for each of these, in this order, and no other."""
        with anyio.fail_after(10):
            while not self._fits(found := self.service.streams, wanted):
                await anyio.lowlevel.checkpoint()
        return list(found)

    def _fits(self, found: tuple[StreamStatus, ...], wanted: tuple[Callable[[StreamStatus], bool], ...]) -> bool:
        return len(found) == len(wanted) and all(fits(each) for fits, each in zip(wanted, found, strict=True))

    async def names(self, *wanted: NameStatus) -> StreamStatus:
        """The only stream, once its names are like this."""
        return (await self.seen(lambda stream: stream.names == wanted))[0]

    async def served(self) -> SotwStream:
        """The only stream, once its client has acknowledged the first certificate."""
        stream = await self.peer.stream().ask("default")
        await stream.read()
        await stream.ack("default")
        await self.names(NameStatus("default", ONE.version, ONE.version))
        return stream


@asynccontextmanager
async def bench(directory: Path, *, most_streams: int = 10_000) -> AsyncIterator[Bench]:
    """A certificate, a bundle and a name without a secret, served."""
    clock = HandClock()
    store = SecretStore(("default", "ROOTCA", "late"))
    store.publish({"default": ONE, "ROOTCA": BundleSecret(b"roots")})
    service = SecretDiscoveryService(store, clock, most_streams=most_streams)
    socket = directory / "sds.sock"
    async with serving(service, SocketFile(socket), Limits()), connected(socket) as peer:
        made = Bench(store, service, peer, clock)
        await made.seen()  # the server's own probe has left
        yield made


async def test_a_stream_says_whose_it_is_what_it_has_and_since_when(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        connected_at = made.clock.now()
        stream = await made.peer.stream().ask("default", "late", node="envoy-a")
        await stream.read()
        waiting, sent = NameStatus("late", waits=True), NameStatus("default", sent=ONE.version)
        status = await made.names(sent, waiting)
        assert (status.method, status.node, status.peer) == ("StreamSecrets", "envoy-a", ME)
        assert (status.connected_at, status.responded_at, status.ack_ms) == (connected_at, connected_at, None)
        await stream.ack("default", "late")
        status = await made.names(NameStatus("default", ONE.version, ONE.version), waiting)
        assert status.ack_ms is not None
        assert status.ack_ms > 0
        made.clock.elapse(timedelta(hours=1))
        made.store.publish({"default": TWO})
        await stream.read()
        status = await made.names(NameStatus("default", TWO.version, ONE.version), waiting)
        assert status.connected_at == connected_at
        assert status.responded_at == connected_at + timedelta(hours=1)


async def test_an_envoy_that_refuses_a_secret_is_seen_with_its_reason_and_with_what_it_goes_on_with(
    tmp_path: Path,
) -> None:
    async with bench(tmp_path) as made:
        stream = await made.served()
        made.store.publish({"default": TWO})
        await stream.read()
        await stream.ack("default", error="Failed to load certificate\nchain")
        refused = Nack(TWO.version, "Failed to load certificate\\nchain")
        assert chain_of((await stream.read())["default"]) == ONE.chain_pem
        await made.names(NameStatus("default", ONE.version, ONE.version, refused))
        await stream.ack("default")
        await made.names(NameStatus("default", ONE.version, ONE.version, refused))
        made.store.publish({"default": THREE})
        await stream.read()
        await stream.ack("default")
        await made.names(NameStatus("default", THREE.version, THREE.version))


async def test_what_all_envoys_have_taken_leaves_no_former_key_in_memory(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        stream = await made.served()
        made.store.publish({"default": TWO})
        await stream.read()
        made.service.release_former()
        assert made.service._catalog.former("default", ONE.version), "the Envoy may refuse the new one"
        await stream.ack("default")
        await made.names(NameStatus("default", TWO.version, TWO.version))
        made.service.release_former()
        assert made.service._catalog.former("default", ONE.version) is None


async def test_a_client_that_refuses_everything_is_not_sent_the_same_for_ever(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        stream = await made.served()
        made.store.publish({"default": TWO})
        for expected in (TWO, *MOST_SENT * [ONE]):
            assert chain_of((await stream.read())["default"]).strip() == expected.chain_pem
            await stream.ack("default", error="no")
        delta = await made.peer.delta().subscribe("default")
        assert (await delta.read()).resources[0].version == TWO.version, "another client is sent the newest"
        await delta.ack()
        made.store.publish({"default": THREE})
        assert chain_of((await stream.read())["default"]) == THREE.chain_pem, "nothing else came between"


async def test_a_delta_client_that_refuses_a_secret_is_sent_the_one_before_again(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        stream = await made.peer.delta().subscribe("default")
        await stream.read()
        await stream.ack()
        await made.names(NameStatus("default", ONE.version, ONE.version))
        made.store.publish({"default": TWO})
        await stream.read()
        await stream.ack(error="no")
        (again,) = (await stream.read()).resources
        assert again.version == ONE.version
        await stream.ack()
        await made.names(NameStatus("default", ONE.version, ONE.version, Nack(TWO.version, "no")))


async def test_a_refused_secret_that_is_withheld_is_replaced_by_nothing(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        stream = await made.served()
        made.store.publish({"default": TWO})
        await stream.read()
        made.store.withhold(["default"])
        await stream.ack("default", error="no")
        await made.names(NameStatus("default", TWO.version, ONE.version, Nack(TWO.version, "no"), waits=True))
        made.store.publish({"default": THREE})
        assert chain_of((await stream.read())["default"]) == THREE.chain_pem


async def test_what_an_envoy_uses_is_kept_through_many_changes(tmp_path: Path) -> None:
    """In a few seconds; its ACK may come only after them."""
    async with bench(tmp_path) as made:
        stream = await made.served()
        made.store.publish({"default": TWO})
        await stream.read()
        for number in range(2 * MOST_FORMER):
            made.store.publish({"default": certificate(b"another chain %d" % number)})
        made.service.release_former()
        await stream.ack("default")
        await stream.read()
        await stream.ack("default", error="no")
        assert chain_of((await stream.read())["default"]) == TWO.chain_pem


async def test_the_key_of_a_former_owner_of_a_name_is_never_sent_again(tmp_path: Path) -> None:
    """A reload may give a name to another SPIFFE ID while its Envoy is being taken back."""
    async with bench(tmp_path) as made:
        stream = await made.served()
        made.store.publish({"default": TWO})
        await stream.read()
        await stream.ack("default", error="no")
        assert chain_of((await stream.read())["default"]) == ONE.chain_pem
        made.store.replace_names(made.store.names, [], {"default": THREE})
        await stream.ack("default")
        assert chain_of((await stream.read())["default"]) == THREE.chain_pem
        await stream.ack("default", error="no")
        await made.names(NameStatus("default", THREE.version, ONE.version, Nack(THREE.version, "no")))
        assert made.service._catalog._former == {}


async def test_what_is_refused_again_and_again_is_seen_as_refused(tmp_path: Path) -> None:
    """Also where what the Envoy had is refused in the end, for the sake of another secret."""
    async with bench(tmp_path) as made:
        stream = await made.served()
        made.store.publish({"default": TWO})
        for number in range(1 + MOST_SENT):
            await stream.read()
            await stream.ack("default", error="no" if number else "for this reason")
        refused = Nack(TWO.version, "for this reason")
        await made.names(NameStatus("default", ONE.version, ONE.version, refused))


async def test_a_name_that_is_refused_after_it_was_given_up_holds_up_no_other(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        with recorded() as events:
            gone = await made.peer.stream().ask("ROOTCA", "late")
            await gone.read()
            await gone.ask("late")
            await gone.ack("late", error="no")
            await events.wait("nacked")
        other = await made.peer.stream().ask("default")
        await other.read()
        await other.ack("default")
        made.store.publish({"default": TWO})
        await other.read()
        await other.ack("default", error="no")
        assert chain_of((await other.read())["default"]) == ONE.chain_pem
        await other.ack("default")
        assert chain_of((await other.read())["default"]).strip() == TWO.chain_pem, "perhaps it was for another's sake"
        await other.ack("default", error="no")
        assert chain_of((await other.read())["default"]).strip() == ONE.chain_pem


async def test_a_client_that_refuses_without_end_does_not_fill_the_log(tmp_path: Path) -> None:
    """Two streams whose secrets are refused for each other's sake, over and over: no secret changes."""
    most_streams, rounds = 3, 10
    async with bench(tmp_path, most_streams=most_streams) as made:
        with recorded() as events:
            one = await made.peer.delta().subscribe("default")
            await one.read()
            await one.ack(error="no")
            other = await made.peer.delta().subscribe("ROOTCA")
            await other.read()
            await other.ack()
            await made.seen(lambda _: True, lambda each: each.names[0].acked is not None)
            made.store.publish({"ROOTCA": BundleSecret(b"other roots")})
            await other.read()
            await other.ack()
            for _ in range(rounds):
                await one.read()
                await other.subscribe("ROOTCA")
                await other.read()
                await other.ack(error="no")
                await made.seen(lambda _: True, lambda each: each.names[0].nacked is not None)
                await one.ack()
                await other.read()
                await one.subscribe("default")
                await one.read()
                await one.ack(error="no")
                await made.seen(lambda each: each.names[0].nacked is not None, lambda _: True)
                await other.ack()
            await one.read()
            assert len(events.named("sent_anew")) <= LINES * most_streams < 2 * rounds
            assert len(events.named("nacked")) <= LINES * most_streams


async def test_a_delta_stream_is_seen_the_same_way(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        stream = await made.peer.delta().subscribe("default", "nobody", node="envoy-d")
        await stream.read()
        await stream.ack()
        status = await made.names(NameStatus("default", ONE.version, ONE.version), NameStatus("nobody", "", ""))
        assert (status.method, status.node) == ("DeltaSecrets", "envoy-d")


@pytest.mark.parametrize("end", ["ack", "leave"])
async def test_a_new_bundle_is_acknowledged_when_every_subscriber_has_it_or_has_left(tmp_path: Path, end: str) -> None:
    """A leaf below a new root goes out when every Envoy has loaded that root, or has left."""
    async with bench(tmp_path) as made, anyio.create_task_group() as tasks:
        sotw = await made.peer.stream().ask("ROOTCA", "default")
        await sotw.read()
        await sotw.ack("ROOTCA", "default")
        delta = await made.peer.delta().subscribe("ROOTCA")
        await delta.read()
        await delta.ack()
        await made.peer.stream().ask("default")
        with anyio.fail_after(10):
            await acknowledged(made.store, ["ROOTCA"])
        made.store.publish({"ROOTCA": BundleSecret(b"roots, a new one among them")})
        done = anyio.Event()

        async def wait() -> None:
            await acknowledged(made.store, ["ROOTCA"])
            done.set()

        tasks.start_soon(wait)
        await sotw.read()
        await sotw.ack("ROOTCA", "default")
        await delta.read()
        await anyio.wait_all_tasks_blocked()
        assert not done.is_set(), "one subscriber has not replied"
        if end == "ack":
            await delta.ack()
        else:
            delta.leave()
        with anyio.fail_after(10):
            await done.wait()


async def test_the_cluster_of_an_envoy_is_seen_too(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        stream = made.peer.stream()
        await stream.call.write(bytes(DiscoveryRequest(node=Node(id="envoy-a", cluster="edge"))))
        await made.seen(lambda each: (each.node, each.cluster, each.names) == ("envoy-a", "edge", ()))


async def test_the_version_of_an_envoy_is_seen_and_can_be_printed(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        for number, node in enumerate(
            (
                Node(id="a", user_agent_build_version=BuildVersion(version=SemanticVersion(1, 40, 3))),
                Node(id="b", user_agent_name="gateway", user_agent_version="2\x1b[31m" + "x" * 5000),
            )
        ):
            call = (made.peer.stream() if number else made.peer.delta()).call
            message = DiscoveryRequest(node=node) if number else DeltaDiscoveryRequest(node=node)
            await call.write(bytes(message))
        envoy, other = sorted(await made.seen(*[lambda each: each.node != ""] * 2), key=lambda each: each.node)
        assert envoy.version == "1.40.3"
        assert other.version.startswith("gateway 2\\u001b[31mx")
        assert len(other.version) < 700


async def test_a_watcher_sees_each_change_of_a_stream(tmp_path: Path) -> None:
    """The page and `status --watch` follow it: what it misses stays wrong on a screen until something else happens."""
    async with bench(tmp_path) as made:
        seen = list[tuple[StreamStatus, ...]]()

        async def shown(*names: NameStatus) -> None:
            """Wait until the watcher, when it was called last, saw one stream, with these names."""
            with anyio.fail_after(10):
                while [each.names for each in (seen or [()])[-1]] != [names]:
                    await anyio.lowlevel.checkpoint()

        with made.service.watching(lambda: seen.append(made.service.streams)):
            stream = await made.peer.stream().ask("late", node="envoy-a")
            await shown(NameStatus("late", waits=True))
            assert seen[-1][0].node == "envoy-a"
            await stream.ask("late", "default")
            await shown(NameStatus("late", waits=True), NameStatus("default", ONE.version))
            await stream.read()
            await stream.ack("late", "default", error="no")
            await shown(
                NameStatus("late", waits=True), NameStatus("default", ONE.version, None, Nack(ONE.version, "no"))
            )
            made.store.publish({"default": TWO})
            await stream.read()
            await stream.ack("default")
            await shown(NameStatus("default", TWO.version, TWO.version))
            stream.leave()
            with anyio.fail_after(10):
                while seen[-1]:
                    await anyio.lowlevel.checkpoint()
        calls = len(seen)
        await (await made.peer.stream().ask("default")).read()
        assert len(seen) == calls, "it is over"


async def test_a_watcher_sees_for_what_a_fetch_waits(tmp_path: Path) -> None:
    async with bench(tmp_path) as made, anyio.create_task_group() as tasks:
        seen = list[tuple[StreamStatus, ...]]()
        with made.service.watching(lambda: seen.append(made.service.streams)), anyio.fail_after(10):
            tasks.start_soon(made.peer.fetch, "late")
            while not seen or [each.names for each in seen[-1]] != [(NameStatus("late", waits=True),)]:
                await anyio.lowlevel.checkpoint()
            made.store.publish({"late": certificate(b"at last")})
            while seen[-1]:
                await anyio.lowlevel.checkpoint()


async def test_a_changed_secret_is_one_line_for_the_streams_of_both_variants(tmp_path: Path) -> None:
    with recorded() as events:
        async with bench(tmp_path) as made:
            sotw = await made.peer.stream().ask("default")
            delta = await made.peer.delta().subscribe("default")
            for stream in (sotw, delta):
                await stream.read()
            await sotw.ack("default")
            await delta.ack()
            await events.wait("acked", count=2)
            assert events.named("pushed") == [], "answers to subscriptions are no push"
            made.store.publish({"default": TWO})
            for stream in (sotw, delta):
                await stream.read()
            await sotw.ack("default")
            await delta.ack(error="no")
            line = await events.wait("pushed")
        assert {key: line[key] for key in ("names", "version", "streams", "acked", "nacked")} == {
            "names": ["default"],
            "version": TWO.version,
            "streams": 2,
            "acked": 1,
            "nacked": 1,
        }
        assert "waiting" not in line
        assert len(events.named("pushed")) == 1
        assert dict(made.service.counts.pushes.counts) == {("default",): 2}


@pytest.mark.parametrize("end", ["back", "withheld"])
async def test_a_change_that_never_goes_out_is_no_line(tmp_path: Path, end: str) -> None:
    """It would be a line that says of healthy Envoys that they do not reply."""
    with recorded() as events:
        async with bench(tmp_path) as made:
            stream = await made.peer.stream().ask("default")
            await stream.read()
            await made.names(NameStatus("default", ONE.version))
            made.store.publish({"default": TWO})
            if end == "back":
                made.store.publish({"default": ONE})
            else:
                made.store.withhold(["default"])
            await stream.ack("default")
            await events.wait("acked")
            assert made.service._journal.pushes.under_way == 0
        assert events.named("pushed") == []


async def test_a_name_of_the_configuration_is_seen_as_it_is_there_and_one_made_up_as_the_log_has_it(
    tmp_path: Path,
) -> None:
    """By its name a view finds what is served."""
    name, pending, made_up = "über", "später", "übel"
    store = SecretStore((name, pending))
    store.publish({name: ONE})
    service, socket = SecretDiscoveryService(store), tmp_path / "sds.sock"
    async with serving(service, SocketFile(socket), Limits()), connected(socket) as peer:
        stream = await peer.stream().ask(name, made_up)
        await stream.read()
        waiting = asyncio.create_task(peer.fetch(pending))
        wanted = [(NameStatus(name, ONE.version), NameStatus("\\u00fcbel")), (NameStatus(pending, waits=True),)]
        with anyio.fail_after(10):
            while [each.names for each in service.streams] != wanted:
                await anyio.lowlevel.checkpoint()
        store.publish({pending: TWO})
        await waiting


async def test_a_fetch_is_seen_while_it_waits_and_no_longer(tmp_path: Path) -> None:
    async with bench(tmp_path) as made, anyio.create_task_group() as tasks:
        tasks.start_soon(made.peer.fetch, "late")
        (status,) = await made.seen(lambda each: each.names == (NameStatus("late", waits=True),))
        assert (status.method, status.peer) == ("FetchSecrets", ME)
        made.store.publish({"late": certificate(b"at last")})
        await made.seen()


async def test_streams_are_seen_in_the_order_in_which_they_came_until_they_end(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        streams = []
        for node in ("a", "b", "c"):
            streams.append(await made.peer.stream().ask("default", node=node))
            await streams[-1].read()
        found = await made.seen(
            lambda each: each.node == "a", lambda each: each.node == "b", lambda each: each.node == "c"
        )
        assert [each.number for each in found] == sorted({each.number for each in found})
        streams[1].leave()
        await made.seen(of("a"), of("c"))


async def test_a_stream_that_is_refused_for_want_of_room_is_not_among_those_that_are_open(tmp_path: Path) -> None:
    async with bench(tmp_path, most_streams=1) as made:
        first = await made.peer.stream().ask("default", node="first")
        await first.read()
        second = await made.peer.stream().ask("default", node="second")
        assert (await second.end())[0] is grpc.StatusCode.RESOURCE_EXHAUSTED
        await made.seen(of("first"))


async def test_a_fetch_for_which_there_is_no_room_says_so_and_not_that_the_secret_is_missing(tmp_path: Path) -> None:
    async with bench(tmp_path, most_streams=1) as made:
        first = await made.peer.stream().ask("default", node="first")
        await first.read()
        with pytest.raises(grpc.aio.AioRpcError, match=r"more streams than sds\.limits\.streams allows") as caught:
            await made.peer.fetch("late")
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        await made.seen(of("first"))


async def test_no_status_has_a_key(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        for stream in (await made.peer.stream().ask("default"), await made.peer.delta().subscribe("default")):
            await stream.read()
        found = await made.seen(lambda each: bool(each.names), lambda each: bool(each.names))
        for text in (repr(found), str(found), msgspec.json.encode(found).decode()):
            assert ONE.version in text
            assert "PLANTED" not in text


async def test_a_stream_that_waits_keeps_nothing_of_the_last_message(tmp_path: Path) -> None:
    """An Envoy's has 61 KB, each of its acknowledgements too: a node with a thousand streams would hold 60 MB of what
    nobody reads again.
    """
    request = bytes(DiscoveryRequest(node=Node(client_features=["x" * 100_000]), resource_names=["default"]))
    number = 20
    async with bench(tmp_path) as here:
        streams = [here.peer.stream() for _ in range(number)]
        tracemalloc.start()
        try:
            for stream in streams:
                await stream.call.write(request)
                await stream.read()
            kept, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert kept < number * 50_000


async def test_memory_is_given_back_when_a_crowd_of_envoys_has_come(tmp_path: Path) -> None:
    """An agent that stayed as large as at its busiest would take a node's memory for good."""
    with recorded() as events:
        async with bench(tmp_path) as here:
            streams = [await here.peer.stream().ask("default") for _ in range(CROWD)]
            await events.wait("memory_given_back")
            assert not here.service.crowd_moved.is_set()
            for stream in streams:
                stream.leave()
            await events.wait("memory_given_back", count=2)


async def test_a_stream_that_ended_is_remembered_until_its_envoy_comes_back(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        assert not made.service.departed
        stream = await made.peer.stream().ask("default", node="envoy-a")
        await stream.read()
        connected_at = made.clock.now()
        made.clock.elapse(timedelta(hours=1))
        stream.leave()
        await made.seen()
        (left,) = made.service.departed
        assert (left.node, left.names, left.peer, left.cause) == ("envoy-a", ("default",), ME, "")
        assert (left.connected_at, left.left_at) == (connected_at, made.clock.now())
        stream = await made.peer.stream().ask("default", node="envoy-a")
        await stream.read()
        await made.seen(of("envoy-a"))
        assert made.service.departed == ()


async def test_a_stream_that_the_agent_ended_is_remembered_with_the_reason(tmp_path: Path) -> None:
    async with bench(tmp_path) as made:
        stream = await made.peer.stream().ask("nope", node="envoy-a")
        await stream.end()
        await made.seen()
        (left,) = made.service.departed
        assert (left.node, left.names) == ("envoy-a", ("nope",))
        assert left.cause.startswith("no secret named 'nope'")
