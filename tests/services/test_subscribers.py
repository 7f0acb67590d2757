"""The clients with which the benchmarks load a server: what they hold must be what Envoys hold, or no figure counts."""

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TypeVar

import anyio
import pytest
from bench.requests import REAL, NodeUse, Variant, subscription
from bench.subscribers import LostError, Subscribers, subscribed
from fakes.events import Events, recorded

from sds_agent.sds.endpoint import SocketFile
from sds_agent.sds.server import Limits, serving
from sds_agent.sds.service import SecretDiscoveryService
from sds_agent.secrets.model import CertificateSecret
from sds_agent.secrets.store import SecretStore

WITHIN = 10.0
STREAMS = 12
ROOT = Path(__file__).parents[2]
T = TypeVar("T")

every_variant = pytest.mark.parametrize("variant", list(Variant))
every_use = pytest.mark.parametrize("node", list(NodeUse))


def certificate(content: bytes) -> CertificateSecret:
    return CertificateSecret(content, b"key", datetime(2036, 1, 1, tzinfo=UTC))


async def acknowledged(clients: Subscribers, events: Events, pushes: int) -> None:
    """Wait until the server has the ACKs of all streams for so many pushes."""
    with anyio.fail_after(WITHIN):
        while len(events.named("pushed", acked=len(clients))) < pushes:
            await off_the_loop(partial(clients.run, 0.01))


async def off_the_loop(act: Callable[[], T]) -> T:
    """Call it while the server runs on the test's event loop; the clients have a loop of their own."""
    return await asyncio.to_thread(act)


@asynccontextmanager
async def running(
    directory: Path, variant: Variant, node: NodeUse, streams: int = STREAMS
) -> AsyncIterator[tuple[SecretStore, SecretDiscoveryService, Subscribers, Events]]:
    """That many streams that have had their first response from the server."""
    store = SecretStore(("default", "late"))
    store.publish({"default": certificate(b"chain 1")})
    service = SecretDiscoveryService(store)
    socket = directory / "sds.sock"
    with recorded() as events:
        async with serving(service, SocketFile(socket), Limits()):
            with subscribed(socket, subscription(variant, node), per_process=None) as clients:
                await off_the_loop(lambda: clients.join(streams))
                await off_the_loop(lambda: clients.each_has(1, WITHIN))
                yield store, service, clients, events


@every_use
@every_variant
async def test_each_stream_gets_each_push_and_acknowledges_it(tmp_path: Path, variant: Variant, node: NodeUse) -> None:
    async with running(tmp_path, variant, node) as (store, _, clients, events):
        for number in (2, 3):
            store.publish({"default": certificate(b"chain %d" % number)})
            assert len(await off_the_loop(partial(clients.each_has, number, WITHIN))) == STREAMS
            await acknowledged(clients, events, pushes=number - 1)
        assert all(len(each.received) == 3 and each.received == sorted(each.received) for each in clients)
        assert events.named("stale") == events.named("nacked") == []


async def test_whole_node_goes_out_as_often_as_was_chosen(tmp_path: Path) -> None:
    """The third is more than fits into the server's first windows: it goes on when the server has made room."""
    node = REAL.stat().st_size
    sent = dict[NodeUse, int]()
    for use in NodeUse:
        (directory := tmp_path / use).mkdir()
        async with running(directory, Variant.SOTW, use, streams=1) as (store, _, clients, events):
            store.publish({"default": certificate(b"chain 2")})
            await off_the_loop(partial(clients.each_has, 2, WITHIN))
            await acknowledged(clients, events, pushes=1)
            (stream,) = clients
            sent[use] = stream.sent_bytes // node
    assert sent == {NodeUse.NOWHERE: 0, NodeUse.FIRST: 1, NodeUse.EVERY: 3}


async def test_streams_that_leave_and_others_that_join_are_counted(tmp_path: Path) -> None:
    async with running(tmp_path, Variant.SOTW, NodeUse.NOWHERE, streams=4) as (store, service, clients, events):
        store.publish({"default": certificate(b"chain 2")})
        await off_the_loop(partial(clients.each_has, 2, WITHIN))
        clients.leave(3)
        await events.wait("left", count=3 + 1)  # and the probe's
        assert len(clients) == len(service.streams) == 1
        await off_the_loop(partial(clients.join, 2))
        await off_the_loop(partial(clients.each_has, 1, WITHIN))
        with pytest.raises(LostError, match="2 of 3 streams have no response 2"):
            await off_the_loop(partial(clients.each_has, 2, 0))
        clients.leave()
        await events.wait("left", count=6 + 1)
        assert len(service.streams) == 0


async def test_a_stream_that_the_server_ends_spoils_the_measurement(tmp_path: Path) -> None:
    async with running(tmp_path, Variant.DELTA, NodeUse.NOWHERE) as (_, service, clients, _events):
        service.dismiss()
        with pytest.raises(LostError, match="the server ended the call"):
            await off_the_loop(partial(clients.run, WITHIN))


async def test_a_server_that_is_not_there_is_named(tmp_path: Path) -> None:
    asked = subscription(Variant.SOTW, NodeUse.FIRST)
    with subscribed(tmp_path / "none.sock", asked, per_process=None) as clients:
        with pytest.raises(LostError, match=r"none\.sock takes no connection: No such file"):
            clients.join(1)
        assert len(clients) == 0


def test_server_sees_as_many_processes_as_a_node_has(tmp_path: Path) -> None:
    """One process that made all connections would be slowed down by the agent as a flood."""
    program = """
import os, socket, struct, sys
from pathlib import Path
from bench.requests import NodeUse, Variant, subscription
from bench.subscribers import subscribed
path = Path(sys.argv[1])
listener = socket.socket(socket.AF_UNIX)
listener.bind(str(path))
listener.listen(10)
with subscribed(path, subscription(Variant.SOTW, NodeUse.FIRST), per_process=2) as clients:
    clients.join(5)
    accepted = [listener.accept()[0] for _ in range(5)]
    ids = [struct.unpack("iII", each.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0] for each in accepted]
    print([ids.count(each) for each in dict.fromkeys(ids)], os.getpid() in ids)
"""
    command = [sys.executable, "-c", program, str(tmp_path / "any.sock")]
    paths = os.pathsep.join(str(ROOT / each) for each in ("benchmarks", "proto_gen"))
    ran = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    assert (ran.stdout, ran.stderr) == ("[2, 2, 1] False\n", "")
