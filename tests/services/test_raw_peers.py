"""Peers that break the protocol: nothing they do harms another peer."""

import os
import struct
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import anyio
import grpc
import pytest
from anyio.streams.buffered import BufferedByteReceiveStream
from envoy_data_plane.envoy.config.core.v3 import Node
from envoy_data_plane.envoy.service.discovery.v3 import DeltaDiscoveryRequest, DiscoveryRequest
from fakes import flood
from fakes.events import Events, recorded
from fakes.loops import anyio_backend, loop_of_the_module, one_loop  # noqa: F401 - fixtures
from fakes.peers import SERVICE, chain_of, connected
from fakes.raw_http2 import (
    CANCEL,
    CONTINUATION,
    DATA,
    END_HEADERS,
    END_STREAM,
    HEADERS,
    PREFACE,
    RST_STREAM,
    SETTINGS,
    RawPeer,
    frame,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from sds_agent.sds.endpoint import SocketFile
from sds_agent.sds.server import STREAMS_PER_CONNECTION, Limits, serving
from sds_agent.sds.service import SecretDiscoveryService
from sds_agent.sds.stream import FULL
from sds_agent.secrets.model import BundleSecret, CertificateSecret
from sds_agent.secrets.store import SecretStore

MAX_CONCURRENT_STREAMS = 3
"""The setting's number (RFC 9113 section 6.5.2)."""
LATER = datetime(2036, 1, 1, tzinfo=UTC)
NAMES = [f"w{number}" for number in range(50)]
ALL = bytes(DeltaDiscoveryRequest(resource_names_subscribe=NAMES))


def certificate(content: bytes) -> CertificateSecret:
    return CertificateSecret(content * 3000, b"key", LATER)


@asynccontextmanager
async def running(directory: Path, limits: Limits | None = None) -> AsyncIterator[tuple[SecretStore, Path, Events]]:
    """Fifty certificates of a usual size, a bundle, and a name without a secret."""
    store, socket = SecretStore([*NAMES, "default", "late", "ROOTCA"]), directory / "sds.sock"
    store.publish({"default": certificate(b"1"), "ROOTCA": BundleSecret(b"roots")})
    store.publish(dict.fromkeys(NAMES, certificate(b"w")))
    with recorded() as events:
        limits = limits or Limits()
        service = SecretDiscoveryService(store, most_streams=limits.streams)
        async with serving(service, SocketFile(socket), limits):
            yield store, socket, events


async def test_peer_that_never_reads_delays_no_other(tmp_path: Path) -> None:
    async with running(tmp_path) as (store, socket, events), connected(socket) as other:
        peer = await RawPeer.connect(socket)
        await peer.open(1, "DeltaSecrets")
        for _ in range(20):
            await peer.say(1, ALL)
        await events.wait("subscribed")
        stream = await other.stream().ask("default")
        await stream.read()
        await stream.ack("default")
        await events.wait("acked", names=["default"])
        pushed = len(events.named("sent"))
        for content in (b"2", b"3"):
            store.publish({name: certificate(content) for name in ["default", *NAMES]})
            assert chain_of((await stream.read())["default"]) == content * 3000
            await stream.ack("default")
            await events.wait("acked", names=["default"], count=2 if content == b"2" else 3)
        assert len(events.named("sent")) == pushed + 2, "no more answers are made for a peer that does not read"
        await peer.connection.aclose()


async def test_answers_to_fetch_that_nobody_reads_count_as_streams(tmp_path: Path) -> None:
    """gRPC stores each of them, for as long as its client likes."""
    store, socket = SecretStore(NAMES), tmp_path / "sds.sock"
    store.publish(dict.fromkeys(NAMES, certificate(b"w")))
    service = SecretDiscoveryService(store, most_streams=3)
    with recorded() as events:
        async with serving(service, SocketFile(socket), Limits(streams=3)):
            peer = await RawPeer.connect(socket)
            for number in range(3):
                await peer.open(2 * number + 1, "FetchSecrets")
                await peer.say(2 * number + 1, bytes(DiscoveryRequest(resource_names=NAMES)))
            await events.wait("sent", count=3)
            await peer.open(7, "FetchSecrets")
            refused = await events.wait("refused")
            assert refused["cause"] == FULL.detail
            assert service.open_streams == 3
            await peer.connection.aclose()
            with anyio.fail_after(10):
                while service.open_streams:
                    await anyio.lowlevel.checkpoint()


@pytest.mark.parametrize(
    "first",
    [
        b"",
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 500,
        PREFACE[:10],
        PREFACE,
        PREFACE + b"\xff" * 1000,
        PREFACE + frame(SETTINGS, 0, 0) + frame(HEADERS, END_HEADERS, 1, b"\xff" * 100),
        PREFACE + frame(SETTINGS, 0, 0) + frame(DATA, 0, 7, b"data on no stream"),
    ],
    ids=["nothing", "HTTP/1", "TLS", "half a preface", "no settings", "no frames", "bad headers", "no stream"],
)
async def test_peer_that_does_not_speak_http2_harms_no_other(tmp_path: Path, first: bytes) -> None:
    async with running(tmp_path) as (_, socket, events), connected(socket) as good:
        peers = [await RawPeer.connect(socket, first) for _ in range(5)]
        assert "default" in await good.fetch("default")
        assert events.named("fault") == []
        for peer in peers[1:]:
            await peer.connection.aclose()
        assert "default" in await good.fetch("default")
    await peers[0].connection.aclose()


async def test_frozen_peer_is_noticed_and_one_that_is_merely_silent_is_not(tmp_path: Path) -> None:
    """A frozen Envoy's streams would stay open for ever; a healthy one says nothing for hours."""
    async with running(tmp_path, Limits(silence=1)) as (store, socket, events), connected(socket) as good:
        stream = await good.stream().ask("default", node="healthy")
        await stream.read()
        frozen = await RawPeer.connect(socket)  # it answers no ping
        await frozen.open(1, "StreamSecrets")
        await frozen.say(1, bytes(DiscoveryRequest(resource_names=["default"], node=Node(id="frozen"))))
        await events.wait("left", node="frozen")
        assert events.named("left", node="healthy") == []
        await stream.ack("default")
        store.publish({"default": certificate(b"2")})
        assert chain_of((await stream.read())["default"]) == b"2" * 3000
        await frozen.connection.aclose()


async def test_frozen_connection_without_a_call_is_closed_too(tmp_path: Path) -> None:
    """Thousands of them would take every descriptor that there is."""
    async with running(tmp_path, Limits(silence=1)) as (_, socket, _events):
        frozen = await RawPeer.connect(socket)
        with anyio.fail_after(20), suppress(anyio.EndOfStream, anyio.BrokenResourceError):
            while True:
                await frozen.connection.receive()
        await frozen.connection.aclose()


@pytest.mark.parametrize("how", ["closes the connection", "resets the stream"])
async def test_peer_that_leaves_in_the_middle_of_a_write_is_no_fault_and_was_pushed_nothing(
    tmp_path: Path, how: str
) -> None:
    async with running(tmp_path) as (_, socket, events):
        peer = await RawPeer.connect(socket)
        await peer.open(1, "DeltaSecrets")
        await peer.say(1, ALL)  # the answer is larger than the peer makes room for
        stream = (await events.wait("subscribed"))["stream"]
        await peer.send(frame(RST_STREAM, 0, 1, CANCEL)) if how == "resets the stream" else None
        await peer.connection.aclose()
        await events.wait("left", stream=stream)
        assert events.named("fault") == events.named("sent") == []


@asynccontextmanager
async def flooded(socket: Path, how: str) -> AsyncIterator[None]:
    """Another process makes calls as fast as it can, as long as this lives."""
    program = str(Path(flood.__file__))
    async with await anyio.open_process([sys.executable, program, str(socket), how], stderr=None) as hostile:
        try:
            assert hostile.stdout is not None
            with anyio.fail_after(20):
                assert await hostile.stdout.receive() == b"flooding\n"
            yield
            assert hostile.returncode is None, "it goes on"
        finally:
            hostile.kill()


@pytest.mark.parametrize("how", ["reset", "leave"])
async def test_peer_that_makes_calls_without_end_keeps_no_new_envoy_out(tmp_path: Path, how: str) -> None:
    async with running(tmp_path) as (_, socket, _events), flooded(socket, how):
        for _ in range(20):
            async with connected(socket) as envoy:
                stream = await envoy.stream().ask("default")
                assert "default" in await stream.read()


async def test_process_that_holds_every_place_for_streams_keeps_no_new_envoy_out(tmp_path: Path) -> None:
    async with (
        running(tmp_path, Limits(streams=20)) as (_, socket, _events),
        flooded(socket, "leave"),
        connected(socket) as envoy,
    ):
        streams = [await envoy.stream().ask("default") for _ in range(5)]
        for stream in streams:
            assert "default" in await stream.read()
        for stream in streams:
            await stream.ack("ROOTCA")
            assert "ROOTCA" in await stream.read(), "it keeps them"


async def test_process_that_holds_every_connection_keeps_no_new_envoy_out(tmp_path: Path) -> None:
    async with (
        running(tmp_path, Limits(streams=20)) as (_, socket, events),
        flooded(socket, "connect"),
        connected(socket) as envoy,
    ):
        stream = await envoy.stream().ask("default")
        assert "default" in await stream.read()
        assert len(events.named("too_many_connections")) == 1, "logged once, however often it happens"
        await stream.ack("ROOTCA")
        assert "ROOTCA" in await stream.read()


async def test_connections_that_have_ended_leave_nothing_behind(tmp_path: Path) -> None:
    """Or else an agent whose health is asked for every few seconds would grow for ever."""
    store, socket = SecretStore(["default"]), tmp_path / "sds.sock"
    store.publish({"default": certificate(b"1")})
    service = SecretDiscoveryService(store)
    async with serving(service, SocketFile(socket), Limits()):
        async with connected(socket) as envoy:
            await envoy.fetch("default")
            holders = {each.holder for each in service.connections.values()}
            assert holders == {f"pid {os.getpid()} (uid {os.geteuid()})"}
        with anyio.fail_after(10):
            while service.connections:
                await anyio.lowlevel.checkpoint()


async def test_every_connection_learns_how_many_streams_it_may_open(tmp_path: Path) -> None:
    """Of those that open more, gRPC would cancel the calls of other Envoys."""
    async with running(tmp_path) as (_, socket, _events):
        peer = await RawPeer.connect(socket)
        stream = BufferedByteReceiveStream(peer.connection)
        with anyio.fail_after(10):
            prefix = await stream.receive_exactly(9)
            settings_sent = await stream.receive_exactly(int.from_bytes(prefix[:3], "big"))
        assert prefix[3] == SETTINGS
        assert (MAX_CONCURRENT_STREAMS, STREAMS_PER_CONNECTION) in struct.iter_unpack(">HI", settings_sent)
        await peer.connection.aclose()


HEADER_BLOCKS = {
    "small fields": [b"\x00\x01a\x01b" * 3000] * 400,
    "one field without end": [b"\x00\x01a\x7f\xff\xff\xff\x7f" + b"x" * 16_000] + [b"x" * 16_000] * 400,
    "fields of one byte": [b"\x82" * 16_000] * 400,
}


@pytest.mark.parametrize("frames", HEADER_BLOCKS.values(), ids=HEADER_BLOCKS.keys())
async def test_header_block_without_end_ends_its_connection_before_it_takes_memory(
    tmp_path: Path, frames: list[bytes]
) -> None:
    """gRPC takes 100 MB for each connection that sends one."""
    async with running(tmp_path) as (_, socket, events), connected(socket) as good:
        peer = await RawPeer.connect(socket)
        await peer.send(frame(HEADERS, 0, 1))
        with anyio.fail_after(10):
            for number, content in enumerate(frames):
                await peer.send(frame(CONTINUATION, 0, 1, content))
                if number % 10 == 0 and events.named("connection_ended"):
                    break
                await anyio.lowlevel.checkpoint()
        reported = await events.wait("connection_ended", level="warning")
        assert reported["holder"] == f"pid {os.getpid()} (uid {os.geteuid()})"
        assert "header block" in reported["cause"]
        assert "default" in await good.fetch("default")
        await peer.connection.aclose()


async def test_calls_in_one_burst_are_all_answered(tmp_path: Path) -> None:
    """A message that comes while another is worked on must not take its place."""
    async with running(tmp_path) as (_, socket, _events), connected(socket) as good:
        stream = good.delta()
        for name in NAMES:
            await stream.subscribe(name)
        got = [(await stream.read()).resources[0].name for _ in NAMES]
        assert got == NAMES


async def test_client_that_has_nothing_more_to_say_is_answered_first(tmp_path: Path) -> None:
    async with running(tmp_path) as (_, socket, _events), connected(socket) as good:
        stream = await good.stream().ask("default")
        await stream.call.done_writing()
        assert "default" in await stream.read()
        assert (await stream.end())[0] is grpc.StatusCode.OK


async def test_message_that_says_it_is_compressed_is_refused(tmp_path: Path) -> None:
    async with running(tmp_path) as (_, socket, events), connected(socket) as good:
        peer = await RawPeer.connect(socket)
        await peer.open(1, "StreamSecrets")
        await peer.say(1, b"\x1a\x07default", compressed=True)
        await events.wait("left", count=2)  # with the server's own probe
        assert events.named("sent") == events.named("fault") == []
        assert "default" in await good.fetch("default")
        await peer.connection.aclose()


async def test_request_that_is_larger_than_what_came_is_refused(tmp_path: Path) -> None:
    """Its names would be kept, and what came is what counts against the bound on what is stored."""
    async with running(tmp_path) as (_, socket, _events), grpc.aio.insecure_channel(f"unix:{socket}") as channel:
        ask: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(f"{SERVICE}/FetchSecrets")
        request = bytes(DiscoveryRequest(resource_names=["default"] * 100))
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await ask(request, timeout=10, compression=grpc.Compression.Gzip)
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert refused.value.details() == "Compression algorithm 'gzip' is disabled."  # as the documentation has it
        assert await ask(request, timeout=10)
        assert await ask(request, timeout=10, compression=grpc.Compression.NoCompression)
        assert await ask(request, timeout=10, metadata=(("grpc-encoding", "identity"),))


words = st.sampled_from(["default", "late", "nobody", "", "*", "é", "x" * 5000])
requests = st.builds(
    lambda names, nonce, version, url: bytes(
        DiscoveryRequest(resource_names=names, response_nonce=nonce, version_info=version, type_url=url)
    ),
    st.lists(words, max_size=4),
    words,
    words,
    st.just(""),
)
delta_requests = st.builds(
    lambda more, less, nonce, stored: bytes(
        DeltaDiscoveryRequest(
            resource_names_subscribe=more,
            resource_names_unsubscribe=less,
            response_nonce=nonce,
            initial_resource_versions=dict.fromkeys(stored, "v"),
        )
    ),
    st.lists(words, max_size=4),
    st.lists(words, max_size=4),
    words,
    st.lists(words, max_size=2),
)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A good message with a few bytes changed, or cut."""
    data = bytearray(draw(requests | delta_requests))
    for _ in range(draw(st.integers(0, 3))):
        if data:
            data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.integers(0, len(data)))])


messages = st.lists(st.binary(max_size=50) | requests | delta_requests | damaged(), max_size=6)
methods = st.sampled_from(["StreamSecrets", "DeltaSecrets", "FetchSecrets"])


@settings(max_examples=15)
@given(st.lists(st.tuples(methods, messages), min_size=4, max_size=4))
def test_no_bytes_bring_a_stream_down(peers: list[tuple[str, list[bytes]]]) -> None:
    """A stream ends with a status of ours or goes on, and the server with it."""

    async def play(socket: Path, method: str, messages: list[bytes]) -> RawPeer:
        peer = await RawPeer.connect(socket)
        await peer.open(1, method)
        for data in messages:
            await peer.say(1, data)
        return peer

    async def play_all() -> None:
        with TemporaryDirectory(dir="/tmp") as directory:
            async with running(Path(directory)) as (store, socket, events), connected(socket) as good:
                opened = [await play(socket, method, messages) for method, messages in peers]
                store.publish({"late": certificate(b"late")})
                for peer in opened:
                    await peer.send(frame(DATA, END_STREAM, 1))
                streams = [method for method, _ in peers if method != "FetchSecrets"]
                await events.wait("left", count=1 + len(streams))  # with the server's own probe
                stream = await good.stream().ask("default")
                assert "default" in await stream.read()
                for peer in opened:
                    await peer.connection.aclose()
                assert events.named("fault") == []
                assert "late" in await good.fetch("late")

    anyio.run(play_all)
